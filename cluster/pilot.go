package cluster

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	autopilot "github.com/hashicorp/raft-autopilot"

	"github.com/certmesh/certmesh/cluster/internal/fsm"
)

const (
	// More voters make every decision slower and survive nothing that a cluster of this kind meets.
	maxVoters = 5
	// Below three voters nobody is taken out for silence: two are worse than three of which one is dead.
	minVoters = 3
	// A follower that lacks more than that is not well.
	maxTrailing = 256
)

// pilot is what autopilot asks of the leader, for one term: who is a member, how it is, who gets a vote, who is taken out.
type pilot struct {
	n    *Node
	ctx  context.Context //nolint:containedctx // The term's; autopilot's interfaces carry none.
	term Term

	mu        sync.Mutex
	evenSince time.Time
	warnedAt  time.Time
}

func (n *Node) newPilot(ctx context.Context, t Term) *autopilot.Autopilot {
	p := &pilot{n: n, ctx: ctx, term: t}
	return autopilot.New(n.raft, p, autopilot.WithPromoter(p), autopilot.WithLogger(bridge(n.log, n.clk)), autopilot.WithTimeProvider(clockOf{n}),
		autopilot.WithUpdateInterval(n.cfg.Timing.Reconcile), autopilot.WithReconcileInterval(n.cfg.Timing.Reconcile))
}

type clockOf struct{ n *Node }

func (c clockOf) Now() time.Time { return c.n.now() }

// AutopilotConfig implements autopilot.ApplicationIntegration.
func (p *pilot) AutopilotConfig() *autopilot.Config {
	return &autopilot.Config{
		// MinQuorum counts members without a vote as well; reapable is stricter with voters, and with nobody else.
		CleanupDeadServers: true, LastContactThreshold: p.n.cfg.Timing.Contact, MaxTrailingLogs: maxTrailing,
		ServerStabilizationTime: p.n.cfg.Timing.Stable,
	}
}

// KnownServers implements autopilot.ApplicationIntegration. Every member is known; those to be taken out are failed.
func (p *pilot) KnownServers() map[raft.ServerID]*autopilot.Server {
	var all []standing
	now := p.n.now()
	for _, s := range p.n.servers() {
		id := string(s.ID)
		st := standing{id: id, voter: s.Suffrage == raft.Voter}
		if id != p.n.cfg.ID {
			st.silent = now.Sub(p.n.trans.contact(id, p.term.Since).at)
		}
		all = append(all, st)
	}
	dead := reapable(all, p.n.cfg.Timing.Contact, p.n.cfg.Timing.ReapAfter)
	known := map[raft.ServerID]*autopilot.Server{}
	for _, st := range all {
		s := &autopilot.Server{
			ID: raft.ServerID(st.id), Name: st.id, Address: raft.ServerAddress(st.id), NodeStatus: autopilot.NodeAlive,
			RaftVersion: raft.ProtocolVersionMax, IsLeader: st.id == p.n.cfg.ID, NodeType: autopilot.NodeVoter,
		}
		if slices.Contains(dead, st.id) {
			s.NodeStatus = autopilot.NodeFailed
		}
		known[s.ID] = s
	}
	return known
}

// FetchServerStats implements autopilot.ApplicationIntegration: heartbeats have brought all of it.
func (p *pilot) FetchServerStats(_ context.Context, servers map[raft.ServerID]*autopilot.Server) map[raft.ServerID]*autopilot.ServerStats {
	stats := map[raft.ServerID]*autopilot.ServerStats{}
	now := p.n.now()
	for id := range servers {
		if string(id) == p.n.cfg.ID {
			stats[id] = &autopilot.ServerStats{LastTerm: p.n.raft.CurrentTerm(), LastIndex: p.n.raft.LastIndex()}
			continue
		}
		c := p.n.trans.contact(string(id), p.term.Since)
		stats[id] = &autopilot.ServerStats{LastContact: now.Sub(c.at), LastTerm: c.term, LastIndex: c.index}
	}
	return stats
}

// NotifyState implements autopilot.ApplicationIntegration.
func (p *pilot) NotifyState(*autopilot.State) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now, voters := p.n.now(), len(p.n.voters())
	if voters%2 == 1 {
		p.evenSince = time.Time{}
		return
	}
	if p.evenSince.IsZero() {
		p.evenSince = now
	}
	after := p.n.cfg.Timing.EvenAfter
	if now.Sub(p.evenSince) >= after && now.Sub(p.warnedAt) >= after {
		p.warnedAt = now
		p.n.log.Warn("the number of voters has been even for long: it survives no more failures than one less; add a node or remove one",
			"voters", voters, "since", p.evenSince)
	}
}

