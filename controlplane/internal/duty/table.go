package duty

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/renew"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Names of the duties, used by Trigger and in duty_fence.
const (
	RenewalCheck     = "renewal_check"
	JobProcessor     = "job_processor"
	JobRetry         = "job_retry"
	JobTimeout       = "job_timeout"
	AgentHealth      = "agent_health"
	ShortLivedExpiry = "short_lived_expiry"
	CRLGeneration    = "crl_generation"
	Retention        = "retention"
)

// Store is what the duties read and write.
type Store interface {
	DueLeaves(ctx context.Context, shard int, now time.Time, limit int) ([]domain.DueLeaf, error)
	PostponeLeaf(ctx context.Context, f domain.Fence, certificateID, agentID string, dueAt time.Time) error
	CreateLeafJobs(ctx context.Context, f domain.Fence, jobs []domain.NewJob, op domain.Op) ([]domain.NewJobOutcome, error)
	DuePlacements(ctx context.Context, shard int, now time.Time, limit int) ([]domain.DuePlacement, error)
	CreateDeployments(ctx context.Context, f domain.Fence, jobs []domain.NewJob, op domain.Op) ([]domain.NewJobOutcome, error)
	ReapJobs(ctx context.Context, f domain.Fence, limits domain.ReapLimits, now time.Time, limit int) ([]domain.Job, error)
	NextDue(ctx context.Context) (domain.NextDue, error)
	SweepStatuses(ctx context.Context, f domain.Fence, shard int, now time.Time, limit int) (int, error)
	AgentsWithOpenJobs(ctx context.Context, node string, limit int) ([]string, error)
	SweepAgents(ctx context.Context, f domain.Fence, staleBefore, offlineBefore, now time.Time) (int, error)
	Retain(ctx context.Context, f domain.Fence, finishedBefore time.Time, now time.Time, limit int) (int, error)
}

// CRLBuilder builds the CRLs that are due; it says when the next one is.
type CRLBuilder interface {
	Build(ctx context.Context, f domain.Fence, now time.Time) (next time.Time, err error)
}

// Settings are the intervals and thresholds an operator may change.
type Settings struct {
	RenewalCheck, JobProcessor, JobRetry, JobTimeout, AgentHealth, ShortLivedExpiry, CRLGeneration, Retention time.Duration

	Limits domain.ReapLimits
	// AgentStale and AgentOffline are how long an agent may be silent.
	AgentStale, AgentOffline time.Duration
	// KeepJobs is how long finished jobs are kept.
	KeepJobs time.Duration
}

// Deps are what Table is made from.
type Deps struct {
	Node     string
	Store    Store
	CRLs     CRLBuilder
	Settings Settings
	// Since is when this node started: agents could not reach it before and are not judged by silence until they have had
	// as long as any.
	Since time.Time
	// Wake tells the node that holds an agent's stream to look for work, WakeHeld this node alone, about agents that it
	// holds.
	Wake     func(agentID string)
	WakeHeld func(agentIDs []string)
	Log      *slog.Logger
}

// batch is how many rows one transaction of a duty touches: enough to amortise the commit, few enough to stay far
// below a session's time-out.
const batch = 100

// scan is how many due rows one shard yields to one run; what is left is due again at once.
const scan = 1000

// Table is the one list of duties.
func Table(d Deps) []Duty {
	s := d.Settings
	return []Duty{
		{Name: RenewalCheck, Interval: s.RenewalCheck, Deadline: 5 * time.Minute, Fenced: true, Run: d.renewalCheck},
		{Name: JobProcessor, Interval: s.JobProcessor, Deadline: time.Minute, Run: d.jobProcessor},
		{Name: JobRetry, Interval: s.JobRetry, Deadline: 5 * time.Minute, Fenced: true, Run: d.jobRetry},
		{Name: JobTimeout, Interval: s.JobTimeout, Deadline: 5 * time.Minute, Fenced: true, Run: d.jobTimeout},
		{Name: AgentHealth, Interval: s.AgentHealth, Deadline: time.Minute, Fenced: true, Run: d.agentHealth},
		{Name: ShortLivedExpiry, Interval: s.ShortLivedExpiry, Deadline: time.Minute, Fenced: true, Run: d.expiry},
		{Name: CRLGeneration, Interval: s.CRLGeneration, Deadline: 5 * time.Minute, Fenced: true, Run: d.CRLs.Build},
		{Name: Retention, Interval: s.Retention, Deadline: 5 * time.Minute, Fenced: true, Run: d.retention},
	}
}

