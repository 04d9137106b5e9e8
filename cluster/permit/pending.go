package permit

import (
	"context"
	"sync"

	"github.com/certmesh/certmesh/protocol/fault"
)

// OpenOrders counts orders that are open at an issuer, for minutes or for days: placed, and neither fulfilled nor given up.
// The store is one. They are no calls: between two looks at its order a call is over and its permit free.
type OpenOrders interface {
	OpenOrders(ctx context.Context, issuerID string) (int, error)
}

// Pending bounds the orders that are open at each issuer. It is safe for concurrent use.
//
// The count is the cluster's, but orders that several nodes place at the same moment may exceed the bound by one each:
// it protects the issuer's queue and an operator's view, not a contract. Where it must be exact, the transaction that
// records the order counts again.
type Pending struct {
	orders OpenOrders
	limits func(issuerID string) Limits

	mu sync.Mutex
	// placing are orders admitted here that the store may not count yet, by issuer.
	placing map[string]int
}

// NewPending counts by orders; Limits.Pending is the bound.
func NewPending(orders OpenOrders, limits func(issuerID string) Limits) *Pending {
	return &Pending{orders: orders, limits: limits, placing: map[string]int{}}
}

// Place admits an order and calls place, which places and records it. Exhausted, without calling it: as many orders are open
// there as may be.
func (p *Pending) Place(ctx context.Context, issuerID string, place func(ctx context.Context) error) error {
	limit := p.limits(issuerID).Pending
	if limit <= 0 {
		return place(ctx)
	}
	// First this one's mark, then the count: of two that are placed at once, at least one sees the other.
	p.mu.Lock()
	p.placing[issuerID]++
	placing := p.placing[issuerID]
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.placing[issuerID]--; p.placing[issuerID] == 0 {
			delete(p.placing, issuerID)
		}
	}()
	open, err := p.orders.OpenOrders(ctx, issuerID)
	if err != nil {
		return fault.Wrap(fault.Retryable, err, "count the orders that are open at issuer %s", issuerID)
	}
	if open+placing > limit {
		return fault.New(fault.Exhausted, "%d orders are open at issuer %s, which may have %d; the next waits until one is fulfilled", open+placing-1, issuerID, limit)
	}
	return place(ctx)
}
