package session

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/certmesh/certmesh/controlplane/internal/dispatch"
)

type metrics struct {
	sessions prometheus.GaugeFunc
	held     *gauges

	received, sent, assigned, results, refused, adopted *prometheus.CounterVec
	timeouts, unknownLeaves                             prometheus.Counter
	wakesSent, wakesReceived, resyncs, moved            prometheus.Counter
}

func newMetrics(s *Server) *metrics {
	vec := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "certmesh", Subsystem: "session", Name: name, Help: help}, labels)
	}
	one := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "certmesh", Subsystem: "session", Name: name, Help: help})
	}
	return &metrics{
		sessions: prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "certmesh", Subsystem: "session", Name: "open",
			Help: "Agents whose stream this node holds."}, func() float64 { return float64(s.Count()) }),
		held:          &gauges{s: s},
		received:      vec("messages_received_total", "Messages of agents by kind.", "message"),
		sent:          vec("messages_sent_total", "Messages to agents by kind.", "message"),
		assigned:      vec("assignments_sent_total", "Assignments sent by class of work.", "class"),
		results:       vec("assignments_settled_total", "Assignments settled by class of work and outcome: ok, failed, ignored.", "class", "outcome"),
		refused:       vec("handshakes_refused_total", "Hellos, enrolments and renewals refused, by reason.", "reason"),
		timeouts:      one("send_timeouts_total", "Streams ended because the agent did not read."),
		unknownLeaves: one("unknown_leaves_total", "Leaves that agents hold and that are not on record."),
		adopted:       vec("leaves_adopted_total", "Reported leaves that were not on record, by what became of them: version, found, known.", "outcome"),
		wakesSent:     one("remote_wakes_sent_total", "Agents that other nodes were asked to wake."),
		wakesReceived: one("remote_wakes_received_total", "Agents that other nodes asked this one to wake."),
		resyncs:       one("resyncs_total", "Looks at all agents held, after a link to another node was made anew."),
		moved:         one("moved_total", "Agents that were asked to connect to another node."),
	}
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.sessions, m.held, m.received, m.sent, m.assigned, m.results, m.refused, m.timeouts, m.unknownLeaves, m.adopted,
		m.wakesSent, m.wakesReceived, m.resyncs, m.moved}
}

// gauges are sums over the streams, made when they are asked for: nothing is counted along the way.
type gauges struct{ s *Server }

var (
	creditsDesc = prometheus.NewDesc("certmesh_session_credits", "Credits that agents granted and that are not used up, by class of work.", []string{"class"}, nil)
	jobsDesc    = prometheus.NewDesc("certmesh_session_jobs", "Jobs of the agents held here: waiting for time or credit, or with the agent.", []string{"where"}, nil)
)

// Describe implements prometheus.Collector.
func (g *gauges) Describe(ch chan<- *prometheus.Desc) { ch <- creditsDesc; ch <- jobsDesc }

// Collect implements prometheus.Collector.
func (g *gauges) Collect(ch chan<- prometheus.Metric) {
	g.s.mu.RLock()
	streams := g.s.listLocked()
	g.s.mu.RUnlock()
	var credits [dispatch.Classes]int
	var waits, out int
	for _, st := range streams {
		st.mu.Lock()
		if st.work.Open() {
			for c, n := range st.work.Credits() {
				credits[c] += n
			}
			w, o := st.work.Counts()
			waits, out = waits+w, out+o
		}
		st.mu.Unlock()
	}
	for c, n := range credits {
		ch <- prometheus.MustNewConstMetric(creditsDesc, prometheus.GaugeValue, float64(n), dispatch.Class(c).String())
	}
	ch <- prometheus.MustNewConstMetric(jobsDesc, prometheus.GaugeValue, float64(waits), "waiting")
	ch <- prometheus.MustNewConstMetric(jobsDesc, prometheus.GaugeValue, float64(out), "with_agent")
}
