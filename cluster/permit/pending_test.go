package permit

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/certmesh/certmesh/protocol/fault"
)

// orders is a store's count.
type orders struct {
	mu   sync.Mutex
	open int
	err  error
}

func (o *orders) OpenOrders(context.Context, string) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.open, o.err
}

func (o *orders) place(context.Context) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.open++
	return nil
}

func TestPendingOrdersAreBounded(t *testing.T) {
	t.Parallel()
	o := &orders{}
	limit := 10
	p := NewPending(o, func(string) Limits { return Limits{Pending: limit} })
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if err := p.Place(t.Context(), "iss_1", o.place); err != nil && !fault.Is(err, fault.Exhausted) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if o.open > limit || o.open == 0 {
		t.Fatalf("%d orders are open, %d may be", o.open, limit)
	}
	for o.open < limit {
		if err := p.Place(t.Context(), "iss_1", o.place); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Place(t.Context(), "iss_1", o.place); !fault.Is(err, fault.Exhausted) {
		t.Fatalf("one more: %v", err)
	}
	o.open, o.err = 0, errors.New("the database is away")
	if err := p.Place(t.Context(), "iss_1", o.place); !fault.Is(err, fault.Retryable) || o.open != 0 {
		t.Fatalf("without a count: %v", err)
	}
	if limit = 0; p.Place(t.Context(), "iss_1", o.place) != nil {
		t.Fatal("no bound, and it was refused")
	}
	if len(p.placing) != 0 {
		t.Errorf("%v are still being placed", p.placing)
	}
}
