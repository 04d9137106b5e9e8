package permit

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func limited(n int) func(string) Limits { return func(string) Limits { return Limits{InFlight: n} } }

func newPermits(tb testing.TB, leaser Leaser) *Permits {
	tb.Helper()
	p, err := New(context.Background(), Config{Leaser: leaser, Instance: "1", Clock: clockwork.NewRealClock(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(p.Close)
	return p
}

func ownPermits(tb testing.TB, n int) *Permits {
	tb.Helper()
	return newPermits(tb, newAlone(clockwork.NewRealClock(), limited(n)))
}

func BenchmarkPermitDo(b *testing.B) {
	p := ownPermits(b, 25)
	ctx, cancel := context.WithTimeout(b.Context(), time.Hour)
	defer cancel()
	b.ReportAllocs()
	for b.Loop() {
		if err := p.Do(ctx, "iss_1", func(context.Context) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

// leaserFunc is a Leaser.
type leaserFunc func(ctx context.Context, r *clusterpb.LeaseRequest) (*clusterpb.LeaseResponse, error)

func (f leaserFunc) Lease(ctx context.Context, r *clusterpb.LeaseRequest) (*clusterpb.LeaseResponse, error) {
	return f(ctx, r)
}

func done(context.Context) error { return nil }

// TestInFlightReachesTheCapAndNotMore: as many calls as allowed are in at once, and issuers do not share.
func TestInFlightReachesTheCapAndNotMore(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 3, 25} {
		synctest.Test(t, func(t *testing.T) {
			p := ownPermits(t, n)
			var now, most [2]atomic.Int64
			var wg sync.WaitGroup
			for i := range 120 {
				wg.Go(func() {
					if err := p.Do(t.Context(), []string{"iss_1", "iss_2"}[i%2], func(context.Context) error {
						k := now[i%2].Add(1)
						defer now[i%2].Add(-1)
						most[i%2].Store(max(k, most[i%2].Load()))
						<-time.After(time.Second)
						return nil
					}); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			for i := range most {
				if got := most[i].Load(); got != int64(n) {
					t.Errorf("cap %d: %d were in flight at once", n, got)
				}
			}
			p.Close()
		})
	}
}

// TestFailuresAndPanicsAreCounted: they hold no permit and are counted.
func TestFailuresAndPanicsAreCounted(t *testing.T) {
	t.Parallel()
	p := ownPermits(t, 1)
	boom := errors.New("the CA says no")
	for i := range 9 {
		err := p.Do(t.Context(), "iss_1", func(context.Context) error {
			switch i % 3 {
			case 0:
				return nil
			case 1:
				return boom
			default:
				panic("defect in a connector")
			}
		})
		if i%3 == 1 && !errors.Is(err, boom) || i%3 == 2 && !fault.Is(err, fault.Internal) || i%3 == 0 && err != nil {
			t.Errorf("call %d: %v", i, err)
		}
	}
	for result, want := range map[string]float64{callDone: 3, callFailed: 3, callPanicked: 3} {
		if got := testutil.ToFloat64(p.m.calls.WithLabelValues("iss_1", result)); got != want {
			t.Errorf("counted %v %s, want %v", got, result, want)
		}
	}
	if got := testutil.ToFloat64(p.m.inFlight.WithLabelValues("iss_1")); got != 0 {
		t.Errorf("%v are still in flight", got)
	}
	if n, err := testutil.GatherAndCount(registryOf(t, p)); err != nil || n == 0 {
		t.Errorf("%d metrics: %v", n, err)
	}
}

func TestDoDoesNotBeginAfterTheEnd(t *testing.T) {
	t.Parallel()
	p := ownPermits(t, 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := p.Do(ctx, "iss_1", func(context.Context) error { t.Error("it was called"); return nil })
	if !fault.Is(err, fault.Retryable) {
		t.Fatalf("error %v", err)
	}
	if got := testutil.ToFloat64(p.m.calls.WithLabelValues("iss_1", callLeft)); got != 1 {
		t.Fatalf("counted %v", got)
	}
}

// TestWaitingEndsWithTheContext: whoever leaves the queue costs no permit.
func TestWaitingEndsWithTheContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := ownPermits(t, 1)
		ctx, cancel := context.WithCancel(t.Context())
		release := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() { _ = p.Do(t.Context(), "iss_1", func(context.Context) error { <-release; return nil }) })
		synctest.Wait()
		for range 50 {
			wg.Go(func() {
				if err := p.Do(ctx, "iss_1", done); !fault.Is(err, fault.Retryable) {
					t.Errorf("error %v", err)
				}
			})
		}
		short, end := context.WithTimeout(t.Context(), time.Second)
		defer end()
		if err := p.Do(short, "iss_1", done); !fault.Is(err, fault.Retryable) {
			t.Errorf("error %v", err)
		}
		cancel()
		synctest.Wait()
		close(release)
		if err := p.Do(t.Context(), "iss_1", done); err != nil {
			t.Error(err)
		}
		wg.Wait()
		p.Close()
	})
}

// TestACallIsCutAtItsDeadline: at its caller's, or after the longest that a call may take.
func TestACallIsCutAtItsDeadline(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := ownPermits(t, 1)
		for wait, want := range map[time.Duration]time.Duration{time.Second: time.Second, time.Hour: MaxCall(DefaultLease)} {
			ctx, cancel := context.WithTimeout(t.Context(), wait)
			var began time.Time
			err := p.Do(ctx, "iss_1", func(ctx context.Context) error { began = time.Now(); <-ctx.Done(); return ctx.Err() })
			if took := time.Since(began); took > want || took < want-time.Millisecond || !fault.Is(err, fault.Retryable) {
				t.Errorf("with %v: cut after %v: %v", wait, took, err)
			}
			cancel()
		}
		p.Close()
	})
}

// TestALeaseLapsesWithoutALeader: calls go on until the lease is used up and not longer, and begin again with the leader.
func TestALeaseLapsesWithoutALeader(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		leader, away := newAlone(clockwork.NewRealClock(), limited(2)), atomic.Bool{}
		p := newPermits(t, leaserFunc(func(ctx context.Context, r *clusterpb.LeaseRequest) (*clusterpb.LeaseResponse, error) {
			if away.Load() {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return leader.Lease(ctx, r)
		}))
		start := time.Now()
		call := func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			return p.Do(ctx, "iss_1", func(context.Context) error { <-time.After(100 * time.Millisecond); return nil })
		}
		if err := call(); err != nil {
			t.Fatal(err)
		}
		away.Store(true)
		for call() == nil {
		}
		// The last one that began had 2 s to go, and what failed waited as long.
		if took := time.Since(start); took < usable(DefaultLease)-2*time.Second || took > usable(DefaultLease)+2*time.Second {
			t.Errorf("without a leader it went on for %v", took)
		}
		away.Store(false)
		if err := p.Do(t.Context(), "iss_1", done); err != nil {
			t.Error(err)
		}
		p.Close()
	})
}

// TestAPauseIsKeptByAll: what one call is told holds for everybody from the next answer on, and for this node at once.
func TestAPauseIsKeptByAll(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		leader := newAlone(clockwork.NewRealClock(), limited(4))
		one := newPermits(t, leader)
		two, err := New(t.Context(), Config{Leaser: leader, Instance: "2", Clock: clockwork.NewRealClock(), Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		told := time.Now()
		if err := one.Do(t.Context(), "iss_1", func(context.Context) error { return fault.Limited(told.Add(time.Minute), "slow down") }); !fault.Is(err, fault.RateLimited) {
			t.Fatal(err)
		}
		synctest.Wait()
		for i, p := range []*Permits{one, two} {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Second)
			err := p.Do(ctx, "iss_1", func(context.Context) error { t.Error("it was called"); return nil })
			f, ok := errors.AsType[*fault.Error](err)
			if !ok || f.Class != fault.RateLimited || f.Until.Before(told.Add(time.Minute)) {
				t.Errorf("permits %d: %v", i+1, err)
			}
			cancel()
			if time.Since(told) > time.Second {
				t.Errorf("permits %d took %v to say so", i+1, time.Since(told))
			}
		}
		var wg sync.WaitGroup
		for _, p := range []*Permits{one, two} {
			wg.Go(func() {
				if err := p.Do(t.Context(), "iss_1", done); err != nil {
					t.Error(err)
				}
				if d := time.Since(told); d < time.Minute || d > 2*time.Minute {
					t.Errorf("called again after %v", d)
				}
			})
		}
		wg.Wait()
		if got := testutil.ToFloat64(one.m.pauses.WithLabelValues("iss_1")); got != 1 {
			t.Errorf("%v pauses counted", got)
		}
		one.Close()
		two.Close()
	})
}

