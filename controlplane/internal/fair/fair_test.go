package fair

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestEachLaneHasItsTurn: whatever is pushed and popped in between, a lane's head waits for at most one turn of each
// other lane that is there when it becomes the head, and of those that come before its turn; within a lane the order holds.
func TestEachLaneHasItsTurn(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		type value struct {
			lane string
			n    int
		}
		var q Queue[value]
		waiting := map[string][]int{}
		since := map[string]map[string]int{} // by lane, how often each other lane was served since this one was
		size, serial := 0, 0
		for range rapid.IntRange(1, 300).Draw(t, "steps") {
			if rapid.IntRange(0, 2).Draw(t, "push") > 0 {
				l := fmt.Sprint(rapid.IntRange(0, 5).Draw(t, "lane"))
				serial++
				q.Push(l, value{l, serial})
				if len(waiting[l]) == 0 {
					since[l] = map[string]int{}
				}
				waiting[l] = append(waiting[l], serial)
				size++
			} else {
				v, ok := q.Pop()
				if ok != (size > 0) {
					t.Fatalf("Pop says %v with %d waiting", ok, size)
				}
				if !ok {
					continue
				}
				size--
				if waiting[v.lane][0] != v.n {
					t.Fatalf("lane %s gave %d before %d", v.lane, v.n, waiting[v.lane][0])
				}
				waiting[v.lane] = waiting[v.lane][1:]
				since[v.lane] = map[string]int{}
				for l, w := range waiting {
					if l == v.lane || len(w) == 0 {
						continue
					}
					if since[l][v.lane]++; since[l][v.lane] > 1 {
						t.Fatalf("lane %s was served twice while %s waited", v.lane, l)
					}
				}
			}
			if all, mine := q.Len("0"); all != size || mine != len(waiting["0"]) {
				t.Fatalf("Len %d, %d; want %d, %d", all, mine, size, len(waiting["0"]))
			}
		}
	})
}

func TestGateBoundsAndTakesTurns(t *testing.T) {
	t.Parallel()
	g := NewGate(1, 3, 4)
	leave, err := g.Enter(t.Context(), "big")
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	var wg sync.WaitGroup
	enter := func(lane string, waits int) {
		wg.Go(func() {
			leave, err := g.Enter(context.WithoutCancel(t.Context()), lane)
			if err != nil {
				t.Error(err)
				return
			}
			order = append(order, lane) // one is inside at a time
			leave()
		})
		for { // the next one asks after this one waits
			if _, n := g.Load(); n == waits {
				return
			}
		}
	}
	enter("big", 1)
	enter("big", 2)
	enter("big", 3)
	if _, err := g.Enter(t.Context(), "big"); !errors.Is(err, ErrFull) {
		t.Fatalf("the lane is full: %v", err)
	}
	enter("small", 4)
	if _, err := g.Enter(t.Context(), "other"); !errors.Is(err, ErrFull) {
		t.Fatalf("the gate is full: %v", err)
	}
	leave()
	wg.Wait()
	if got := fmt.Sprint(order); got != "[big small big big]" {
		t.Errorf("order %s", got)
	}
	if in, waits := g.Load(); in != 0 || waits != 0 {
		t.Errorf("%d inside, %d waiting", in, waits)
	}
}

// TestWhoGivesUpLosesNoPlace: callers whose context ends at any moment leave the gate as it was.
func TestWhoGivesUpLosesNoPlace(t *testing.T) {
	t.Parallel()
	g := NewGate(2, 1000, 1000)
	var inside atomic.Int64
	var wg sync.WaitGroup
	for i := range 200 {
		ctx, cancel := context.WithCancel(t.Context())
		wg.Go(func() {
			leave, err := g.Enter(ctx, fmt.Sprint(i%3))
			if err != nil {
				return
			}
			if n := inside.Add(1); n > 2 {
				t.Errorf("%d inside", n)
			}
			inside.Add(-1)
			leave()
		})
		if i%2 == 0 {
			wg.Go(cancel)
		} else {
			defer cancel()
		}
	}
	wg.Wait()
	if in, waits := g.Load(); in != 0 || waits != 0 {
		t.Errorf("%d inside, %d waiting", in, waits)
	}
}