func (d Deps) op(duty string, now time.Time) domain.Op {
	return domain.Op{Actor: "node:" + d.Node, RequestID: duty, At: domain.Micro(now)}
}

// renewalCheck makes a job for every leaf that is due and puts off those that are not.
func (d Deps) renewalCheck(ctx context.Context, f domain.Fence, now time.Time) (time.Time, error) {
	for shard := range domain.Shards {
		due, err := d.Store.DueLeaves(ctx, shard, now, scan)
		if err != nil {
			return time.Time{}, fmt.Errorf("find due leaves: %w", err)
		}
		var jobs []domain.NewJob
		for _, l := range due {
			why := renew.Why(l.Leaf, l.Policy, l.Profile, l.Status, now, l.OpenJob)
			if why.Due {
				jobs = append(jobs, domain.NewJob{Kind: domain.JobRenewal, CertificateID: l.Leaf.CertificateID,
					AgentID: l.Leaf.AgentID, Reason: why.Reason})
				continue
			}
			err := d.Store.PostponeLeaf(ctx, f, l.Leaf.CertificateID, l.Leaf.AgentID, why.At)
			if fault.Is(err, fault.Conflict) {
				// Either an operator's renewal was quicker, or the duty was lost: an empty batch of jobs tells.
				_, err = d.Store.CreateLeafJobs(ctx, f, nil, d.op(RenewalCheck, now))
			}
			if err != nil {
				return time.Time{}, fmt.Errorf("put off a leaf that is not due: %w", err)
			}
		}
		if err := d.create(ctx, f, jobs, d.op(RenewalCheck, now), d.Store.CreateLeafJobs); err != nil {
			return time.Time{}, fmt.Errorf("create renewal jobs: %w", err)
		}
	}
	next, err := d.Store.NextDue(ctx)
	return next.Leaf, err
}

// jobRetry makes deployment jobs for placements that do not hold what they should and whose back-off has passed. All that
// are due go to the store, also those that get no job: it decides in the same transaction when they are due again.
func (d Deps) jobRetry(ctx context.Context, f domain.Fence, now time.Time) (time.Time, error) {
	for shard := range domain.Shards {
		due, err := d.Store.DuePlacements(ctx, shard, now, scan)
		if err != nil {
			return time.Time{}, fmt.Errorf("find placements that lag: %w", err)
		}
		var jobs []domain.NewJob
		for _, p := range due {
			jobs = append(jobs, domain.NewJob{Kind: domain.JobDeployment, CertificateID: p.Placement.CertificateID,
				AgentID: p.Placement.AgentID, TargetID: p.Placement.TargetID,
				Reason: placementReason(p)})
		}
		if err := d.create(ctx, f, jobs, d.op(JobRetry, now), d.Store.CreateDeployments); err != nil {
			return time.Time{}, fmt.Errorf("create deployment jobs: %w", err)
		}
	}
	next, err := d.Store.NextDue(ctx)
	return next.Placement, err
}

type creator func(context.Context, domain.Fence, []domain.NewJob, domain.Op) ([]domain.NewJobOutcome, error)

