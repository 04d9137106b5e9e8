package permit

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

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Leaser asks who leads for permits on behalf of this node; on the node that leads that is its Leader. An error says that no
// answer came, whatever the reason; the request may have been carried out nevertheless. It must return when ctx ends.
type Leaser interface {
	Lease(ctx context.Context, r *clusterpb.LeaseRequest) (*clusterpb.LeaseResponse, error)
}

// Config is what Permits need.
type Config struct {
	Leaser Leaser
	// Instance is random per start of the process.
	Instance string
	// Lease is how long leases usually are (0: DefaultLease); MaxCall bounds a call's time (0: MaxCall(Lease), which bounds it
	// anyway).
	Lease, MaxCall time.Duration
	Clock          clockwork.Clock
	Log            *slog.Logger
	// Jitter returns a number in [0, 1); nil: at random.
	Jitter func() float64
}

// Permits cap the calls toward each external issuer, by this node's leases. Our own CAs take none: they cost nothing but
// CPU. It is a prometheus.Collector and safe for concurrent use.
type Permits struct {
	cfg   Config
	start time.Time
	// ctx ends with Close.
	ctx    context.Context
	cancel context.CancelFunc
	asks   sync.WaitGroup
	m      *metrics

	mu      sync.Mutex
	issuers map[string]*issuerPermits
	closed  bool
}

// issuerPermits carries out what one Holder decides.
type issuerPermits struct {
	p  *Permits
	id string

	mu    sync.Mutex
	h     *Holder
	timer clockwork.Timer
	// wake is what the timer is set to; 0: it is not.
	wake time.Duration
	// pausedUntil mirrors the Holder's, to count pauses as they begin.
	pausedUntil time.Duration
}

// outcome is what became of a call that waited.
type outcome struct {
	begun bool
	until time.Duration
	err   error
}

// New returns Permits that hold none yet. Close them.
func New(ctx context.Context, cfg Config) (*Permits, error) {
	switch {
	case cfg.Leaser == nil || cfg.Clock == nil || cfg.Log == nil:
		return nil, fault.New(fault.Internal, "permits need a Leaser, a clock and a log")
	case cfg.Instance == "":
		return nil, fault.New(fault.Internal, "permits need an instance")
	}
	if cfg.Lease <= 0 {
		cfg.Lease = DefaultLease
	}
	if cfg.MaxCall <= 0 {
		cfg.MaxCall = MaxCall(cfg.Lease)
	}
	if cfg.Jitter == nil {
		cfg.Jitter = rand.Float64
	}
	p := &Permits{cfg: cfg, start: cfg.Clock.Now(), issuers: map[string]*issuerPermits{}}
	p.m = newMetrics(p)
	p.ctx, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
	return p, nil
}

// Close refuses whoever waits and all that comes, stops asking and waits for that. Calls in flight go on; wait for them
// before the node stops. What is leased lapses.
func (p *Permits) Close() {
	p.mu.Lock()
	p.closed = true
	all := make([]*issuerPermits, 0, len(p.issuers))
	for _, i := range p.issuers {
		all = append(all, i)
	}
	p.mu.Unlock()
	p.cancel()
	for _, i := range all {
		i.step(func(now time.Duration) Effects { return i.h.Close(now) })
	}
	p.asks.Wait()
}

// now is the time since New, on the monotonic clock where the clock has one.
func (p *Permits) now() time.Duration { return p.cfg.Clock.Since(p.start) }

func (p *Permits) issuer(id string) *issuerPermits {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := p.issuers[id]
	if i == nil {
		i = &issuerPermits{p: p, id: id, h: NewHolder(id, p.cfg.Instance, p.cfg.Lease, p.cfg.MaxCall)}
		if p.closed {
			i.h.Close(0)
		}
		p.issuers[id] = i
	}
	return i
}

// Do waits for a permit and calls fn with it. The context that fn gets ends when the call must: at ctx's own deadline, or
// after the longest that a call may take. fn returns soon after that; as long as it does not, its permit is not free.
// Do returns fn's error. Without calling fn: Retryable when ctx ended first or the node stops, RateLimited when the issuer
// wants to be left alone until after ctx's deadline. A RateLimited error of fn, until when its Until says, keeps every
// node from the issuer. A panic in fn gives the permit back and comes out as an Internal error with the stack as its cause.
func (p *Permits) Do(ctx context.Context, issuerID string, fn func(ctx context.Context) error) error {
	i := p.issuer(issuerID)
	c := &Call{deadline: forEver, ready: make(chan outcome, 1)}
	o := p.arrive(ctx, i, c)
	if !o.begun {
		p.m.calls.WithLabelValues(issuerID, callLeft).Inc()
		return o.err
	}
	inFlight := p.m.inFlight.WithLabelValues(issuerID)
	inFlight.Inc()
	defer inFlight.Dec()
	result := callDone
	defer func() { p.m.calls.WithLabelValues(issuerID, result).Inc() }()
	var pause time.Duration
	// By defer: fn may end its goroutine.
	defer func() { i.step(func(now time.Duration) Effects { return i.h.End(now, c, pause) }) }()
	rest := o.until - p.now()
	callCtx, cancel := context.WithTimeout(ctx, rest)
	defer cancel()
	panicked, err := contained(callCtx, fn)
	switch {
	case panicked:
		result = callPanicked
	case err != nil:
		result = callFailed
		pause = p.pauseOf(err)
	}
	if late := p.now() - o.until; late > time.Second {
		p.cfg.Log.Warn("a call to an issuer went on past its deadline", "issuer", issuerID, "late", late)
	}
	return err
}

