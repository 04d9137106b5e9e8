package store

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// A rollover is one row, and each of its steps one transaction that compares the row's revision: a step that was killed
// has happened or has not, and of two at once one finds the row moved on.

const rolloverColumns = `mesh_rollover.phase, mesh_rollover.revision, mesh_rollover.other_chain, mesh_rollover.other_key_uri,
 mesh_rollover.other_root_key_uri, mesh_rollover.vouched, mesh_rollover.bundle, mesh_rollover.started_at,
 mesh_rollover.activated_at, mesh_rollover.ended_at`

func scanRollover(scan scanner) (domain.Rollover, error) {
	var r domain.Rollover
	var chain, vouched []byte
	var startedAt, activatedAt, endedAt int64
	if err := scan(&r.Phase, &r.Revision, &chain, &r.Other.KeyURI, &r.Other.RootKeyURI, &vouched, &r.Bundle, &startedAt,
		&activatedAt, &endedAt); err != nil {
		return domain.Rollover{}, err
	}
	r.Other.ID = domain.MeshCA
	r.StartedAt, r.ActivatedAt, r.EndedAt = fromMicro(startedAt), fromMicro(activatedAt), fromMicro(endedAt)
	var err error
	if r.Other.Chain, err = splitDER(chain); err != nil {
		return domain.Rollover{}, err
	}
	r.Other.Vouched, err = splitDER(vouched)
	return r, err
}

// rollover returns the zero Rollover when there never was one.
func (t *tx) rollover() (domain.Rollover, error) {
	return one(t, nil, "SELECT "+rolloverColumns+" FROM mesh_rollover WHERE mesh_rollover.id = $1", []any{domain.MeshCA}, scanRollover)
}

func (t *tx) trustBundle() (version int64, roots [][]byte, err error) {
	roots, err = one(t, fault.New(fault.NotFound, "the cluster has no trust bundle yet; a node makes it when it first starts"),
		"SELECT version, roots FROM trust_bundle ORDER BY version DESC LIMIT 1", nil,
		func(scan scanner) ([][]byte, error) {
			var joined []byte
			if err := scan(&version, &joined); err != nil {
				return nil, err
			}
			return splitDER(joined)
		})
	return version, roots, err
}

func (t *tx) meshState() (m domain.Mesh, r domain.Rollover, err error) {
	if m.CA, err = t.ca(domain.MeshCA); err != nil {
		return m, r, err
	}
	if m.Bundle, m.Roots, err = t.trustBundle(); err != nil {
		return m, r, err
	}
	r, err = t.rollover()
	m.Revision = r.Revision
	return m, r, err
}

// Mesh returns the mesh CA that signs now with the roots that are trusted. NotFound before the first node's start.
func (s *Store) Mesh(ctx context.Context) (domain.Mesh, error) {
	var m domain.Mesh
	err := s.read(ctx, "mesh.get", func(t *tx) error {
		var err error
		m, _, err = t.meshState()
		return err
	})
	return m, err
}

// MeshRevision is that of Mesh: one row, for nodes that ask every few seconds.
func (s *Store) MeshRevision(ctx context.Context) (int64, error) {
	var revision int64
	err := s.read(ctx, "mesh.revision", func(t *tx) error {
		var err error
		revision, err = one(t, nil, "SELECT revision FROM mesh_rollover WHERE id = $1", []any{domain.MeshCA}, func(scan scanner) (int64, error) {
			var n int64
			err := scan(&n)
			return n, err
		})
		return err
	})
	return revision, err
}

// checkGeneration refuses identities of a CA that does not sign any more. The row is read, so that of this and a step of a
// rollover beside it SERIALIZABLE lets one commit.
func (t *tx) checkGeneration(generation int64) error {
	present, err := one(t, nil, "SELECT generation FROM ca WHERE id = $1", []any{domain.MeshCA}, func(scan scanner) (int64, error) {
		var n int64
		err := scan(&n)
		return n, err
	})
	if err != nil || present == 0 || present == max(generation, 1) {
		return err
	}
	return fault.New(fault.Conflict, "the mesh CA of generation %d does not sign any more, %d does", max(generation, 1), present)
}

