package store

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

// A placement's due_at is set exactly while it does not hold what is wanted and no job of its own is open.

type placementID struct{ certificateID, targetID string }

type placementOwner struct{ certificateID, agentID string }

type placementState struct {
	placement domain.Placement
	wanted    int64
	revoked   bool
	enabled   bool
	probed    bool // the target has a verify address
}

func (t *tx) placementStates(keys []placementID) (map[placementID]placementState, error) {
	found := make(map[placementID]placementState, len(keys))
	err := chunks(keys, func(keys []placementID) error {
		v := t.values("c text, x text")
		for _, k := range keys {
			v.add(k.certificateID, k.targetID)
		}
		return t.each(v.with()+" SELECT "+placementColumns+`, leaf.current_generation, leaf.revoked, target.enabled, target.verify_address
FROM v JOIN placement ON placement.certificate_id = v.c AND placement.target_id = v.x
JOIN leaf ON leaf.certificate_id = placement.certificate_id AND leaf.agent_id = placement.agent_id
JOIN target ON target.id = placement.target_id`, v.args, func(scan func(...any) error) error {
			var p placementRow
			var s placementState
			var address string
			if err := scan(append(p.dest(), &s.wanted, &s.revoked, &s.enabled, &address)...); err != nil {
				return err
			}
			s.placement, s.probed = p.toDomain(), address != ""
			found[placementID{s.placement.CertificateID, s.placement.TargetID}] = s
			return nil
		})
	})
	return found, err
}

// restPlacements counts a failure, or a cancellation (which counts nothing and rests an hour), and makes the placements
// due again. A validation counts nothing either way: that it found something else is drift.
func (t *tx) restPlacements(ended []domain.Job) error {
	var keys []placementID
	for _, j := range ended {
		keys = append(keys, placementID{j.CertificateID, j.TargetID})
	}
	states, err := t.placementStates(keys)
	if err != nil {
		return err
	}
	v := t.values("c text, x text, state text, failures int, until int, drifted int, due int, error text, at int")
	for i, j := range ended {
		s, ok := states[keys[i]]
		if !ok {
			continue
		}
		p := s.placement
		switch j.Kind {
		case domain.JobValidation:
			if j.State == domain.JobFailed && j.ErrorClass == string(fault.Conflict) {
				if err := t.auditDrift(p, j.Generation, j.Error, j.RequestID, j.FinishedAt); err != nil {
					return err
				}
				p = p.Drifted(j.Error, j.FinishedAt)
			}
		default:
			if j.State == domain.JobFailed {
				p.Failures++
				p.State = domain.PlacementFailed
			}
			p.BackoffUntil, p.LastError = domain.Micro(j.FinishedAt.Add(domain.FailureBackoff(max(p.Failures, 1)))), j.Error
		}
		var due any
		if !s.revoked && p.Lags(s.wanted) {
			due = micro(p.DueAt(j.FinishedAt))
		}
		v.add(j.CertificateID, j.TargetID, string(p.State), p.Failures, micro(p.BackoffUntil), micro(p.DriftedAt), due, p.LastError, micro(j.FinishedAt))
	}
	if v.rows == 0 {
		return nil
	}
	_, err = t.exec(v.with()+`
UPDATE placement SET state = v.state, failures = v.failures, backoff_until = v.until, drifted_at = v.drifted, due_at = v.due,
 last_error = v.error, updated_at = v.at
FROM v WHERE placement.certificate_id = v.c AND placement.target_id = v.x`, v.args...)
	return err
}

// DuePlacements returns placements of a shard that are due, the longest due first.
func (s *Store) DuePlacements(ctx context.Context, shard int, now time.Time, limit int) ([]domain.DuePlacement, error) {
	var due []domain.DuePlacement
	err := s.read(ctx, "placement.due", func(t *tx) error {
		due = nil
		return t.each("SELECT "+placementColumns+`, leaf.current_generation, target.enabled, CASE WHEN job.id IS NULL THEN 0 ELSE 1 END
FROM placement JOIN leaf ON leaf.certificate_id = placement.certificate_id AND leaf.agent_id = placement.agent_id
JOIN target ON target.id = placement.target_id
LEFT JOIN job ON job.open_key = 'placement:' || placement.certificate_id || ':' || placement.target_id
WHERE placement.shard = $1 AND placement.due_at <= $2 ORDER BY placement.due_at LIMIT $3`, []any{shard, micro(now), limit}, func(scan func(...any) error) error {
			var p placementRow
			var d domain.DuePlacement
			var open int
			if err := scan(append(p.dest(), &d.Wanted, &d.Enabled, &open)...); err != nil {
				return err
			}
			d.Placement, d.OpenJob = p.toDomain(), open == 1
			due = append(due, d)
			return nil
		})
	})
	return due, err
}

