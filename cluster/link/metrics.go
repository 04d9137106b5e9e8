package link

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
)

// alarmEvery is how often the same alarm is written to the log.
const alarmEvery = 10 * time.Minute

type metrics struct {
	up             prometheus.GaugeFunc
	sent, received *prometheus.CounterVec
	breaks         *prometheus.CounterVec
	skew           *prometheus.GaugeVec

	mu      sync.Mutex
	alarmed map[string]time.Time
}

func newMetrics(m *Mesh) *metrics {
	opts := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: "certmesh", Subsystem: "link", Name: name, Help: help}
	}
	return &metrics{
		up: prometheus.NewGaugeFunc(prometheus.GaugeOpts(opts("up", "Other nodes to which the link stands in both directions.")), func() float64 {
			n := 0
			for _, up := range m.Up() {
				if up {
					n++
				}
			}
			return float64(n)
		}),
		sent:     prometheus.NewCounterVec(prometheus.CounterOpts(opts("sent_total", "Messages sent to other nodes by kind.")), []string{"message"}),
		received: prometheus.NewCounterVec(prometheus.CounterOpts(opts("received_total", "Messages received from other nodes by kind.")), []string{"message"}),
		breaks:   prometheus.NewCounterVec(prometheus.CounterOpts(opts("breaks_total", "Links that ended or could not be made, by node.")), []string{"node"}),
		skew: prometheus.NewGaugeVec(prometheus.GaugeOpts(opts("clock_ahead_seconds",
			"How far another node's clock is ahead of this node's, the time on the way included.")), []string{"node"}),
		alarmed: map[string]time.Time{},
	}
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.up, m.sent, m.received, m.breaks, m.skew}
}

// alarm reports whether an alarm about a node is to be written now.
func (m *metrics) alarm(nodeID string, now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if last, ok := m.alarmed[nodeID]; ok && now.Sub(last) < alarmEvery {
		return false
	}
	m.alarmed[nodeID] = now
	return true
}

// kindOf names a message for a metric.
func kindOf(m *clusterpb.LinkRequest) string {
	if m.Message == nil {
		return "unknown"
	}
	name := fmt.Sprintf("%T", m.Message)
	return strings.ToLower(name[strings.LastIndexByte(name, '_')+1:])
}