var errStepTaken = errors.New("store: the step is done")

// step runs one step of a rollover. fn decides by what there is and returns errStepTaken when nothing is to be done. The
// rollover as it is afterwards is returned.
func (s *Store) step(ctx context.Context, name string, fn func(t *tx, m domain.Mesh, r domain.Rollover) error) (domain.Rollover, error) {
	var after domain.Rollover
	err := s.settled(ctx, name, func(t *tx) error {
		m, r, err := t.meshState()
		if err != nil {
			return err
		}
		switch err := fn(t, m, r); {
		case errors.Is(err, errStepTaken):
		case err != nil:
			return err
		}
		after, err = t.rollover()
		return err
	})
	return after, err
}

// move writes the rollover's row where it is still the one of revision.
func (t *tx) move(r domain.Rollover, revision int64) error {
	n, err := t.exec(`UPDATE mesh_rollover SET revision = $1, phase = $2, other_chain = $3, other_key_uri = $4, other_root_key_uri = $5,
 vouched = $6, bundle = $7, started_at = $8, activated_at = $9, ended_at = $10 WHERE id = $11 AND revision = $12`,
		revision+1, string(r.Phase), joinDER(r.Other.Chain), r.Other.KeyURI, r.Other.RootKeyURI, joinDER(r.Other.Vouched), r.Bundle,
		micro(r.StartedAt), micro(r.ActivatedAt), micro(r.EndedAt), domain.MeshCA, revision)
	if err == nil && n != 1 {
		err = errMoved
	}
	return err
}

// insertBundle makes roots the trust bundle of the next version.
func (t *tx) insertBundle(former int64, roots [][]byte, op domain.Op) error {
	_, err := t.exec("INSERT INTO trust_bundle (version, roots, created_at) VALUES ($1, $2, $3)", former+1, joinDER(roots), micro(op.At))
	if _, ok := isUnique(err); ok {
		return errMoved
	}
	return err
}

// destroyKeys deletes the sealed keys of a CA and says how many there were. Keys elsewhere are not ours to delete.
func (t *tx) destroyKeys(c domain.CA) (int, error) {
	uris := []string{c.KeyURI}
	if c.RootKeyURI != c.KeyURI {
		uris = append(uris, c.RootKeyURI)
	}
	destroyed := 0
	for _, uri := range uris {
		id, sealed := strings.CutPrefix(uri, "sealed:")
		if !sealed {
			continue
		}
		n, err := t.exec("DELETE FROM sealed_key WHERE id = $1", id)
		if err != nil {
			return 0, err
		}
		destroyed += int(n)
	}
	return destroyed, nil
}

func rootOf(c domain.CA) []byte { return c.Chain[len(c.Chain)-1] }

// lead puts root first, once.
func lead(root []byte, roots [][]byte) [][]byte { return append([][]byte{root}, drop(root, roots)...) }

func drop(root []byte, roots [][]byte) [][]byte {
	var out [][]byte
	for _, r := range roots {
		if !bytes.Equal(r, root) {
			out = append(out, r)
		}
	}
	return out
}

