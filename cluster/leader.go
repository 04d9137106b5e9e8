package cluster

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	// How often leadership that can be neither established nor given away is tried before the node fails.
	maxStumbles = 4
	stumbleMin  = 250 * time.Millisecond
	stumbleMax  = 5 * time.Second
)

// reign is one time of leadership, as this node sees it.
type reign struct {
	end  context.CancelFunc
	done chan struct{}
}

// leadership follows what Raft says of this node. The channel keeps only the newest word: true after true means lost and
// gained again, and false after false that there was nothing to establish.
func (n *Node) leadership() {
	var now *reign
	end := func() {
		if now != nil {
			now.end()
			<-now.done
			now = nil
		}
	}
	defer end()
	for {
		select {
		case <-n.ctx.Done():
			return
		case leads := <-n.raft.LeaderCh():
			end()
			if leads {
				now = n.begin()
			}
		case <-n.disk.stuck:
			end()
		}
	}
}

func (n *Node) begin() *reign {
	ctx, cancel := context.WithCancel(n.ctx)
	r := &reign{end: cancel, done: make(chan struct{})}
	t := Term{Number: n.raft.CurrentTerm(), Since: n.now()}
	n.wg.Go(func() {
		defer close(r.done)
		defer cancel()
		n.reign(ctx, t)
	})
	return r
}

// reign runs until ctx ends, which is when leadership was lost.
func (n *Node) reign(ctx context.Context, t Term) {
	for {
		err := n.establish(ctx, t)
		if n.raft.State() != raft.Leader {
			// Lost on the way; the word of it is under way.
			<-ctx.Done()
		}
		if ctx.Err() != nil {
			return
		}
		n.stumbles++
		n.log.Error("leadership could not be established", "term", t.Number, "error", err)
		// Two nodes of which neither can must not pass it to and fro as fast as the network is.
		if !sleep(ctx, min(stumbleMin<<min(n.stumbles, 8), stumbleMax)) {
			return
		}
		if len(n.voters()) == 1 {
			continue
		}
		if err := n.giveAway(ctx); err != nil {
			n.log.Warn("leadership could not be given away", "error", err)
		} else if !sleep(ctx, n.cfg.Timing.GiveAway) {
			return
		}
		if n.stumbles >= maxStumbles {
			n.fail(fault.Wrap(fault.Internal, err, "this node leads but can neither do what the leader does nor give leadership away"))
			<-ctx.Done()
			return
		}
	}
}

// establish does what a new leader does, and undoes it in the opposite order when ctx ends or it fails.
func (n *Node) establish(ctx context.Context, t Term) error {
	barrier, cancel := context.WithTimeout(ctx, n.cfg.Timing.Barrier)
	defer cancel()
	if err := await(barrier, n.raft.Barrier(n.cfg.Timing.Barrier)); err != nil {
		return fmt.Errorf("see what was decided before: %w", err)
	}
	n.log.Info("this node leads the cluster", "term", t.Number)
	defer n.log.Info("this node does not lead the cluster any more", "term", t.Number)
	n.setTerm(&t)
	defer n.setTerm(nil)

	pilot := n.newPilot(ctx, t)
	pilot.Start(ctx)
	defer func() { <-pilot.Stop() }()

	if n.cfg.Revoke != nil {
		defer n.cfg.Revoke(t)
	}
	if n.cfg.Leading != nil {
		if err := n.cfg.Leading(ctx, t); err != nil {
			return err
		}
	}
	n.stumbles = 0
	<-ctx.Done()
	return nil
}

// TransferLeadership gives leadership to the member that is best prepared. A node that does not lead returns nil. The wait
// is bounded by ctx and Timing.GiveAway.
func (n *Node) TransferLeadership(ctx context.Context) error {
	if n.raft.State() != raft.Leader {
		return nil
	}
	if err := n.giveAway(ctx); err != nil {
		return fault.Wrap(fault.Retryable, err, "leadership could not be given to another node")
	}
	return nil
}

func (n *Node) giveAway(ctx context.Context) error {
	heir := n.heir()
	if heir == "" {
		return fault.New(fault.Rejected, "no other voter is well")
	}
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Timing.GiveAway)
	defer cancel()
	n.log.Info("leadership is given away", "to", heir)
	return await(ctx, n.raft.LeadershipTransferToServer(raft.ServerID(heir), raft.ServerAddress(heir)))
}

// heir returns the voter that should lead next: well, if possible not draining, and far on in the log.
func (n *Node) heir() string {
	type candidate struct {
		id       string
		draining int
		index    uint64
	}
	var all []candidate
	for _, m := range n.Members() {
		id := m.GetId()
		if id == n.cfg.ID || m.GetSuffrage() != clusterpb.Member_SUFFRAGE_VOTER || !n.trans.answered(id, n.cfg.Timing.Contact) {
			continue
		}
		c := candidate{id: id, index: n.trans.contact(id, time.Time{}).index}
		if m.GetDraining() {
			c.draining = 1
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return ""
	}
	return slices.MinFunc(all, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.draining, b.draining), cmp.Compare(b.index, a.index), cmp.Compare(a.id, b.id))
	}).id
}
