package node

import (
	"context"
	"time"

	"github.com/jonboulle/clockwork"
)

// nudgePause is the least time between two nudges of one node alone: duties read a few indexes each time, which is nothing
// once a second and would be a load after each of thousands of certificates. Of several nodes each waits for so many times
// as long, because all nudge the one that leads.
const nudgePause = time.Second

// nudge makes the duties look again after something changed that may bring their next due time forward, such as a
// certificate that lives for minutes. Requests coalesce.
type nudge struct {
	clk clockwork.Clock
	do  func()
	// nodes is how many nodes there are, this one included.
	nodes func() int
	wake  chan struct{}
}

func newNudge(clk clockwork.Clock, nodes func() int, do func()) *nudge {
	return &nudge{clk: clk, do: do, nodes: nodes, wake: make(chan struct{}, 1)}
}

func (n *nudge) request() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

func (n *nudge) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.wake:
		}
		n.do()
		t := n.clk.NewTimer(nudgePause * time.Duration(n.nodes()))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.Chan():
		}
	}
}
