package store

import (
	"context"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

// A leaf's due_at is NULL exactly while one of its jobs is open, or when it will never be due again. Whatever opens a leaf
// job clears it; whatever ends one sets it.

type leafID struct{ certificateID, agentID string }

// leafState is a leaf with what decides whether it may be due.
type leafState struct {
	leaf   domain.Leaf
	status domain.CertificateStatus
	policy domain.Policy
	owner  string
	agent  domain.AgentState
}

// never reports that no duty will renew the leaf.
func (l leafState) never() bool {
	return l.ended() != nil || l.policy.Disabled && l.leaf.Current > 0
}

// ended refuses jobs for a leaf that is no longer kept.
func (l leafState) ended() error {
	switch {
	case l.status == domain.CertificateArchived:
		return fault.New(fault.Conflict, "certificate %s is archived and is not renewed", l.leaf.CertificateID)
	case l.leaf.Revoked || l.status == domain.CertificateRevoked:
		return fault.New(fault.Conflict, "certificate %s is revoked at agent %s and is not renewed", l.leaf.CertificateID, l.leaf.AgentID)
	case l.agent == domain.AgentRetired:
		return fault.New(fault.Conflict, "agent %s is retired", l.leaf.AgentID)
	}
	return nil
}

func (t *tx) leafStates(keys []leafID) (map[leafID]leafState, error) {
	found := make(map[leafID]leafState, len(keys))
	err := chunks(keys, func(keys []leafID) error {
		v := t.values("c text, a text")
		for _, k := range keys {
			v.add(k.certificateID, k.agentID)
		}
		// The agent's state by a subquery: joined, it tempts a planner without statistics to read all leaves of an agent.
		return t.each(v.with()+" SELECT "+leafColumns+`, certificate.status, certificate.policy, certificate.owner,
 (SELECT agent.state FROM agent WHERE agent.id = leaf.agent_id)
FROM v JOIN leaf ON leaf.certificate_id = v.c AND leaf.agent_id = v.a
JOIN certificate ON certificate.id = leaf.certificate_id`, v.args, func(scan func(...any) error) error {
			var l leafRow
			var s leafState
			var policy string
			if err := scan(append(l.dest(), &s.status, &policy, &s.owner, &s.agent)...); err != nil {
				return err
			}
			if err := fromJSON(policy, &s.policy); err != nil {
				return err
			}
			s.leaf = l.toDomain()
			found[leafID{s.leaf.CertificateID, s.leaf.AgentID}] = s
			return nil
		})
	})
	return found, err
}

// restLeaves counts a failure, or a cancellation (which counts nothing and rests an hour), and makes the leaves due again.
func (t *tx) restLeaves(ended []domain.Job) error {
	var keys []leafID
	for _, j := range ended {
		keys = append(keys, leafID{j.CertificateID, j.AgentID})
	}
	states, err := t.leafStates(keys)
	if err != nil {
		return err
	}
	v := t.values("c text, a text, failures int, until int, due int, error text")
	abandoned := t.values("c text, a text, g int")
	for i, j := range ended {
		s, ok := states[keys[i]]
		if !ok {
			continue
		}
		failures := s.leaf.Failures
		if j.State == domain.JobFailed {
			failures++
		}
		until := domain.Micro(j.FinishedAt.Add(domain.FailureBackoff(max(failures, 1))))
		var due any
		if !s.never() {
			due = micro(until)
		}
		v.add(j.CertificateID, j.AgentID, failures, micro(until), due, j.Error)
		abandoned.add(j.CertificateID, j.AgentID, j.Generation)
	}
	if v.rows == 0 {
		return nil
	}
	if _, err := t.exec(v.with()+`
UPDATE leaf SET failures = v.failures, backoff_until = v.until, due_at = v.due, last_error = v.error
FROM v WHERE leaf.certificate_id = v.c AND leaf.agent_id = v.a`, v.args...); err != nil {
		return err
	}
	// The next job has the next generation: what was to be signed for this one never will be.
	text := abandoned.with()
	_, err = t.exec(text+`
UPDATE intent SET state = `+abandoned.arg(string(domain.IntentAbandoned))+`
FROM v WHERE intent.certificate_id = v.c AND intent.agent_id = v.a AND intent.generation = v.g AND intent.state = `+
		abandoned.arg(string(domain.IntentOpen)), abandoned.args...)
	return err
}

// DueLeaves returns leaves of a shard whose DueAt has come, the longest due first. Leaves of one batch may share what their
// policies and profiles hold: it is only to be read.
func (s *Store) DueLeaves(ctx context.Context, shard int, now time.Time, limit int) ([]domain.DueLeaf, error) {
	var due []domain.DueLeaf
	err := s.read(ctx, "leaf.due", func(t *tx) error {
		due = nil
		// Of a thousand leaves nearly all have one of a few policies and profiles: each is read and parsed once.
		policies := map[string]domain.Policy{}
		profiles := map[string]domain.Profile{}
		err := t.each("SELECT "+leafColumns+`, certificate.status, certificate.policy, certificate.profile_id, CASE WHEN job.id IS NULL THEN 0 ELSE 1 END
FROM leaf JOIN certificate ON certificate.id = leaf.certificate_id
LEFT JOIN job ON job.open_key = 'leaf:' || leaf.certificate_id || ':' || leaf.agent_id
WHERE leaf.shard = $1 AND leaf.due_at <= $2 ORDER BY leaf.due_at LIMIT $3`, []any{shard, micro(now), limit}, func(scan func(...any) error) error {
			var l leafRow
			var d domain.DueLeaf
			var policy string
			var open int
			if err := scan(append(l.dest(), &d.Status, &policy, &d.Profile.ID, &open)...); err != nil {
				return err
			}
			p, ok := policies[policy]
			if !ok {
				if err := fromJSON(policy, &p); err != nil {
					return err
				}
				policies[policy] = p
			}
			d.Leaf, d.Policy, d.OpenJob = l.toDomain(), p, open == 1
			profiles[d.Profile.ID] = domain.Profile{}
			due = append(due, d)
			return nil
		})
		if err != nil || len(due) == 0 {
			return err
		}
		ids := slices.Sorted(maps.Keys(profiles))
		clear(profiles)
		err = chunks(ids, func(ids []string) error {
			in, args := inList(1, ids)
			found, err := collect(t, "SELECT "+profileColumns+" FROM profile WHERE profile.id IN "+in, args, scanProfile)
			for _, p := range found {
				profiles[p.ID] = p
			}
			return err
		})
		kept := due[:0]
		for _, d := range due {
			if p, ok := profiles[d.Profile.ID]; ok {
				d.Profile = p
				kept = append(kept, d)
			}
		}
		due = kept
		return err
	})
	return due, err
}

// PostponeLeaf moves the time at which a due leaf is looked at again; the zero time: never. Conflict: the duty was lost,
// or the leaf is not due (a job was opened meanwhile).
func (s *Store) PostponeLeaf(ctx context.Context, f domain.Fence, certificateID, agentID string, dueAt time.Time) error {
	return s.settled(ctx, "leaf.postpone", func(t *tx) error {
		if err := t.fence(f); err != nil {
			return err
		}
		n, err := t.exec("UPDATE leaf SET due_at = $1 WHERE certificate_id = $2 AND agent_id = $3 AND (due_at IS NOT NULL OR $4 = 1)",
			nullMicro(dueAt), certificateID, agentID, boolInt(t.again && dueAt.IsZero()))
		if err != nil || n == 1 {
			return err
		}
		return fault.New(fault.Conflict, "the leaf of certificate %s at agent %s is not due", certificateID, agentID)
	})
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// CreateLeafJobs opens an Issuance (nothing issued yet) or a Renewal per item, with the leaf's next generation. An item
// whose leaf has an open job already gets that one. Kind and TargetID of the items are not looked at. The fence is not
// optional: operators' renewals have a method of their own. Conflict per item: revoked, archived or retired.
func (s *Store) CreateLeafJobs(ctx context.Context, f domain.Fence, items []domain.NewJob, op domain.Op) ([]domain.NewJobOutcome, error) {
	if f.Duty == "" {
		return nil, fault.New(fault.Internal, "leaf jobs are created under a duty's fence")
	}
	var outs []domain.NewJobOutcome
	ids := s.newIDs(id.Job, len(items))
	err := s.settled(ctx, "leaf.jobs", func(t *tx) error {
		if err := t.fence(f); err != nil {
			return err
		}
		var err error
		outs, err = t.openLeafJobs(items, ids, op)
		return err
	})
	if err != nil {
		return nil, err
	}
	return outs, nil
}

func (s *Store) newIDs(prefix string, n int) []string {
	ids := make([]string, n)
	for i := range ids {
		ids[i] = s.newID(prefix)
	}
	return ids
}

// openLeafJobs is CreateLeafJobs inside a transaction, for operators' renewals too. ids are the new jobs' ids, one an item.
// Run again it finds its own jobs, which it knows by their ids.
func (t *tx) openLeafJobs(items []domain.NewJob, ids []string, op domain.Op) ([]domain.NewJobOutcome, error) {
	outs := make([]domain.NewJobOutcome, len(items))
	keys := make([]leafID, len(items))
	names := make([]string, len(items))
	for i, n := range items {
		keys[i] = leafID{n.CertificateID, n.AgentID}
		names[i] = leafKey(n.CertificateID, n.AgentID)
	}
	states, err := t.leafStates(keys)
	if err != nil {
		return nil, err
	}
	open, err := t.openJobs(names)
	if err != nil {
		return nil, err
	}
	var jobs []domain.Job
	var certs []string
	for i, n := range items {
		st, ok := states[keys[i]]
		if !ok {
			outs[i].Err = notFound("leaf", n.CertificateID+" at "+n.AgentID)
			continue
		}
		if j, ok := open[names[i]]; ok {
			outs[i] = domain.NewJobOutcome{Job: j, Created: j.ID == ids[i]}
			continue
		}
		if outs[i].Err = st.ended(); outs[i].Err != nil {
			continue
		}
		kind := domain.JobRenewal
		if st.leaf.Current == 0 {
			kind = domain.JobIssuance
		}
		j := newJob(ids[i], kind, n.CertificateID, n.AgentID, "", st.leaf.Generation+1, n.Reason, op.RequestID, op.At)
		j.State = st.policy.FirstState(kind)
		open[names[i]] = j
		outs[i] = domain.NewJobOutcome{Job: j, Created: true}
		jobs, certs = append(jobs, j), append(certs, j.CertificateID)
	}
	if len(jobs) == 0 {
		return outs, nil
	}
	if err := t.createAll(jobs, op); err != nil {
		return nil, err
	}
	err = chunks(jobs, func(jobs []domain.Job) error {
		v := t.values("c text, a text, g int")
		for _, j := range jobs {
			v.add(j.CertificateID, j.AgentID, j.Generation)
		}
		_, err := t.exec(v.with()+`
UPDATE leaf SET generation = v.g, due_at = NULL FROM v
WHERE leaf.certificate_id = v.c AND leaf.agent_id = v.a AND leaf.generation < v.g`, v.args...)
		return err
	})
	if err != nil {
		return nil, err
	}
	return outs, t.restatus(certs, op.At)
}

// createAll inserts jobs of which this transaction has seen that none is open, with an audit row each.
func (t *tx) createAll(jobs []domain.Job, op domain.Op) error {
	created, err := t.insertJobs(jobs)
	if err != nil {
		return err
	}
	if len(created) != len(jobs) {
		return errMoved
	}
	for _, j := range jobs {
		if err := t.auditOp(op, "job.created", "job/"+j.ID, createdDetail(j)); err != nil {
			return err
		}
	}
	return nil
}

// createdDetail is what the trail says of a new job.
func createdDetail(j domain.Job) map[string]string {
	return map[string]string{"kind": string(j.Kind), "certificate": j.CertificateID, "agent": j.AgentID, "target": j.TargetID,
		"generation": strconv.FormatInt(j.Generation, 10), "reason": j.Reason}
}
