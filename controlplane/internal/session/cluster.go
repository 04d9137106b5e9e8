package session

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/dispatch"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// Agents are held by the node that they have connected to, and what concerns them may happen on any. A node tells the
// others over links on which nothing is waited for; what a link loses while it is down is found by Resync when it is
// there again, and once a minute besides.

const (
	// recheckInterval is how often a node of a cluster looks whether the agents it holds may still be connected.
	recheckInterval = time.Minute
	// askBatch is how many agents one question to the store is about.
	askBatch = 500
	// askPause is the least time between two questions about holders. A wake after a quiet moment does not wait; in a burst one
	// question is about many.
	askPause = 5 * time.Millisecond
	// sweepMost bounds how many agents with open work one Resync wakes; the duty that sweeps finds the others.
	sweepMost = 1 << 17
)

// alone reports that no other node can hold an agent.
func (s *Server) alone() bool {
	return s.cfg.RemoteWake == nil || s.cfg.Alone != nil && s.cfg.Alone()
}

// others are the nodes that agents may connect to, in random order, so that they spread.
func (s *Server) others() []string {
	if s.cfg.Nodes == nil {
		return nil
	}
	return shuffled(s.cfg.Nodes())
}

// WakeHeld makes agents that this node holds look at their open jobs, because another node asked for it. It is not passed
// on: the other has read who holds them.
func (s *Server) WakeHeld(agentIDs []string) {
	s.metrics.wakesReceived.Add(float64(len(agentIDs)))
	for _, id := range agentIDs {
		for _, st := range s.of(id) {
			st.locked(func() {
				if st.owing.IsZero() {
					st.owing = s.now()
				}
				st.workStep(dispatch.Woken{At: s.now()})
			})
		}
	}
}

// owingMost is how long an agent may have work that another node knows of and this one cannot read.
const owingMost = 5 * time.Second

// unread follows the answer to a Load. Whoever wakes an agent here has reached the database. If this node goes on failing
// to, the agent is sent elsewhere: it would wait here with work that others could give it. While the database is away from
// all, nobody wakes anybody, and streams stay up.
func (st *stream) unread(e dispatch.Event) {
	loaded, ok := e.(dispatch.Loaded)
	switch {
	case !ok:
	case loaded.Err == nil:
		st.owing = time.Time{}
	case !st.owing.IsZero() && st.s.now().Sub(st.owing) >= owingMost && !st.s.alone():
		st.s.cfg.Log.Warn("an agent's work cannot be read here, and another node could; it is sent elsewhere", "agent_id", st.who.agentID, "error", loaded.Err)
		st.protoStep(Ending{endUnread()})
	}
}

// WakeLocal is Wake for agents of which it is known that this node holds them.
func (s *Server) WakeLocal(agentIDs []string) {
	for _, id := range agentIDs {
		for _, st := range s.of(id) {
			st.event(dispatch.Woken{At: s.now()})
		}
	}
}

// quarantined begins the reason of a Disconnect that is not for good.
const quarantined = "the agent is quarantined"

// DisconnectHeld is Disconnect for this node alone, because another node asked for it.
func (s *Server) DisconnectHeld(agentID, reason string) {
	end := endRetired(clean(reason, maxFailure))
	switch {
	case strings.HasPrefix(reason, quarantined):
		end = endQuarantined(clean(reason, maxFailure))
	case revoked(reason):
		end = endRevoked(clean(reason, maxFailure))
	}
	for _, st := range s.of(agentID) {
		st.end(end)
	}
}

// PushStateHeld is PushState for this node alone, because another node asked for it; an empty id stands for every agent.
func (s *Server) PushStateHeld(agentID string) {
	if agentID == "" {
		s.pushing.request()
		return
	}
	for _, st := range s.of(agentID) {
		s.background("send an agent's desired state", func(ctx context.Context) error {
			// If it fails the agent gets it with its next Hello.
			all, err := s.desired(ctx, agentID, true)
			if err == nil {
				st.proto(Desired{Resources: all})
			}
			return err
		})
	}
}

// Resync finds what was missed while a link to another node was down: agents held here that have open work, may not be
// connected any more, or are to have another state. It returns at once; several are one.
func (s *Server) Resync() {
	s.metrics.resyncs.Inc()
	s.sweeping.request()
	s.checking.request()
	s.pushing.request()
}

// pass is a look at all agents that runs in the background, once at a time; requests that come meanwhile are one more.
type pass struct {
	s    *Server
	what string
	f    func(ctx context.Context) error

	mu             sync.Mutex
	running, again bool
}

func (p *pass) request() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.again = p.running; !p.running {
		p.running = true
		p.s.store.do(ownWork, p.run)
	}
}

func (p *pass) run() {
	for more := true; more; {
		err := contain(p.s.cfg.Log, p.what, func() error { return p.f(p.s.ctx) })
		if err != nil {
			p.s.cfg.Log.Warn("not done: "+p.what, "err", err)
		}
		p.mu.Lock()
		more, p.again = p.again, false
		p.running = more
		p.mu.Unlock()
	}
}

// sweepWork wakes all agents held here that have open work.
func (s *Server) sweepWork(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	agents, err := s.cfg.Store.AgentsWithOpenJobs(ctx, s.cfg.NodeID, sweepMost)
	if err == nil {
		s.WakeLocal(agents)
	}
	return err
}

