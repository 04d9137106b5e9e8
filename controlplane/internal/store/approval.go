package store

import (
	"context"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// ApproveJob lets a job that waits for approval go on at once; reason may be empty. Conflict: it does not wait for
// approval. Forbidden: op's actor ordered the certificate or asked for this job; somebody else is to look at it.
func (s *Store) ApproveJob(ctx context.Context, jobID, reason string, op domain.Op) (domain.Job, error) {
	return s.decide(ctx, "job.approve", "job.approved", jobID, reason, op, func(t *tx, j domain.Job) (domain.Job, error) {
		after := j
		after.State = j.Kind.InitialState()
		after.RunAt, after.UpdatedAt = domain.Micro(op.At), domain.Micro(op.At)
		kept, err := t.saveJobs([]change{{j, after}})
		if err == nil && !kept[j.ID] {
			err = errMoved
		}
		return after, err
	})
}

// RejectJob cancels a job that waits for approval, with reason as its error. What it was for is still wanted: its leaf is
// due again after an hour's rest. Errors as ApproveJob, and Invalid without a reason.
func (s *Store) RejectJob(ctx context.Context, jobID, reason string, op domain.Op) (domain.Job, error) {
	if reason == "" {
		return domain.Job{}, fault.InvalidField("reason", "is empty; say why the job is rejected")
	}
	return s.decide(ctx, "job.reject", "job.rejected", jobID, reason, op, func(t *tx, j domain.Job) (domain.Job, error) {
		return t.cancelOne(j, "rejected by "+op.Actor+": "+reason, op)
	})
}

// decide does what approving and rejecting share.
func (s *Store) decide(ctx context.Context, name, action, jobID, reason string, op domain.Op, end func(*tx, domain.Job) (domain.Job, error)) (domain.Job, error) {
	if err := checkTexts("reason", reason); err != nil {
		return domain.Job{}, err
	}
	var job domain.Job
	err := s.settled(ctx, name, func(t *tx) error {
		j, err := t.job(jobID)
		if err != nil {
			return err
		}
		if j.State != domain.JobAwaitingApproval {
			if t.again {
				if kept, err := t.decided(action, j.ID, op); err != nil || kept {
					job = j
					return err
				}
			}
			return fault.New(fault.Conflict, "job %s is %s and waits for nobody's approval; certmesh jobs list --state AwaitingApproval shows what does", j.ID, j.State)
		}
		if err := t.fourEyes(j, op.Actor); err != nil {
			return err
		}
		if job, err = end(t, j); err != nil {
			return err
		}
		return t.auditOp(op, action, "job/"+j.ID, map[string]string{"certificate": j.CertificateID, "agent": j.AgentID,
			"kind": string(j.Kind), "reason": reason})
	})
	if err != nil {
		return domain.Job{}, err
	}
	return job, nil
}

// decided reports whether the trail has this very decision.
func (t *tx) decided(action, jobID string, op domain.Op) (bool, error) {
	n, err := t.count("SELECT COUNT(*) FROM audit WHERE resource = $1 AND action = $2 AND actor = $3 AND at = $4",
		"job/"+jobID, action, op.Actor, micro(op.At))
	return n > 0, err
}

// fourEyes refuses a decision on what its maker asked for. Who ordered the certificate is on it; who asked for the job is
// in the trail, in the row that its creation wrote: that is never deleted or changed.
func (t *tx) fourEyes(j domain.Job, actor string) error {
	orderer, err := one(t, certificateKind.missing(j.CertificateID), "SELECT created_by FROM certificate WHERE id = $1", []any{j.CertificateID}, scanText)
	if err != nil {
		return err
	}
	if orderer == actor {
		return fault.New(fault.Forbidden, "%s ordered this certificate, so somebody else must decide on job %s; use another person's key", actor, j.ID)
	}
	n, err := t.count("SELECT COUNT(*) FROM audit WHERE resource = $1 AND action = $2 AND actor = $3", "job/"+j.ID, "job.created", actor)
	if err != nil {
		return err
	}
	if n > 0 {
		return fault.New(fault.Forbidden, "%s asked for job %s, so somebody else must decide on it; use another person's key", actor, j.ID)
	}
	return nil
}
