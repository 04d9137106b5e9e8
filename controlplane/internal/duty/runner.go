// Package duty runs what nobody asks for: finding certificates that are due, placements that do not serve what they
// should, jobs that stand still, agents that fell silent, expired rows. One table (Table) names them all, one Runner
// runs them.
//
// A duty only creates work and sweeps; it never dispatches. A fenced duty writes under an epoch that the database
// minted when the duty was taken: a node that was paused and has been replaced cannot commit (domain/fence.go). Its own
// belief that it still holds the duty is worth nothing.
//
// In a cluster the node that leads runs the fenced duties: Lead takes them all and runs each at once, Lapse cancels what
// runs and forgets the fences. That spares the others the work; what keeps two nodes apart is the fence.
package duty

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"sync"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Duty is one line of the table.
type Duty struct {
	Name string
	// Interval between two runs. A run may ask to be called earlier by the time it returns.
	Interval time.Duration
	// Deadline bounds one run.
	Deadline time.Duration
	// Fenced duties are held by the node that leads; the others run on every node.
	Fenced bool
	// Run does the duty once. A time other than zero asks for the next run at that time if it is before the interval's
	// end. A Conflict fault means that another node holds the duty.
	Run func(ctx context.Context, f domain.Fence, now time.Time) (next time.Time, err error)
}

// Taker mints fences.
type Taker interface {
	TakeDuty(ctx context.Context, duty, node string, at time.Time) (domain.Fence, error)
}

// Config is what a Runner needs.
type Config struct {
	Node   string
	Duties []Duty
	Store  Taker
	// Elected: this node leads between Lead and Lapse only. Otherwise it leads from the start, and for good.
	Elected bool
	// RemoteTrigger asks whichever other node leads to run a fenced duty soon; nil when there is no other. It must not block.
	RemoteTrigger func(duty string)
	Clock         clockwork.Clock
	Log           *slog.Logger
	Metrics       prometheus.Registerer
	// Jitter returns a number in [0,1); nil means a random one.
	Jitter func() float64
}

// Status is what an operator sees of a duty.
type Status struct {
	Name      string
	Interval  time.Duration
	LastRun   time.Time
	LastError string
	Epoch     domain.Epoch
}

// Runner runs each duty in a goroutine of its own, so that a duty never overlaps itself and a slow one delays no other.
type Runner struct {
	cfg     Config
	loops   []*loop
	stop    context.CancelFunc
	done    sync.WaitGroup
	mu      sync.Mutex
	started bool
	// term is the leadership of this node; nil: it does not lead.
	term *term

	runs    *prometheus.CounterVec
	seconds *prometheus.HistogramVec
}

type loop struct {
	Duty
	wake chan struct{}

	// fence was taken in held; told: its taken was. They are the loop's own.
	fence domain.Fence
	held  *term
	told  bool

	mu     sync.Mutex
	status Status
}

// term is one leadership of this node.
type term struct {
	ctx    context.Context
	cancel context.CancelFunc
	// taken receives, once for each fenced duty, whether its fence could be taken. There is room for all.
	taken chan error
}

const (
	// minPause keeps a duty that always asks to be called at once from spinning.
	minPause = 200 * time.Millisecond
	// takePause is when a fence that could not be taken, or was lost, is taken anew.
	takePause = 2 * time.Second
	// failPause is when a duty that failed is run anew, unless its interval is shorter: soon after a database that was away
	// for a moment, seldom enough for what goes on failing.
	failPause = 10 * time.Second
)

// NewRunner checks the table and prepares a Runner.
func NewRunner(cfg Config) (*Runner, error) {
	if cfg.Jitter == nil {
		cfg.Jitter = rand.Float64
	}
	r := &Runner{
		cfg: cfg,
		runs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "certmesh_duty_runs_total", Help: "Runs of background duties by outcome (ok, error, panic, lost).",
		}, []string{"duty", "outcome"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "certmesh_duty_seconds", Help: "Duration of one run of a background duty.",
			Buckets: []float64{.001, .005, .02, .1, .5, 2, 10, 60},
		}, []string{"duty"}),
	}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(r.runs, r.seconds)
	}
	seen := map[string]bool{}
	for _, d := range cfg.Duties {
		if d.Interval <= 0 || d.Deadline <= 0 || d.Run == nil || seen[d.Name] {
			return nil, fmt.Errorf("duty %q: needs a unique name, an interval and a deadline above zero, and something to run", d.Name)
		}
		seen[d.Name] = true
		r.loops = append(r.loops, &loop{Duty: d, wake: make(chan struct{}, 1),
			status: Status{Name: d.Name, Interval: d.Interval}})
	}
	if !cfg.Elected {
		r.term = r.newTerm()
	}
	return r, nil
}

