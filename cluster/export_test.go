package cluster

import (
	"github.com/hashicorp/raft"

	clusterlog "github.com/certmesh/certmesh/cluster/internal/log"
)

// Backend is what a test's disk implements.
type Backend = clusterlog.Backend

// SetBackend puts a test's disk under the Raft log.
func (c *Config) SetBackend(wrap func(Backend) Backend) { c.backend = wrap }

// ApplyRaw puts bytes into the log that Propose would refuse.
func (n *Node) ApplyRaw(data []byte) error { return n.raft.Apply(data, n.cfg.Timing.Barrier).Error() }

// Snapshot makes Raft write a snapshot now.
func (n *Node) Snapshot() error { return n.raft.Snapshot().Error() }

// Compact leaves as little log behind a snapshot as possible.
func (n *Node) Compact() error {
	c := n.raft.ReloadableConfig()
	c.TrailingLogs = 1
	return n.raft.ReloadConfig(c)
}

// IsRaftLeader reports what Raft says, before any barrier.
func (n *Node) IsRaftLeader() bool { return n.raft.State() == raft.Leader }
