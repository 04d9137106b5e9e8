package duty

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type taker struct{ epoch atomic.Int64 }

func (t *taker) TakeDuty(_ context.Context, duty, node string, _ time.Time) (domain.Fence, error) {
	return domain.Fence{Duty: duty, Holder: node, Epoch: domain.Epoch(t.epoch.Add(1))}, nil
}

type run struct {
	fence domain.Fence
	reply chan error
	next  time.Time
}

// bench runs one duty under a fake clock; each run waits for the test's reply. The first run begins at once, as there is no
// jitter; no timer is armed for it.
func bench(t *testing.T, fenced bool) (*Runner, *clockwork.FakeClock, *taker, chan *run) {
	t.Helper()
	clk, tk, runs := clockwork.NewFakeClock(), &taker{}, make(chan *run)
	r, err := NewRunner(Config{Node: "n1", Store: tk, Clock: clk, Log: slog.New(slog.DiscardHandler),
		Metrics: prometheus.NewRegistry(), Jitter: func() float64 { return 0 },
		Duties: []Duty{{Name: "d", Interval: time.Hour, Deadline: time.Minute, Fenced: fenced,
			Run: func(ctx context.Context, f domain.Fence, _ time.Time) (time.Time, error) {
				c := &run{fence: f, reply: make(chan error)}
				select {
				case runs <- c:
				case <-ctx.Done():
					return time.Time{}, ctx.Err()
				}
				select {
				case err := <-c.reply:
					if err != nil && err.Error() == "panic" {
						panic("on request")
					}
					return c.next, err
				case <-ctx.Done():
					return time.Time{}, ctx.Err()
				}
			}}}})
	if err != nil {
		t.Fatal(err)
	}
	r.Start()
	t.Cleanup(r.Stop)
	return r, clk, tk, runs
}

// tick lets the armed timer pass.
func tick(t *testing.T, clk *clockwork.FakeClock, d time.Duration) {
	t.Helper()
	if err := clk.BlockUntilContext(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	clk.Advance(d)
}

func TestRunnerKeepsTheInterval(t *testing.T) {
	_, clk, _, runs := bench(t, false)
	(<-runs).reply <- nil
	tick(t, clk, time.Hour-time.Second)
	select {
	case <-runs:
		t.Fatal("ran before its interval")
	default:
	}
	tick(t, clk, time.Second)
	(<-runs).reply <- nil
}

func TestRunnerComesEarlierWhenAsked(t *testing.T) {
	_, clk, _, runs := bench(t, false)
	c := <-runs
	c.next = clk.Now().Add(5 * time.Minute)
	c.reply <- nil
	tick(t, clk, 5*time.Minute)
	(<-runs).reply <- nil
}

func TestRunnerNeverSpins(t *testing.T) {
	_, clk, _, runs := bench(t, false)
	c := <-runs
	c.next = clk.Now().Add(-time.Hour)
	c.reply <- nil
	tick(t, clk, minPause-time.Millisecond)
	select {
	case <-runs:
		t.Fatal("ran again at once")
	default:
	}
	tick(t, clk, time.Millisecond)
	(<-runs).reply <- nil
}

func TestTriggerRunsOnceAndNeverOverlaps(t *testing.T) {
	r, clk, _, runs := bench(t, false)
	c := <-runs
	r.Trigger("d")
	r.Trigger("d")
	r.Trigger("unknown")
	select {
	case <-runs:
		t.Fatal("overlapped itself")
	default:
	}
	c.reply <- nil
	(<-runs).reply <- nil // the two triggers are one run
	if err := clk.BlockUntilContext(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	select {
	case <-runs:
		t.Fatal("ran a third time")
	default:
	}
}

func TestLostFenceIsTakenAnew(t *testing.T) {
	_, clk, tk, runs := bench(t, true)
	c := <-runs
	if c.fence.Epoch != 1 {
		t.Fatalf("epoch %d", c.fence.Epoch)
	}
	c.reply <- nil
	tick(t, clk, time.Hour)
	c = <-runs
	if c.fence.Epoch != 1 || tk.epoch.Load() != 1 {
		t.Fatal("took the duty again although it was held")
	}
	c.reply <- fault.New(fault.Conflict, "held by n2")
	tick(t, clk, time.Hour)
	c = <-runs
	if c.fence.Epoch != 2 {
		t.Fatalf("went on under the lost fence %d", c.fence.Epoch)
	}
	c.reply <- nil
}

func TestFailureAndPanicAreContainedAndShown(t *testing.T) {
	for _, reply := range []string{"store is down", "panic"} {
		r, clk, _, runs := bench(t, false)
		(<-runs).reply <- errors.New(reply)
		tick(t, clk, time.Hour)
		c := <-runs // it goes on
		if s := r.Status()[0]; s.LastError == "" {
			t.Errorf("%s: not shown", reply)
		}
		c.reply <- nil
		r.Stop()
	}
}

func TestStopCancelsWhatRunsAndIsIdempotent(t *testing.T) {
	r, _, _, runs := bench(t, false)
	<-runs // never answered: only cancellation ends it
	r.Stop()
	r.Stop()
}

func TestTableIsChecked(t *testing.T) {
	t.Parallel()
	ok := Duty{Name: "a", Interval: 1, Deadline: 1, Run: func(context.Context, domain.Fence, time.Time) (time.Time, error) {
		return time.Time{}, nil
	}}
	for name, duties := range map[string][]Duty{"twice": {ok, ok}, "no interval": {{Name: "x", Deadline: 1, Run: ok.Run}}, "nothing to run": {{Name: "x", Interval: 1, Deadline: 1}}} {
		if _, err := NewRunner(Config{Duties: duties}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
