package session

import (
	"context"
	"sync"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// TrustChanged takes in that the mesh CA or the trust bundle is another: all agents are sent the bundle, and no identity
// of before is given out any more. The node's own TLS has changed before it is called.
func (s *Server) TrustChanged(ctx context.Context) error {
	s.issued.clear()
	_, res, _, err := s.trust(ctx, true)
	if err != nil {
		return err
	}
	s.mu.RLock()
	streams := s.listLocked()
	s.mu.RUnlock()
	for _, st := range streams {
		st.proto(TrustChanged{&res})
	}
	return nil
}

// clear forgets what was made; how often agents were given some is kept.
func (i *identities) clear() {
	i.mu.Lock()
	defer i.mu.Unlock()
	clear(i.made)
}

// offerTrust is offer for the trust bundle, of which one that was read earlier may come later.
func (m *machine) offerTrust(r Resource) {
	if m.trust != nil && m.trust.Revision > r.Revision {
		r = *m.trust
	}
	m.trust = nil
	if r.Revision < m.trustRevision {
		return
	}
	m.trustRevision = r.Revision
	m.offer(r)
}

// acknowledge notes that the agent has a state in force; only the trust bundle's is of interest to others.
func (m *machine) acknowledge(k stateKey, revision int64) {
	if k.kind == kindTrustBundle && revision > 0 {
		m.do(Acknowledge{Version: revision})
	}
}

// maxAcks bounds what waits to be written, and what is remembered of what was. An agent acknowledges again with its next
// Hello.
const maxAcks = 200_000

// acks gathers which trust bundles agents have in force, to be written together. Each is written once a node: most Hellos
// say what is known.
type acks struct {
	mu      sync.Mutex
	waiting map[string]domain.TrustAck
	written map[string]int64 // version by agent
}

func (a *acks) note(k domain.TrustAck) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.written[k.AgentID] >= k.Version || a.waiting[k.AgentID].Version >= k.Version || len(a.waiting) >= maxAcks {
		return
	}
	if a.waiting == nil {
		a.waiting = map[string]domain.TrustAck{}
	}
	a.waiting[k.AgentID] = k
}

func (a *acks) take() []domain.TrustAck {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := make([]domain.TrustAck, 0, len(a.waiting))
	for _, k := range a.waiting {
		all = append(all, k)
	}
	a.waiting = nil
	return all
}

func (a *acks) wrote(all []domain.TrustAck) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.written == nil || len(a.written)+len(all) > maxAcks {
		a.written = make(map[string]int64, len(all))
	}
	for _, k := range all {
		a.written[k.AgentID] = max(a.written[k.AgentID], k.Version)
	}
}

// writeAcks writes what has been gathered. What cannot be written now is kept for the next time.
func (s *Server) writeAcks(ctx context.Context) {
	all := s.acks.take()
	if len(all) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	err := contain(s.cfg.Log, "write acknowledgements", func() error { return s.cfg.Store.AcknowledgeTrust(ctx, all) })
	if err == nil {
		s.acks.wrote(all)
		return
	}
	s.cfg.Log.Warn("acknowledged trust bundles not written; they will be tried again", "agents", len(all), "err", err)
	if fault.Is(err, fault.Internal) {
		return
	}
	for _, k := range all {
		s.acks.note(k)
	}
}
