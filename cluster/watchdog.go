package cluster

import (
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

// watchdog makes a follower notice a leader's silence when it is due.
//
// Raft looks at random times that are one to two timeouts apart, so a silence of one timeout is noticed after up to three;
// and it grants no vote before it has noticed itself, so the slowest of the majority decides: with three nodes, two timeouts
// in the mean. Here every follower looks right when the timeout has passed, one after the other so that votes do not
// split. The way to have Raft look is to shorten its timeout, by nothing.
func (n *Node) watchdog() {
	silence := n.cfg.Timing.Heartbeat
	var noticed time.Time
	for {
		wait := silence
		last := n.raft.LastContact()
		if n.raft.State() == raft.Follower && slices.Equal(n.voters(), []string{n.cfg.ID}) {
			// There is nobody to hear of.
			n.look()
		} else if leader := n.leaderID(); n.raft.State() == raft.Follower && leader != "" && !last.IsZero() && !last.Equal(noticed) {
			due := last.Add(silence + time.Duration(n.turn(leader))*silence/4 + time.Millisecond)
			wait = time.Until(due) //nolint:forbidigo // Raft's times are the real clock's.
			if wait <= 0 {
				noticed, wait = last, silence
				n.look()
			}
		}
		if !sleep(n.ctx, wait) {
			return
		}
	}
}

// look has Raft's follower compare the leader's silence with its timeout now.
func (n *Node) look() {
	c := n.raft.ReloadableConfig()
	c.HeartbeatTimeout = n.cfg.Timing.Heartbeat + time.Microsecond
	_ = n.raft.ReloadConfig(c) // It is as valid as the one before.
	c.HeartbeatTimeout = n.cfg.Timing.Heartbeat
	_ = n.raft.ReloadConfig(c) // The one before.
}

// turn returns this node's place among the voters that may follow the leader.
func (n *Node) turn(leader string) int {
	others := slices.DeleteFunc(n.voters(), func(id string) bool { return id == leader })
	slices.Sort(others)
	return max(0, slices.Index(others, n.cfg.ID))
}

func (n *Node) leaderID() string {
	_, id := n.raft.LeaderWithID()
	return string(id)
}
