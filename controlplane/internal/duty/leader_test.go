package duty

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// fences is a store's duty_fence, and the work that was committed under it.
type fences struct {
	mu     sync.Mutex
	held   map[string]domain.Fence
	work   []string
	fail   map[string]error
	refuse int
}

func newFences() *fences { return &fences{held: map[string]domain.Fence{}, fail: map[string]error{}} }

func (s *fences) TakeDuty(_ context.Context, duty, node string, _ time.Time) (domain.Fence, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.fail[duty]; err != nil {
		return domain.Fence{}, err
	}
	f := domain.Fence{Duty: duty, Holder: node, Epoch: s.held[duty].Epoch + 1}
	s.held[duty] = f
	return f, nil
}

func (s *fences) broken(duty string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail[duty] = err
}

// write commits work under a fence.
func (s *fences) write(f domain.Fence) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[f.Duty] != f {
		s.refuse++
		return fault.New(fault.Conflict, "duty %s is no longer held by %s", f.Duty, f.Holder)
	}
	s.work = append(s.work, fmt.Sprintf("%s %s %d", f.Duty, f.Holder, f.Epoch))
	return nil
}

func (s *fences) done() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.work...)
}

const patience = 10 * time.Second

// receive waits for what must come.
func receive[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("it did not come: %s", what)
		panic("unreachable")
	}
}

