package store

import (
	"context"
	"strconv"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

// DeployCertificate opens a Deployment of what is issued at every placement of a certificate (id or name) now, whatever
// its back-off and also where it is current already, or returns the one that is open; by agent and target. A validation that is
// open gives way. Left out are leaves of which nothing is issued, that are revoked or at retired agents, and targets that
// are disabled. Conflict when no placement is left, or the certificate is revoked or archived.
func (s *Store) DeployCertificate(ctx context.Context, certificateID, reason string, op domain.Op) ([]domain.Job, error) {
	if err := checkTexts("reason", reason); err != nil {
		return nil, err
	}
	var jobs []domain.Job
	// Drawn here and again the same in each run, so that a run after a commit without an answer knows its own jobs.
	var drawn []string
	err := s.settled(ctx, "certificate.deploy", func(t *tx) error {
		jobs = nil
		c, err := find(t, certificateKind, "SELECT "+certificateColumns+" FROM certificate", certificateID, scanCertificate)
		if err != nil {
			return err
		}
		if c.Status == domain.CertificateRevoked || c.Status == domain.CertificateArchived {
			return fault.New(fault.Conflict, "certificate %q is %s and is not deployed; order a new one with certs create", c.Name, c.Status)
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
		var yield []change
		why := deployRefusal{}
		due := map[placementID]time.Time{}
		for _, k := range keys {
			st := states[k]
			for _, at := range placements[k] {
				switch {
				case st.ended() != nil:
					why.ended++
					continue
				case st.leaf.Current == 0:
					why.unissued++
					continue
				case !at.target.Enabled:
					why.disabled++
					continue
				case at.hasOpen && at.open.Kind == domain.JobDeployment:
					jobs = append(jobs, at.open)
					continue
				case at.hasOpen:
					yield = append(yield, change{at.open, cancelled(at.open, "a deployment was ordered", op)})
				}
				if len(created) == len(drawn) {
					drawn = append(drawn, t.s.newID(id.Job))
				}
				j := newJob(drawn[len(created)], domain.JobDeployment, c.ID, k.agentID, at.target.ID, st.leaf.Current, reason, op.RequestID, op.At)
				created, jobs = append(created, j), append(jobs, j)
				due[placementID{c.ID, at.target.ID}] = time.Time{}
			}
		}
		if len(jobs) == 0 {
			return why.of(c.Name)
		}
		if len(created) == 0 {
			return nil
		}
		kept, err := t.saveJobs(yield)
		if err != nil {
			return err
		}
		if len(kept) != len(yield) {
			return errMoved
		}
		for _, y := range yield {
			if err := t.auditOp(op, "job.cancelled", "job/"+y.after.ID, map[string]string{"certificate": c.ID, "reason": y.after.Error}); err != nil {
				return err
			}
		}
		if err := t.createAll(created, op); err != nil {
			return err
		}
		if err := t.placementsDue(due); err != nil {
			return err
		}
		if err := t.restless(c.ID, created); err != nil {
			return err
		}
		return t.auditOp(op, "certificate.deployment_ordered", "certificate/"+c.ID, map[string]string{"reason": reason, "jobs": strconv.Itoa(len(created))})
	})
	if err != nil {
		return nil, err
	}
	return jobs, nil
}

// restless ends the back-off of the placements of jobs.
func (t *tx) restless(certificateID string, jobs []domain.Job) error {
	var targets []string
	for _, j := range jobs {
		targets = append(targets, j.TargetID)
	}
	return chunks(targets, func(ids []string) error {
		in, args := inList(2, ids)
		_, err := t.exec("UPDATE placement SET backoff_until = 0 WHERE certificate_id = $1 AND backoff_until > 0 AND target_id IN "+in,
			append([]any{certificateID}, args...)...)
		return err
	})
}

// deployRefusal counts why placements of a certificate are not deployed.
type deployRefusal struct{ ended, unissued, disabled int }

func (r deployRefusal) of(name string) error {
	switch {
	case r.unissued > 0:
		return fault.New(fault.Conflict, "nothing of certificate %q is issued yet, so there is nothing to deploy; certs why tells what it waits for", name)
	case r.disabled > 0:
		return fault.New(fault.Conflict, "every target of certificate %q is disabled; enable one, then deploy", name)
	default:
		return fault.New(fault.Conflict, "certificate %q has no placement left to deploy: its leaves are revoked or at retired agents; order a new one with certs create", name)
	}
}
