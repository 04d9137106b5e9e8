package permit

import (
	"testing"
	"time"

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
)

// desk is a Granter whose grants are committed.
type desk struct {
	g      *Granter
	now    time.Duration
	limits Limits
}

func newDesk(limits Limits) *desk {
	return &desk{g: NewGranter(Term{Now: -DefaultLease, Lease: DefaultLease}), limits: limits}
}

func (d *desk) ask(node string, want int32, givenBack uint64) *clusterpb.LeaseResponse {
	got := d.g.Ask(d.now, node, &clusterpb.LeaseRequest{IssuerId: "iss_1", Instance: node, Want: want, GivenBack: givenBack}, d.limits)
	if got.Grant != nil {
		d.g.Committed(d.now, got.Grant)
	}
	return got.Response
}

// TestSharesFollowDemand: all to one alone, then halves, and little to whoever wants little.
func TestSharesFollowDemand(t *testing.T) {
	t.Parallel()
	d := newDesk(Limits{InFlight: 10, Rate: 5})
	a := d.ask("a", 100, 0)
	if a.GetPermits() != 10 || a.GetRate() != 5 {
		t.Fatalf("alone it gets %v", a)
	}
	if b := d.ask("b", 100, 0); b.GetPermits() != 0 || b.GetRetryAfterMs() > 1000 {
		t.Fatalf("while all is leased: %v", b)
	}
	d.now += 4 * time.Second
	a2 := d.ask("a", 100, 0)
	if a2.GetPermits() != 5 || a2.GetRate() != 2.5 {
		t.Fatalf("with another one it gets %v", a2)
	}
	// Its former lease may still be in use, until it says that it is not.
	if b := d.ask("b", 100, 0); b.GetPermits() != 0 {
		t.Fatalf("too early: %v", b)
	}
	a3 := d.ask("a", 100, a.GetLeaseId())
	b := d.ask("b", 100, 0)
	if a3.GetPermits() != 5 || b.GetPermits() != 5 || b.GetRate() != 2.5 {
		t.Fatalf("halves are %v and %v", a3, b)
	}
	// b wants 1 from now on: the rest is for a, as soon as what b gave up is over.
	d.now += 4 * time.Second
	if b = d.ask("b", 1, 0); b.GetPermits() != 1 {
		t.Fatalf("who wants one gets %v", b)
	}
	d.now += DefaultLease - time.Second
	if a := d.ask("a", 100, 0); a.GetPermits() != 9 {
		t.Fatalf("what others do not want is for a: %v", a)
	}
}

// TestEverybodyGetsATurn: more nodes than permits, and each holds one after a while.
func TestEverybodyGetsATurn(t *testing.T) {
	t.Parallel()
	d := newDesk(Limits{InFlight: 2})
	nodes := []string{"a", "b", "c", "d", "e"}
	leases, turns := map[string]uint64{}, map[string]int{}
	for range 300 {
		d.now += 100 * time.Millisecond
		held := 0
		for _, n := range nodes {
			r := d.ask(n, 3, leases[n])
			if leases[n] = r.GetLeaseId(); leases[n] != 0 {
				turns[n]++
				held++
			}
		}
		if held > d.limits.InFlight {
			t.Fatalf("%d permits at once", held)
		}
	}
	for _, n := range nodes {
		if turns[n] < 300*2/5/2 {
			t.Errorf("%s had a permit %d times of 300: %v", n, turns[n], turns)
		}
	}
}
