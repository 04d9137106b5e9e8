package issue

import (
	"fmt"
	"testing"
	"time"
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