// TestIdleCostsNothing: who does not call gives its lease back and asks for nothing any more.
func TestIdleCostsNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		leader, asked := newAlone(clockwork.NewRealClock(), limited(4)), atomic.Int64{}
		p := newPermits(t, leaserFunc(func(ctx context.Context, r *clusterpb.LeaseRequest) (*clusterpb.LeaseResponse, error) {
			asked.Add(1)
			return leader.Lease(ctx, r)
		}))
		if err := p.Do(t.Context(), "iss_1", done); err != nil {
			t.Fatal(err)
		}
		<-time.After(time.Minute)
		if n := asked.Swap(0); n > 3 {
			t.Errorf("one call asked %d times", n)
		}
		leader.mu.Lock()
		if got, _ := leader.granter.issuer("iss_1").inUseByAll(); got != 0 {
			t.Errorf("%d permits are kept", got)
		}
		leader.mu.Unlock()
		<-time.After(time.Hour)
		if n := asked.Load(); n != 0 {
			t.Errorf("%d requests in an idle hour", n)
		}
		p.Close()
	})
}

// TestCloseRefuses: who waits and who comes is refused with a sentence, and calls in flight go on.
func TestCloseRefuses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := ownPermits(t, 1)
		release := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := p.Do(t.Context(), "iss_1", func(context.Context) error { <-release; return nil }); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		wg.Go(func() {
			if err := p.Do(t.Context(), "iss_1", done); !fault.Is(err, fault.Retryable) {
				t.Error(err)
			}
		})
		synctest.Wait()
		p.Close()
		p.Close()
		for _, issuer := range []string{"iss_1", "iss_2"} {
			if err := p.Do(t.Context(), issuer, done); !fault.Is(err, fault.Retryable) {
				t.Error(err)
			}
		}
		close(release)
		wg.Wait()
	})
}
