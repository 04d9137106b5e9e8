package store

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

// RecordObservation records what an agent found at a target by itself: drift makes the placement due, an end of it restores
// the placement. changed is false when that says nothing new: it is recorded already, another generation was deployed
// since, or a deployment is open, which puts the target right or tells why not. NotFound: the agent has no such
// placement, or no such generation was issued to it.
func (s *Store) RecordObservation(ctx context.Context, o domain.Observation) (changed bool, err error) {
	if err := checkTexts("certificate_id", o.CertificateID, "target_id", o.TargetID, "problem", o.Problem); err != nil {
		return false, err
	}
	o.InstalledFingerprint, o.ServedFingerprint = strings.ToLower(o.InstalledFingerprint), strings.ToLower(o.ServedFingerprint)
	o.At = domain.Micro(o.At)
	key := placementID{o.CertificateID, o.TargetID}
	none := fault.New(fault.NotFound, "there is no placement of %s at %s with generation %d of this agent", o.CertificateID, o.TargetID, o.Generation)
	err = s.settled(ctx, "placement.observe", func(t *tx) error {
		// After a commit without an answer the change may be there already; its duties are woken all the same.
		changed = t.again
		states, err := t.placementStates([]placementID{key})
		if err != nil {
			return err
		}
		st, ok := states[key]
		if !ok || st.placement.AgentID != o.AgentID {
			return none
		}
		var fingerprint string
		err = t.queryRow("SELECT fingerprint FROM version WHERE certificate_id = $1 AND agent_id = $2 AND generation = $3",
			o.CertificateID, o.AgentID, o.Generation).Scan(&fingerprint)
		if isNoRows(err) {
			return none
		}
		if err != nil {
			return err
		}
		open, err := t.openJobs([]string{placementKey(o.CertificateID, o.TargetID)})
		if err != nil {
			return err
		}
		job, busy := open[placementKey(o.CertificateID, o.TargetID)]
		if busy && job.Kind != domain.JobValidation {
			return nil
		}
		before := st.placement
		p := before.Observed(o, fingerprint, st.probed)
		if p == before {
			return nil
		}
		changed = true
		var due any
		if !busy && !st.revoked && p.Lags(st.wanted) {
			due = micro(p.DueAt(o.At))
		}
		if _, err := t.exec(`UPDATE placement SET state = $3, installed_generation = $4, served_generation = $5, installed_fingerprint = $6,
 served_fingerprint = $7, served_at = $8, due_at = $9, failures = $10, backoff_until = $11, last_error = $12, drifted_at = $13, updated_at = $14
WHERE certificate_id = $1 AND target_id = $2`, o.CertificateID, o.TargetID, string(p.State), p.InstalledGeneration, p.ServedGeneration,
			p.InstalledFingerprint, p.ServedFingerprint, micro(p.ServedAt), due, p.Failures, micro(p.BackoffUntil), p.LastError,
			micro(p.DriftedAt), micro(p.UpdatedAt)); err != nil {
			return err
		}
		switch {
		case before.DriftedAt.IsZero():
			return t.auditDrift(before, o.Generation, o.Problem, o.RequestID, o.At)
		case p.DriftedAt.IsZero():
			return t.audit(driftEvent("placement.restored", p, o.Generation, o.RequestID, o.At))
		}
		return nil
	})
	return changed && err == nil, err
}

func driftEvent(action string, p domain.Placement, generation int64, requestID string, at time.Time) domain.AuditEvent {
	return domain.AuditEvent{At: at, Actor: "agent:" + p.AgentID, Action: action, Resource: "certificate/" + p.CertificateID, RequestID: requestID,
		Detail: map[string]string{"target": p.TargetID, "agent": p.AgentID, "generation": strconv.FormatInt(generation, 10)}}
}

// auditDrift puts the beginning of a drift into the trail; p is the placement before it.
func (t *tx) auditDrift(p domain.Placement, generation int64, problem, requestID string, at time.Time) error {
	if !p.DriftedAt.IsZero() {
		return nil
	}
	e := driftEvent("placement.drifted", p, generation, requestID, at)
	e.Detail["problem"] = problem
	return t.audit(e)
}

// VerifyCertificate opens a Validation of what was deployed last at every placement of a certificate (id or name), or
// returns the job of the placement that is open; by agent and target. Left out are leaves that are revoked or at retired
// agents, targets that are disabled, and placements at which nothing was deployed yet. Conflict when none is left, or the
// certificate is revoked or archived.
func (s *Store) VerifyCertificate(ctx context.Context, certificateID, reason string, op domain.Op) ([]domain.Job, error) {
	if err := checkTexts("reason", reason); err != nil {
		return nil, err
	}
	var jobs []domain.Job
	// Drawn here and again the same in each run, so that a run after a commit without an answer knows its own jobs.
	var drawn []string
	err := s.settled(ctx, "certificate.verify", func(t *tx) error {
		jobs = nil
		c, err := find(t, certificateKind, "SELECT "+certificateColumns+" FROM certificate", certificateID, scanCertificate)
		if err != nil {
			return err
		}
		if c.Status == domain.CertificateRevoked || c.Status == domain.CertificateArchived {
			return fault.New(fault.Conflict, "certificate %q is %s and is not looked after; order a new one with certs create", c.Name, c.Status)
		}
		leaves, err := t.certificateLeaves(c.ID)
		if err != nil {
			return err
		}
		var keys []leafID
		for _, l := range leaves {
			keys = append(keys, leafID{c.ID, l.AgentID})
		}
		states, err := t.leafStates(keys)
		if err != nil {
			return err
		}
		placements, err := t.placementsOf(keys)
		if err != nil {
			return err
		}
		var created []domain.Job
		due := map[placementID]time.Time{}
		undeployed := false
		for _, k := range keys {
			st := states[k]
			for _, at := range placements[k] {
				generation := at.placement.InstalledGeneration
				if generation == 0 && !at.placement.DriftedAt.IsZero() {
					generation = st.leaf.Current
				}
				switch {
				case st.ended() != nil || !at.target.Enabled:
					continue
				case at.hasOpen:
					jobs = append(jobs, at.open)
					continue
				case generation == 0:
					undeployed = true
					continue
				}
				if len(created) == len(drawn) {
					drawn = append(drawn, t.s.newID(id.Job))
				}
				j := newJob(drawn[len(created)], domain.JobValidation, c.ID, k.agentID, at.target.ID, generation, reason, op.RequestID, op.At)
				created, jobs = append(created, j), append(jobs, j)
				due[placementID{c.ID, at.target.ID}] = time.Time{}
			}
		}
		switch {
		case len(jobs) == 0 && undeployed:
			return fault.New(fault.Conflict, "certificate %q is deployed nowhere yet, so there is nothing to verify; certs why tells what it waits for", c.Name)
		case len(jobs) == 0:
			return fault.New(fault.Conflict, "certificate %q has no placement to verify: its targets are disabled, its leaves revoked or at retired agents", c.Name)
		case len(created) == 0:
			return nil
		}
		if err := t.createAll(created, op); err != nil {
			return err
		}
		return t.placementsDue(due)
	})
	if err != nil {
		return nil, err
	}
	return jobs, nil
}