// member is one node's runner with three fenced duties and one of its own; every run is announced and writes under its
// fence.
func member(t *testing.T, node string, s *fences, clk clockwork.Clock, change ...func(*Config)) (*Runner, chan string) {
	t.Helper()
	ran := make(chan string, 64)
	cfg := Config{Node: node, Store: s, Clock: clk, Log: slog.New(slog.DiscardHandler), Elected: true, Jitter: func() float64 { return 0.9 }}
	for _, name := range []string{"a", "b", "c"} {
		cfg.Duties = append(cfg.Duties, Duty{Name: name, Interval: time.Hour, Deadline: time.Minute, Fenced: true,
			Run: func(_ context.Context, f domain.Fence, _ time.Time) (time.Time, error) {
				err := s.write(f)
				ran <- name
				return time.Time{}, err
			}})
	}
	cfg.Duties = append(cfg.Duties, Duty{Name: "own", Interval: time.Hour, Deadline: time.Minute,
		Run: func(context.Context, domain.Fence, time.Time) (time.Time, error) {
			ran <- "own"
			return time.Time{}, nil
		}})
	for _, c := range change {
		c(&cfg)
	}
	r, err := NewRunner(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.Start()
	t.Cleanup(r.Stop)
	return r, ran
}

// A new leader runs everything at once, whatever the clock and the jitter say; who does not lead runs what is its own.
func TestOnlyTheLeaderRunsFencedDutiesAndAtOnce(t *testing.T) {
	t.Parallel()
	s, clk := newFences(), clockwork.NewFakeClock()
	one, ranOne := member(t, "n1", s, clk)
	two, ranTwo := member(t, "n2", s, clk)
	if one.Leads() || two.Leads() {
		t.Fatal("leads unelected")
	}
	for range 4 { // terms; the fake clock stands still
		for _, m := range []struct {
			r   *Runner
			ran chan string
		}{{one, ranOne}, {two, ranTwo}} {
			if err := m.r.Lead(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := m.r.Lead(t.Context()); err != nil {
				t.Fatal(err)
			}
			seen := map[string]bool{}
			for range 3 {
				seen[receive(t, m.ran, "the run of a duty")] = true
			}
			if !seen["a"] || !seen["b"] || !seen["c"] {
				t.Fatalf("ran %v", seen)
			}
			if e := m.r.Status()[0].Epoch; !m.r.Leads() || e == 0 && s.refuse > 0 {
				t.Fatalf("leads %v, epoch %d", m.r.Leads(), e)
			}
			m.r.Lapse()
			m.r.Lapse()
			if m.r.Leads() || m.r.Status()[0].Epoch != 0 {
				t.Fatal("leads after it lapsed")
			}
		}
	}
	got := strings.Join(s.done(), "\n")
	for _, d := range []string{"a", "b", "c"} {
		for term := range 8 {
			if want := fmt.Sprintf("%s n%d %d", d, term%2+1, term+1); strings.Count(got, want) != 1 {
				t.Errorf("%q is there %d times", want, strings.Count(got, want))
			}
		}
	}
	if len(s.done()) != 24 || s.refuse != 0 {
		t.Errorf("%d writes, %d refused", len(s.done()), s.refuse)
	}
	if len(ranOne)+len(ranTwo) != 0 {
		t.Error("a duty ran without leadership")
	}
	if err := clk.BlockUntilContext(t.Context(), 2); err != nil { // the two that are nobody's wait for their jitter
		t.Fatal(err)
	}
	clk.Advance(3 * time.Hour)
	if a, b := receive(t, ranOne, "own duty"), receive(t, ranTwo, "own duty"); a != "own" || b != "own" {
		t.Errorf("followers ran %s and %s", a, b)
	}
}

// A leader that has been replaced and does not know it: the fence refuses what it writes, and it does not take the duty
// back before it is told.
func TestTheFenceRefusesTheFormerLeader(t *testing.T) {
	t.Parallel()
	s, clk := newFences(), clockwork.NewFakeClock()
	inside, resume := make(chan struct{}), make(chan struct{})
	var once sync.Once
	old, _ := member(t, "n1", s, clk, func(c *Config) {
		run := c.Duties[0].Run
		c.Duties[0].Run = func(ctx context.Context, f domain.Fence, now time.Time) (time.Time, error) {
			once.Do(func() {
				close(inside)
				<-resume // stopped: not even its cancellation reaches it
			})
			return run(ctx, f, now)
		}
	})
	heir, ran := member(t, "n2", s, clk)
	if err := old.Lead(t.Context()); err != nil {
		t.Fatal(err)
	}
	receive(t, inside, "the old leader's run")
	if err := heir.Lead(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		receive(t, ran, "the heir's run")
	}
	close(resume)
	deadline := time.After(patience)
	for old.Status()[0].LastError == "" {
		select {
		case <-deadline:
			t.Fatal("the former leader noticed nothing")
		case <-time.After(time.Millisecond):
		}
	}
	old.Lapse()
	for _, w := range s.done() {
		if strings.HasPrefix(w, "a n1") {
			t.Errorf("the former leader wrote: %v", s.done())
		}
	}
	if s.refuse != 1 {
		t.Errorf("%d writes were refused", s.refuse)
	}
}

// What runs is cancelled when the leadership ends, and the next leadership is not kept waiting by it.
func TestLapseCancelsWhatRuns(t *testing.T) {
	t.Parallel()
	s, clk := newFences(), clockwork.NewFakeClock()
	began, ended := make(chan struct{}, 4), make(chan error, 4)
	r, _ := member(t, "n1", s, clk, func(c *Config) {
		c.Duties[1].Run = func(ctx context.Context, _ domain.Fence, _ time.Time) (time.Time, error) {
			began <- struct{}{}
			<-ctx.Done()
			ended <- ctx.Err()
			return time.Time{}, ctx.Err()
		}
	})
	for range 2 {
		if err := r.Lead(t.Context()); err != nil {
			t.Fatal(err)
		}
		receive(t, began, "the run")
		r.Lapse()
		if err := receive(t, ended, "its end"); !errors.Is(err, context.Canceled) {
			t.Errorf("it ended by %v", err)
		}
	}
	if e := r.Status()[1].LastError; e != "" {
		t.Errorf("it is shown as a failure: %s", e)
	}
}

// One fence that cannot be taken is reported, keeps no other back, and is tried again.
func TestAFenceThatCannotBeTaken(t *testing.T) {
	t.Parallel()
	s, clk := newFences(), clockwork.NewFakeClock()
	s.broken("b", fault.New(fault.Retryable, "another stands inside its transaction"))
	r, ran := member(t, "n1", s, clk)
	err := r.Lead(t.Context())
	if !fault.Is(err, fault.Retryable) || !strings.Contains(err.Error(), "take duty b") || strings.Contains(err.Error(), "take duty a") {
		t.Fatalf("lead: %v", err)
	}
	if one, two := receive(t, ran, "a run"), receive(t, ran, "another run"); one == "b" || two == "b" {
		t.Errorf("ran %s and %s", one, two)
	}
	s.broken("b", nil)
	if err := clk.BlockUntilContext(t.Context(), 4); err != nil {
		t.Fatal(err)
	}
	clk.Advance(takePause)
	for got := receive(t, ran, "the run of b"); got != "b"; got = receive(t, ran, "the run of b") {
	}
}

func TestLeadEndsWithItsContext(t *testing.T) {
	t.Parallel()
	s, clk := newFences(), clockwork.NewFakeClock()
	inside, resume := make(chan struct{}), make(chan struct{})
	defer close(resume)
	var once sync.Once
	r, _ := member(t, "n1", s, clk, func(c *Config) {
		c.Duties[2].Run = func(context.Context, domain.Fence, time.Time) (time.Time, error) {
			once.Do(func() { close(inside); <-resume })
			return time.Time{}, nil
		}
	})
	if err := r.Lead(t.Context()); err != nil {
		t.Fatal(err)
	}
	receive(t, inside, "the run")
	r.Lapse()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Lead(ctx); !fault.Is(err, fault.Retryable) {
		t.Fatalf("lead: %v", err)
	}
}

func TestTriggersGoToTheLeader(t *testing.T) {
	t.Parallel()
	s, clk := newFences(), clockwork.NewFakeClock()
	asked := make(chan string, 8)
	r, ran := member(t, "n1", s, clk, func(c *Config) { c.RemoteTrigger = func(d string) { asked <- d } })
	r.Trigger("a")
	r.Trigger("unknown")
	r.TriggerHeld("b") // came too late: nobody is asked again
	if d := receive(t, asked, "the request"); d != "a" || len(asked) != 0 {
		t.Fatalf("asked for %s, and %d more", d, len(asked))
	}
	r.Trigger("own")
	if d := receive(t, ran, "own duty"); d != "own" {
		t.Fatalf("ran %s", d)
	}
	if err := r.Lead(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		receive(t, ran, "first run")
	}
	r.Trigger("a")
	r.TriggerHeld("b")
	if one, two := receive(t, ran, "a run"), receive(t, ran, "another"); one == two || one > "b" || two > "b" || len(asked) != 0 {
		t.Errorf("ran %s and %s; asked %d", one, two, len(asked))
	}
	// A link was lost and made anew: what was asked over it is not known.
	r.TriggerAllHeld()
	seen := map[string]bool{}
	for range 3 {
		seen[receive(t, ran, "a run")] = true
	}
	if len(seen) != 3 || len(asked) != 0 {
		t.Errorf("ran %v, asked %d", seen, len(asked))
	}
	r.Lapse()
	r.TriggerAllHeld()
	if len(ran) != 0 {
		t.Errorf("ran %d without leading", len(ran))
	}
}

// TestTriggerOutlivesTheTerm: who is asked to run a duty and finds out that another has taken it passes the request on.
func TestTriggerOutlivesTheTerm(t *testing.T) {
	t.Parallel()
	s, clk := newFences(), clockwork.NewFakeClock()
	asked := make(chan string, 8)
	r, ran := member(t, "n1", s, clk, func(c *Config) { c.RemoteTrigger = func(d string) { asked <- d } })
	if err := r.Lead(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		receive(t, ran, "first run")
	}
	if _, err := s.TakeDuty(t.Context(), "a", "n2", clk.Now()); err != nil {
		t.Fatal(err)
	}
	r.Trigger("a") // this node believes to lead
	receive(t, ran, "a run that is refused")
	if d := receive(t, asked, "the request to be passed on"); d != "a" {
		t.Errorf("asked for %s", d)
	}
}

// TestFailedRunIsRepeated: what a trigger asked for is done soon after a failure, not an interval later.
func TestFailedRunIsRepeated(t *testing.T) {
	t.Parallel()
	s, clk := newFences(), clockwork.NewFakeClock()
	var away atomic.Bool
	r, ran := member(t, "n1", s, clk, func(c *Config) {
		run := c.Duties[0].Run
		c.Duties[0].Run = func(ctx context.Context, f domain.Fence, now time.Time) (time.Time, error) {
			if _, err := run(ctx, f, now); err != nil || !away.Load() {
				return time.Time{}, err
			}
			return time.Time{}, fault.New(fault.Retryable, "the database does not answer")
		}
	})
	if err := r.Lead(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		receive(t, ran, "first run")
	}
	away.Store(true)
	r.Trigger("a")
	receive(t, ran, "a run that fails")
	away.Store(false)
	if err := clk.BlockUntilContext(t.Context(), 4); err != nil {
		t.Fatal(err)
	}
	clk.Advance(failPause)
	// The duty that every node runs had its first run to come.
	d := receive(t, ran, "the run after it")
	if d == "own" {
		d = receive(t, ran, "the run after it")
	}
	if d != "a" {
		t.Errorf("ran %s", d)
	}
}