// disabledRest is how long a placement at a disabled target rests before it is looked at again.
const disabledRest = time.Hour

// CreateDeployments opens a Deployment of the leaf's current generation per item. An item whose placement has an open job
// already gets that one. Conflict per item: nothing is issued, it is installed already, it is revoked (and so not due any
// more), or the target is disabled (due again in an hour). Kind and AgentID of the items are not looked at.
func (s *Store) CreateDeployments(ctx context.Context, f domain.Fence, items []domain.NewJob, op domain.Op) ([]domain.NewJobOutcome, error) {
	if f.Duty == "" {
		return nil, fault.New(fault.Internal, "deployments are created under a duty's fence")
	}
	var outs []domain.NewJobOutcome
	ids := s.newIDs(id.Job, len(items))
	err := s.settled(ctx, "placement.jobs", func(t *tx) error {
		outs = make([]domain.NewJobOutcome, len(items))
		if err := t.fence(f); err != nil {
			return err
		}
		keys := make([]placementID, len(items))
		names := make([]string, len(items))
		for i, n := range items {
			keys[i] = placementID{n.CertificateID, n.TargetID}
			names[i] = placementKey(n.CertificateID, n.TargetID)
		}
		states, err := t.placementStates(keys)
		if err != nil {
			return err
		}
		open, err := t.openJobs(names)
		if err != nil {
			return err
		}
		var jobs []domain.Job
		due := map[placementID]time.Time{}
		for i, n := range items {
			st, ok := states[keys[i]]
			if !ok {
				outs[i].Err = notFound("placement", n.CertificateID+" at "+n.TargetID)
				continue
			}
			if j, ok := open[names[i]]; ok {
				outs[i] = domain.NewJobOutcome{Job: j, Created: j.ID == ids[i]}
				due[keys[i]] = time.Time{}
				continue
			}
			switch {
			case st.wanted == 0:
				outs[i].Err = fault.New(fault.Conflict, "nothing is issued yet for certificate %s at target %s", n.CertificateID, n.TargetID)
				due[keys[i]] = time.Time{}
				continue
			case st.revoked || !st.placement.Lags(st.wanted):
				outs[i].Err = fault.New(fault.Conflict, "target %s needs no deployment of certificate %s", n.TargetID, n.CertificateID)
				due[keys[i]] = time.Time{}
				continue
			case !st.enabled:
				outs[i].Err = fault.New(fault.Conflict, "target %s is disabled", n.TargetID)
				due[keys[i]] = op.At.Add(disabledRest)
				continue
			}
			j := newJob(ids[i], domain.JobDeployment, n.CertificateID, st.placement.AgentID, n.TargetID, st.wanted, n.Reason, op.RequestID, op.At)
			open[names[i]] = j
			outs[i] = domain.NewJobOutcome{Job: j, Created: true}
			jobs = append(jobs, j)
			due[keys[i]] = time.Time{}
		}
		if len(jobs) > 0 {
			if err := t.createAll(jobs, op); err != nil {
				return err
			}
		}
		return t.placementsDue(due)
	})
	if err != nil {
		return nil, err
	}
	return outs, nil
}

// placementsDue sets due_at; the zero time: not due.
func (t *tx) placementsDue(due map[placementID]time.Time) error {
	if len(due) == 0 {
		return nil
	}
	keys := make([]placementID, 0, len(due))
	for k := range due {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b placementID) int {
		return cmpStrings(a.certificateID, b.certificateID, a.targetID, b.targetID)
	})
	return chunks(keys, func(keys []placementID) error {
		v := t.values("c text, x text, due int")
		for _, k := range keys {
			v.add(k.certificateID, k.targetID, nullMicro(due[k]))
		}
		_, err := t.exec(v.with()+`
UPDATE placement SET due_at = v.due FROM v WHERE placement.certificate_id = v.c AND placement.target_id = v.x`, v.args...)
		return err
	})
}