// RemoveFailedServer implements autopilot.ApplicationIntegration.
func (p *pilot) RemoveFailedServer(s *autopilot.Server) {
	id := string(s.ID)
	// The node's group is open: this runs inside a term, which is part of it.
	p.n.wg.Go(func() {
		ctx, cancel := context.WithTimeout(p.ctx, p.n.cfg.Timing.Barrier)
		defer cancel()
		p.n.log.Warn("a member was silent for very long and is taken out; it joins again if it comes back", "node", id, "after", p.n.cfg.Timing.ReapAfter)
		if err := p.n.takeOut(ctx, id); err != nil && ctx.Err() == nil {
			p.n.log.Warn("a silent member could not be taken out", "node", id, "error", err)
		}
	})
}

// GetServerExt implements autopilot.Promoter.
func (p *pilot) GetServerExt(*autopilot.Config, *autopilot.ServerState) any { return nil }

// GetStateExt implements autopilot.Promoter.
func (p *pilot) GetStateExt(*autopilot.Config, *autopilot.State) any { return nil }

// GetNodeTypes implements autopilot.Promoter: every node may vote.
func (p *pilot) GetNodeTypes(_ *autopilot.Config, s *autopilot.State) map[raft.ServerID]autopilot.NodeType {
	types := map[raft.ServerID]autopilot.NodeType{}
	for id := range s.Servers {
		types[id] = autopilot.NodeVoter
	}
	return types
}

// IsPotentialVoter implements autopilot.Promoter.
func (p *pilot) IsPotentialVoter(t autopilot.NodeType) bool { return t == autopilot.NodeVoter }

// FilterFailedServerRemovals implements autopilot.Promoter; KnownServers has judged already.
func (p *pilot) FilterFailedServerRemovals(_ *autopilot.Config, _ *autopilot.State, failed *autopilot.FailedServers) *autopilot.FailedServers {
	return failed
}

// CalculatePromotionsAndDemotions implements autopilot.Promoter.
func (p *pilot) CalculatePromotionsAndDemotions(c *autopilot.Config, s *autopilot.State) autopilot.RaftChanges {
	now, registry := p.n.now(), p.n.machine.current()
	var stable []*autopilot.ServerState
	for _, server := range p.n.servers() {
		st, ok := s.Servers[server.ID]
		if !ok || server.Suffrage == raft.Voter || !st.Health.IsStable(now, c.ServerStabilizationTime) || fsm.Member(registry, string(server.ID)).GetDraining() {
			continue
		}
		stable = append(stable, st)
	}
	slices.SortFunc(stable, func(a, b *autopilot.ServerState) int {
		return cmp.Or(a.Health.StableSince.Compare(b.Health.StableSince), cmp.Compare(a.Server.ID, b.Server.ID))
	})
	var changes autopilot.RaftChanges
	for _, st := range stable[:promotions(len(p.n.voters()), len(stable))] {
		changes.Promotions = append(changes.Promotions, st.Server.ID)
	}
	return changes
}

// promotions returns how many of the stable members without a vote get one: as many as leave the number of voters odd.
func promotions(voters, stable int) int {
	most := min(voters+stable, maxVoters)
	if most%2 == 0 {
		most--
	}
	return max(0, most-voters)
}

// standing is how a member is, as its leader sees it.
type standing struct {
	id    string
	voter bool
	// silent is the time since its last answer, or since the term began.
	silent time.Duration
}

// reapable returns the members that are taken out: silent for after, while a majority of the voters has answered within
// contact. (A leader that was stopped for a day must not take everyone else for dead.) At most one voter at a time, and
// never below three.
func reapable(all []standing, contact, after time.Duration) []string {
	voters, well := 0, 0
	for _, s := range all {
		if s.voter {
			voters++
			if s.silent <= contact {
				well++
			}
		}
	}
	if well < voters/2+1 {
		return nil
	}
	var dead []string
	reaped := false
	for _, s := range all {
		switch {
		case s.silent < after:
		case !s.voter:
			dead = append(dead, s.id)
		case voters > minVoters && !reaped:
			reaped = true
			dead = append(dead, s.id)
		}
	}
	return dead
}