func (r *Runner) newTerm() *term {
	t := &term{taken: make(chan error, len(r.loops))}
	t.ctx, t.cancel = context.WithCancel(context.Background()) //nolint:forbidigo // a term ends by Lapse or Stop, not with whoever began it
	return t
}

// Lead makes this node run the fenced duties: each is taken and run at once, none waits for another. It returns when all
// have been taken, or were tried to; the error names those that could not, which are tried again until Lapse. Retryable,
// too, when ctx or the leadership ended first. Before Start it only says who leads; leading already it does nothing.
func (r *Runner) Lead(ctx context.Context) error {
	r.mu.Lock()
	if r.term != nil {
		r.mu.Unlock()
		return nil
	}
	t := r.newTerm()
	r.term = t
	started := r.started
	r.mu.Unlock()
	if !started {
		return nil
	}
	var failed []error
	fenced := 0
	for _, l := range r.loops {
		if l.Fenced {
			fenced++
			l.signal()
		}
	}
	for range fenced {
		select {
		case err := <-t.taken:
			failed = append(failed, err)
		case <-t.ctx.Done():
			return fault.New(fault.Retryable, "the leadership ended before all duties were taken")
		case <-ctx.Done():
			return fault.Wrap(fault.Retryable, context.Cause(ctx), "not all duties could be taken in time")
		}
	}
	return errors.Join(failed...)
}

// Lapse is the mirror image of Lead: fenced duties that run are cancelled and none begins. It does not wait for them: what
// they still write the fence refuses, once another node has taken it. Not leading it does nothing.
func (r *Runner) Lapse() {
	r.mu.Lock()
	t := r.term
	r.term = nil
	r.mu.Unlock()
	if t != nil {
		t.cancel()
	}
}

// Leads reports whether this node runs the fenced duties.
func (r *Runner) Leads() bool { return r.leading() != nil }

func (r *Runner) leading() *term {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.term
}

// Start begins all duties. Starting twice is a no-op.
func (r *Runner) Start() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.started {
		return
	}
	r.started = true
	ctx, cancel := context.WithCancel(context.Background()) //nolint:forbidigo // duties end by Stop, not with whoever started them
	r.stop = cancel
	for _, l := range r.loops {
		r.done.Go(func() { r.run(ctx, l) })
	}
}

// Stop cancels what runs and waits for it. Stopping twice, or before Start, is a no-op.
func (r *Runner) Stop() {
	r.mu.Lock()
	if !r.started {
		r.mu.Unlock()
		return
	}
	r.started = false
	r.mu.Unlock()
	r.stop()
	r.done.Wait()
}

// Trigger asks for a run of the named duty as soon as possible, on the node that leads if it is fenced; several requests
// before it begins are one.
func (r *Runner) Trigger(name string) { r.trigger(name, r.cfg.RemoteTrigger) }

// TriggerHeld is Trigger for what another node asked: it is not passed on if this node does not lead any more.
func (r *Runner) TriggerHeld(name string) { r.trigger(name, nil) }

// TriggerAllHeld asks for a run of every fenced duty if this node leads: what other nodes asked for may have been lost.
func (r *Runner) TriggerAllHeld() {
	for _, l := range r.loops {
		if l.Fenced && r.Leads() {
			l.signal()
		}
	}
}

// passOn asks the other nodes for a run that may have been asked for here, and that this node could not do because it does
// not lead any more: whoever asked believed that it did.
func (r *Runner) passOn(l *loop) {
	if r.cfg.RemoteTrigger != nil {
		r.cfg.RemoteTrigger(l.Name)
	}
}

func (r *Runner) trigger(name string, elsewhere func(string)) {
	for _, l := range r.loops {
		switch {
		case l.Name != name:
		case !l.Fenced || r.Leads():
			l.signal()
		case elsewhere != nil:
			elsewhere(name)
		}
	}
}

func (l *loop) signal() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Status lists all duties in the table's order. A duty that another node runs has no epoch here.
func (r *Runner) Status() []Status {
	leads := r.Leads()
	out := make([]Status, 0, len(r.loops))
	for _, l := range r.loops {
		l.mu.Lock()
		s := l.status
		l.mu.Unlock()
		if l.Fenced && !leads {
			s.Epoch = 0
		}
		out = append(out, s)
	}
	return out
}