// CompleteDeployments records successes of deployments and validations: the job is Completed, and the placement Served
// (probed) or Installed. One that had drifted is restored, which is remembered for an hour (see domain.DriftMemory). The
// reported fingerprints must be those of the job's version (Invalid; nothing is changed, fail the job). When a newer
// generation has been issued meanwhile the placement is due at once. A result that was recorded before is a Conflict whose
// Settlement says what to tell the agent.
func (s *Store) CompleteDeployments(ctx context.Context, items []domain.DeployResult) []domain.DeployOutcome {
	return s.batches.complete.do(ctx, items)
}

// deployment is a job with the version it deploys.
type deployment struct {
	job         domain.Job
	fingerprint string
	wanted      int64
	revoked     bool
	drifted     bool
}

func (t *tx) deployments(items []domain.DeployResult) (map[string]deployment, error) {
	v := t.values("k text")
	for _, r := range items {
		v.add(r.JobID)
	}
	found := make(map[string]deployment, len(items))
	err := t.each(v.with()+" SELECT "+jobColumns+`, COALESCE(version.fingerprint, ''), COALESCE(leaf.current_generation, 0),
 CASE WHEN leaf.revoked THEN 1 ELSE 0 END, COALESCE(placement.drifted_at, 0)
FROM v JOIN job ON job.id = v.k
LEFT JOIN version ON version.certificate_id = job.certificate_id AND version.agent_id = job.agent_id AND version.generation = job.generation
LEFT JOIN leaf ON leaf.certificate_id = job.certificate_id AND leaf.agent_id = job.agent_id
LEFT JOIN placement ON placement.certificate_id = job.certificate_id AND placement.target_id = job.target_id`, v.args, func(scan func(...any) error) error {
		var j jobRow
		var d deployment
		var revoked int
		var drifted int64
		err := scan(append(j.dest(), &d.fingerprint, &d.wanted, &revoked, &drifted)...)
		d.job, d.revoked, d.drifted = j.toDomain(), revoked == 1, drifted > 0
		found[d.job.ID] = d
		return err
	})
	return found, err
}

func (d deployment) check(r domain.DeployResult) error {
	switch {
	case forLeaf(d.job.Kind):
		return fault.New(fault.Conflict, "job %s is not about a target", d.job.ID)
	case d.fingerprint == "" || !strings.EqualFold(r.InstalledFingerprint, d.fingerprint):
		return fault.InvalidField("installed_fingerprint", "is not the certificate of generation %d that job %s is about", d.job.Generation, d.job.ID)
	case r.ServedFingerprint != "" && !strings.EqualFold(r.ServedFingerprint, d.fingerprint):
		return fault.InvalidField("served_fingerprint", "is not the certificate of generation %d that job %s is about", d.job.Generation, d.job.ID)
	}
	return nil
}

