package dispatch

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"

	"github.com/certmesh/certmesh/protocol/fault"
)

// Permits cap the calls in flight toward each external issuer on this node. Our own CAs take none: they cost nothing
// but CPU. It is a prometheus.Collector and safe for concurrent use.
type Permits struct {
	cap int64

	mu        sync.Mutex
	byIssuer  map[string]*semaphore.Weighted
	inFlight  *prometheus.GaugeVec
	calls     *prometheus.CounterVec
	perIssuer *prometheus.Desc
}

// Results of a call, as the label of its counter.
const (
	callDone     = "done"
	callFailed   = "failed"
	callPanicked = "panicked"
	callLeft     = "not_started"
)

// NewPermits allows n calls in flight per issuer; n ≤ 0 becomes 1.
func NewPermits(n int) *Permits {
	return &Permits{
		cap:      int64(max(n, 1)),
		byIssuer: map[string]*semaphore.Weighted{},
		inFlight: prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "certmesh", Subsystem: "issuer", Name: "calls_in_flight",
			Help: "Calls under way toward an external issuer."}, []string{"issuer"}),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "certmesh", Subsystem: "issuer", Name: "calls_total",
			Help: "Calls toward an external issuer by result: done, failed, panicked, not_started (cancelled while waiting)."}, []string{"issuer", "result"}),
		perIssuer: prometheus.NewDesc("certmesh_issuer_permits", "Calls that may be in flight toward one external issuer.", nil, nil),
	}
}

// Cap is how many calls may be in flight per issuer.
func (p *Permits) Cap() int { return int(p.cap) }

func (p *Permits) semaphore(issuerID string) *semaphore.Weighted {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.byIssuer[issuerID]
	if s == nil {
		s = semaphore.NewWeighted(p.cap)
		p.byIssuer[issuerID] = s
	}
	return s
}

// Do waits for a permit and calls fn with it. It returns fn's error; Retryable, without calling fn, when ctx ended first.
// A panic in fn gives the permit back and comes out as an Internal error with the stack as its cause.
func (p *Permits) Do(ctx context.Context, issuerID string, fn func(ctx context.Context) error) error {
	s := p.semaphore(issuerID)
	// Acquire takes a free permit even when ctx has ended.
	err := ctx.Err()
	if err == nil {
		err = s.Acquire(ctx, 1)
	}
	if err != nil {
		p.calls.WithLabelValues(issuerID, callLeft).Inc()
		return fault.Wrap(fault.Retryable, context.Cause(ctx), "no permit for issuer %s came free in time", issuerID)
	}
	defer s.Release(1)
	p.inFlight.WithLabelValues(issuerID).Inc()
	defer p.inFlight.WithLabelValues(issuerID).Dec()
	result := callDone
	defer func() { p.calls.WithLabelValues(issuerID, result).Inc() }()
	panicked, err := contained(ctx, fn)
	switch {
	case panicked:
		result = callPanicked
	case err != nil:
		result = callFailed
	}
	return err
}

func contained(ctx context.Context, fn func(ctx context.Context) error) (panicked bool, err error) {
	defer func() {
		if v := recover(); v != nil {
			err, panicked = fault.Wrap(fault.Internal, fmt.Errorf("panic: %v\n%s", v, debug.Stack()), "a call panicked"), true
		}
	}()
	return false, fn(ctx)
}

// Describe implements prometheus.Collector.
func (p *Permits) Describe(ch chan<- *prometheus.Desc) {
	p.inFlight.Describe(ch)
	p.calls.Describe(ch)
	ch <- p.perIssuer
}

// Collect implements prometheus.Collector.
func (p *Permits) Collect(ch chan<- prometheus.Metric) {
	p.inFlight.Collect(ch)
	p.calls.Collect(ch)
	ch <- prometheus.MustNewConstMetric(p.perIssuer, prometheus.GaugeValue, float64(p.cap))
}
