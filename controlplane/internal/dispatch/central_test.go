package dispatch

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sync/semaphore"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// crowd counts calls in flight and lets them go when all that can be in have come.
type crowd struct {
	now, most atomic.Int64
	full      chan struct{}
	once      sync.Once
	want      int64
}

func newCrowd(want int) *crowd { return &crowd{full: make(chan struct{}), want: int64(want)} }

// call waits until the crowd is full: it ends only if the cap is reached.
func (c *crowd) call(ctx context.Context) error {
	n := c.now.Add(1)
	defer c.now.Add(-1)
	for {
		m := c.most.Load()
		if n <= m || c.most.CompareAndSwap(m, n) {
			break
		}
	}
	if n >= c.want {
		c.once.Do(func() { close(c.full) })
	}
	select {
	case <-c.full:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// permits are those of a cluster of one: n calls in flight toward each issuer.
type permits struct {
	n        int64
	mu       sync.Mutex
	byIssuer map[string]*semaphore.Weighted
}

func central(n int) Central {
	return Central{Permits: &permits{n: int64(n), byIssuer: map[string]*semaphore.Weighted{}}, Workers: n}
}

func (p *permits) Do(ctx context.Context, issuerID string, fn func(ctx context.Context) error) error {
	p.mu.Lock()
	s := p.byIssuer[issuerID]
	if s == nil {
		s = semaphore.NewWeighted(p.n)
		p.byIssuer[issuerID] = s
	}
	p.mu.Unlock()
	if err := s.Acquire(ctx, 1); err != nil {
		return err
	}
	defer s.Release(1)
	return fn(ctx)
}

func centralJobs(n int, issuer string) []CentralJob {
	jobs := make([]CentralJob, n)
	for i := range jobs {
		jobs[i] = CentralJob{Job: domain.Job{ID: fmt.Sprintf("job_%03d", i)}, IssuerID: issuer}
	}
	return jobs
}

// TestInFlightReachesTheCapAndNotMore: calls end only once as many as the cap are in, so the cap is reached; and it is
// never exceeded, by two runs at the same time either.
func TestInFlightReachesTheCapAndNotMore(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 3, 25} {
		p := central(n)
		c := newCrowd(n)
		ctx := testContext(t)
		var wg sync.WaitGroup
		var done atomic.Int64
		for range 2 {
			wg.Go(func() {
				s := p.Run(ctx, centralJobs(60, "iss_1"), func(ctx context.Context, _ CentralJob) error { return c.call(ctx) })
				done.Add(int64(s.Done))
			})
		}
		wg.Wait()
		if got := c.most.Load(); got != int64(n) {
			t.Errorf("cap %d: %d were in flight at once", n, got)
		}
		if done.Load() != 120 {
			t.Errorf("cap %d: %d of 120 were done", n, done.Load())
		}
	}
}

// TestIssuersDoNotShareCaps: one issuer that answers nothing holds up its own jobs only.
func TestIssuersDoNotShareCaps(t *testing.T) {
	t.Parallel()
	p := central(2)
	ctx, cancel := context.WithCancel(testContext(t))
	jobs := append(centralJobs(10, "stuck"), centralJobs(10, "fine")...)
	var fine atomic.Int64
	stuck := make(chan struct{}, 2)
	s := p.Run(ctx, jobs, func(ctx context.Context, j CentralJob) error {
		if j.IssuerID == "fine" {
			if fine.Add(1) == 10 {
				<-stuck
				<-stuck
				cancel()
			}
			return nil
		}
		stuck <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	})
	if s.Done != 10 || s.Failed != 2 || s.Left != 8 {
		t.Fatalf("summary %+v", s)
	}
}

// TestLesson1AgentsJobsAreNotRunCentrally: they are returned as skipped, each with its reason, and never called.
func TestLesson1AgentsJobsAreNotRunCentrally(t *testing.T) {
	t.Parallel()
	jobs := centralJobs(6, "iss_1")
	for _, i := range []int{1, 4} {
		jobs[i].Job.AgentID = "agt_9"
	}
	var mu sync.Mutex
	ran := map[string]int{}
	s := central(3).Run(testContext(t), jobs, func(_ context.Context, j CentralJob) error {
		mu.Lock()
		defer mu.Unlock()
		ran[j.Job.ID]++
		return nil
	})
	if s.Done != 4 || s.Skipped != 2 || len(s.Errors) != 2 {
		t.Fatalf("summary %+v", s)
	}
	for _, e := range s.Errors {
		if ran[e.JobID] != 0 || !fault.Is(e.Err, fault.Conflict) {
			t.Errorf("%s ran %d times: %v", e.JobID, ran[e.JobID], e.Err)
		}
	}
	for id, n := range ran {
		if n != 1 {
			t.Errorf("%s ran %d times", id, n)
		}
	}
}

// TestCancellingStopsAndDrains: after the cancellation nothing begins, and Run returns only when what was in flight has
// ended.
func TestCancellingStopsAndDrains(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(testContext(t))
	in := make(chan struct{}, 4)
	var begun, ended atomic.Int64
	result := make(chan Summary, 1)
	release := make(chan struct{})
	go func() {
		result <- central(4).Run(ctx, centralJobs(100, "iss_1"), func(ctx context.Context, _ CentralJob) error {
			begun.Add(1)
			in <- struct{}{}
			<-ctx.Done()
			<-release // it takes its time to stop
			ended.Add(1)
			return ctx.Err()
		})
	}()
	for range 4 {
		<-in
	}
	cancel()
	select {
	case s := <-result:
		t.Fatalf("it returned with calls in flight: %+v", s)
	default:
	}
	close(release)
	s := <-result
	if begun.Load() != 4 || ended.Load() != 4 || s.Failed != 4 || s.Left != 96 || s.Done != 0 {
		t.Fatalf("begun %d, ended %d, summary %+v", begun.Load(), ended.Load(), s)
	}
}

// TestFailuresStopNoOtherJob: they hold no permit, and are told in the order of the jobs.
func TestFailuresStopNoOtherJob(t *testing.T) {
	t.Parallel()
	p := central(2)
	boom := errors.New("the CA says no")
	s := p.Run(testContext(t), centralJobs(30, "iss_1"), func(_ context.Context, j CentralJob) error {
		if strings.HasSuffix(j.Job.ID, "3") {
			return boom
		}
		return nil
	})
	if s.Done != 27 || s.Failed != 3 || len(s.Errors) != 3 {
		t.Fatalf("summary %+v", s)
	}
	for i, e := range s.Errors {
		if e.JobID != fmt.Sprintf("job_0%d3", i) || !errors.Is(e.Err, boom) {
			t.Errorf("%s: %v", e.JobID, e.Err)
		}
	}
	// Both permits are free again: two calls can be in at once.
	c := newCrowd(2)
	if s := p.Run(testContext(t), centralJobs(2, "iss_1"), func(ctx context.Context, _ CentralJob) error { return c.call(ctx) }); s.Done != 2 {
		t.Fatalf("a permit was lost: %+v", s)
	}
}
