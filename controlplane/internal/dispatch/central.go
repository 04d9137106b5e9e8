package dispatch

import (
	"context"
	"sync"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Permits cap the calls in flight toward an issuer; *permit.Permits do.
type Permits interface {
	// Do waits for a permit, runs fn under it and returns fn's error. Retryable, without calling fn, when ctx ends first.
	Do(ctx context.Context, issuerID string, fn func(ctx context.Context) error) error
}

// Central runs work that no agent owns, under the permits of its issuers.
type Central struct {
	Permits Permits
	// Workers bounds the jobs toward one issuer that wait for permits or are under way at once; 0 or less counts as 1. More
	// than the issuer's cap are of no use.
	Workers int
}

// CentralJob is a job with the issuer that it calls.
type CentralJob struct {
	Job      domain.Job
	IssuerID string
}

// JobError says why a job was not done.
type JobError struct {
	JobID string
	Err   error
}

// Summary says what became of the jobs of a Run: every one is counted once.
type Summary struct {
	// Done without an error; Failed with one (a panic is one); Skipped because an agent owns it; Left because the context
	// ended before its turn came.
	Done, Failed, Skipped, Left int
	// Errors of the failed and the skipped, in the order of the jobs.
	Errors []JobError
}

// Run calls do for each job, as many at once as the permits allow, and returns when none is in flight any more. When
// ctx ends no further job is begun; those in flight see it through their context and are waited for. A job that fails
// or panics stops no other. Jobs that belong to an agent are never run here: their agent's stream carries them (Conflict
// in Errors).
func (c Central) Run(ctx context.Context, jobs []CentralJob, do func(ctx context.Context, j CentralJob) error) Summary {
	errs := make([]error, len(jobs))
	begun := make([]bool, len(jobs))
	byIssuer := map[string][]int{}
	var order []string
	for i, j := range jobs {
		if j.Job.AgentID != "" {
			errs[i] = fault.New(fault.Conflict, "job %s belongs to agent %s and is done over its stream", j.Job.ID, j.Job.AgentID)
			continue
		}
		if _, ok := byIssuer[j.IssuerID]; !ok {
			order = append(order, j.IssuerID)
		}
		byIssuer[j.IssuerID] = append(byIssuer[j.IssuerID], i)
	}
	var wg sync.WaitGroup
	for _, issuer := range order {
		var mu sync.Mutex
		queue := byIssuer[issuer]
		next := func() (int, bool) {
			mu.Lock()
			defer mu.Unlock()
			if len(queue) == 0 || ctx.Err() != nil {
				return 0, false
			}
			i := queue[0]
			queue = queue[1:]
			return i, true
		}
		// A waiting goroutine per job would be one per certificate of the estate.
		for range min(max(c.Workers, 1), len(queue)) {
			wg.Go(func() {
				for i, ok := next(); ok; i, ok = next() {
					errs[i] = c.Permits.Do(ctx, issuer, func(ctx context.Context) error {
						begun[i] = true
						return do(ctx, jobs[i])
					})
				}
			})
		}
	}
	wg.Wait()
	var s Summary
	for i, j := range jobs {
		switch {
		case j.Job.AgentID != "":
			s.Skipped++
		case !begun[i]:
			s.Left++
			continue
		case errs[i] != nil:
			s.Failed++
		default:
			s.Done++
			continue
		}
		s.Errors = append(s.Errors, JobError{JobID: j.Job.ID, Err: errs[i]})
	}
	return s
}
