package cluster

import (
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
)

var (
	termDesc    = prometheus.NewDesc("certmesh_raft_term", "Raft's term.", nil, nil)
	appliedDesc = prometheus.NewDesc("certmesh_raft_applied_index", "Last entry of the Raft log that was applied.", nil, nil)
	contactDesc = prometheus.NewDesc("certmesh_raft_last_contact_seconds", "Time since the leader was heard; 0 on the leader, absent while it never was.", nil, nil)
	leaderDesc  = prometheus.NewDesc("certmesh_raft_leader", "1 on the node that leads.", nil, nil)
	membersDesc = prometheus.NewDesc("certmesh_raft_members", "Members by suffrage, as this node knows them.", []string{"suffrage"}, nil)
	diskDesc    = prometheus.NewDesc("certmesh_raft_disk_failing", "1 while the Raft log cannot be written.", nil, nil)
)

// collector shows how the node stands.
type collector struct {
	n       *Node
	changes prometheus.Counter
}

func newCollector(n *Node) *collector {
	return &collector{n: n, changes: prometheus.NewCounter(prometheus.CounterOpts{
		Name: "certmesh_raft_leader_changes_total", Help: "Changes of the leader that this node has seen.",
	})}
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{termDesc, appliedDesc, contactDesc, leaderDesc, membersDesc, diskDesc} {
		ch <- d
	}
	c.changes.Describe(ch)
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	c.changes.Collect(ch)
	r := c.n.raft
	gauge(termDesc, float64(r.CurrentTerm()))
	gauge(appliedDesc, float64(r.AppliedIndex()))
	leads := r.State() == raft.Leader
	gauge(leaderDesc, number(leads))
	if last := r.LastContact(); leads {
		gauge(contactDesc, 0)
	} else if !last.IsZero() {
		gauge(contactDesc, c.n.now().Sub(last).Seconds())
	}
	voters, others := 0, 0
	for _, s := range c.n.servers() {
		if s.Suffrage == raft.Voter {
			voters++
		} else {
			others++
		}
	}
	gauge(membersDesc, float64(voters), "voter")
	gauge(membersDesc, float64(others), "nonvoter")
	gauge(diskDesc, number(c.n.disk.failing()))
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
