package permit

import (
	"context"
	"sync"
	"time"

	"github.com/jonboulle/clockwork"

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
)

// alone is a Leaser that leads itself, keeps no log and grants at once.
type alone struct {
	start   time.Time
	clk     clockwork.Clock
	limits  func(issuerID string) Limits
	mu      sync.Mutex
	granter *Granter
}

// newAlone leases for as long as a DefaultLease.
func newAlone(clk clockwork.Clock, limits func(issuerID string) Limits) *alone {
	return &alone{start: clk.Now(), clk: clk, limits: limits, granter: NewGranter(Term{Now: -DefaultLease, Lease: DefaultLease})}
}

// Lease implements Leaser.
func (a *alone) Lease(_ context.Context, r *clusterpb.LeaseRequest) (*clusterpb.LeaseResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.clk.Since(a.start)
	a.granter.Sweep(now)
	d := a.granter.Ask(now, "", r, a.limits(r.GetIssuerId()))
	if d.Grant != nil {
		a.granter.Committed(now, d.Grant)
	}
	return d.Response, nil
}
