package store

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/certmesh/certmesh/protocol/fault"
)

// metrics count transactions by name; names are constants of this package, so their number is bounded.
type metrics struct {
	seconds   *prometheus.HistogramVec
	failed    *prometheus.CounterVec
	retries   *prometheus.CounterVec
	ambiguous *prometheus.CounterVec
	batch     *prometheus.HistogramVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "certmesh_store_seconds", Help: "Duration of store transactions with their retries.",
			Buckets: []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .5, 2, 10},
		}, []string{"tx"}),
		failed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "certmesh_store_failures_total", Help: "Store transactions that ended in an error other than a refusal.",
		}, []string{"tx"}),
		retries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "certmesh_store_retries_total", Help: "Store transactions run again after a conflict with another.",
		}, []string{"tx"}),
		ambiguous: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "certmesh_store_ambiguous_commits_total", Help: "Commits whose outcome had to be found out.",
		}, []string{"tx"}),
		batch: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "certmesh_store_batch_items", Help: "Items that shared one commit.",
			Buckets: []float64{1, 2, 5, 10, 20, 50, 100},
		}, []string{"tx"}),
	}
	if reg != nil {
		reg.MustRegister(m.seconds, m.failed, m.retries, m.ambiguous, m.batch)
	}
	return m
}

func (m *metrics) done(name string, err error, tries int, took time.Duration) {
	m.seconds.WithLabelValues(name).Observe(took.Seconds())
	if tries > 1 {
		m.retries.WithLabelValues(name).Add(float64(tries - 1))
	}
	var f *fault.Error
	if err != nil && !errors.As(err, &f) && !errors.Is(err, context.Canceled) {
		m.failed.WithLabelValues(name).Inc()
	}
}
