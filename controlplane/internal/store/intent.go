package store

import (
	"context"
	"database/sql"
	"errors"
	"strconv"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// metaRecovery is the key of the recovery generation: it rises when the database was restored from a backup, and intents
// from before are never signed.
const metaRecovery = "recovery"

const intentColumns = `intent.id, intent.certificate_id, intent.agent_id, intent.generation, intent.job_id, intent.attempt,
 intent.issuer_id, intent.serial, intent.tbs, intent.order_key, intent.ref, intent.spki, intent.state, intent.recovery, intent.created_at`

// intentRow is read through a LEFT JOIN: all columns may be NULL.
type intentRow struct {
	id, certificate, agent, job, issuer, serial, orderKey, ref, spki, state sql.NullString
	generation, attempt, recovery, createdAt                                sql.NullInt64
	tbs                                                                     []byte
}

func (r *intentRow) dest() []any {
	return []any{&r.id, &r.certificate, &r.agent, &r.generation, &r.job, &r.attempt,
		&r.issuer, &r.serial, &r.tbs, &r.orderKey, &r.ref, &r.spki, &r.state, &r.recovery, &r.createdAt}
}

func (r *intentRow) toDomain() (domain.Intent, bool) {
	if !r.id.Valid {
		return domain.Intent{}, false
	}
	return domain.Intent{ID: r.id.String, CertificateID: r.certificate.String, AgentID: r.agent.String, Generation: r.generation.Int64,
		JobID: r.job.String, Attempt: r.attempt.Int64, IssuerID: r.issuer.String, Serial: r.serial.String, TBS: r.tbs,
		OrderKey: r.orderKey.String, Ref: r.ref.String, SPKI: r.spki.String, State: domain.IntentState(r.state.String),
		Recovery: r.recovery.Int64, CreatedAt: fromMicro(r.createdAt.Int64)}, true
}

// recovery reads the recovery generation.
func (t *tx) recovery() (int64, error) {
	var text string
	switch err := t.queryRow("SELECT value FROM meta WHERE key = $1", metaRecovery).Scan(&text); {
	case isNoRows(err):
		return 0, nil
	case err != nil:
		return 0, err
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return 0, errors.New("store: meta recovery is not a number")
	}
	return n, nil
}

// RecordIntents writes down what is going to be signed, before it is: at most one intent per (certificate, agent,
// generation). The outcome's Intent is the one to sign.
//
//   - The same key again gets the recorded intent (Existing): sign those bytes, not new ones.
//   - Signed already: Issued carries the version, also when the job has completed since.
//   - Another key, an intent from before a restore or before StaleBefore: the old intent is Abandoned, a version of it is revoked
//     (superseded), and job, leaf and the new intent get the leaf's next generation: look at the outcome's Generation.
//
// Conflict: the attempt is not the one that is awaited, or the serial is taken at this issuer (SerialTaken: choose another).
func (s *Store) RecordIntents(ctx context.Context, items []domain.Intent) []domain.IntentOutcome {
	return s.batches.intents.do(ctx, items)
}

type signing struct {
	job    domain.Job
	intent domain.Intent
	has    bool
}

// signings reads the jobs and the intents of their present generations.
func (t *tx) signings(jobIDs []string) (map[string]signing, error) {
	in, args := inList(1, jobIDs)
	found := make(map[string]signing, len(jobIDs))
	err := t.each("SELECT "+jobColumns+", "+intentColumns+` FROM job LEFT JOIN intent
ON intent.certificate_id = job.certificate_id AND intent.agent_id = job.agent_id AND intent.generation = job.generation
WHERE job.id IN `+in, args, func(scan func(...any) error) error {
		var j jobRow
		var r intentRow
		if err := scan(append(j.dest(), r.dest()...)...); err != nil {
			return err
		}
		x := signing{job: j.toDomain()}
		x.intent, x.has = r.toDomain()
		found[x.job.ID] = x
		return nil
	})
	return found, err
}

func (s *Store) intendAll(ctx context.Context, items []domain.Intent) ([]domain.IntentOutcome, error) {
	var outs []domain.IntentOutcome
	ids := make([]string, len(items))
	for i, it := range items {
		ids[i] = it.JobID
	}
	// READ COMMITTED, because unique keys and compare-and-set are all it needs: one intent a (certificate, agent,
	// generation) and one a serial are unique keys, and what replaces an intent compares intent and job as it writes. A job
	// that ends between being read and the commit leaves an intent that nobody can consume: RecordIssued compares again.
	err := s.settledAt(ctx, "intent.record", sql.LevelReadCommitted, func(t *tx) error {
		outs = make([]domain.IntentOutcome, len(items))
		found, err := t.signings(ids)
		if err != nil {
			return err
		}
		recovery, err := t.recovery()
		if err != nil {
			return err
		}
		var fresh []int
		for i, it := range items {
			it.Recovery, it.State, it.CreatedAt = recovery, domain.IntentOpen, domain.Micro(it.CreatedAt)
			x, ok := found[it.JobID]
			x.job.ID = it.JobID
			if it.SPKI == "" || it.CertificateID != x.job.CertificateID && ok {
				outs[i].Err = fault.New(fault.Invalid, "the intent for job %s names no key or another certificate", it.JobID)
				continue
			}
			// The same key of the same attempt, signed already: that is the answer, although the job has ended by it.
			if ok && x.has && x.job.AgentID == it.AgentID && x.job.Attempt == it.Attempt && x.intent.SPKI == it.SPKI && x.intent.State == domain.IntentConsumed {
				outs[i] = domain.IntentOutcome{Intent: x.intent, Existing: true}
				continue
			}
			if outs[i].Err = judge(x.job, ok, it.AgentID, it.Attempt); outs[i].Err != nil {
				continue
			}
			if !forLeaf(x.job.Kind) {
				outs[i].Err = fault.New(fault.Conflict, "job %s issues nothing", it.JobID)
				continue
			}
			it.Generation = x.job.Generation
			switch {
			case !x.has:
				outs[i].Intent, fresh = it, append(fresh, i)
			case x.intent.ID == it.ID:
				outs[i].Intent = x.intent // our own, of a run whose commit gave no answer
			case x.intent.SPKI == it.SPKI && x.intent.State == domain.IntentOpen && x.intent.Recovery == recovery && !x.intent.CreatedAt.Before(it.StaleBefore):
				outs[i] = domain.IntentOutcome{Intent: x.intent, Existing: true}
			default:
				if it.Generation, err = t.nextGeneration(x, it); err != nil {
					return err
				}
				outs[i].Intent, fresh = it, append(fresh, i)
			}
		}
		if err := t.issuedBefore(outs); err != nil {
			return err
		}
		return t.insertIntents(outs, fresh)
	})
	return outs, err
}

// insertIntents writes the intents of outs[fresh]. One whose serial is taken is refused.
func (t *tx) insertIntents(outs []domain.IntentOutcome, fresh []int) error {
	if len(fresh) == 0 {
		return nil
	}
	v := t.values("id text, c text, a text, g int, job text, attempt int, issuer text, serial text, tbs bytes, order_key text, ref text, spki text, state text, recovery int, at int")
	for _, i := range fresh {
		it := outs[i].Intent
		v.add(it.ID, it.CertificateID, it.AgentID, it.Generation, it.JobID, it.Attempt, it.IssuerID, nullText(it.Serial), it.TBS,
			it.OrderKey, it.Ref, it.SPKI, string(it.State), it.Recovery, micro(it.CreatedAt))
	}
	done := map[string]bool{}
	err := t.each(v.with()+`
INSERT INTO intent (id, certificate_id, agent_id, generation, job_id, attempt, issuer_id, serial, tbs, order_key, ref, spki, state, recovery, created_at)
SELECT v.id, v.c, v.a, v.g, v.job, v.attempt, v.issuer, v.serial, v.tbs, v.order_key, v.ref, v.spki, v.state, v.recovery, v.at
FROM v WHERE v.id IS NOT NULL
ON CONFLICT DO NOTHING RETURNING id`, v.args, func(scan func(...any) error) error {
		var id string
		err := scan(&id)
		done[id] = true
		return err
	})
	if err != nil {
		return err
	}
	for _, i := range fresh {
		if it := outs[i].Intent; !done[it.ID] {
			outs[i] = domain.IntentOutcome{SerialTaken: true,
				Err: fault.New(fault.Conflict, "serial %s of issuer %s is taken; choose another", it.Serial, it.IssuerID)}
		}
	}
	return nil
}

// issuedBefore adds the version to the outcomes whose intent was consumed.
func (t *tx) issuedBefore(outs []domain.IntentOutcome) error {
	var keys []generationKey
	for _, o := range outs {
		if o.Existing && o.Intent.State == domain.IntentConsumed {
			keys = append(keys, generationKey{o.Intent.CertificateID, o.Intent.AgentID, o.Intent.Generation})
		}
	}
	if len(keys) == 0 {
		return nil
	}
	versions, err := t.versionsByKey(keys)
	if err != nil {
		return err
	}
	for i := range outs {
		o := &outs[i]
		if !o.Existing || o.Intent.State != domain.IntentConsumed {
			continue
		}
		v, ok := versions[generationKey{o.Intent.CertificateID, o.Intent.AgentID, o.Intent.Generation}]
		if !ok {
			return errors.New("store: an intent was consumed and its version is missing")
		}
		o.Issued = &v
	}
	return nil
}

// nextGeneration abandons the intent that is in the way of it, because the agent has another key now or because the
// intent is from before a restore, and moves job and leaf to the next generation. It is rare: item by item.
func (t *tx) nextGeneration(x signing, it domain.Intent) (int64, error) {
	gone, err := t.exec("UPDATE intent SET state = $1 WHERE id = $2 AND state = $3", string(domain.IntentAbandoned), x.intent.ID, string(x.intent.State))
	if err != nil {
		return 0, err
	}
	if gone != 1 {
		return 0, errMoved
	}
	var g int64
	err = t.queryRow("UPDATE leaf SET generation = generation + 1 WHERE certificate_id = $1 AND agent_id = $2 RETURNING generation",
		it.CertificateID, it.AgentID).Scan(&g)
	if err != nil {
		return 0, err
	}
	n, err := t.exec("UPDATE job SET generation = $1, updated_at = $2 WHERE id = $3 AND attempt = $4 AND state = $5",
		g, micro(it.CreatedAt), x.job.ID, x.job.Attempt, string(x.job.State))
	if err != nil {
		return 0, err
	}
	if n != 1 {
		return 0, errMoved
	}
	revoked, err := t.exec(`UPDATE version SET revoked_at = $1, revocation_reason = $2
WHERE certificate_id = $3 AND agent_id = $4 AND generation = $5 AND revoked_at IS NULL`,
		micro(it.CreatedAt), superseded, x.intent.CertificateID, x.intent.AgentID, x.intent.Generation)
	if err != nil {
		return 0, err
	}
	action := "certificate.key_lost"
	if x.intent.SPKI == it.SPKI {
		action = "certificate.intent_abandoned"
	}
	return g, t.audit(domain.AuditEvent{At: it.CreatedAt, Actor: "agent:" + it.AgentID, Action: action,
		Resource: "certificate/" + it.CertificateID, RequestID: x.job.RequestID, Detail: map[string]string{
			"agent": it.AgentID, "job": x.job.ID, "abandoned_generation": strconv.FormatInt(x.intent.Generation, 10),
			"abandoned_serial": x.intent.Serial, "revoked_versions": strconv.FormatInt(revoked, 10), "generation": strconv.FormatInt(g, 10)}})
}

// superseded is CRLReason 4 (RFC 5280 section 5.3.1): the key is not known to be in wrong hands.
const superseded = 4
