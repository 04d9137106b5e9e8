package store

import (
	"context"
	"testing"
	"time"
)

// TestCutEndsSharedCommits: a database that does not answer must not hold up Close for a batch's timeout, or for as many as
// have queued.
func TestCutEndsSharedCommits(t *testing.T) {
	t.Parallel()
	s := &Store{metrics: newMetrics(nil)}
	s.shared, s.cut = context.WithCancel(t.Context())
	begun := make(chan struct{}, 3)
	b := &batch[string, error]{s: s, name: "test", key: func(k string) string { return k }, fail: plain,
		run: func(ctx context.Context, _ []string) ([]error, error) {
			begun <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}}
	outs := make(chan []error, 3)
	for range cap(outs) {
		// One row: each waits for the one before it.
		go func() { outs <- b.do(t.Context(), []string{"row"}) }()
	}
	<-begun
	s.Cut()
	stopped := make(chan struct{})
	go func() {
		for range cap(outs) {
			if out := <-outs; out[0] == nil {
				t.Error("what was cut counts as done")
			}
		}
		b.stop()
		close(stopped)
	}()
	select {
	case <-stopped:
	case <-time.After(batchTimeout / 3):
		t.Fatal("the batches did not end")
	}
}
