package session

import (
	"testing"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// withoutDatabase is a node that is one of several, holds an agent and cannot read work; read is called until false, with
// the time moved on by a second each.
func withoutDatabase(t *testing.T) (p *plane, h *host, k *talk, pass func(until func() bool)) {
	t.Helper()
	clk := clockwork.NewFakeClockAt(time.Now())
	p = newPlane(t, func(c *Config) { c.Clock, c.RemoteWake = clk, func(string, []string) {} })
	h = p.host("web1")
	k = h.online(credits(4, 4))
	p.store.order(domain.JobDeployment, h.id, "cert_1", "tgt_1")
	p.store.onCall(func(method string) error {
		if method == "OpenWork" {
			return fault.New(fault.Retryable, "the database does not answer")
		}
		return nil
	})
	return p, h, k, func(until func() bool) {
		deadline := time.Now().Add(patience)
		for !until() {
			if time.Now().After(deadline) {
				t.Fatal("it takes too long")
			}
			clk.Advance(time.Second / 4)
			select {
			case <-k.done:
			case <-time.After(time.Millisecond):
			}
		}
	}
}

// TestUnreadableWorkGoesElsewhere: another node, which has the database, says that there is work.
func TestUnreadableWorkGoesElsewhere(t *testing.T) {
	t.Parallel()
	p, h, k, pass := withoutDatabase(t)
	p.srv.WakeHeld([]string{h.id})
	pass(func() bool {
		select {
		case <-k.done:
			return true
		default:
			return false
		}
	})
	if g := k.goodbye(); g.GetReason() != agentpb.Goodbye_REASON_SHUTDOWN || g.GetPermanent() {
		t.Errorf("%v", g)
	}
}

// TestStreamsStayWithoutADatabase: nobody has one, so nobody says anything.
func TestStreamsStayWithoutADatabase(t *testing.T) {
	t.Parallel()
	p, h, k, pass := withoutDatabase(t)
	before := p.store.count("OpenWork")
	p.srv.WakeLocal([]string{h.id})
	pass(func() bool { return p.store.count("OpenWork") >= before+5 })
	p.store.onCall(nil)
	pass(func() bool {
		select {
		case <-k.done:
			t.Fatal("the stream has ended")
		default:
		}
		return p.store.count("Dispatch") > 0
	})
	k.assignment()
}

// TestReadWorkIsNotOwed: a failure that has passed is no reason to go later.
func TestReadWorkIsNotOwed(t *testing.T) {
	t.Parallel()
	p, h, k, pass := withoutDatabase(t)
	p.srv.WakeHeld([]string{h.id})
	before := p.store.count("OpenWork")
	pass(func() bool { return p.store.count("OpenWork") > before })
	p.store.onCall(nil)
	pass(func() bool { return p.store.count("Dispatch") > 0 })
	k.assignment()
	for _, st := range p.srv.of(h.id) {
		st.locked(func() {
			if !st.owing.IsZero() {
				t.Error("work that was read is still owed")
			}
		})
	}
}
