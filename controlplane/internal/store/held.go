package store

import (
	"context"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// Standings says, in their order, how the agents of open streams stand: for a node that may have missed what others did.
func (s *Store) Standings(ctx context.Context, held []domain.HeldStream) ([]domain.Standing, error) {
	var outs []domain.Standing
	err := s.read(ctx, "session.standings", func(t *tx) error {
		outs = make([]domain.Standing, 0, len(held))
		return chunks(held, func(held []domain.HeldStream) error {
			agents, serials := make([]string, len(held)), make([]string, len(held))
			for i, h := range held {
				agents[i], serials[i] = h.AgentID, h.IdentitySerial
			}
			in, args := inList(1, agents)
			known := make(map[string]domain.Standing, len(held))
			err := t.each(`SELECT agent.id, agent.state, agent.reason, agent_session.epoch, agent_session.holder, agent_session.boot_id
FROM agent JOIN agent_session ON agent_session.agent_id = agent.id WHERE agent.id IN `+in, args, func(scan func(...any) error) error {
				var x domain.Standing
				err := scan(&x.Session.AgentID, &x.State, &x.Reason, &x.Session.Epoch, &x.Session.Holder, &x.Session.BootID)
				known[x.Session.AgentID] = x
				return err
			})
			if err != nil {
				return err
			}
			in, args = inList(1, serials)
			revoked := map[domain.HeldStream]bool{}
			err = t.each("SELECT agent_id, serial FROM agent_identity WHERE revoked_at <> 0 AND serial IN "+in, args, func(scan func(...any) error) error {
				var x domain.HeldStream
				err := scan(&x.AgentID, &x.IdentitySerial)
				revoked[x] = true
				return err
			})
			if err != nil {
				return err
			}
			for _, h := range held {
				x := known[h.AgentID]
				x.Revoked = revoked[h]
				outs = append(outs, x)
			}
			return nil
		})
	})
	return outs, err
}

// TargetsOfAgents is TargetsOfAgent for many agents at once.
func (s *Store) TargetsOfAgents(ctx context.Context, agentIDs []string) (map[string][]domain.Target, error) {
	var found map[string][]domain.Target
	err := s.read(ctx, "target.of_agents", func(t *tx) error {
		found = make(map[string][]domain.Target, len(agentIDs))
		return chunks(agentIDs, func(ids []string) error {
			in, args := inList(1, ids)
			all, err := collect(t, "SELECT "+targetColumns+" FROM target WHERE target.agent_id IN "+in+" ORDER BY target.id", args, scanTarget)
			for _, g := range all {
				found[g.AgentID] = append(found[g.AgentID], g)
			}
			return err
		})
	})
	return found, err
}
