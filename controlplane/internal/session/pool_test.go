package session

import (
	"context"
	"slices"
	"testing"
	"time"
)

// TestLanesTakeTurns: however many wait in one lane, another's first is next but one.
func TestLanesTakeTurns(t *testing.T) {
	t.Parallel()
	p := newPool(1)
	gate, begun := make(chan struct{}), make(chan struct{})
	var ran []string
	p.do("big", func() { close(begun); <-gate })
	<-begun
	for range 100 {
		p.do("big", func() { ran = append(ran, "big") }) // one at a time
	}
	p.do("small", func() { ran = append(ran, "small") })
	close(gate)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := p.wait(ctx); err != nil {
		t.Fatal(err)
	}
	if len(ran) != 101 || slices.Index(ran, "small") != 1 {
		t.Errorf("small ran as number %d of %d", slices.Index(ran, "small"), len(ran))
	}
}
