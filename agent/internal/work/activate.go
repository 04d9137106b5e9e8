package work

import (
	"context"
	"sync"

	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/protocol/fault"
)

// step is what one assignment wants of its reload domain.
type step struct {
	// install stages, journals and commits; it may be called again after undo.
	install func(ctx context.Context) error
	// undo goes back to before install; nil for a step whose install is itself an undo or nothing.
	undo     func(ctx context.Context) error
	activate func(ctx context.Context) error

	// ctx is the patience of whoever waits: a step that is still queued when it ends is taken out.
	ctx  context.Context
	done chan error
}

// domains batches activations per reload domain without a timer: what queued while an activation ran goes into the next
// one. Installing is part of the batch, so that no half-installed neighbour is ever validated.
type domains struct {
	mu    sync.Mutex
	byKey map[string]*queue
}

type queue struct {
	steps []*step
	busy  bool
}

// do runs s with its batch and returns its own outcome. act bounds the acting itself.
func (d *domains) do(act context.Context, key string, s *step) error {
	s.done = make(chan error, 1)
	d.mu.Lock()
	if d.byKey == nil {
		d.byKey = map[string]*queue{}
	}
	q := d.byKey[key]
	if q == nil {
		q = &queue{}
		d.byKey[key] = q
	}
	q.steps = append(q.steps, s)
	lead := !q.busy
	q.busy = true
	d.mu.Unlock()
	if lead {
		d.lead(act, key, q)
		return <-s.done
	}
	select {
	case err := <-s.done:
		return err
	case <-s.ctx.Done():
	}
	d.mu.Lock()
	for i, o := range q.steps {
		if o == s {
			q.steps = append(q.steps[:i:i], q.steps[i+1:]...)
			d.mu.Unlock()
			return fault.Wrap(fault.Retryable, context.Cause(s.ctx), "it was stopped before anything was installed")
		}
	}
	d.mu.Unlock()
	return <-s.done
}

// lead runs the batch that waits. What queued meanwhile is led by a goroutine of its own, so that the first in does not
// wait for all that came later.
func (d *domains) lead(act context.Context, key string, q *queue) {
	d.mu.Lock()
	batch := q.steps
	q.steps = nil
	d.mu.Unlock()
	runBatch(act, batch)
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(q.steps) > 0 {
		go d.lead(act, key, q)
		return
	}
	q.busy = false
	delete(d.byKey, key)
}

func runBatch(ctx context.Context, batch []*step) {
	var back, forth []*step
	for _, s := range batch {
		if s.undo == nil {
			back = append(back, s)
		} else {
			forth = append(forth, s)
		}
	}
	// Going back comes first and is activated by itself: it must not fail because of what is new.
	runBack(ctx, back)
	solve(ctx, forth)
}

func runBack(ctx context.Context, steps []*step) {
	var ok []*step
	for _, s := range steps {
		if err := s.install(ctx); err != nil {
			s.done <- err
			continue
		}
		ok = append(ok, s)
	}
	if len(ok) == 0 {
		return
	}
	err := ok[0].activate(ctx)
	for _, s := range ok {
		s.done <- err
	}
}

// solve installs steps and activates them once. If that fails it takes them all back and tries each half by itself, down
// to the culprits, which stay undone; everything else ends up installed and active. k culprits among n steps cost about
// 2k·log2(n) activations.
func solve(ctx context.Context, steps []*step) {
	// Installing is mostly waiting for the disk: all at once, as far as install itself lets them.
	bad := make([]error, len(steps))
	var wg sync.WaitGroup
	for i, s := range steps {
		wg.Go(func() {
			defer func() {
				if p := recover(); p != nil {
					// A connector's defect costs its own assignment, not the agent.
					bad[i] = fault.New(fault.Internal, "the agent met a defect of its own while installing: %v", p)
				}
			}()
			bad[i] = s.install(ctx)
		})
	}
	wg.Wait()
	var in []*step
	for i, s := range steps {
		if bad[i] != nil {
			s.done <- joinUndo(bad[i], s.undo(ctx))
			continue
		}
		in = append(in, s)
	}
	if len(in) == 0 {
		return
	}
	err := in[0].activate(ctx)
	if err == nil {
		for _, s := range in {
			s.done <- nil
		}
		return
	}
	undone := make([]error, len(in))
	for i, s := range in {
		undone[i] = s.undo(ctx)
	}
	if len(in) == 1 {
		// An activation may fail after the service has already begun to load: make it load what is installed now. When
		// the configuration is broken for another reason this fails too, and says nothing new.
		_ = in[0].activate(ctx)
		in[0].done <- joinUndo(err, undone[0])
		return
	}
	var again []*step
	for i, s := range in {
		if undone[i] != nil {
			s.done <- joinUndo(err, undone[i])
			continue
		}
		again = append(again, s)
	}
	solve(ctx, again[:len(again)/2])
	solve(ctx, again[len(again)/2:])
}

// joinUndo keeps err's class and says so when going back failed as well.
func joinUndo(err, undo error) error {
	if undo == nil {
		return err
	}
	f := FailureOf(err)
	return fault.Wrap(fault.Class(f.GetClass()), err, "%s; and the former state could not be restored: %s", f.GetMessage(), FailureOf(undo).GetMessage())
}

// keyed serialises by key: one assignment at a time works on a target.
type keyed struct {
	mu sync.Mutex
	by map[string]*slot
}

type slot struct {
	free  chan struct{} // holds one token
	users int
}

// lock waits for key until ctx ends; the returned function gives it back.
func (k *keyed) lock(ctx context.Context, key string) (func(), error) {
	k.mu.Lock()
	if k.by == nil {
		k.by = map[string]*slot{}
	}
	s := k.by[key]
	if s == nil {
		s = &slot{free: make(chan struct{}, 1)}
		s.free <- struct{}{}
		k.by[key] = s
	}
	s.users++
	k.mu.Unlock()
	leave := func() {
		k.mu.Lock()
		if s.users--; s.users == 0 {
			delete(k.by, key)
		}
		k.mu.Unlock()
	}
	select {
	case <-s.free:
		return func() { s.free <- struct{}{}; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, fault.Wrap(fault.Retryable, context.Cause(ctx), "it was stopped before it began")
	}
}

// domainOf returns the reload domain of t and how to activate it; a target without one has a domain of its own, whose
// activation is nothing.
func domainOf(t target.Target, id string) (string, func(ctx context.Context) error) {
	if a, ok := t.(target.Activator); ok {
		return "domain:" + a.Domain(), a.Activate
	}
	return "target:" + id, func(context.Context) error { return nil }
}
