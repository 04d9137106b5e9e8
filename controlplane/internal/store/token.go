package store

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"strings"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

// CreateJoinToken records a token by the SHA-256 of its secret. MaxUses 0 means 1.
func (s *Store) CreateJoinToken(ctx context.Context, k domain.JoinToken, op domain.Op) error {
	if k.MaxUses == 0 {
		k.MaxUses = 1
	}
	if k.CreatedAt.IsZero() {
		k.CreatedAt = op.At
	}
	switch {
	case !strings.HasPrefix(k.ID, id.Token+"_") || !storable(k.ID):
		return fault.InvalidField("id", "must begin with %s_", id.Token)
	case len(k.Hash) != sha256.Size:
		return fault.InvalidField("hash", "must be the SHA-256 of the secret")
	case k.MaxUses < 0:
		return fault.InvalidField("max_uses", "must be 1 or more")
	case !k.ExpiresAt.After(op.At):
		return fault.InvalidField("expires_at", "must lie in the future")
	}
	labels, err := jsonText(k.Labels)
	if err != nil {
		return err
	}
	return s.settled(ctx, "token.create", func(t *tx) error {
		if t.again {
			if kept, err := t.exists("join_token", k.ID); kept || err != nil {
				return err
			}
		}
		if _, err := t.exec(`INSERT INTO join_token (id, hash, labels, max_uses, uses, expires_at, revoked_at, created_by, created_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)`, k.ID, k.Hash, labels, k.MaxUses, k.Uses, micro(k.ExpiresAt), micro(k.RevokedAt),
			k.CreatedBy, micro(k.CreatedAt)); err != nil {
			if _, ok := isUnique(err); ok {
				return fault.Wrap(fault.Conflict, err, "a join token with this id is there already; ask again")
			}
			return err
		}
		return t.auditOp(op, "token.created", "token/"+k.ID, map[string]string{"max_uses": fmt.Sprint(k.MaxUses)})
	})
}

const joinColumns = `join_token.id, join_token.hash, join_token.labels, join_token.max_uses, join_token.uses,
 join_token.expires_at, join_token.revoked_at, join_token.created_by, join_token.created_at`

func scanToken(scan scanner) (domain.JoinToken, error) {
	var k domain.JoinToken
	var labels string
	var expiresAt, revokedAt, createdAt int64
	if err := scan(&k.ID, &k.Hash, &labels, &k.MaxUses, &k.Uses, &expiresAt, &revokedAt, &k.CreatedBy, &createdAt); err != nil {
		return domain.JoinToken{}, err
	}
	k.ExpiresAt, k.RevokedAt, k.CreatedAt = fromMicro(expiresAt), fromMicro(revokedAt), fromMicro(createdAt)
	return k, fromJSON(labels, &k.Labels)
}

