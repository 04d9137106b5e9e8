package store

import (
	"context"
	"database/sql"
	"errors"
	"slices"
	"strconv"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// A job's row: made by its creator, then changed by the holder of the agent's session. Dispatch raises attempt under the
// session's epoch; everything that comes from the agent is judged by (id, attempt, state) alone.

// leafKey and placementKey are the values of job.open_key: at most one open job each.
func leafKey(certificateID, agentID string) string { return "leaf:" + certificateID + ":" + agentID }
func placementKey(certificateID, targetID string) string {
	return "placement:" + certificateID + ":" + targetID
}

func forLeaf(k domain.JobKind) bool { return k == domain.JobIssuance || k == domain.JobRenewal }

func openKey(j domain.Job) string {
	if forLeaf(j.Kind) {
		return leafKey(j.CertificateID, j.AgentID)
	}
	return placementKey(j.CertificateID, j.TargetID)
}

func missingJob(id string) error {
	return fault.New(fault.NotFound, "there is no job %s of this agent", id)
}

func staleJob(j domain.Job, attempt int64) error {
	if !j.State.Open() {
		return fault.New(fault.Conflict, "job %s is %s already", j.ID, j.State)
	}
	return fault.New(fault.Conflict, "job %s is at attempt %d and %s; attempt %d is not awaited", j.ID, j.Attempt, j.State, attempt)
}

// judge says whether a report of an agent about an attempt is the one that is awaited.
func judge(j domain.Job, found bool, agentID string, attempt int64) error {
	switch {
	case !found || j.AgentID != agentID:
		return missingJob(j.ID)
	case !j.State.Open() || j.State == domain.JobAwaitingApproval || j.Attempt != attempt || attempt < 1:
		return staleJob(j, attempt)
	}
	return nil
}

// jobsByID reads jobs.
func (t *tx) jobsByID(ids []string) (map[string]domain.Job, error) {
	found := make(map[string]domain.Job, len(ids))
	err := chunks(ids, func(ids []string) error {
		in, args := inList(1, ids)
		return t.each("SELECT "+jobColumns+" FROM job WHERE job.id IN "+in, args, func(scan func(...any) error) error {
			j, err := scanJob(scan)
			found[j.ID] = j
			return err
		})
	})
	return found, err
}

// insertJobs writes new open jobs. A job whose key has an open one already is left out; created holds the ids of the others.
func (t *tx) insertJobs(jobs []domain.Job) (created map[string]bool, err error) {
	created = make(map[string]bool, len(jobs))
	err = chunks(jobs, func(jobs []domain.Job) error {
		v := t.values("id text, kind text, state text, c text, a text, target text, g int, max int, run_at int, reason text, request text, k text, shard int, at int")
		for _, j := range jobs {
			v.add(j.ID, string(j.Kind), string(j.State), j.CertificateID, j.AgentID, j.TargetID, j.Generation, j.MaxTries, micro(j.RunAt),
				j.Reason, j.RequestID, openKey(j), domain.ShardOf(j.CertificateID), micro(j.CreatedAt))
		}
		return t.each(v.with()+`
INSERT INTO job (id, kind, state, certificate_id, agent_id, target_id, generation, attempt, tries, max_tries, run_at, accepted_at,
 error_class, error, reason, request_id, open_key, shard, owner, created_at, updated_at, finished_at)
SELECT v.id, v.kind, v.state, v.c, v.a, v.target, v.g, 0, 0, v.max, v.run_at, 0,
 '', '', v.reason, v.request, v.k, v.shard, COALESCE((SELECT certificate.owner FROM certificate WHERE certificate.id = v.c), ''), v.at, v.at, NULL
FROM v WHERE v.id IS NOT NULL
ON CONFLICT (open_key) DO NOTHING RETURNING id`, v.args, func(scan func(...any) error) error {
			var id string
			err := scan(&id)
			created[id] = true
			return err
		})
	})
	return created, err
}

// openJobs reads the open jobs by their open_key.
func (t *tx) openJobs(keys []string) (map[string]domain.Job, error) {
	found := make(map[string]domain.Job, len(keys))
	err := chunks(keys, func(keys []string) error {
		in, args := inList(1, keys)
		return t.each("SELECT "+jobColumns+" FROM job WHERE job.open_key IN "+in, args, func(scan func(...any) error) error {
			j, err := scanJob(scan)
			found[openKey(j)] = j
			return err
		})
	})
	return found, err
}

// newJob is a job in its first state. id is made before the transaction.
func newJob(id string, kind domain.JobKind, certificateID, agentID, targetID string, generation int64, reason, requestID string, at time.Time) domain.Job {
	at = domain.Micro(at)
	return domain.Job{ID: id, Kind: kind, State: kind.InitialState(), CertificateID: certificateID, AgentID: agentID,
		TargetID: targetID, Generation: generation, MaxTries: domain.DefaultMaxTries, RunAt: at, Reason: reason,
		RequestID: requestID, CreatedAt: at, UpdatedAt: at}
}

// change is a job before and after.
type change struct{ before, after domain.Job }

// saveJobs writes changed jobs where attempt and state are still those of before, and checks each move against the table
// of transitions. kept holds the ids of the jobs that were written. A finished job gives its open_key up.
func (t *tx) saveJobs(changes []change) (kept map[string]bool, err error) {
	kept = make(map[string]bool, len(changes))
	err = chunks(changes, func(changes []change) error {
		v := t.values("k text, n int, was text, state text, g int, attempt int, tries int, run_at int, accepted int, class text, error text, at int, finished int, open text")
		for _, c := range changes {
			if err := domain.CheckTransition(c.before.State, c.after.State); err != nil {
				return err
			}
			a := c.after
			var open any
			if a.State.Open() {
				open = openKey(a)
			}
			v.add(a.ID, c.before.Attempt, string(c.before.State), string(a.State), a.Generation, a.Attempt, a.Tries, micro(a.RunAt),
				micro(a.AcceptedAt), a.ErrorClass, a.Error, micro(a.UpdatedAt), nullMicro(a.FinishedAt), open)
		}
		return t.each(v.with()+`
UPDATE job SET state = v.state, generation = v.g, attempt = v.attempt, tries = v.tries, run_at = v.run_at, accepted_at = v.accepted,
 error_class = v.class, error = v.error, updated_at = v.at, away = 0, finished_at = v.finished, open_key = v.open
FROM v WHERE job.id = v.k AND job.attempt = v.n AND job.state = v.was RETURNING id`, v.args, func(scan func(...any) error) error {
			var id string
			err := scan(&id)
			kept[id] = true
			return err
		})
	})
	return kept, err
}

type generationKey struct {
	certificateID, agentID string
	generation             int64
}

// work adds to jobs what their assignments need. A deployment whose version or target is gone is left out: it can only be
// cancelled.
func (t *tx) work(jobs []domain.Job) ([]domain.Work, error) {
	var certs, targets []string
	var keys []generationKey
	for _, j := range jobs {
		if forLeaf(j.Kind) {
			certs = append(certs, j.CertificateID)
			continue
		}
		targets = append(targets, j.TargetID)
		keys = append(keys, generationKey{j.CertificateID, j.AgentID, j.Generation})
	}
	orders, err := t.orders(certs)
	if err != nil {
		return nil, err
	}
	byTarget, err := t.targetsByID(targets)
	if err != nil {
		return nil, err
	}
	versions, err := t.versionsByKey(keys)
	if err != nil {
		return nil, err
	}
	owners, err := t.owners(keys)
	if err != nil {
		return nil, err
	}
	work := make([]domain.Work, 0, len(jobs))
	for _, j := range jobs {
		w := domain.Work{Job: j}
		if forLeaf(j.Kind) {
			o, ok := orders[j.CertificateID]
			if !ok {
				continue
			}
			w.Names, w.KeyAlgorithm, w.Profile, w.Policy = o.names, o.profile.KeyAlgorithm, o.profile, o.policy
			w.IssuerID, w.IssuerKind, w.Owner = o.issuerID, o.issuerKind, o.owner
		} else {
			var hasTarget, hasVersion bool
			w.Target, hasTarget = byTarget[j.TargetID]
			w.Version, hasVersion = versions[generationKey{j.CertificateID, j.AgentID, j.Generation}]
			if !hasTarget || !hasVersion {
				continue
			}
			w.Owner = owners[j.CertificateID]
		}
		work = append(work, w)
	}
	return work, nil
}

// owners reads whose the certificates are.
func (t *tx) owners(keys []generationKey) (map[string]string, error) {
	ids := make([]string, len(keys))
	for i, k := range keys {
		ids[i] = k.certificateID
	}
	found := make(map[string]string, len(ids))
	err := certificateChunks(ids, func(ids []string) error {
		in, args := inList(1, ids)
		return t.each("SELECT certificate.id, certificate.owner FROM certificate WHERE certificate.id IN "+in, args, func(scan func(...any) error) error {
			var id, owner string
			err := scan(&id, &owner)
			found[id] = owner
			return err
		})
	})
	return found, err
}

type order struct {
	names                domain.Names
	issuerID, issuerKind string
	owner                string
	profile              domain.Profile
	policy               domain.Policy
}

// orders reads what was ordered of certificates, from whom, and by which rules.
func (t *tx) orders(ids []string) (map[string]order, error) {
	slices.Sort(ids)
	ids = slices.Compact(ids)
	found := make(map[string]order, len(ids))
	err := chunks(ids, func(ids []string) error {
		in, args := inList(1, ids)
		err := t.each("SELECT "+profileColumns+`, certificate.id, certificate.common_name, certificate.policy, certificate.owner, issuer.id, issuer.kind
FROM certificate JOIN profile ON profile.id = certificate.profile_id JOIN issuer ON issuer.id = certificate.issuer_id
WHERE certificate.id IN `+in, args, func(scan func(...any) error) error {
			var id, policy string
			var o order
			var p profileRow
			err := scan(append(p.dest(), &id, &o.names.CommonName, &policy, &o.owner, &o.issuerID, &o.issuerKind)...)
			if err != nil {
				return err
			}
			if o.profile, err = p.toDomain(); err != nil {
				return err
			}
			if err := fromJSON(policy, &o.policy); err != nil {
				return err
			}
			found[id] = o
			return nil
		})
		if err != nil {
			return err
		}
		return t.each(`SELECT certificate_id, kind, value FROM certificate_san WHERE certificate_id IN `+in+`
ORDER BY certificate_id, kind, value`, args, func(scan func(...any) error) error {
			var id, kind, value string
			if err := scan(&id, &kind, &value); err != nil {
				return err
			}
			o := found[id]
			if err := addName(&o.names, kind, value); err != nil {
				return err
			}
			found[id] = o
			return nil
		})
	})
	return found, err
}

func (t *tx) targetsByID(ids []string) (map[string]domain.Target, error) {
	slices.Sort(ids)
	ids = slices.Compact(ids)
	found := make(map[string]domain.Target, len(ids))
	err := chunks(ids, func(ids []string) error {
		in, args := inList(1, ids)
		return t.each("SELECT "+targetColumns+" FROM target WHERE target.id IN "+in, args, func(scan func(...any) error) error {
			x, err := scanTarget(scan)
			found[x.ID] = x
			return err
		})
	})
	return found, err
}

func (t *tx) versionsByKey(keys []generationKey) (map[generationKey]domain.Version, error) {
	slices.SortFunc(keys, func(a, b generationKey) int {
		return cmpStrings(a.certificateID, b.certificateID, a.agentID, b.agentID, strconv.FormatInt(a.generation, 10), strconv.FormatInt(b.generation, 10))
	})
	keys = slices.Compact(keys)
	found := make(map[generationKey]domain.Version, len(keys))
	err := chunks(keys, func(keys []generationKey) error {
		v := t.values("c text, a text, g int")
		for _, k := range keys {
			v.add(k.certificateID, k.agentID, k.generation)
		}
		return t.each(v.with()+" SELECT "+versionColumns+` FROM v JOIN version
ON version.certificate_id = v.c AND version.agent_id = v.a AND version.generation = v.g`, v.args, func(scan func(...any) error) error {
			x, err := scanVersion(scan)
			found[generationKey{x.CertificateID, x.AgentID, x.Generation}] = x
			return err
		})
	})
	return found, err
}

// Dispatch raises the attempts of jobs under the epochs of their agents' sessions; the job goes back to its first state,
// not accepted. Conflict: the attempt is not the one believed, or the session has been taken over or closed.
//
// It runs at READ COMMITTED, because the row locks of its two updates are all it needs: the session's row is locked and
// its epoch compared by one statement, and stays locked until the commit, so nobody takes the session over in between;
// the job's row is compared and set by the other.
//
// To send again what was never accepted is no progress: away then keeps updated_at + away where it was, so that the
// reaper's clock (see still) runs on.
func (s *Store) Dispatch(ctx context.Context, items []domain.Dispatch) []error {
	return s.batches.dispatch.do(ctx, items)
}

func (s *Store) dispatchAll(ctx context.Context, items []domain.Dispatch) ([]error, error) {
	var outs []error
	err := s.settledAt(ctx, "job.dispatch", sql.LevelReadCommitted, func(t *tx) error {
		outs = make([]error, len(items))
		type session struct {
			agent string
			epoch domain.Epoch
		}
		held := map[session]bool{}
		v := t.values("a text, e int")
		for _, d := range items {
			k := session{d.AgentID, d.Epoch}
			if _, ok := held[k]; !ok {
				held[k] = false
				v.add(d.AgentID, int64(d.Epoch))
			}
		}
		err := t.each(v.with()+`
UPDATE agent_session SET epoch = agent_session.epoch FROM v
WHERE agent_session.agent_id = v.a AND agent_session.epoch = v.e AND agent_session.holder <> '' RETURNING agent_id, epoch`, v.args,
			func(scan func(...any) error) error {
				var k session
				err := scan(&k.agent, &k.epoch)
				held[k] = true
				return err
			})
		if err != nil {
			return err
		}
		v = t.values("k text, n int, a text, at int")
		for i, d := range items {
			if held[session{d.AgentID, d.Epoch}] {
				v.add(d.JobID, d.Attempt, d.AgentID, micro(d.At))
				continue
			}
			outs[i] = fault.New(fault.Conflict, "the session of agent %s is no longer at epoch %d", d.AgentID, d.Epoch)
		}
		if v.rows == 0 {
			return nil
		}
		done := map[string]bool{}
		text := v.with()
		err = t.each(text+`
UPDATE job SET attempt = job.attempt + 1, accepted_at = 0, updated_at = v.at,
 away = CASE WHEN job.attempt > 0 AND job.accepted_at = 0 THEN job.away + job.updated_at - v.at ELSE 0 END,
 state = CASE WHEN job.kind = `+v.arg(string(domain.JobIssuance))+` OR job.kind = `+v.arg(string(domain.JobRenewal))+`
 THEN `+v.arg(string(domain.JobAwaitingCSR))+` ELSE `+v.arg(string(domain.JobPending))+` END
FROM v WHERE job.id = v.k AND job.attempt = v.n AND job.agent_id = v.a AND job.state IN `+v.dispatchable()+` RETURNING id`, v.args,
			func(scan func(...any) error) error {
				var id string
				err := scan(&id)
				done[id] = true
				return err
			})
		if err != nil {
			return err
		}
		return t.explain(len(items), func(i int) (string, bool) {
			return items[i].JobID, outs[i] == nil && !done[items[i].JobID]
		}, func(i int, j domain.Job, found bool) {
			d := items[i]
			// Only the holder of this epoch could have raised it since.
			if t.again && found && j.AgentID == d.AgentID && j.State.Open() && j.Attempt == d.Attempt+1 {
				return
			}
			outs[i] = missingJob(d.JobID)
			if found && j.AgentID == d.AgentID {
				outs[i] = staleJob(j, d.Attempt)
			}
		})
	})
	return outs, err
}

// dispatchable writes the states in which a job may be given to its agent. They are parameters: literal states let
// PostgreSQL prove a partial index and scan all open jobs.
func (v *valueList) dispatchable() string {
	return "(" + v.arg(string(domain.JobPending)) + ", " + v.arg(string(domain.JobAwaitingCSR)) + ", " + v.arg(string(domain.JobRunning)) + ")"
}

// explain reads the jobs of the items that a compare-and-set missed and lets say name each one's verdict. In the ordinary
// case it does nothing.
func (t *tx) explain(n int, missed func(i int) (jobID string, ok bool), say func(i int, j domain.Job, found bool)) error {
	var ids []string
	for i := range n {
		if id, ok := missed(i); ok {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	jobs, err := t.jobsByID(ids)
	if err != nil {
		return err
	}
	for i := range n {
		if id, ok := missed(i); ok {
			j, found := jobs[id]
			j.ID = id
			say(i, j, found)
		}
	}
	return nil
}

// Accept records that agents have their attempts in the journal: tries+1, and a deployment runs. The same acceptance
// again changes nothing and is no error. Conflict: another attempt is awaited, or the job has ended. It runs at READ
// COMMITTED: one compare-and-set of one row.
func (s *Store) Accept(ctx context.Context, items []domain.Acceptance) []error {
	return s.batches.accept.do(ctx, items)
}

func (s *Store) acceptAll(ctx context.Context, items []domain.Acceptance) ([]error, error) {
	var outs []error
	err := s.settledAt(ctx, "job.accept", sql.LevelReadCommitted, func(t *tx) error {
		outs = make([]error, len(items))
		v := t.values("k text, n int, a text, at int")
		for _, a := range items {
			v.add(a.JobID, a.Attempt, a.AgentID, micro(a.At))
		}
		done := map[string]bool{}
		text := v.with()
		err := t.each(text+`
UPDATE job SET tries = job.tries + 1, accepted_at = v.at, updated_at = v.at, away = 0,
 state = CASE WHEN job.kind = `+v.arg(string(domain.JobIssuance))+` OR job.kind = `+v.arg(string(domain.JobRenewal))+`
 THEN job.state ELSE `+v.arg(string(domain.JobRunning))+` END
FROM v WHERE job.id = v.k AND job.attempt = v.n AND job.agent_id = v.a AND v.n > 0 AND job.accepted_at = 0 AND job.state IN `+v.dispatchable()+`
RETURNING id`, v.args, func(scan func(...any) error) error {
			var id string
			err := scan(&id)
			done[id] = true
			return err
		})
		if err != nil {
			return err
		}
		return t.explain(len(items), func(i int) (string, bool) { return items[i].JobID, !done[items[i].JobID] },
			func(i int, j domain.Job, found bool) {
				if outs[i] = judge(j, found, items[i].AgentID, items[i].Attempt); outs[i] == nil && j.AcceptedAt.IsZero() {
					outs[i] = staleJob(j, items[i].Attempt)
				}
			})
	})
	return outs, err
}

// FailJobs ends attempts. A job that is tried again gets the next attempt at once, so that the same report repeated is
// refused as stale; its outcome carries that attempt. A job that is not tried again is Failed: its leaf or placement
// rests for FailureBackoff and is due again after it.
func (s *Store) FailJobs(ctx context.Context, items []domain.Failure) []domain.FailureOutcome {
	return s.batches.fail.do(ctx, items)
}

func (s *Store) failAll(ctx context.Context, items []domain.Failure) ([]domain.FailureOutcome, error) {
	var outs []domain.FailureOutcome
	ids := make([]string, len(items))
	for i, f := range items {
		ids[i] = f.JobID
	}
	err := s.settled(ctx, "job.fail", func(t *tx) error {
		jobs, err := t.jobsByID(ids)
		if err != nil {
			return err
		}
		if t.again && keptAny(jobs, len(outs), func(i int) (domain.Job, bool) { return outs[i].Job, outs[i].Err == nil }) {
			return nil
		}
		outs = make([]domain.FailureOutcome, len(items))
		var changes []change
		var ended []domain.Job
		for i, f := range items {
			j, found := jobs[f.JobID]
			j.ID = f.JobID
			if outs[i].Err = judge(j, found, f.AgentID, f.Attempt); outs[i].Err != nil {
				continue
			}
			f.At = domain.Micro(f.At)
			after := domain.AfterFailure(j, f, fault.MayRetry(&fault.Error{Class: fault.Class(f.Class)}))
			if after.State.Open() {
				after.Attempt++
			} else {
				ended = append(ended, after)
			}
			changes = append(changes, change{j, after})
			outs[i].Job = after
		}
		kept, err := t.saveJobs(changes)
		if err != nil {
			return err
		}
		if len(kept) != len(changes) {
			return errMoved
		}
		return t.rest(ended, func(j domain.Job) domain.AuditEvent {
			return domain.AuditEvent{Actor: "agent:" + j.AgentID, Action: "job.failed", Resource: "job/" + j.ID}
		})
	})
	return outs, err
}

// errMoved: a row that this transaction has read was changed by another before it was written. No isolation that the store
// uses lets that commit; it stands for a serialization failure where an engine reports it by a missing row.
var errMoved error = injected("40001")

// keptAny reports whether an earlier run that may have been kept was: then the first job it would have changed is as it
// left it. A transaction is kept whole or not at all, so one row is enough. When it was kept and others moved the job on
// since, the answer is no; the new run then refuses the items as stale, which is true as well.
func keptAny(now map[string]domain.Job, n int, at func(i int) (domain.Job, bool)) bool {
	for i := range n {
		if j, ok := at(i); ok {
			have, found := now[j.ID]
			return found && have.Attempt == j.Attempt && have.State == j.State && have.Error == j.Error && have.UpdatedAt.Equal(j.UpdatedAt)
		}
	}
	return false
}

// rest is what follows when jobs have ended without success: back-off, due again, status, audit (by event, which fills
// in who and what).
func (t *tx) rest(ended []domain.Job, event func(domain.Job) domain.AuditEvent) error {
	if len(ended) == 0 {
		return nil
	}
	var leafJobs, placementJobs []domain.Job
	var certs []string
	for _, j := range ended {
		if forLeaf(j.Kind) {
			leafJobs = append(leafJobs, j)
			certs = append(certs, j.CertificateID)
		} else {
			placementJobs = append(placementJobs, j)
		}
		e := event(j)
		e.At, e.Outcome, e.RequestID = j.FinishedAt, j.ErrorClass, j.RequestID
		e.Detail = map[string]string{"certificate": j.CertificateID, "agent": j.AgentID, "kind": string(j.Kind), "error": j.Error,
			"generation": strconv.FormatInt(j.Generation, 10), "job": j.ID}
		if j.TargetID != "" {
			e.Detail["target"] = j.TargetID
		}
		if err := t.audit(e); err != nil {
			return err
		}
		if forLeaf(j.Kind) && j.State == domain.JobFailed {
			e.Action, e.Resource = "certificate.failed", "certificate/"+j.CertificateID
			if err := t.audit(e); err != nil {
				return err
			}
		}
	}
	if err := chunks(leafJobs, t.restLeaves); err != nil {
		return err
	}
	if err := chunks(placementJobs, t.restPlacements); err != nil {
		return err
	}
	return t.restatus(certs, ended[0].FinishedAt)
}

// endJobs cancels or fails open jobs for good, as an operator or a duty does, with all that follows. message becomes the
// leaf's or placement's last error. Jobs must have been read in this transaction.
func (t *tx) endJobs(jobs []domain.Job, state domain.JobState, class fault.Class, message string, at time.Time, event func(domain.Job) domain.AuditEvent) ([]domain.Job, error) {
	at = domain.Micro(at)
	changes := make([]change, len(jobs))
	ended := make([]domain.Job, len(jobs))
	for i, j := range jobs {
		a := j
		a.State, a.FinishedAt, a.UpdatedAt, a.AcceptedAt = state, at, at, time.Time{}
		a.ErrorClass, a.Error = string(class), message
		changes[i], ended[i] = change{j, a}, a
	}
	kept, err := t.saveJobs(changes)
	if err != nil {
		return nil, err
	}
	if len(kept) != len(changes) {
		return nil, errMoved
	}
	return ended, t.rest(ended, event)
}

// Settlements says for assignments that an agent still has open what became of them. A job that is unknown or belongs to
// another agent has an empty State; Open is set only for the attempt that is awaited; an attempt that was superseded
// carries the job's present State with Open false.
func (s *Store) Settlements(ctx context.Context, agentID string, refs []domain.JobRef) ([]domain.Settlement, error) {
	var outs []domain.Settlement
	ids := make([]string, len(refs))
	for i, r := range refs {
		ids[i] = r.JobID
	}
	err := s.read(ctx, "job.settlements", func(t *tx) error {
		outs = make([]domain.Settlement, len(refs))
		jobs, err := t.jobsByID(ids)
		if err != nil {
			return err
		}
		var holders []placementOwner
		for i, r := range refs {
			j, ok := jobs[r.JobID]
			outs[i] = domain.Settlement{JobID: r.JobID, Attempt: r.Attempt}
			if !ok || j.AgentID != agentID {
				continue
			}
			outs[i] = settlementOf(j, r.Attempt)
			if j.State == domain.JobCompleted && !forLeaf(j.Kind) {
				holders = append(holders, placementOwner{j.CertificateID, j.AgentID})
			}
		}
		below, err := t.retireBelow(holders)
		if err != nil {
			return err
		}
		for i := range outs {
			if outs[i].State == domain.JobCompleted && !forLeaf(outs[i].Kind) {
				outs[i].RetireBelow = below[placementOwner{outs[i].CertificateID, agentID}]
			}
		}
		return nil
	})
	return outs, err
}

func settlementOf(j domain.Job, attempt int64) domain.Settlement {
	return domain.Settlement{JobID: j.ID, Attempt: attempt, State: j.State, CertificateID: j.CertificateID, Generation: j.Generation,
		ErrorClass: j.ErrorClass, Error: j.Error, Kind: j.Kind,
		Open: judge(j, true, j.AgentID, attempt) == nil}
}

// AgentsWithOpenJobs lists agents whose session the node holds and that have open jobs: the net under lost wake-ups.
func (s *Store) AgentsWithOpenJobs(ctx context.Context, node string, limit int) ([]string, error) {
	var ids []string
	err := s.read(ctx, "work.sweep", func(t *tx) error {
		ids = nil
		return t.each(`SELECT DISTINCT job.agent_id FROM job JOIN agent_session ON agent_session.agent_id = job.agent_id
WHERE job.finished_at IS NULL AND job.state <> $1 AND agent_session.holder = $2 ORDER BY job.agent_id LIMIT $3`,
			[]any{string(domain.JobAwaitingApproval), node, limit}, func(scan func(...any) error) error {
				var id string
				err := scan(&id)
				ids = append(ids, id)
				return err
			})
	})
	return ids, err
}

func cmpStrings(pairs ...string) int {
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i] != pairs[i+1] {
			if pairs[i] < pairs[i+1] {
				return -1
			}
			return 1
		}
	}
	return 0
}

var errNoRows = sql.ErrNoRows

func isNoRows(err error) bool { return errors.Is(err, errNoRows) }
