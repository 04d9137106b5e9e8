package store

import (
	"context"
	"slices"
	"strconv"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

var agentKind = kind{noun: "agent", table: "agent", prefix: id.Agent, list: "agents list", get: "agents get"}

// agent reads an agent by its id or name.
func (t *tx) agent(idOrName string) (domain.Agent, error) {
	return find(t, agentKind, "SELECT "+agentColumns+" FROM agent", idOrName, scanAgent)
}

// Agent returns an agent by its id or name.
func (s *Store) Agent(ctx context.Context, idOrName string) (domain.Agent, error) {
	var a domain.Agent
	err := s.read(ctx, "agent.get", func(t *tx) error {
		var err error
		a, err = t.agent(idOrName)
		return err
	})
	return a, err
}

// Agents lists agents by id, in one state or in all, and the cursor of the next page.
func (s *Store) Agents(ctx context.Context, state domain.AgentState, p domain.PageRequest) ([]domain.Agent, string, error) {
	size, after, err := pageAfter(p, id.Agent+"_")
	if err != nil {
		return nil, "", err
	}
	if err := checkTexts("state", string(state)); err != nil {
		return nil, "", err
	}
	var all []domain.Agent
	err = s.read(ctx, "agent.list", func(t *tx) error {
		var err error
		all, err = readPage(t, pageQuery{columns: agentColumns, from: "agent", lead: pins("agent.state", string(state)), key: "agent.id"},
			size, position(after), scanAgent)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	all, next := nextCursor(all, size, func(a domain.Agent) string { return a.ID })
	return all, next, nil
}

const identityColumns = `agent_identity.serial, agent_identity.agent_id, agent_identity.spki, agent_identity.not_before,
 agent_identity.not_after, agent_identity.revoked_at, agent_identity.first_used_at, agent_identity.created_at, agent_identity.generation`

func scanIdentity(scan scanner) (domain.Identity, error) {
	var i domain.Identity
	var notBefore, notAfter, revokedAt, firstUsedAt, createdAt int64
	err := scan(&i.Serial, &i.AgentID, &i.SPKI, &notBefore, &notAfter, &revokedAt, &firstUsedAt, &createdAt, &i.Generation)
	i.NotBefore, i.NotAfter, i.RevokedAt = fromMicro(notBefore), fromMicro(notAfter), fromMicro(revokedAt)
	i.FirstUsedAt, i.CreatedAt = fromMicro(firstUsedAt), fromMicro(createdAt)
	return i, err
}

// RecordIdentity records a client certificate before it is handed out. The same one again is no error; Forbidden when the
// agent is retired, Conflict when the CA that would sign it does not sign any more: read the mesh CA again.
func (s *Store) RecordIdentity(ctx context.Context, i domain.Identity, op domain.Op) error {
	if err := checkTexts("serial", i.Serial, "spki", i.SPKI); err != nil {
		return err
	}
	if i.Serial == "" || i.SPKI == "" {
		return fault.InvalidField("identity", "needs a serial and the SHA-256 of its key")
	}
	if i.CreatedAt.IsZero() {
		i.CreatedAt = op.At
	}
	return s.settled(ctx, "identity.record", func(t *tx) error {
		a, err := t.agent(i.AgentID)
		if err != nil {
			return err
		}
		// A plain read is enough beside RetireAgent: it writes this row and every identity that it sees, so of two that
		// miss each other SERIALIZABLE lets one commit.
		if a.State == domain.AgentRetired {
			return fault.New(fault.Forbidden, "agent %q is retired; it gets no identity", a.Name)
		}
		// One that has been used was signed long ago.
		if i.FirstUsedAt.IsZero() {
			if err := t.checkGeneration(i.Generation); err != nil {
				return err
			}
		}
		n, err := t.exec(`INSERT INTO agent_identity (serial, agent_id, spki, not_before, not_after, revoked_at, first_used_at, created_at, generation)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (serial) DO NOTHING`, i.Serial, a.ID, i.SPKI, micro(i.NotBefore),
			micro(i.NotAfter), micro(i.RevokedAt), micro(i.FirstUsedAt), micro(i.CreatedAt), max(i.Generation, 1))
		if err != nil {
			return err
		}
		if n == 0 {
			have, err := t.identity(i.Serial)
			if err == nil && (have.AgentID != a.ID || have.SPKI != i.SPKI) {
				err = fault.New(fault.Conflict, "another identity has the serial %s; sign again with another", i.Serial)
			}
			return err
		}
		return t.auditOp(op, "identity.issued", "agent/"+a.ID, map[string]string{"serial": i.Serial})
	})
}

func (t *tx) identity(serial string) (domain.Identity, error) {
	missing := fault.New(fault.NotFound, "no identity has the serial %q", serial)
	if !storable(serial) {
		return domain.Identity{}, missing
	}
	return one(t, missing, "SELECT "+identityColumns+" FROM agent_identity WHERE agent_identity.serial = $1", []any{serial}, scanIdentity)
}

// Identity returns a client certificate's record by its serial.
func (s *Store) Identity(ctx context.Context, serial string) (domain.Identity, error) {
	var i domain.Identity
	err := s.read(ctx, "identity.get", func(t *tx) error {
		var err error
		i, err = t.identity(serial)
		return err
	})
	return i, err
}

// RevokeIdentities revokes all identities of an agent (id or name) and returns the serials it revoked, sorted. The agent
// may enrol again.
func (s *Store) RevokeIdentities(ctx context.Context, agentID string, op domain.Op) ([]string, error) {
	var serials []string
	err := s.settled(ctx, "identity.revoke", func(t *tx) error {
		a, err := t.agent(agentID)
		if err != nil {
			return err
		}
		revoked, err := t.revokeIdentities(a.ID, op)
		if err != nil || len(revoked) > 0 || !t.again {
			serials = revoked
		}
		return err
	})
	return serials, err
}

// revokeIdentities keeps the time of those that were revoked before.
func (t *tx) revokeIdentities(agentID string, op domain.Op) ([]string, error) {
	serials, err := collect(t, "UPDATE agent_identity SET revoked_at = $1 WHERE agent_id = $2 AND revoked_at = 0 RETURNING serial",
		[]any{micro(op.At), agentID}, scanText)
	if err != nil {
		return nil, err
	}
	slices.Sort(serials)
	for _, serial := range serials {
		if err := t.auditOp(op, "identity.revoked", "agent/"+agentID, map[string]string{"serial": serial}); err != nil {
			return nil, err
		}
	}
	return serials, nil
}

// moveAgent writes a new state where the agent is still in the one that was read.
func (t *tx) moveAgent(a domain.Agent, to domain.AgentState, reason string) (domain.Agent, error) {
	if err := domain.CheckAgentTransition(a.State, to); err != nil {
		return a, err
	}
	n, err := t.exec("UPDATE agent SET state = $1, reason = $2 WHERE id = $3 AND state = $4", string(to), reason, a.ID, string(a.State))
	if err != nil {
		return a, err
	}
	if n != 1 {
		return a, errMoved
	}
	a.State, a.Reason = to, reason
	return a, nil
}

// RetireAgent removes an agent (id or name) for good: its identities are revoked, its open jobs cancelled, nothing of it
// is due any more. What it holds stays on record. A retired agent is returned as it is.
func (s *Store) RetireAgent(ctx context.Context, agentID, reason string, op domain.Op) (domain.Agent, error) {
	if err := checkTexts("reason", reason); err != nil {
		return domain.Agent{}, err
	}
	var agent domain.Agent
	err := s.settled(ctx, "agent.retire", func(t *tx) error {
		a, err := t.agent(agentID)
		if err != nil {
			return err
		}
		if a.State == domain.AgentRetired {
			agent = a
			return nil
		}
		if a, err = t.moveAgent(a, domain.AgentRetired, reason); err != nil {
			return err
		}
		serials, err := t.revokeIdentities(a.ID, op)
		if err != nil {
			return err
		}
		jobs, err := t.cancelJobs("job.agent_id", a.ID, "the agent was retired", op)
		if err != nil {
			return err
		}
		// With no job open nothing may be due either: the duties skip agents by their rows, not by their state.
		if _, err := t.exec("UPDATE leaf SET due_at = NULL WHERE agent_id = $1", a.ID); err != nil {
			return err
		}
		if _, err := t.exec("UPDATE placement SET due_at = NULL, updated_at = $1 WHERE agent_id = $2 AND due_at IS NOT NULL",
			micro(op.At), a.ID); err != nil {
			return err
		}
		if err := t.restatus(leafCertificates(jobs), op.At); err != nil {
			return err
		}
		agent = a
		return t.auditOp(op, "agent.retired", "agent/"+a.ID, map[string]string{"reason": reason,
			"identities": strconv.Itoa(len(serials)), "jobs": strconv.Itoa(len(jobs))})
	})
	return agent, err
}

// QuarantineAgent keeps an agent (id or name) from opening sessions until an operator releases it.
func (s *Store) QuarantineAgent(ctx context.Context, agentID, reason string, op domain.Op) error {
	if err := checkTexts("reason", reason); err != nil {
		return err
	}
	return s.settled(ctx, "agent.quarantine", func(t *tx) error {
		a, err := t.agent(agentID)
		if err != nil {
			return err
		}
		was := a.State
		if _, err = t.moveAgent(a, domain.AgentQuarantined, reason); err != nil || was == domain.AgentQuarantined && a.Reason == reason {
			return err
		}
		return t.auditOp(op, "agent.quarantined", "agent/"+a.ID, map[string]string{"reason": reason, "before": string(was)})
	})
}

// ReleaseAgent ends a quarantine: the agent is Offline until it says Hello. Conflict when it is not quarantined.
func (s *Store) ReleaseAgent(ctx context.Context, agentID string, op domain.Op) (domain.Agent, error) {
	var agent domain.Agent
	err := s.settled(ctx, "agent.release", func(t *tx) error {
		a, err := t.agent(agentID)
		if err != nil {
			return err
		}
		if a.State != domain.AgentQuarantined {
			if t.again && a.State == domain.AgentOffline {
				agent = a
				return nil
			}
			return fault.New(fault.Conflict, "agent %q is %s, not quarantined; there is nothing to release", a.Name, a.State)
		}
		reason := a.Reason
		if a, err = t.moveAgent(a, domain.AgentOffline, ""); err != nil {
			return err
		}
		a.OfflineSince = domain.Micro(op.At)
		if _, err := t.exec("UPDATE agent SET offline_since = $1 WHERE id = $2", micro(op.At), a.ID); err != nil {
			return err
		}
		agent = a
		return t.auditOp(op, "agent.released", "agent/"+a.ID, map[string]string{"reason": reason})
	})
	return agent, err
}