// JoinTokens lists the tokens that are kept, the newest first. Hashes are left out.
func (s *Store) JoinTokens(ctx context.Context, p domain.PageRequest) ([]domain.JoinToken, string, error) {
	size, after, err := pageAfter(p, id.Token+"_")
	if err != nil {
		return nil, "", err
	}
	var all []domain.JoinToken
	err = s.read(ctx, "token.list", func(t *tx) error {
		var err error
		all, err = readPage(t, pageQuery{columns: joinColumns, from: "join_token", key: "join_token.id", newest: true},
			size, position(after), scanToken)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	all, next := nextCursor(all, size, func(k domain.JoinToken) string { return k.ID })
	for i := range all {
		all[i].Hash = nil
	}
	return all, next, nil
}

// RevokeJoinToken ends a token for good; agents that joined with it stay. Once more it changes nothing and answers the
// same. NotFound: it never was, or it expired so long ago that it is not kept any more.
func (s *Store) RevokeJoinToken(ctx context.Context, tokenID string, op domain.Op) (domain.JoinToken, error) {
	missing := fault.New(fault.NotFound, "there is no join token %q; agents token list shows them", tokenID)
	if !storable(tokenID) {
		return domain.JoinToken{}, missing
	}
	var token domain.JoinToken
	err := s.settled(ctx, "token.revoke", func(t *tx) error {
		k, err := one(t, missing, "SELECT "+joinColumns+" FROM join_token WHERE join_token.id = $1", []any{tokenID}, scanToken)
		if err != nil {
			return err
		}
		k.Hash = nil
		if token = k; !k.RevokedAt.IsZero() {
			return nil
		}
		token.RevokedAt = domain.Micro(op.At)
		n, err := t.exec("UPDATE join_token SET revoked_at = $1 WHERE id = $2 AND revoked_at = 0", micro(op.At), k.ID)
		if err != nil {
			return err
		}
		if n != 1 {
			return errMoved
		}
		return t.auditOp(op, "token.revoked", "token/"+k.ID, map[string]string{"uses": fmt.Sprint(k.Uses)})
	})
	return token, err
}

var errTokenUnknown = fault.New(fault.Unauthorized, "the join token is not known here; make one with certmesh agents token create")

// token reads a token and judges all but its uses. Who does not know the secret learns nothing about the token.
func (t *tx) token(e domain.Enrollment) (domain.JoinToken, error) {
	k, err := one(t, errTokenUnknown, "SELECT "+joinColumns+" FROM join_token WHERE join_token.id = $1", []any{e.TokenID}, scanToken)
	missing := fault.Is(err, fault.Unauthorized)
	if err != nil && !missing {
		return k, err
	}
	if missing {
		k.Hash = make([]byte, sha256.Size)
	}
	if subtle.ConstantTimeCompare(k.Hash, e.TokenHash) != 1 || missing {
		return k, errTokenUnknown
	}
	switch {
	case !k.RevokedAt.IsZero():
		return k, fault.New(fault.Unauthorized, "the join token was revoked; make one with certmesh agents token create")
	case !e.Op.At.Before(k.ExpiresAt):
		return k, fault.New(fault.Unauthorized, "the join token has expired; make one with certmesh agents token create")
	}
	return k, nil
}

// Enroll joins a host: it counts a use of the token and makes the agent, Offline until its first Hello. The same token
// with the same key again returns the same agent and counts no use, even when the token is used up by then; not when it
// has expired or was revoked. Unauthorized, in one sentence each: the token is unknown, expired, revoked or used up. A
// name that is taken gets -2, -3, … appended. Facts are stored as they are: the caller has bounded and stripped them.
func (s *Store) Enroll(ctx context.Context, e domain.Enrollment) (domain.Agent, error) {
	if e.Name == "" {
		e.Name = strings.Replace(e.AgentID, "_", "-", 1)
	}
	if err := agentKind.check(e.AgentID, e.Name); err != nil {
		return domain.Agent{}, err
	}
	if e.SPKI == "" || !storable(e.SPKI) {
		return domain.Agent{}, fault.InvalidField("spki", "must be the SHA-256 of the key in hex")
	}
	if !storable(e.TokenID) {
		return domain.Agent{}, errTokenUnknown
	}
	var agent domain.Agent
	err := s.settled(ctx, "agent.enroll", func(t *tx) error {
		var err error
		agent, err = t.enroll(e)
		return err
	})
	return agent, err
}

func (t *tx) enroll(e domain.Enrollment) (domain.Agent, error) {
	k, err := t.token(e)
	if err != nil {
		return domain.Agent{}, err
	}
	joined, err := one(t, nil, "SELECT agent_id FROM enrollment WHERE token_id = $1 AND spki = $2", []any{e.TokenID, e.SPKI}, scanText)
	if err != nil {
		return domain.Agent{}, err
	}
	if joined != "" {
		a, err := t.agent(joined)
		if err == nil && a.State == domain.AgentRetired {
			err = fault.New(fault.Forbidden, "agent %q is retired; delete the agent's key and join with a new token", a.Name)
		}
		return a, err
	}
	if k.Uses >= k.MaxUses {
		return domain.Agent{}, fault.New(fault.Unauthorized, "the join token is used up; make one with certmesh agents token create")
	}
	n, err := t.exec("UPDATE join_token SET uses = uses + 1 WHERE id = $1 AND uses = $2", k.ID, k.Uses)
	if err != nil {
		return domain.Agent{}, err
	}
	if n != 1 {
		return domain.Agent{}, errMoved
	}
	name, err := t.freeAgentName(e.Name)
	if err != nil {
		return domain.Agent{}, err
	}
	a := domain.Agent{ID: e.AgentID, Name: name, State: domain.AgentOffline, Labels: k.Labels, Facts: e.Facts,
		Capabilities: []string{}, CreatedAt: domain.Micro(e.Op.At), OfflineSince: domain.Micro(e.Op.At)}
	labels, err := jsonText(a.Labels)
	if err != nil {
		return domain.Agent{}, err
	}
	facts, err := jsonText(a.Facts)
	if err != nil {
		return domain.Agent{}, err
	}
	if _, err := t.exec(`INSERT INTO agent (id, name, state, labels, facts, capabilities, protocol, reason, created_at, last_seen, offline_since)
VALUES ($1, $2, $3, $4, $5, '[]', 0, '', $6, 0, $6)`, a.ID, a.Name, string(a.State), labels, facts, micro(a.CreatedAt)); err != nil {
		// Another host took the name since it was looked for: the next run finds the next one.
		if key, _ := isUnique(err); key == "agent.name" {
			return domain.Agent{}, errMoved
		}
		return domain.Agent{}, agentKind.insertError(err, a.Name)
	}
	if _, err := t.exec("INSERT INTO enrollment (token_id, spki, agent_id, created_at) VALUES ($1, $2, $3, $4)",
		e.TokenID, e.SPKI, a.ID, micro(e.Op.At)); err != nil {
		if _, ok := isUnique(err); ok {
			return domain.Agent{}, errMoved // the same host asked twice at once: the next run finds its agent
		}
		return domain.Agent{}, err
	}
	return a, t.auditOp(e.Op, "agent.enrolled", "agent/"+a.ID, map[string]string{"name": a.Name, "token": e.TokenID})
}

// freeAgentName returns base, or base with the first number from 2 that is free.
func (t *tx) freeAgentName(base string) (string, error) {
	const step, most = 64, 4096
	for first := 1; first < most; first += step {
		names := make([]string, step)
		for i := range names {
			names[i] = fmt.Sprintf("%s-%d", base, first+i)
		}
		if first == 1 {
			names[0] = base
		}
		taken := map[string]bool{}
		in, args := inList(1, names)
		if err := t.each("SELECT name FROM agent WHERE name IN "+in, args, func(scan func(...any) error) error {
			n, err := scanText(scan)
			taken[n] = true
			return err
		}); err != nil {
			return "", err
		}
		for _, n := range names {
			if !taken[n] {
				return n, nil
			}
		}
	}
	return "", fault.New(fault.Conflict, "too many agents are called %q; give this one another name with --name", base)
}
