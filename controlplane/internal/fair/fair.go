// Package fair shares what is scarce between those who ask for it: whoever waits stands in a lane, lanes take turns, and
// within a lane the first comes first. However long one lane is, another waits for one turn of each.
package fair

import (
	"context"
	"errors"
	"sync"
)

// Queue holds values in lanes. With n lanes waiting, the head of each is among the next n that Pop returns. The zero
// Queue is empty and ready; it is not safe for concurrent use.
type Queue[T any] struct {
	lanes map[string]*lane[T]
	// turns are the lanes that hold something, the next one first.
	turns []*lane[T]
	size  int
}

type lane[T any] struct {
	name  string
	items []T
}

// Push puts v at the end of its lane. A lane that was empty has its turn after all others.
func (q *Queue[T]) Push(name string, v T) {
	l := q.lanes[name]
	if l == nil {
		if q.lanes == nil {
			q.lanes = map[string]*lane[T]{}
		}
		l = &lane[T]{name: name}
		q.lanes[name] = l
		q.turns = append(q.turns, l)
	}
	l.items = append(l.items, v)
	q.size++
}

// Pop takes the head of the lane whose turn it is; ok is false when the queue is empty.
func (q *Queue[T]) Pop() (v T, ok bool) {
	if q.size == 0 {
		return v, false
	}
	l := q.turns[0]
	q.turns[0] = nil
	q.turns = q.turns[1:]
	v = l.items[0]
	var none T
	l.items[0] = none
	l.items = l.items[1:]
	if q.size--; len(l.items) > 0 {
		q.turns = append(q.turns, l)
	} else {
		delete(q.lanes, l.name)
	}
	if q.size == 0 {
		q.lanes, q.turns = nil, nil // an idle queue keeps nothing
	}
	return v, true
}

// Len is how many values wait, and how many of them in a lane.
func (q *Queue[T]) Len(name string) (all, inLane int) {
	if l := q.lanes[name]; l != nil {
		inLane = len(l.items)
	}
	return q.size, inLane
}

// ErrFull says that as many wait as may.
var ErrFull = errors.New("too many are waiting")

// Gate lets a number of callers in at a time; the others wait in lanes. It is made by NewGate and safe for concurrent use.
type Gate struct {
	places, lane, waiting int

	mu     sync.Mutex
	inside int
	queue  Queue[*waiter]
	// gone are waiters whose context has ended and that are still in the queue.
	gone int
}

type waiter struct {
	in chan struct{} // closed when it is let in
	// left: nobody waits for it any more.
	left bool
}

// NewGate lets places callers in at a time; waiting may stand before it, at most lane of them in one lane.
func NewGate(places, lane, waiting int) *Gate {
	return &Gate{places: max(places, 1), lane: lane, waiting: waiting}
}

// Enter waits for a place and returns how to give it back, which must be called once. Errors: ErrFull at once, or the
// cause of ctx's end.
func (g *Gate) Enter(ctx context.Context, lane string) (leave func(), err error) {
	g.mu.Lock()
	if g.inside < g.places {
		g.inside++
		g.mu.Unlock()
		return g.leave, nil
	}
	if all, mine := g.queue.Len(lane); all >= g.waiting || mine >= g.lane {
		g.mu.Unlock()
		return nil, ErrFull
	}
	w := &waiter{in: make(chan struct{})}
	g.queue.Push(lane, w)
	g.mu.Unlock()
	select {
	case <-w.in:
		return g.leave, nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	select {
	case <-w.in: // in the same moment; the place goes to the next
		g.nextLocked()
	default:
		// It stays in its lane, and in the count, until its turn: a caller that gives up and asks again gains no room by it.
		w.left = true
		g.gone++
	}
	g.mu.Unlock()
	return nil, context.Cause(ctx)
}

// Load is how many are inside and how many wait.
func (g *Gate) Load() (inside, waiting int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	all, _ := g.queue.Len("")
	return g.inside, all - g.gone
}

func (g *Gate) leave() {
	g.mu.Lock()
	g.nextLocked()
	g.mu.Unlock()
}

// nextLocked passes a place on to the next that waits, or gives it up.
func (g *Gate) nextLocked() {
	for {
		w, ok := g.queue.Pop()
		switch {
		case !ok:
			g.inside--
			return
		case w.left:
			g.gone--
		default:
			close(w.in)
			return
		}
	}
}
