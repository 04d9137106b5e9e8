package store

import (
	"context"
	"strconv"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// recoverChunk is how many certificates' leaves are raised in one transaction.
const recoverChunk = 1000

// Recover makes a database that was restored from a backup safe to go on with, while no node runs. Whatever was given out
// after the backup and is not known here is left behind for good:
//
//   - the epochs of duties, sessions and nodes, and the attempts of open jobs, are raised above all that were minted, so that
//     no write and no result of before counts;
//   - leaves' generations are raised, so that no generation is issued twice; open jobs get new ones;
//   - open intents are abandoned: their serials may be signed and served;
//   - targets and the trust bundle get versions above all that agents hold, and CRLs numbers above all that were published.
//
// duties are the names of all of them: one that was never held before the backup may have been since. Again it raises
// everything again, which does no harm; killed in between, it is run again.
func (s *Store) Recover(ctx context.Context, duties []string, op domain.Op) (domain.Recovery, error) {
	var r domain.Recovery
	leaves, err := s.raiseLeaves(ctx, op.At.Unix())
	if err != nil {
		return r, err
	}
	err = s.settled(ctx, "recover", func(t *tx) error {
		former, err := t.recovery()
		if err != nil {
			return err
		}
		if t.again && former == r.Generation {
			return nil
		}
		r = domain.Recovery{Generation: domain.Raised(former, op.At.UnixMicro()), Leaves: leaves}
		if err := t.raiseFences(&r, duties, op.At); err != nil {
			return err
		}
		if err := t.raiseWork(&r, op.At); err != nil {
			return err
		}
		if err := t.raisePublished(&r, op.At); err != nil {
			return err
		}
		if r.Trusted, err = t.trusted(op.At); err != nil {
			return err
		}
		if _, err := t.exec("INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
			metaRecovery, strconv.FormatInt(r.Generation, 10)); err != nil {
			return err
		}
		return t.auditOp(op, "store.recovered", "store", map[string]string{"recovery": strconv.FormatInt(r.Generation, 10),
			"leaves": strconv.FormatInt(r.Leaves, 10), "jobs": strconv.FormatInt(r.Jobs, 10), "intents": strconv.FormatInt(r.Abandoned, 10)})
	})
	return r, err
}

// RecoveredAt is when the last recovery was; the zero time: never. What was signed before it may be missing here.
func (s *Store) RecoveredAt(ctx context.Context) (time.Time, error) {
	var at time.Time
	err := s.read(ctx, "recover.at", func(t *tx) error {
		g, err := t.recovery()
		at = fromMicro(g)
		return err
	})
	return at, err
}

// raiseLeaves raises the generations, so many certificates at a time: an estate may have a million.
func (s *Store) raiseLeaves(ctx context.Context, floor int64) (int64, error) {
	var raised int64
	for after := ""; ; {
		var n int64
		last := ""
		err := s.settled(ctx, "recover.leaves", func(t *tx) error {
			n, last = 0, ""
			err := t.each("SELECT id FROM certificate WHERE id > $1 ORDER BY id LIMIT $2", []any{after, recoverChunk}, func(scan func(...any) error) error {
				return scan(&last)
			})
			if err != nil || last == "" {
				return err
			}
			n, err = t.exec(`UPDATE leaf SET generation = CASE WHEN generation < $1 THEN $1 ELSE generation + 1 END
WHERE certificate_id > $2 AND certificate_id <= $3`, floor, after, last)
			return err
		})
		if err != nil || last == "" {
			return raised, err
		}
		raised, after = raised+n, last
	}
}

// raiseFences raises the epochs; nobody holds anything afterwards. An agent that never had a session, and a duty that was
// never held, may have had one after the backup: their rows begin at the recovery.
func (t *tx) raiseFences(r *domain.Recovery, duties []string, at time.Time) error {
	var err error
	if r.Duties, err = t.exec("UPDATE duty_fence SET holder = '', epoch = CASE WHEN epoch < $1 THEN $1 ELSE epoch + 1 END", r.Generation); err != nil {
		return err
	}
	for _, d := range duties {
		n, err := t.exec("INSERT INTO duty_fence (duty, epoch, holder, taken_at) VALUES ($1, $2, '', 0) ON CONFLICT (duty) DO NOTHING", d, r.Generation)
		if err != nil {
			return err
		}
		r.Duties += n
	}
	if r.Sessions, err = t.exec("UPDATE agent_session SET holder = '', epoch = CASE WHEN epoch < $1 THEN $1 ELSE epoch + 1 END", r.Generation); err != nil {
		return err
	}
	n, err := t.exec(`INSERT INTO agent_session (agent_id, epoch, holder, boot_id, opened_at)
SELECT agent.id, CAST($1 AS BIGINT), '', '', 0 FROM agent WHERE NOT EXISTS (SELECT 1 FROM agent_session WHERE agent_session.agent_id = agent.id)`, r.Generation)
	if err != nil {
		return err
	}
	r.Sessions += n
	if _, err := t.exec("UPDATE agent SET state = $1, offline_since = $2 WHERE state IN ($3, $4)",
		string(domain.AgentOffline), micro(at), string(domain.AgentOnline), string(domain.AgentStale)); err != nil {
		return err
	}
	r.Nodes, err = t.exec("UPDATE cluster_node SET instance = '', epoch = CASE WHEN epoch < $1 THEN $1 ELSE epoch + 1 END", r.Generation)
	return err
}

// deployLater is how long open deployments wait after a recovery: their agents may hold a newer generation, and report it
// as soon as they are connected.
const deployLater = 5 * time.Minute

// raiseWork begins open jobs anew, those of leaves with the raised generation, and abandons open intents.
func (t *tx) raiseWork(r *domain.Recovery, at time.Time) error {
	now := micro(at)
	var err error
	if r.Jobs, err = t.exec(`UPDATE job SET attempt = CASE WHEN attempt < $1 THEN $1 ELSE attempt + 1 END,
 state = CASE WHEN state = $2 THEN state WHEN kind IN ($3, $4) THEN $5 ELSE $6 END,
 generation = COALESCE((SELECT leaf.generation FROM leaf WHERE job.target_id = '' AND leaf.certificate_id = job.certificate_id AND leaf.agent_id = job.agent_id), job.generation),
 accepted_at = 0, away = 0, updated_at = CAST($7 AS BIGINT),
 run_at = CASE WHEN target_id = '' THEN CAST($7 AS BIGINT) ELSE CAST($8 AS BIGINT) END
WHERE finished_at IS NULL`, r.Generation, string(domain.JobAwaitingApproval), string(domain.JobIssuance), string(domain.JobRenewal),
		string(domain.JobIssuance.InitialState()), string(domain.JobDeployment.InitialState()), now, micro(at.Add(deployLater))); err != nil {
		return err
	}
	r.Abandoned, err = t.exec("UPDATE intent SET state = $1 WHERE state = $2", string(domain.IntentAbandoned), string(domain.IntentOpen))
	return err
}

// raisePublished raises what agents and relying parties compare by number: latest wins with them.
func (t *tx) raisePublished(r *domain.Recovery, at time.Time) error {
	var err error
	if r.Targets, err = t.exec("UPDATE target SET revision = CASE WHEN revision < $1 THEN $1 ELSE revision + 1 END", r.Generation); err != nil {
		return err
	}
	if _, err := t.exec(`INSERT INTO trust_bundle (version, roots, created_at)
SELECT CASE WHEN newest.version < $1 THEN $1 ELSE newest.version + 1 END, newest.roots, CAST($2 AS BIGINT) FROM trust_bundle AS newest
WHERE newest.version = (SELECT MAX(version) FROM trust_bundle)`, r.Generation, micro(at)); err != nil {
		return err
	}
	// Who said that it trusts a later bundle may have meant one that is lost: a rollover waits for all to say it again.
	if _, err := t.exec("DELETE FROM agent_trust"); err != nil {
		return err
	}
	if _, err := t.exec("UPDATE mesh_rollover SET revision = revision + 1, bundle = (SELECT MAX(version) FROM trust_bundle) WHERE bundle > 0"); err != nil {
		return err
	}
	// Half expired since long: each is built anew at once, with a number above this one.
	r.CRLs, err = t.exec("UPDATE crl SET this_update = 0, number = CASE WHEN number < $1 THEN $1 ELSE number + 1 END", at.UnixMilli())
	return err
}

// trusted counts what an operator has to look through.
func (t *tx) trusted(at time.Time) (domain.Trusted, error) {
	var all domain.Trusted
	for _, q := range []struct {
		into  *int64
		query string
		args  []any
	}{
		{&all.APIKeys, "SELECT COUNT(*) FROM api_key WHERE revoked_at = 0 AND (expires_at = 0 OR expires_at > $1)", []any{micro(at)}},
		{&all.JoinTokens, "SELECT COUNT(*) FROM join_token WHERE revoked_at = 0 AND expires_at > $1 AND uses < max_uses", []any{micro(at)}},
		{&all.ClusterTokens, "SELECT COUNT(*) FROM cluster_token WHERE node_id = '' AND expires_at > $1", []any{micro(at)}},
		{&all.Nodes, "SELECT COUNT(*) FROM cluster_node WHERE removed_at = 0", nil},
		{&all.Agents, "SELECT COUNT(*) FROM agent WHERE state <> $1", []any{string(domain.AgentRetired)}},
		{&all.Identities, "SELECT COUNT(*) FROM agent_identity WHERE revoked_at = 0 AND not_after > $1", []any{micro(at)}},
	} {
		if err := t.queryRow(q.query, q.args...).Scan(q.into); err != nil {
			return all, err
		}
	}
	return all, nil
}