// each calls f with all open streams, some at a time, until it fails or the server stops.
func (s *Server) each(ctx context.Context, f func(ctx context.Context, some []*stream) error) error {
	s.mu.RLock()
	open := make([]*stream, 0, len(s.agents))
	for _, list := range s.agents {
		for _, st := range list {
			if st.epoch > 0 {
				open = append(open, st)
			}
		}
	}
	s.mu.RUnlock()
	for some := range slices.Chunk(open, askBatch) {
		err := func() error {
			ctx, cancel := context.WithTimeout(ctx, storeTimeout)
			defer cancel()
			return f(ctx, some)
		}()
		if err != nil || s.isStopping() {
			return err
		}
	}
	return nil
}

func (s *Server) isStopping() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.stopping
}

// recheck ends the streams of agents that may not be connected any more, or are connected elsewhere by now.
func (s *Server) recheck(ctx context.Context) error {
	return s.each(ctx, func(ctx context.Context, some []*stream) error {
		held := make([]domain.HeldStream, len(some))
		for i, st := range some {
			held[i] = domain.HeldStream{AgentID: st.who.agentID, IdentitySerial: st.who.serial}
		}
		standings, err := s.cfg.Store.Standings(ctx, held)
		if err != nil {
			return err
		}
		for i, st := range some {
			switch x := standings[i]; {
			case x.State == domain.AgentRetired:
				st.end(endRetired("the agent was retired" + because(x.Reason)))
			case x.State == domain.AgentQuarantined:
				st.end(endQuarantined(quarantined + because(x.Reason)))
			case x.Revoked:
				st.end(endRevoked("the identity was revoked; join again with a new token"))
			case x.Session.Epoch > st.epochNow():
				st.end(endSuperseded())
			}
		}
		return nil
	})
}

// pushAll sends every agent held here what is new of its desired state.
func (s *Server) pushAll(ctx context.Context) error {
	fresh := true
	return s.each(ctx, func(ctx context.Context, some []*stream) error {
		_, trust, _, err := s.trust(ctx, fresh)
		if err != nil {
			return err
		}
		fresh = false
		ids := make([]string, len(some))
		for i, st := range some {
			ids[i] = st.who.agentID
		}
		targets, err := s.cfg.Store.TargetsOfAgents(ctx, ids)
		if err != nil {
			return err
		}
		for _, st := range some {
			all, err := s.resources(st.who.agentID, trust, targets[st.who.agentID])
			if err != nil {
				return err
			}
			st.proto(Desired{Resources: all})
		}
		return nil
	})
}

// asker finds out who holds agents that have work: what is asked while a question runs goes into the next. Idle it has no
// goroutine.
type asker struct {
	s *Server

	mu      sync.Mutex
	want    map[string]struct{}
	running bool
}

func (a *asker) add(agentID string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.want == nil {
		a.want = map[string]struct{}{}
	}
	a.want[agentID] = struct{}{}
	if !a.running {
		a.running = true
		a.s.store.do(ownWork, a.run)
	}
}

func (a *asker) take() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	batch := make([]string, 0, min(len(a.want), askBatch))
	for id := range a.want {
		if len(batch) == askBatch {
			break
		}
		batch = append(batch, id)
		delete(a.want, id)
	}
	if len(batch) == 0 {
		a.want, a.running = nil, false
	}
	return batch
}

func (a *asker) run() {
	clk := a.s.cfg.Clock
	for batch := a.take(); len(batch) > 0; batch = a.take() {
		began := clk.Now()
		a.ask(batch)
		if len(batch) == askBatch {
			continue
		}
		t := clk.NewTimer(askPause - clk.Since(began))
		select {
		case <-t.Chan():
		case <-a.s.ctx.Done():
		}
		t.Stop()
	}
}

// ask has the agents woken by the nodes that hold them. This node's own streams have been woken; those that the store
// says are not the agent's any more end here, so that they swallow no further wake.
func (a *asker) ask(agentIDs []string) {
	s := a.s
	ctx, cancel := context.WithTimeout(s.ctx, storeTimeout)
	defer cancel()
	var holders map[string]domain.Session
	err := contain(s.cfg.Log, "read holders", func() error {
		var err error
		holders, err = s.cfg.Store.SessionHolders(ctx, agentIDs)
		return err
	})
	if s.ctx.Err() != nil {
		return // this node has stopped
	}
	if err != nil {
		s.cfg.Log.Warn("holders of streams not read; all nodes are told", "agents", len(agentIDs), "err", err)
		s.wakeElsewhere("", agentIDs)
		return
	}
	elsewhere := map[string][]string{}
	for _, id := range agentIDs {
		x := holders[id]
		if x.Holder != "" && x.Holder != s.cfg.NodeID {
			elsewhere[x.Holder] = append(elsewhere[x.Holder], id)
		}
		for _, st := range s.of(id) {
			if e := st.epochNow(); e > 0 && e < x.Epoch {
				st.end(endSuperseded())
			}
		}
	}
	for node, ids := range elsewhere {
		s.wakeElsewhere(node, ids)
	}
}

func (s *Server) wakeElsewhere(node string, agentIDs []string) {
	s.metrics.wakesSent.Add(float64(len(agentIDs)))
	s.cfg.RemoteWake(node, agentIDs)
}
