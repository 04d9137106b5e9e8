package dispatch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

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
		p := NewPermits(n)
		c := newCrowd(n)
		ctx := testContext(t)
		var wg sync.WaitGroup
		var done atomic.Int64
		for range 2 {
			wg.Go(func() {
				s := Central{Permits: p}.Run(ctx, centralJobs(60, "iss_1"), func(ctx context.Context, _ CentralJob) error { return c.call(ctx) })
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
	p := NewPermits(2)
	ctx, cancel := context.WithCancel(testContext(t))
	jobs := append(centralJobs(10, "stuck"), centralJobs(10, "fine")...)
	var fine atomic.Int64
	stuck := make(chan struct{}, 2)
	s := Central{Permits: p}.Run(ctx, jobs, func(ctx context.Context, j CentralJob) error {
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

func TestNonPositiveCapsAreOne(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, -1, -1 << 40} {
		if got := NewPermits(n).Cap(); got != 1 {
			t.Errorf("NewPermits(%d) allows %d", n, got)
		}
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
	s := Central{Permits: NewPermits(3)}.Run(testContext(t), jobs, func(_ context.Context, j CentralJob) error {
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
		result <- Central{Permits: NewPermits(4)}.Run(ctx, centralJobs(100, "iss_1"), func(ctx context.Context, _ CentralJob) error {
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

// TestFailuresAndPanicsAreCounted: they stop no other job, hold no permit, and are counted.
func TestFailuresAndPanicsAreCounted(t *testing.T) {
	t.Parallel()
	p := NewPermits(2)
	boom := errors.New("the CA says no")
	s := Central{Permits: p}.Run(testContext(t), centralJobs(30, "iss_1"), func(_ context.Context, j CentralJob) error {
		switch j.Job.ID[len(j.Job.ID)-1] {
		case '3':
			return boom
		case '7':
			panic("defect in a connector")
		default:
			return nil
		}
	})
	if s.Done != 24 || s.Failed != 6 || len(s.Errors) != 6 {
		t.Fatalf("summary %+v", s)
	}
	for _, e := range s.Errors {
		if panicked := e.JobID[len(e.JobID)-1] == '7'; panicked != fault.Is(e.Err, fault.Internal) && !errors.Is(e.Err, boom) {
			t.Errorf("%s: %v", e.JobID, e.Err)
		}
	}
	for result, want := range map[string]float64{callDone: 24, callFailed: 3, callPanicked: 3} {
		if got := testutil.ToFloat64(p.calls.WithLabelValues("iss_1", result)); got != want {
			t.Errorf("counted %v %s, want %v", got, result, want)
		}
	}
	if got := testutil.ToFloat64(p.inFlight.WithLabelValues("iss_1")); got != 0 {
		t.Errorf("%v are still in flight", got)
	}
	// Both permits are free again: two calls can be in at once.
	c := newCrowd(2)
	if s := (Central{Permits: p}).Run(testContext(t), centralJobs(2, "iss_1"), func(ctx context.Context, _ CentralJob) error { return c.call(ctx) }); s.Done != 2 {
		t.Fatalf("a permit was lost: %+v", s)
	}
}

func TestDoDoesNotBeginAfterTheEnd(t *testing.T) {
	t.Parallel()
	p := NewPermits(1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := p.Do(ctx, "iss_1", func(context.Context) error { t.Error("it was called"); return nil })
	if !fault.Is(err, fault.Retryable) {
		t.Fatalf("error %v", err)
	}
	if got := testutil.ToFloat64(p.calls.WithLabelValues("iss_1", callLeft)); got != 1 {
		t.Fatalf("counted %v", got)
	}
}
