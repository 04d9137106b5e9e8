package session

import (
	"maps"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

// TestLesson11NothingIsWrittenForAnIdleAgent: beats of idle agents reach no method of the store but the batched flush, and
// that once an interval, however many they are.
func TestLesson11NothingIsWrittenForAnIdleAgent(t *testing.T) {
	t.Parallel()
	clk := clockwork.NewFakeClockAt(time.Now())
	p := newPlane(t, func(c *Config) { c.Clock = clk })
	hosts := make([]*talk, 0, 8)
	for _, name := range []string{"a", "b", "c", "d", "e", "f", "g", "h"} {
		hosts = append(hosts, p.host(name).online())
	}
	calls := func() map[string]int {
		p.store.mu.Lock()
		defer p.store.mu.Unlock()
		return maps.Clone(p.store.calls)
	}
	before := calls()
	for range 25 {
		for _, h := range hosts {
			h.send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Beat{Beat: &agentpb.Beat{}}})
		}
	}
	eventually(t, "beats are written", func() bool {
		clk.Advance(time.Second)
		p.store.mu.Lock()
		defer p.store.mu.Unlock()
		return len(p.store.seen) == len(hosts)
	})
	for method, n := range calls() {
		switch n -= before[method]; {
		case method == "FlushSeen" && n > 2:
			t.Errorf("%d flushes for %d beats", n, 25*len(hosts))
		case method != "FlushSeen" && n > 0:
			t.Errorf("%s was called %d times for idle agents", method, n)
		}
	}
}