// StartRollover makes next, with its keys, the CA that will sign, and its root one that is trusted from now on. When a
// rollover has been started already that one stays, and next is not kept. Conflict: one is further on, or next was made
// for another present CA.
func (s *Store) StartRollover(ctx context.Context, next domain.CA, keys []domain.SealedKey, op domain.Op) (domain.Rollover, error) {
	if len(next.Chain) == 0 || next.KeyURI == "" || next.ID != domain.MeshCA {
		return domain.Rollover{}, fault.New(fault.Internal, "what a rollover is to lead to is no mesh CA")
	}
	return s.step(ctx, "rollover.start", func(t *tx, m domain.Mesh, r domain.Rollover) error {
		switch {
		case r.Phase == domain.RolloverStarted:
			return errStepTaken
		case r.Phase == domain.RolloverActivated:
			return fault.New(fault.Conflict, "a rollover is under way and activated; finish it before another is started")
		case next.Generation != m.CA.Generation+1:
			return fault.New(fault.Conflict, "the mesh CA was changed meanwhile; look at certmeshd mesh rollover status")
		}
		if r.Revision == 0 {
			n, err := t.exec(`INSERT INTO mesh_rollover (id, revision, phase, other_chain, other_key_uri, other_root_key_uri, vouched, bundle,
 started_at, activated_at, ended_at) VALUES ($1, 0, '', $2, '', '', $2, 0, 0, 0, 0) ON CONFLICT (id) DO NOTHING`, domain.MeshCA, []byte{})
			if err != nil {
				return err
			}
			if n != 1 {
				return errMoved
			}
		}
		if err := t.insertKeys(keys); err != nil {
			return err
		}
		if err := t.insertBundle(m.Bundle, append(lead(rootOf(m.CA), m.Roots), rootOf(next)), op); err != nil {
			return err
		}
		if err := t.move(domain.Rollover{Phase: domain.RolloverStarted, Other: next, Bundle: m.Bundle + 1, StartedAt: op.At}, r.Revision); err != nil {
			return err
		}
		return t.auditOp(op, "mesh.rollover_started", "ca/mesh", map[string]string{
			"former_root": domain.HashHex(rootOf(m.CA)), "next_root": domain.HashHex(rootOf(next)), "bundle": strconv.FormatInt(m.Bundle+1, 10)})
	})
}

// ActivateRollover makes the next CA the one that signs. expected is the revision that the caller has judged. Activated
// already is no error. Conflict: the rollover is not the one that was judged.
func (s *Store) ActivateRollover(ctx context.Context, expected int64, left int, op domain.Op) (domain.Rollover, error) {
	return s.step(ctx, "rollover.activate", func(t *tx, m domain.Mesh, r domain.Rollover) error {
		switch {
		case r.Phase == domain.RolloverActivated:
			return errStepTaken
		case r.Phase != domain.RolloverStarted:
			return errNoRollover
		case r.Revision != expected:
			return errOtherStep
		}
		next := r.Other
		n, err := t.exec(`UPDATE ca SET chain = $1, key_uri = $2, root_key_uri = $3, vouched = $4, generation = generation + 1
WHERE id = $5 AND key_uri = $6`, joinDER(next.Chain), next.KeyURI, next.RootKeyURI, joinDER(next.Vouched), domain.MeshCA, m.CA.KeyURI)
		if err != nil {
			return err
		}
		if n != 1 {
			return errMoved
		}
		if err := t.insertBundle(m.Bundle, lead(rootOf(next), m.Roots), op); err != nil {
			return err
		}
		r.Phase, r.ActivatedAt, r.Other = domain.RolloverActivated, op.At, m.CA
		r.Other.Vouched = nil
		if err := t.move(r, expected); err != nil {
			return err
		}
		return t.auditOp(op, "mesh.rollover_activated", "ca/mesh", map[string]string{"root": domain.HashHex(rootOf(next)), "left_behind": strconv.Itoa(left)})
	})
}

// FinishRollover ends the trust in the former root and destroys its keys. expected is the revision that the caller has
// judged. Finished already is no error.
func (s *Store) FinishRollover(ctx context.Context, expected int64, left int, op domain.Op) (domain.Rollover, error) {
	return s.step(ctx, "rollover.finish", func(t *tx, m domain.Mesh, r domain.Rollover) error {
		switch {
		case r.Phase == domain.RolloverFinished:
			return errStepTaken
		case r.Phase == domain.RolloverStarted:
			return fault.New(fault.Conflict, "the rollover is not activated yet; certmeshd mesh rollover activate comes first")
		case r.Phase != domain.RolloverActivated:
			return errNoRollover
		case r.Revision != expected:
			return errOtherStep
		}
		former := r.Other
		n, err := t.exec("UPDATE ca SET vouched = $1 WHERE id = $2 AND key_uri = $3", []byte{}, domain.MeshCA, m.CA.KeyURI)
		if err != nil {
			return err
		}
		if n != 1 {
			return errMoved
		}
		return t.end(m, r, former, domain.RolloverFinished, left, op)
	})
}