func (s *Store) completeAll(ctx context.Context, items []domain.DeployResult) ([]domain.DeployOutcome, error) {
	var outs []domain.DeployOutcome
	var done []domain.Job
	err := s.settled(ctx, "job.complete", func(t *tx) error {
		found, err := t.deployments(items)
		if err != nil {
			return err
		}
		if t.again && len(done) > 0 && found[done[0].ID].job.UpdatedAt.Equal(done[0].UpdatedAt) && found[done[0].ID].job.State == domain.JobCompleted {
			return nil
		}
		outs, done = make([]domain.DeployOutcome, len(items)), nil
		var changes []change
		var owners []placementOwner
		v := t.values("c text, x text, state text, g int, served int, finger text, served_finger text, served_at int, due int, look int, memory int, at int")
		for i, r := range items {
			d, ok := found[r.JobID]
			d.job.ID = r.JobID
			if outs[i].Err = judge(d.job, ok, r.AgentID, r.Attempt); outs[i].Err != nil {
				if ok && d.job.AgentID == r.AgentID {
					outs[i].Settlement = settlementOf(d.job, r.Attempt)
					owners = append(owners, placementOwner{d.job.CertificateID, r.AgentID})
				}
				continue
			}
			if outs[i].Err = d.check(r); outs[i].Err != nil {
				continue
			}
			after := d.job
			after.State, after.FinishedAt, after.UpdatedAt = domain.JobCompleted, domain.Micro(r.At), domain.Micro(r.At)
			after.ErrorClass, after.Error = "", ""
			changes, done = append(changes, change{d.job, after}), append(done, after)
			outs[i].Settlement = settlementOf(after, r.Attempt)
			owners = append(owners, placementOwner{d.job.CertificateID, r.AgentID})

			state, servedAt := domain.PlacementInstalled, time.Time{}
			if r.ServedFingerprint != "" {
				state, servedAt = domain.PlacementServed, r.ServedAt
			}
			var due any
			if after.Generation < d.wanted && !d.revoked {
				due = micro(r.At)
			}
			v.add(after.CertificateID, after.TargetID, string(state), after.Generation, boolInt(state == domain.PlacementServed), d.fingerprint,
				strings.ToLower(r.ServedFingerprint), micro(servedAt), due, boolInt(after.Kind == domain.JobValidation),
				micro(r.At.Add(domain.DriftMemory)), micro(r.At))
			actions := []string{"certificate.deployed"}
			if after.Kind == domain.JobValidation {
				actions[0] = "certificate.verified"
			}
			if d.drifted {
				actions = append(actions, "placement.restored")
			}
			for _, action := range actions {
				err := t.audit(domain.AuditEvent{At: r.At, Actor: "agent:" + r.AgentID, Action: action,
					Resource: "certificate/" + after.CertificateID, RequestID: after.RequestID, Detail: map[string]string{
						"job": after.ID, "target": after.TargetID, "agent": after.AgentID, "state": string(state), "address": r.Address,
						"generation": strconv.FormatInt(after.Generation, 10), "fingerprint": d.fingerprint}})
				if err != nil {
					return err
				}
			}
		}
		if len(changes) > 0 {
			kept, err := t.saveJobs(changes)
			if err != nil {
				return err
			}
			if len(kept) != len(changes) {
				return errMoved
			}
			if _, err := t.exec(v.with()+`
UPDATE placement SET state = v.state, installed_generation = v.g, installed_fingerprint = v.finger,
 served_generation = CASE WHEN v.served = 1 THEN v.g ELSE placement.served_generation END,
 served_fingerprint = CASE WHEN v.served = 1 THEN v.served_finger ELSE placement.served_fingerprint END,
 served_at = CASE WHEN v.served = 1 THEN v.served_at ELSE placement.served_at END,
 due_at = CASE WHEN v.look = 1 AND v.due < placement.backoff_until THEN placement.backoff_until ELSE v.due END,
 failures = CASE WHEN placement.drifted_at > 0 OR v.look = 1 THEN placement.failures ELSE 0 END,
 backoff_until = CASE WHEN placement.drifted_at > 0 THEN v.memory WHEN v.look = 1 THEN placement.backoff_until ELSE 0 END,
 last_error = CASE WHEN v.look = 1 AND v.due IS NOT NULL THEN placement.last_error ELSE '' END, drifted_at = 0, updated_at = v.at
FROM v WHERE placement.certificate_id = v.c AND placement.target_id = v.x`, v.args...); err != nil {
				return err
			}
		}
		below, err := t.retireBelow(owners)
		if err != nil {
			return err
		}
		for i, r := range items {
			if st := &outs[i].Settlement; st.State == domain.JobCompleted {
				st.RetireBelow = below[placementOwner{st.CertificateID, r.AgentID}]
			}
		}
		return nil
	})
	return outs, err
}

// retireBelow returns the lowest generation that is installed at any placement of the (certificate, agent).
func (t *tx) retireBelow(owners []placementOwner) (map[placementOwner]int64, error) {
	found := make(map[placementOwner]int64, len(owners))
	for _, o := range owners {
		found[o] = 0
	}
	unique := make([]placementOwner, 0, len(found))
	for o := range found {
		unique = append(unique, o)
	}
	err := chunks(unique, func(owners []placementOwner) error {
		v := t.values("c text, a text")
		for _, o := range owners {
			v.add(o.certificateID, o.agentID)
		}
		return t.each(v.with()+` SELECT placement.certificate_id, placement.agent_id, MIN(placement.installed_generation)
FROM v JOIN placement ON placement.certificate_id = v.c AND placement.agent_id = v.a
WHERE placement.installed_generation > 0 GROUP BY placement.certificate_id, placement.agent_id`, v.args, func(scan func(...any) error) error {
			var o placementOwner
			var g int64
			err := scan(&o.certificateID, &o.agentID, &g)
			found[o] = g
			return err
		})
	})
	return found, err
}
