package issue

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/certmesh/certmesh/protocol/fault"
)

func TestCarelessAgentsAreSlowedDown(t *testing.T) {
	t.Parallel()
	var c careless
	now := time.Unix(1_800_000_000, 0)
	for i := range carelessBurst {
		if !c.mayCheck("bad", now) {
			t.Fatalf("bad request %d was not looked at", i+1)
		}
		c.wasBad("bad", now)
	}
	if c.mayCheck("bad", now) {
		t.Error("beyond its burst it is looked at")
	}
	if !c.mayCheck("good", now) {
		t.Error("another agent is not looked at")
	}
	now = now.Add(time.Second / carelessRate)
	if !c.mayCheck("bad", now) {
		t.Error("it is not looked at when its time has come")
	}
	if now = now.Add(time.Hour); !c.mayCheck("bad", now) || len(c.agents) != 0 {
		t.Errorf("it was not forgiven: %v", c.agents)
	}
	for i := range 2 * carelessMax {
		c.wasBad(fmt.Sprint(i), now)
	}
	if len(c.agents) > carelessMax {
		t.Errorf("%d agents are remembered", len(c.agents))
	}
}

// Whoever is slowed down is told that its request was not looked at, and that is counted.
func TestCarelessRefusalsAreCounted(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	bad, good := b.request(newKey(t)), b.request(newKey(t))
	bad.CSR = []byte("no request")
	for range carelessBurst {
		if _, err := b.p.Issue(t.Context(), bad); !fault.Is(err, fault.Invalid) {
			t.Fatalf("a bad request: %v", err)
		}
	}
	_, err := b.p.Issue(t.Context(), good)
	var e *fault.Error
	if !errors.As(err, &e) || e.Class != fault.RateLimited || e.Until.IsZero() {
		t.Errorf("a good request of the same agent: %v", err)
	}
	if n := testutil.ToFloat64(b.p.refused.WithLabelValues("careless")); n != 1 {
		t.Errorf("%v refusals were counted", n)
	}
}