// arrive queues c and waits until it begins or cannot.
func (p *Permits) arrive(ctx context.Context, i *issuerPermits, c *Call) outcome {
	left := func() outcome {
		return outcome{err: fault.Wrap(fault.Retryable, context.Cause(ctx), "no permit for issuer %s came free in time", i.id)}
	}
	if ctx.Err() != nil {
		return left()
	}
	deadline, limited := ctx.Deadline()
	i.step(func(now time.Duration) Effects {
		if limited {
			c.deadline = now + deadline.Sub(p.cfg.Clock.Now())
		}
		return i.h.Arrive(now, c)
	})
	select {
	case o := <-c.ready:
		return o
	default:
	}
	waits := p.m.waiting.WithLabelValues(i.id)
	waits.Inc()
	defer waits.Dec()
	select {
	case o := <-c.ready:
		return o
	case <-ctx.Done():
		i.step(func(now time.Duration) Effects { return i.h.Leave(now, c) })
		select {
		case o := <-c.ready: // It began, or was refused, at the same moment.
			return o
		default:
			return left()
		}
	}
}

// pauseOf is how long err asks everybody to leave the issuer alone; 0: it does not.
func (p *Permits) pauseOf(err error) time.Duration {
	f, ok := errors.AsType[*fault.Error](err)
	if !ok || f.Class != fault.RateLimited {
		return 0
	}
	if f.Until.IsZero() {
		return p.cfg.Lease
	}
	return max(f.Until.Sub(p.cfg.Clock.Now()), 0)
}

// step has the Holder decide, and carries it out.
func (i *issuerPermits) step(decide func(now time.Duration) Effects) {
	i.mu.Lock()
	defer i.mu.Unlock()
	now := i.p.now()
	e := decide(now)
	for _, b := range e.Begin {
		b.Call.ready <- outcome{begun: true, until: b.Until}
	}
	if i.h.pausedUntil > i.pausedUntil {
		if i.pausedUntil <= now {
			i.p.m.pauses.WithLabelValues(i.id).Inc()
			i.p.cfg.Log.Info("an issuer asked for restraint", "issuer", i.id, "for", i.h.pausedUntil-now)
		}
		i.pausedUntil = i.h.pausedUntil
	}
	for _, c := range e.Refuse {
		c.ready <- outcome{err: i.refusalLocked(now)}
	}
	if e.Ask != nil {
		i.p.asks.Go(func() { i.ask(e.Seq, e.Ask) })
	}
	i.wakeLocked(now, e.Wake)
}

// refusalLocked says why a call was refused.
func (i *issuerPermits) refusalLocked(now time.Duration) error {
	switch {
	case i.h.closed:
		return fault.New(fault.Retryable, "this node stops and calls issuer %s no more; another node does", i.id)
	case now < i.h.pausedUntil:
		return fault.Limited(i.p.cfg.Clock.Now().Add(i.h.pausedUntil-now), "issuer %s wants to be left alone for %v", i.id, (i.h.pausedUntil - now).Round(time.Second))
	default:
		return fault.New(fault.Retryable, "no permit for issuer %s came free in time", i.id)
	}
}

// wakeLocked has Tick called at the given time; 0: not at all.
func (i *issuerPermits) wakeLocked(now, at time.Duration) {
	if at == i.wake {
		return
	}
	i.wake = at
	wait := max(at-now, time.Microsecond)
	switch {
	case at == 0:
		i.timer.Stop()
	case i.timer == nil:
		i.timer = i.p.cfg.Clock.AfterFunc(wait, i.tick)
	default:
		i.timer.Reset(wait)
	}
}

func (i *issuerPermits) tick() {
	i.step(func(now time.Duration) Effects {
		i.wake = 0
		return i.h.Tick(now)
	})
}

// ask carries a request to who leads, and its answer back.
func (i *issuerPermits) ask(seq uint64, r *clusterpb.LeaseRequest) {
	ctx, cancel := context.WithTimeout(i.p.ctx, i.p.cfg.Lease/4)
	defer cancel()
	answer, err := i.p.cfg.Leaser.Lease(ctx, r)
	jitter := i.p.cfg.Jitter()
	if err != nil {
		i.p.m.asks.WithLabelValues(askFailed).Inc()
		i.p.cfg.Log.Debug("no answer about permits", "issuer", i.id, "error", err)
		i.step(func(now time.Duration) Effects { return i.h.Failed(now, seq, jitter) })
		return
	}
	i.p.m.asks.WithLabelValues(askAnswered).Inc()
	i.step(func(now time.Duration) Effects { return i.h.Answer(now, seq, answer, jitter) })
}

func contained(ctx context.Context, fn func(ctx context.Context) error) (panicked bool, err error) {
	defer func() {
		if v := recover(); v != nil {
			err, panicked = fault.Wrap(fault.Internal, fmt.Errorf("panic: %v\n%s", v, debug.Stack()), "a call panicked"), true
		}
	}()
	return false, fn(ctx)
}