// run is one duty's life. The first run comes after at most a tenth of the interval, so that a restart neither delays
// what is due nor runs everything in the same instant; a new leader runs at once. While another node leads, a fenced duty
// waits for Lead alone.
func (r *Runner) run(ctx context.Context, l *loop) {
	pause := time.Duration(r.cfg.Jitter() * float64(min(l.Interval/10, 2*time.Second)))
	for l.wait(ctx, r, pause) {
		if l.Fenced {
			t := r.leading()
			if t == nil {
				r.passOn(l)
				continue
			}
			if l.held != t {
				l.held, l.told, l.fence = t, false, domain.Fence{}
			}
		}
		next := r.once(ctx, l)
		if ctx.Err() != nil {
			return
		}
		pause = l.Interval + time.Duration(r.cfg.Jitter()*float64(l.Interval)/20)
		if !next.IsZero() {
			pause = min(pause, max(next.Sub(r.cfg.Clock.Now()), minPause))
		}
	}
}

// wait waits for the pause or for a signal; without leadership, for a signal. False: the runner stops.
func (l *loop) wait(ctx context.Context, r *Runner, pause time.Duration) bool {
	var passed <-chan time.Time
	if !l.Fenced || r.Leads() {
		t := r.cfg.Clock.NewTimer(pause)
		defer t.Stop()
		passed = t.Chan()
	}
	select {
	case <-ctx.Done():
		return false
	case <-l.wake:
	case <-passed:
	}
	return ctx.Err() == nil
}

func (r *Runner) once(ctx context.Context, l *loop) time.Time {
	ctx, cancel := context.WithTimeout(ctx, l.Deadline)
	defer cancel()
	if l.Fenced {
		defer context.AfterFunc(l.held.ctx, cancel)()
	}
	start := r.cfg.Clock.Now()
	next, err := r.guarded(ctx, l, start)
	if l.Fenced && r.leading() != l.held {
		r.passOn(l)
		return time.Time{} // what it says of itself was said without the duty
	}
	r.seconds.WithLabelValues(l.Name).Observe(r.cfg.Clock.Since(start).Seconds())

	outcome := "ok"
	switch {
	case err == nil:
	case fault.Is(err, fault.Conflict) && l.Fenced:
		// Another node took the duty, or the fence was lost to a restore: believe nothing, take it anew next time. Soon
		// only where a leader that was taken over is told so: two nodes that nobody elects would take it from each other.
		outcome, next = "lost", time.Time{}
		l.fence = domain.Fence{}
		r.passOn(l)
		if r.cfg.Elected {
			next = start.Add(takePause)
		}
		r.cfg.Log.Info("duty is held elsewhere", "duty", l.Name, "error", err)
	case ctx.Err() != nil && errors.Is(context.Cause(ctx), context.Canceled):
		return time.Time{}
	default:
		outcome = "error"
		if p := (*panicked)(nil); errors.As(err, &p) {
			outcome = "panic"
		}
		// What was to be done is still to be done, and the trigger that told of it is used up.
		next = start.Add(failPause)
		if l.Fenced && l.fence.Epoch == 0 {
			next = start.Add(takePause)
		}
		r.cfg.Log.Error("duty failed", "duty", l.Name, "error", err)
	}
	r.runs.WithLabelValues(l.Name, outcome).Inc()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.status.LastRun, l.status.LastError, l.status.Epoch = start, "", l.fence.Epoch
	if err != nil {
		l.status.LastError = err.Error()
	}
	return next
}

type panicked struct{ value any }

func (p *panicked) Error() string { return fmt.Sprintf("panic: %v", p.value) }

func (r *Runner) guarded(ctx context.Context, l *loop, now time.Time) (next time.Time, err error) {
	defer func() {
		if v := recover(); v != nil {
			r.cfg.Log.Error("duty panicked", "duty", l.Name, "panic", v, "stack", string(debug.Stack()))
			err = &panicked{v}
		}
	}()
	if l.Fenced && l.fence.Epoch == 0 {
		f, err := r.cfg.Store.TakeDuty(ctx, l.Name, r.cfg.Node, domain.Micro(now))
		if err != nil {
			err = fmt.Errorf("take duty %s: %w", l.Name, err)
		}
		if !l.told {
			l.told = true
			l.held.taken <- err
		}
		if err != nil {
			return time.Time{}, err
		}
		l.fence = f
	}
	return l.Run(ctx, l.fence, now)
}