// AbortRollover takes back a rollover that is started and not activated: the next root is not trusted any more and its
// keys are destroyed. Aborted already is no error.
func (s *Store) AbortRollover(ctx context.Context, op domain.Op) (domain.Rollover, error) {
	return s.step(ctx, "rollover.abort", func(t *tx, m domain.Mesh, r domain.Rollover) error {
		switch r.Phase {
		case domain.RolloverStarted:
		case domain.RolloverAborted:
			return errStepTaken
		case domain.RolloverActivated:
			return fault.New(fault.Conflict, "the next CA signs already, and what it signed cannot be taken back; finish this rollover, then start another")
		default:
			return errNoRollover
		}
		return t.end(m, r, r.Other, domain.RolloverAborted, 0, op)
	})
}

// end drops a CA: its root from the bundle, its keys from the store.
func (t *tx) end(m domain.Mesh, r domain.Rollover, gone domain.CA, phase domain.RolloverPhase, left int, op domain.Op) error {
	if err := t.insertBundle(m.Bundle, drop(rootOf(gone), m.Roots), op); err != nil {
		return err
	}
	destroyed, err := t.destroyKeys(gone)
	if err != nil {
		return err
	}
	revision := r.Revision
	r.Phase, r.EndedAt, r.Other = phase, op.At, domain.CA{}
	if err := t.move(r, revision); err != nil {
		return err
	}
	return t.auditOp(op, "mesh.rollover_"+strings.ToLower(string(phase)), "ca/mesh", map[string]string{"dropped_root": domain.HashHex(rootOf(gone)),
		"keys_destroyed": strconv.Itoa(destroyed), "left_behind": strconv.Itoa(left)})
}

var (
	errNoRollover = fault.New(fault.Conflict, "no rollover of the mesh CA is under way; certmeshd mesh rollover start begins one")
	errOtherStep  = fault.New(fault.Conflict, "somebody else moved the rollover on meanwhile; look at certmeshd mesh rollover status")
)

// AcknowledgeTrust records which trust bundles agents have in force. A lower version than the one recorded changes
// nothing.
func (s *Store) AcknowledgeTrust(ctx context.Context, acks []domain.TrustAck) error {
	// In the order of their keys, so that two nodes that write the same ones do not wait for each other; each once.
	acks = slices.SortedFunc(slices.Values(acks), func(a, b domain.TrustAck) int {
		return cmp.Or(strings.Compare(a.AgentID, b.AgentID), cmp.Compare(b.Version, a.Version))
	})
	acks = slices.CompactFunc(acks, func(a, b domain.TrustAck) bool { return a.AgentID == b.AgentID })
	return chunks(acks, func(acks []domain.TrustAck) error {
		// Each row stands for itself, and only rises.
		return s.settledAt(ctx, "trust.acknowledge", sql.LevelReadCommitted, func(t *tx) error {
			known, err := t.acknowledged(acks)
			if err != nil {
				return err
			}
			v := t.values("k text, n int, at int")
			for _, a := range acks {
				if a.Version > known[a.AgentID] {
					v.add(a.AgentID, a.Version, micro(a.At))
				}
			}
			if v.rows == 0 {
				return nil
			}
			_, err = t.exec(v.with()+`
INSERT INTO agent_trust (agent_id, version, at) SELECT k, n, at FROM v WHERE k IS NOT NULL
ON CONFLICT (agent_id) DO UPDATE SET version = excluded.version, at = excluded.at WHERE agent_trust.version < excluded.version`, v.args...)
			return err
		})
	})
}

// acknowledged is what is recorded of the agents. After a node's start all of its agents say again what is known.
func (t *tx) acknowledged(acks []domain.TrustAck) (map[string]int64, error) {
	ids := make([]string, len(acks))
	for i, a := range acks {
		ids[i] = a.AgentID
	}
	known := make(map[string]int64, len(acks))
	in, args := inList(1, ids)
	err := t.each("SELECT agent_id, version FROM agent_trust WHERE agent_id IN "+in, args, func(scan func(...any) error) error {
		var id string
		var version int64
		err := scan(&id, &version)
		known[id] = version
		return err
	})
	return known, err
}

