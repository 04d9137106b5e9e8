package node

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
)

// TestNudgesOfManyNodesAreAsFewAsOfOne: requests coalesce, the first is carried out at once, and the pause after it is as
// many times longer as there are nodes.
func TestNudgesOfManyNodesAreAsFewAsOfOne(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	clk := clockwork.NewFakeClock()
	done := make(chan time.Time, 10)
	n := newNudge(clk, func() int { return 3 }, func() { done <- clk.Now() })
	var running sync.WaitGroup
	running.Go(func() { n.run(ctx) })
	defer running.Wait()
	defer cancel()
	n.request()
	first := <-done
	for range 5 {
		n.request()
	}
	if err := clk.BlockUntilContext(ctx, 1); err != nil {
		t.Fatal(err)
	}
	clk.Advance(3*nudgePause - time.Millisecond)
	select {
	case <-done:
		t.Fatal("nudged before the pause of three nodes was over")
	default:
	}
	clk.Advance(time.Millisecond)
	if again := <-done; again.Sub(first) != 3*nudgePause {
		t.Errorf("nudged again after %s", again.Sub(first))
	}
	if err := clk.BlockUntilContext(ctx, 1); err != nil {
		t.Fatal(err)
	}
	clk.Advance(3 * nudgePause)
	if len(done) != 0 {
		t.Error("five requests were carried out more than once")
	}
}