// create writes jobs in batches and, after each commit, wakes their agents. A Conflict about one job is a verdict, not a
// failure: what was due when it was read is not any more. It must not pass for the loss of the duty.
func (d Deps) create(ctx context.Context, f domain.Fence, jobs []domain.NewJob, op domain.Op, with creator) error {
	var failed []error
	for len(jobs) > 0 {
		n := min(batch, len(jobs))
		outcomes, err := with(ctx, f, jobs[:n], op)
		if err != nil {
			return err
		}
		for i, o := range outcomes {
			switch {
			case fault.Is(o.Err, fault.Conflict):
				d.Log.Info("no job is needed", "kind", jobs[i].Kind, "certificate", jobs[i].CertificateID, "agent", jobs[i].AgentID,
					"target", jobs[i].TargetID, "reason", o.Err)
			case o.Err != nil:
				failed = append(failed, fmt.Errorf("%s for %s: %w", jobs[i].Kind, jobs[i].CertificateID, o.Err))
			case o.Created:
				d.Wake(o.Job.AgentID)
			}
		}
		jobs = jobs[n:]
	}
	if len(failed) > 0 {
		return fmt.Errorf("%d jobs could not be created, the first: %w", len(failed), failed[0])
	}
	return nil
}

// jobProcessor is the safety net under wake-ups: it wakes the agents of this node that have open jobs.
func (d Deps) jobProcessor(ctx context.Context, _ domain.Fence, _ time.Time) (time.Time, error) {
	agents, err := d.Store.AgentsWithOpenJobs(ctx, d.Node, 10*scan)
	if err != nil {
		return time.Time{}, fmt.Errorf("find agents with open jobs: %w", err)
	}
	d.WakeHeld(agents)
	return time.Time{}, nil
}

// jobTimeout ends jobs that stand still although their agent is online.
func (d Deps) jobTimeout(ctx context.Context, f domain.Fence, now time.Time) (time.Time, error) {
	for {
		reaped, err := d.Store.ReapJobs(ctx, f, d.Settings.Limits, now, batch)
		if err != nil {
			return time.Time{}, fmt.Errorf("reap jobs: %w", err)
		}
		for _, j := range reaped {
			d.Log.Warn("job reaped", "job", j.ID, "kind", j.Kind, "agent", j.AgentID, "reason", j.Error)
			d.Wake(j.AgentID)
		}
		if len(reaped) < batch {
			return time.Time{}, nil
		}
	}
}

func (d Deps) agentHealth(ctx context.Context, f domain.Fence, now time.Time) (time.Time, error) {
	if grace := d.Since.Add(d.Settings.AgentOffline); now.Before(grace) {
		return grace, nil
	}
	_, err := d.Store.SweepAgents(ctx, f, now.Add(-d.Settings.AgentStale), now.Add(-d.Settings.AgentOffline), now)
	if err != nil {
		return time.Time{}, fmt.Errorf("sweep agents: %w", err)
	}
	return time.Time{}, nil
}

// expiry moves statuses that change by time alone (Expiring, Expired), short-lived certificates included: the sweep goes
// by an index on when each changes, so the short interval costs nothing on a large estate.
func (d Deps) expiry(ctx context.Context, f domain.Fence, now time.Time) (time.Time, error) {
	for shard := range domain.Shards {
		for {
			n, err := d.Store.SweepStatuses(ctx, f, shard, now, batch)
			if err != nil {
				return time.Time{}, fmt.Errorf("sweep statuses: %w", err)
			}
			if n < batch {
				break
			}
		}
	}
	next, err := d.Store.NextDue(ctx)
	return next.Status, err
}

func (d Deps) retention(ctx context.Context, f domain.Fence, now time.Time) (time.Time, error) {
	for {
		n, err := d.Store.Retain(ctx, f, now.Add(-d.Settings.KeepJobs), now, batch)
		if err != nil {
			return time.Time{}, fmt.Errorf("drop old rows: %w", err)
		}
		if n < batch {
			return time.Time{}, nil
		}
	}
}

func placementReason(p domain.DuePlacement) string {
	if !p.Placement.DriftedAt.IsZero() {
		return fmt.Sprintf("it was found changed at %s", p.Placement.DriftedAt.UTC().Format(time.RFC3339))
	}
	if p.Placement.InstalledGeneration >= p.Wanted {
		return fmt.Sprintf("the last deployment of generation %d failed", p.Wanted)
	}
	return fmt.Sprintf("generation %d is wanted, %d is held", p.Wanted, p.Placement.InstalledGeneration)
}