// RolloverProgress returns how far the rollover has come at a moment, with at most most agents and tokens that lag, the
// agents by name. Agents that have not acknowledged lag while it is started, those that have not moved as well once it is
// activated; tokens lag once it is started.
func (s *Store) RolloverProgress(ctx context.Context, op domain.Op, most int) (domain.RolloverProgress, error) {
	var p domain.RolloverProgress
	err := s.read(ctx, "rollover.progress", func(t *tx) error {
		p = domain.RolloverProgress{}
		var err error
		if p.Mesh, p.Rollover, err = t.meshState(); err != nil || !p.Rollover.Phase.UnderWay() {
			return err
		}
		if err := t.lags(&p, op, most); err != nil {
			return err
		}
		return t.staleTokens(&p, op, most)
	})
	return p, err
}

func (t *tx) lags(p *domain.RolloverProgress, op domain.Op, most int) error {
	activated := p.Rollover.Phase == domain.RolloverActivated
	w := &where{}
	alive := micro(op.At.Add(-domain.IdentityGrace))
	rows := `SELECT agent.id, agent.name, agent.state, agent.last_seen, COALESCE(agent_trust.version, 0), COALESCE(agent_rejection.reason, ''),
 CASE WHEN EXISTS (SELECT 1 FROM agent_identity WHERE agent_identity.agent_id = agent.id AND agent_identity.generation >= ` + w.arg(p.Mesh.CA.Generation) + `
  AND agent_identity.first_used_at > 0) THEN 1 ELSE 0 END
FROM agent LEFT JOIN agent_trust ON agent_trust.agent_id = agent.id
 LEFT JOIN agent_rejection ON agent_rejection.agent_id = agent.id AND agent_rejection.kind = 'trust_bundle' AND agent_rejection.name = ''
WHERE agent.state <> ` + w.arg(string(domain.AgentRetired)) + ` AND EXISTS (SELECT 1 FROM agent_identity WHERE agent_identity.agent_id = agent.id
  AND agent_identity.not_after > ` + w.arg(alive) + ` AND agent_identity.revoked_at = 0)
ORDER BY agent.name`
	err := t.each(rows, w.args, func(scan func(...any) error) error {
		var l domain.RolloverLag
		var lastSeen, version, moved int64
		if err := scan(&l.AgentID, &l.Name, &l.State, &lastSeen, &version, &l.Refusal, &moved); err != nil {
			return err
		}
		l.LastSeen, l.Acknowledged, l.Moved = fromMicro(lastSeen), version >= p.Rollover.Bundle, moved > 0
		p.Agents++
		if l.Acknowledged && (l.Moved || !activated) {
			return nil
		}
		if p.Lagging++; len(p.Lags) < most {
			p.Lags = append(p.Lags, l)
		}
		return nil
	})
	if err != nil {
		return err
	}
	p.FormerIdentities, err = t.formerIdentities(p.Mesh.CA.Generation, op)
	return err
}

func (t *tx) formerIdentities(present int64, op domain.Op) (int, error) {
	n, err := t.count(`SELECT COUNT(*) FROM agent_identity JOIN agent ON agent.id = agent_identity.agent_id
WHERE agent_identity.generation < $1 AND agent_identity.revoked_at = 0 AND agent_identity.not_after > $2 AND agent.state <> $3`,
		present, micro(op.At), string(domain.AgentRetired))
	return int(n), err
}

// staleTokens are those made before the next root was the first of the bundle.
func (t *tx) staleTokens(p *domain.RolloverProgress, op domain.Op, most int) error {
	before := op.At
	if p.Rollover.Phase == domain.RolloverActivated {
		before = p.Rollover.ActivatedAt
	}
	all, err := collect(t, "SELECT "+joinColumns+` FROM join_token WHERE join_token.revoked_at = 0 AND join_token.expires_at > $1
 AND join_token.uses < join_token.max_uses AND join_token.created_at <= $2 ORDER BY join_token.id`, []any{micro(op.At), micro(before)}, scanToken)
	if err != nil {
		return err
	}
	p.TokensTotal = len(all)
	p.Tokens = all[:min(len(all), most)]
	for i := range p.Tokens {
		p.Tokens[i].Hash = nil
	}
	return nil
}
