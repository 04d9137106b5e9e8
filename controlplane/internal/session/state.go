package session

import (
	"context"
	"crypto/sha256"
	"slices"
	"sync"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

func hashOf(b []byte) [sha256.Size]byte { return sha256.Sum256(b) }

// bundleAge is how old the kept trust bundle may be: it changes about never, and a node that starts gets thousands of
// Hellos at once.
const bundleAge = 10 * time.Second

// bundle keeps the trust bundle, read again when it is old.
type bundle struct {
	mu   sync.Mutex
	at   time.Time
	pb   *agentpb.TrustBundle
	res  Resource
	root ca.Bundle
}

func (s *Server) trust(ctx context.Context, fresh bool) (*agentpb.TrustBundle, Resource, ca.Bundle, error) {
	b := &s.bundle
	b.mu.Lock()
	defer b.mu.Unlock()
	now := s.cfg.Clock.Now()
	if b.pb != nil && !fresh && now.Sub(b.at) < bundleAge {
		return b.pb, b.res, b.root, nil
	}
	version, roots, err := s.cfg.Store.TrustBundle(ctx)
	if err != nil {
		return nil, Resource{}, ca.Bundle{}, err
	}
	pb := &agentpb.TrustBundle{Version: version, Roots: roots}
	res, err := resource(kindTrustBundle, "", version, pb, &agentpb.State{Body: &agentpb.State_TrustBundle{TrustBundle: pb}})
	if err != nil {
		return nil, Resource{}, ca.Bundle{}, err
	}
	b.pb, b.res, b.root, b.at = pb, res, ca.Bundle{Version: version, Roots: roots}, now
	return b.pb, b.res, b.root, nil
}

// desired is what an agent is to have: trust bundle, settings, and its targets.
func (s *Server) desired(ctx context.Context, agentID string, fresh bool) ([]Resource, error) {
	_, trust, _, err := s.trust(ctx, fresh)
	if err != nil {
		return nil, err
	}
	targets, err := s.cfg.Store.TargetsOfAgent(ctx, agentID)
	if err != nil {
		return nil, err
	}
	return s.resources(agentID, trust, targets)
}

// resources are the states of an agent with these targets.
func (s *Server) resources(agentID string, trust Resource, targets []domain.Target) ([]Resource, error) {
	all := make([]Resource, 0, 2+len(targets))
	all = append(all, trust, s.settings)
	for _, t := range targets {
		spec := targetPB(t)
		state := &agentpb.State{Body: &agentpb.State_Target{Target: spec}}
		if !fits(state) {
			// Such settings are refused when they are made; a message that ended the stream would end every next one too.
			s.cfg.Log.Error("target is too large to be sent", "agent_id", agentID, "target_id", t.ID)
			continue
		}
		r, err := resource(kindTarget, t.ID, t.Revision, spec, state)
		if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return all, nil
}

// reported remembers, per agent, the hash of the leaves whose list was taken in. A node that starts asks each agent once.
type reported struct {
	mu    sync.Mutex
	known map[string][sha256.Size]byte
	said  map[string][sha256.Size]byte
	// coming are the agents whose list is being taken in.
	coming map[string]bool
}

// maxReported bounds what is remembered; beyond it lists are asked for again.
const maxReported = 200_000

// wants notes what a Hello says of the leaves held and reports whether the list is to be sent.
func (r *reported) wants(agentID string, count int32, hash []byte) bool {
	if count == 0 || len(hash) != sha256.Size {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	h := hashFrom(hash)
	if r.known[agentID] == h {
		return false
	}
	if r.said == nil || len(r.said) > maxReported {
		r.said = map[string][sha256.Size]byte{}
	}
	r.said[agentID] = h
	return true
}

// begin says whether the agent's list was asked for and is not being taken in already, and which one is expected. It is
// read once for each question, because every certificate in it costs reads; end must follow.
func (r *reported) begin(agentID string) (announced [sha256.Size]byte, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	announced, ok = r.said[agentID]
	if !ok || r.coming[agentID] {
		return announced, false
	}
	if r.coming == nil {
		r.coming = map[string]bool{}
	}
	r.coming[agentID] = true
	return announced, true
}

// end follows begin. Whatever became of the list, the next one is asked for by a Welcome.
func (r *reported) end(agentID string, announced [sha256.Size]byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.coming, agentID)
	if r.said[agentID] == announced {
		delete(r.said, agentID)
	}
}

// taken notes that the list was taken in. It counts only if it is the one that Hello announced.
func (r *reported) taken(agentID string, fingerprints []string) {
	slices.Sort(fingerprints)
	h := sha256.New()
	for _, f := range fingerprints {
		h.Write([]byte(f + "\n"))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if said, ok := r.said[agentID]; !ok || said != [sha256.Size]byte(h.Sum(nil)) {
		return
	}
	delete(r.said, agentID)
	if r.known == nil || len(r.known) > maxReported {
		r.known = map[string][sha256.Size]byte{}
	}
	r.known[agentID] = [sha256.Size]byte(h.Sum(nil))
}
