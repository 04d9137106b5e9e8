package permit

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/cluster/internal/fsm"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func registryOf(t *testing.T, c prometheus.Collector) *prometheus.Registry {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	if err := r.Register(c); err != nil {
		t.Fatal(err)
	}
	return r
}

// fakeLog is the cluster's state machine without Raft.
type fakeLog struct {
	mu    sync.Mutex
	state *clusterpb.Snapshot
	fails error
	count int
}

func (l *fakeLog) Propose(_ context.Context, c *clusterpb.Command) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fails != nil {
		return l.fails
	}
	entry, err := proto.Marshal(c)
	if err != nil {
		return err
	}
	l.count++
	next, err := fsm.Apply(l.state, entry)
	if errors.Is(err, fsm.ErrStale) {
		return fault.Wrap(fault.Conflict, err, "too late")
	}
	l.state = next
	return err
}

func (l *fakeLog) current() *clusterpb.Snapshot {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state
}

func (l *fakeLog) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fails = err
}

func (l *fakeLog) Leases() []*clusterpb.PermitLease { return l.current().GetLeases() }
func (l *fakeLog) Pauses() []*clusterpb.PauseIssuer { return l.current().GetPauses() }
func (l *fakeLog) LastLeaseID() uint64              { return l.current().GetLastLeaseId() }

// lead starts a leader that leads until the returned function is called.
func lead(t *testing.T, log *fakeLog, limits func(string) Limits) (*Leader, func()) {
	t.Helper()
	l, err := NewLeader(LeaderConfig{Log: log, Limits: limits, Clock: clockwork.NewRealClock(), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return l, leadAgain(t, l)
}

func leadAgain(t *testing.T, l *Leader) func() {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { l.Lead(ctx) })
	synctest.Wait()
	return func() { cancel(); wg.Wait() }
}

func ask(want int32) *clusterpb.LeaseRequest {
	return &clusterpb.LeaseRequest{IssuerId: "iss_1", Instance: "1", Want: want}
}

func mustAsk(t *testing.T, l *Leader, node string, r *clusterpb.LeaseRequest) *clusterpb.LeaseResponse {
	t.Helper()
	resp, err := l.Lease(t.Context(), node, r)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func TestANewLeaderWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log := &fakeLog{state: &clusterpb.Snapshot{}}
		l, stop := lead(t, log, limited(5))
		if r := mustAsk(t, l, "a", ask(9)); r.GetPermits() != 0 || !r.GetUndecided() || r.GetRetryAfterMs() != DefaultLease.Milliseconds() {
			t.Fatalf("a leader that has just begun says %v", r)
		}
		<-time.After(DefaultLease)
		if r := mustAsk(t, l, "a", ask(9)); r.GetPermits() != 5 || r.GetLeaseId() == 0 {
			t.Fatalf("a leader that has waited says %v", r)
		}
		stop()
		if _, err := l.Lease(t.Context(), "a", ask(1)); !fault.Is(err, fault.Rejected) {
			t.Fatalf("one that leads no more says %v", err)
		}
		// What the ledger says may be longer than our leases.
		log.state.Leases[0].DurationMs = 60_000
		stop = leadAgain(t, l)
		<-time.After(59 * time.Second)
		if r := mustAsk(t, l, "b", ask(1)); r.GetPermits() != 0 {
			t.Fatalf("it says %v while a long lease is out", r)
		}
		<-time.After(time.Second)
		if r := mustAsk(t, l, "b", ask(1)); r.GetPermits() != 1 {
			t.Fatalf("it says %v after the long lease", r)
		}
		stop()
	})
}

// TestWhoeverKnowsTooLittleWaitsAgain: a lease's id that is taken says that somebody else has granted.
func TestWhoeverKnowsTooLittleWaitsAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log := &fakeLog{state: &clusterpb.Snapshot{LastLeaseId: 7}}
		l, stop := lead(t, log, limited(5))
		<-time.After(DefaultLease)
		log.mu.Lock()
		log.state = &clusterpb.Snapshot{LastLeaseId: 8}
		log.mu.Unlock()
		if _, err := l.Lease(t.Context(), "a", ask(1)); !fault.Is(err, fault.Retryable) {
			t.Fatalf("error %v", err)
		}
		if r := mustAsk(t, l, "a", ask(1)); !r.GetUndecided() {
			t.Fatalf("it says %v", r)
		}
		<-time.After(DefaultLease)
		if r := mustAsk(t, l, "a", ask(1)); r.GetLeaseId() != 9 {
			t.Fatalf("it says %v", r)
		}
		stop()
	})
}

