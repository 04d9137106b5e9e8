package store

import (
	"context"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

var targetKind = kind{noun: "target", table: "target", prefix: id.Target, list: "targets list", get: "targets get"}

// CreateTarget records a target of an agent that is not retired; AgentID may be the agent's name. Conflict when the name
// is taken.
func (s *Store) CreateTarget(ctx context.Context, g domain.Target, op domain.Op) error {
	if err := targetKind.check(g.ID, g.Name); err != nil {
		return err
	}
	if err := checkTexts("kind", g.Kind, "settings", string(g.Settings), "verify_address", g.VerifyAddress, "server_name", g.ServerName); err != nil {
		return err
	}
	if g.Kind == "" {
		return fault.InvalidField("kind", "must not be empty")
	}
	if g.CreatedAt.IsZero() {
		g.CreatedAt = op.At
	}
	g.Revision = max(g.Revision, 1)
	return s.settled(ctx, "target.create", func(t *tx) error {
		if t.again {
			if kept, err := t.exists("target", g.ID); kept || err != nil {
				return err
			}
		}
		a, err := t.agent(g.AgentID)
		switch {
		case fault.Is(err, fault.NotFound):
			return fault.InvalidField("agent_id", "there is no agent %q; agents list shows them", g.AgentID)
		case err != nil:
			return err
		case a.State == domain.AgentRetired:
			return fault.InvalidField("agent_id", "agent %q is retired; choose another", a.Name)
		}
		if _, err := t.exec(`INSERT INTO target (id, name, agent_id, kind, settings, verify_address, server_name, enabled, created_at, revision)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)`, g.ID, g.Name, a.ID, g.Kind, settingsText(g.Settings), g.VerifyAddress,
			g.ServerName, g.Enabled, micro(g.CreatedAt), g.Revision); err != nil {
			return targetKind.insertError(err, g.Name)
		}
		return t.auditOp(op, "target.created", "target/"+g.ID, map[string]string{"name": g.Name, "kind": g.Kind, "agent": a.ID})
	})
}

// Targets lists targets by id, of one agent (id or name) or of all, and the cursor of the next page.
func (s *Store) Targets(ctx context.Context, agentID string, p domain.PageRequest) ([]domain.Target, string, error) {
	size, after, err := pageAfter(p, id.Target+"_")
	if err != nil {
		return nil, "", err
	}
	var all []domain.Target
	err = s.read(ctx, "target.list", func(t *tx) error {
		agent, err := t.idOf(agentKind, agentID)
		if err != nil {
			return err
		}
		all, err = readPage(t, pageQuery{columns: targetColumns, from: "target", lead: pins("target.agent_id", agent), key: "target.id"},
			size, position(after), scanTarget)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	all, next := nextCursor(all, size, func(g domain.Target) string { return g.ID })
	return all, next, nil
}

// Target returns a target by its id or name.
func (s *Store) Target(ctx context.Context, idOrName string) (domain.Target, error) {
	var g domain.Target
	err := s.read(ctx, "target.get", func(t *tx) error {
		var err error
		g, err = find(t, targetKind, "SELECT "+targetColumns+" FROM target", idOrName, scanTarget)
		return err
	})
	return g, err
}

// TargetsOfAgent returns all targets of an agent by id: what is sent to it as its state.
func (s *Store) TargetsOfAgent(ctx context.Context, agentID string) ([]domain.Target, error) {
	var all []domain.Target
	err := s.read(ctx, "target.of_agent", func(t *tx) error {
		var err error
		all, err = collect(t, "SELECT "+targetColumns+" FROM target WHERE target.agent_id = $1 ORDER BY target.id",
			[]any{agentID}, scanTarget)
		return err
	})
	return all, err
}
