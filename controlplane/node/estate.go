package node

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// counter counts the estate.
type counter interface {
	Counts(ctx context.Context) (domain.Counts, error)
}

// countsFresh is how long one count answers scrapes: several scrapers cost the store one query set.
const countsFresh = 5 * time.Second

// estate tells Prometheus how the estate stands. When the store does not answer, the last counts stand and a failure is
// counted: a gap would look like recovery to an alert.
type estate struct {
	store counter
	clk   clockwork.Clock
	log   *slog.Logger

	mu     sync.Mutex
	last   domain.Counts
	at     time.Time
	failed prometheus.Counter
}

var (
	certificatesDesc = prometheus.NewDesc("certmesh_certificates", "Managed certificates by status.", []string{"status"}, nil)
	agentsDesc       = prometheus.NewDesc("certmesh_agents", "Agents by state.", []string{"state"}, nil)
	jobsDesc         = prometheus.NewDesc("certmesh_jobs_open", "Open jobs by state.", []string{"state"}, nil)
	laggingDesc      = prometheus.NewDesc("certmesh_placements_lagging", "Placements that do not serve, or where not probed hold, what is wanted.", nil, nil)
)

func newEstate(s counter, clk clockwork.Clock, log *slog.Logger) *estate {
	return &estate{store: s, clk: clk, log: log, failed: prometheus.NewCounter(prometheus.CounterOpts{
		Name: "certmesh_estate_count_failures_total", Help: "Scrapes that were answered with older counts because the store did not answer.",
	})}
}

// Describe implements prometheus.Collector.
func (e *estate) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{certificatesDesc, agentsDesc, jobsDesc, laggingDesc} {
		ch <- d
	}
	e.failed.Describe(ch)
}

// Collect implements prometheus.Collector.
func (e *estate) Collect(ch chan<- prometheus.Metric) {
	c := e.counts()
	// Every status is there from the first scrape: an alert on a series that does not exist yet never fires.
	for _, s := range domain.CertificateStatuses {
		ch <- prometheus.MustNewConstMetric(certificatesDesc, prometheus.GaugeValue, float64(c.Certificates[s]), string(s))
	}
	for _, s := range domain.AgentStates {
		ch <- prometheus.MustNewConstMetric(agentsDesc, prometheus.GaugeValue, float64(c.Agents[s]), string(s))
	}
	for _, s := range domain.OpenJobStates {
		ch <- prometheus.MustNewConstMetric(jobsDesc, prometheus.GaugeValue, float64(c.OpenJobs[s]), string(s))
	}
	ch <- prometheus.MustNewConstMetric(laggingDesc, prometheus.GaugeValue, float64(c.PlacementsLagging))
	e.failed.Collect(ch)
}

func (e *estate) counts() domain.Counts {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.clk.Now()
	if !e.at.IsZero() && now.Sub(e.at) < countsFresh {
		return e.last
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second) //nolint:forbidigo // Prometheus gives a collector no context
	defer cancel()
	c, err := e.store.Counts(ctx)
	if err != nil {
		e.failed.Inc()
		e.log.Warn("the estate could not be counted", "error", err)
		return e.last
	}
	e.last, e.at = c, now
	return c
}