// TestAGrantThatMayHaveFailedCounts: nobody else gets those permits until they would have lapsed.
func TestAGrantThatMayHaveFailedCounts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log := &fakeLog{state: &clusterpb.Snapshot{}}
		l, stop := lead(t, log, limited(5))
		<-time.After(DefaultLease)
		log.fail(context.DeadlineExceeded)
		if _, err := l.Lease(t.Context(), "a", ask(9)); !fault.Is(err, fault.Retryable) {
			t.Fatalf("error %v", err)
		}
		log.fail(nil)
		if r := mustAsk(t, l, "b", ask(2)); r.GetPermits() != 0 {
			t.Fatalf("it says %v", r)
		}
		<-time.After(DefaultLease)
		if r := mustAsk(t, l, "b", ask(2)); r.GetPermits() != 2 {
			t.Fatalf("it says %v", r)
		}
		stop()
	})
}

// TestThePauseOutlivesTheLeader: the next one reads it in the log.
func TestThePauseOutlivesTheLeader(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log := &fakeLog{state: &clusterpb.Snapshot{}}
		l, stop := lead(t, log, limited(5))
		r := ask(1)
		r.PauseMs = 60_000
		mustAsk(t, l, "a", r)
		stop()
		l, stop = lead(t, log, limited(5))
		<-time.After(30 * time.Second)
		if r := mustAsk(t, l, "b", ask(1)); r.GetPauseMs() < 30_000 || r.GetPermits() != 0 {
			t.Fatalf("it says %v", r)
		}
		<-time.After(2 * time.Minute)
		if n := len(log.Pauses()); n != 0 {
			t.Fatalf("%d pauses are in the log", n)
		}
		if r := mustAsk(t, l, "b", ask(1)); r.GetPermits() != 1 {
			t.Fatalf("it says %v", r)
		}
		stop()
	})
}

// TestTheLogIsSwept: what lapsed leaves the log, by few entries, and an idle cluster writes none.
func TestTheLogIsSwept(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log := &fakeLog{state: &clusterpb.Snapshot{}}
		l, stop := lead(t, log, limited(5))
		<-time.After(DefaultLease)
		for _, node := range []string{"a", "b", "c"} {
			mustAsk(t, l, node, ask(1))
		}
		if n := len(log.Leases()); n != 3 {
			t.Fatalf("%d leases", n)
		}
		<-time.After(3 * DefaultLease)
		if n := len(log.Leases()); n != 0 {
			t.Fatalf("%d leases are left", n)
		}
		count := log.count
		<-time.After(time.Hour)
		if log.count != count || count > 6 {
			t.Fatalf("%d entries, then %d", count, log.count)
		}
		stop()
	})
}

func TestRequestsThatNobodySends(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l, stop := lead(t, &fakeLog{state: &clusterpb.Snapshot{}}, limited(5))
		<-time.After(DefaultLease)
		long := string(make([]byte, 300))
		for _, r := range []*clusterpb.LeaseRequest{nil, {}, {IssuerId: long}, {IssuerId: "i", Instance: long}} {
			if _, err := l.Lease(t.Context(), "a", r); !fault.Is(err, fault.Invalid) {
				t.Errorf("%v: %v", r, err)
			}
		}
		for _, r := range []*clusterpb.LeaseRequest{{IssuerId: "i", Want: -7}, {IssuerId: "i", PauseMs: -1}, {IssuerId: "i", GivenBack: 1 << 63}} {
			if resp := mustAsk(t, l, "a", r); resp.GetPermits() != 0 {
				t.Errorf("%v: %v", r, resp)
			}
		}
		// An absurd wish lasts a day or so, and no longer.
		if resp := mustAsk(t, l, "a", &clusterpb.LeaseRequest{IssuerId: "i", Want: 1 << 30, PauseMs: 1 << 60}); resp.GetPauseMs() > 2*maxPause.Milliseconds() {
			t.Errorf("%v", resp)
		}
		if resp := mustAsk(t, l, "a", &clusterpb.LeaseRequest{IssuerId: "j", Want: 1 << 30}); resp.GetPermits() != 5 {
			t.Errorf("%v", resp)
		}
		stop()
	})
}

// inUseByAll is the most that all holders together can be using.
func (i *issuer) inUseByAll() (permits int, rate float64) {
	for _, h := range i.holders {
		p, r := h.inUse()
		permits, rate = permits+p, rate+r
	}
	return permits, rate
}
