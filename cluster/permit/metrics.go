package permit

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Results of a call, and of a request for permits, as labels of their counters.
const (
	callDone     = "done"
	callFailed   = "failed"
	callPanicked = "panicked"
	callLeft     = "not_started"

	askAnswered = "answered"
	askFailed   = "failed"
)

type metrics struct {
	inFlight, waiting   *prometheus.GaugeVec
	calls, pauses, asks *prometheus.CounterVec
	leased              *prometheus.Desc
	p                   *Permits
}

func newMetrics(p *Permits) *metrics {
	gauge := func(name, help string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "certmesh", Subsystem: "issuer", Name: name, Help: help}, []string{"issuer"})
	}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "certmesh", Subsystem: "issuer", Name: name, Help: help}, labels)
	}
	return &metrics{
		p:        p,
		inFlight: gauge("calls_in_flight", "Calls under way toward an external issuer."),
		waiting:  gauge("calls_waiting", "Calls toward an external issuer that wait for a permit."),
		calls:    counter("calls_total", "Calls toward an external issuer by result: done, failed, panicked, not_started (cancelled or refused while waiting).", "issuer", "result"),
		pauses:   counter("pauses_total", "Times that an external issuer asked for restraint, as this node learnt it.", "issuer"),
		asks:     counter("lease_requests_total", "Requests for permits to the node that leads, by result: answered, failed.", "result"),
		leased:   prometheus.NewDesc("certmesh_issuer_permits", "Calls that this node may have in flight toward an external issuer.", []string{"issuer"}, nil),
	}
}

// Describe implements prometheus.Collector.
func (p *Permits) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range p.m.vectors() {
		c.Describe(ch)
	}
	ch <- p.m.leased
}

// Collect implements prometheus.Collector.
func (p *Permits) Collect(ch chan<- prometheus.Metric) {
	for _, c := range p.m.vectors() {
		c.Collect(ch)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, i := range p.issuers {
		i.mu.Lock()
		n := i.h.Leased(p.now())
		i.mu.Unlock()
		ch <- prometheus.MustNewConstMetric(p.m.leased, prometheus.GaugeValue, float64(n), id)
	}
}

func (m *metrics) vectors() []prometheus.Collector {
	return []prometheus.Collector{m.inFlight, m.waiting, m.calls, m.pauses, m.asks}
}
