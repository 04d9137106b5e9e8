package store

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/certmesh/certmesh/protocol/fault"
)

// goodBatch is how many items are worth a transaction beside another one.
const goodBatch = maxBatch / 2

// batchTimeout is the ceiling of one shared transaction with its retries. It does not hang on any caller's context: a
// caller that gives up must not abort the work of ninety-nine others.
const batchTimeout = 30 * time.Second

// batch is a group commit without a timer: while one transaction runs, calls queue; what has queued, at most maxBatch
// items, goes into the next. Under no load an item waits for nobody.
type batch[I, O any] struct {
	s    *Store
	name string
	// key names the row that an item is about. A batch holds one item per key, sorted, so that two batches lock in the
	// same order and a statement never meets a row twice; the second item waits for the next batch.
	key func(I) string
	// run does one transaction and answers per item. An error means that nothing was kept for any of them.
	run func(ctx context.Context, items []I) ([]O, error)
	// fail is the outcome of an item whose transaction failed.
	fail func(error) O
	// lanes is how many transactions may run at once; 0 means 1. Only for what is safe beside itself at READ COMMITTED. Each
	// after the first begins when enough for a good batch has queued, and ends when that is no longer so.
	lanes int

	mu      sync.Mutex
	queue   []*entry[I, O]
	running int
	closed  bool
	idle    sync.WaitGroup
}

type entry[I, O any] struct {
	item I
	out  O
	key  string
	done *sync.WaitGroup
}

var errClosed = fault.New(fault.Retryable, "the store is closing; try again at another node")

// do queues items and waits for their outcomes, in order. When ctx ends first it returns the context's error for all of
// them; they may be kept all the same.
func (b *batch[I, O]) do(ctx context.Context, items []I) []O {
	if len(items) == 0 {
		return nil
	}
	var done sync.WaitGroup
	done.Add(len(items))
	mine := make([]*entry[I, O], len(items))
	for i, item := range items {
		mine[i] = &entry[I, O]{item: item, key: b.key(item), done: &done}
	}
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return b.failed(len(items), errClosed)
	}
	b.queue = append(b.queue, mine...)
	if b.running == 0 || b.running < b.lanes && len(b.queue) >= goodBatch {
		b.running++
		b.idle.Add(1)
		go b.loop()
	}
	b.mu.Unlock()

	if ctx.Done() != nil {
		ready := make(chan struct{})
		go func() { done.Wait(); close(ready) }()
		select {
		case <-ready:
		case <-ctx.Done():
			return b.failed(len(items), fmt.Errorf("store: %s: %w", b.name, ctx.Err()))
		}
	} else {
		done.Wait()
	}
	outs := make([]O, len(items))
	for i, e := range mine {
		outs[i] = e.out
	}
	return outs
}

func (b *batch[I, O]) failed(n int, err error) []O {
	outs := make([]O, n)
	for i := range outs {
		outs[i] = b.fail(err)
	}
	return outs
}

// loop runs batches until the queue is empty, then ends: an idle store has no goroutines.
func (b *batch[I, O]) loop() {
	defer b.idle.Done()
	for {
		b.mu.Lock()
		if len(b.queue) == 0 || b.running > 1 && len(b.queue) < goodBatch {
			b.running--
			b.mu.Unlock()
			return
		}
		work := b.takeLocked()
		b.mu.Unlock()
		b.s.metrics.batch.WithLabelValues(b.name).Observe(float64(len(work)))
		b.serve(work)
		for _, e := range work {
			e.done.Done()
		}
	}
}

func (b *batch[I, O]) takeLocked() []*entry[I, O] {
	var work []*entry[I, O]
	var later []*entry[I, O]
	seen := map[string]bool{}
	for i, e := range b.queue {
		if len(work) == maxBatch {
			later = append(later, b.queue[i:]...)
			break
		}
		if seen[e.key] {
			later = append(later, e)
			continue
		}
		seen[e.key] = true
		work = append(work, e)
	}
	b.queue = later
	slices.SortFunc(work, func(x, y *entry[I, O]) int { return strings.Compare(x.key, y.key) })
	return work
}

func (b *batch[I, O]) serve(work []*entry[I, O]) {
	err := b.try(work)
	if err == nil {
		return
	}
	// An error that is not the database's state of health lies with one item: each gets its own transaction.
	if len(work) > 1 && !fault.Is(err, fault.Retryable) && !errors.Is(err, ErrCut) {
		for _, e := range work {
			if err := b.try([]*entry[I, O]{e}); err != nil {
				e.out = b.fail(err)
			}
		}
		return
	}
	for _, e := range work {
		e.out = b.fail(err)
	}
}

func (b *batch[I, O]) try(work []*entry[I, O]) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fault.New(fault.Internal, "the store failed at %s: %v\n%s", b.name, p, debug.Stack())
		}
	}()
	items := make([]I, len(work))
	for i, e := range work {
		items[i] = e.item
	}
	ctx, cancel := context.WithTimeout(b.s.shared, batchTimeout)
	defer cancel()
	outs, err := b.run(ctx, items)
	if err != nil {
		return err
	}
	for i, e := range work {
		e.out = outs[i]
	}
	return nil
}

// stop lets what is queued finish and refuses what comes later.
func (b *batch[I, O]) stop() {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.idle.Wait()
}
