package storetest_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
	"github.com/certmesh/certmesh/protocol/fault"
)

// together runs calls at the same time and fails on any error but the classes a loser may get.
func together(t *testing.T, calls ...func() error) {
	t.Helper()
	var wg sync.WaitGroup
	begin := make(chan struct{})
	for _, call := range calls {
		wg.Go(func() {
			<-begin
			switch err := call(); {
			case err == nil, fault.Is(err, fault.Conflict), fault.Is(err, fault.Forbidden), fault.Is(err, fault.Unauthorized), fault.Is(err, fault.Invalid), fault.Is(err, fault.Retryable):
			default:
				t.Errorf("%v", err)
			}
		})
	}
	close(begin)
	wg.Wait()
}

func (x *estate) number(query string, args ...any) (n int) {
	x.t.Helper()
	x.must(x.sql().QueryRowContext(x.ctx, query, args...).Scan(&n))
	return n
}

// Whoever comes first, nothing of a retired agent stays alive.
func TestRetireAgainstTheRest(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, e storetest.Engine) {
		x := newEstate(t, e)
		second := x.agent("other")
		for i := range 12 {
			other := x.target(second, fmt.Sprintf("other%d", i))
			a := x.agent(fmt.Sprintf("web-%d", i))
			g, late := x.target(a, fmt.Sprintf("t%d", i)), x.target(a, fmt.Sprintf("late%d", i))
			c, _ := x.create(x.order(fmt.Sprintf("site-%d", i), g, other))
			x.issue(c, a.ID, fmt.Sprintf("a%d", i), 1, x.now.Add(time.Hour))
			n := x.order(fmt.Sprintf("late-%d", i), late)
			hello := domain.SessionOpen{AgentID: a.ID, Node: "n1", BootID: "b", Protocol: 1, IdentitySerial: fmt.Sprintf("i%d", i), At: x.now}
			x.must(x.RecordIdentity(x.ctx, domain.Identity{Serial: hello.IdentitySerial, AgentID: a.ID, SPKI: "s"}, x.op()))
			together(t,
				func() error { _, err := x.RetireAgent(x.ctx, a.ID, "gone", x.op()); return err },
				func() error {
					return x.RecordIdentity(x.ctx, domain.Identity{Serial: fmt.Sprintf("%d", i), AgentID: a.ID, SPKI: "s"}, x.op())
				},
				func() error { return x.OpenSessions(x.ctx, []domain.SessionOpen{hello})[0].Err },
				func() error { _, _, err := x.CreateCertificate(x.ctx, n); return err },
				func() error { _, err := x.RenewCertificate(x.ctx, c.ID, "r", x.op()); return err })
			if _, err := x.RetireAgent(x.ctx, a.ID, "gone", x.op()); err != nil {
				t.Fatal(err)
			}
			refused(t, x.OpenSessions(x.ctx, []domain.SessionOpen{hello})[0].Err, fault.Forbidden)
			now, err := x.Agent(x.ctx, a.ID)
			x.must(err)
			same(t, "state", now.State, domain.AgentRetired)
			if n := x.number("SELECT COUNT(*) FROM agent_identity WHERE agent_id = $1 AND revoked_at = 0", a.ID); n != 0 {
				t.Errorf("run %d: %d identities of a retired agent are good", i, n)
			}
			if n := x.number("SELECT COUNT(*) FROM job WHERE agent_id = $1 AND finished_at IS NULL", a.ID); n != 0 {
				t.Errorf("run %d: %d jobs of a retired agent are open", i, n)
			}
			if n := x.number("SELECT COUNT(*) FROM leaf WHERE agent_id = $1 AND due_at IS NOT NULL", a.ID); n != 0 {
				t.Errorf("run %d: %d leaves of a retired agent are due", i, n)
			}
		}
	})
}

// Whoever comes first, a revoked certificate has no open job, is not due and stays Revoked; and a leaf is due or has an
// open job, never both and, while it is kept, never neither.
func TestRevokeRenewCancelTogether(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, e storetest.Engine) {
		x := newEstate(t, e)
		a := x.agent("web")
		for i := range 12 {
			c, jobs := x.create(x.order(fmt.Sprintf("site-%d", i), x.target(a, fmt.Sprintf("t%d", i))))
			calls := []func() error{
				func() error { _, err := x.RenewCertificate(x.ctx, c.ID, "r", x.op()); return err },
				func() error { _, err := x.RenewCertificate(x.ctx, c.ID, "r", x.op()); return err },
				func() error { _, err := x.CancelJob(x.ctx, jobs[0].ID, x.op()); return err },
				func() error { _, err := x.CancelJob(x.ctx, jobs[0].ID, x.op()); return err },
			}
			revoke := i%2 == 0
			if revoke {
				calls = append(calls, func() error { _, _, err := x.RevokeCertificate(x.ctx, c.ID, 1, x.op()); return err })
			}
			together(t, calls...)
			if revoke {
				if _, _, err := x.RevokeCertificate(x.ctx, c.ID, 1, x.op()); err != nil {
					t.Fatal(err)
				}
			}
			open := x.number("SELECT COUNT(*) FROM job WHERE certificate_id = $1 AND finished_at IS NULL", c.ID)
			_, due := x.dueAt("leaf", c.ID, "agent_id", a.ID)
			view, err := x.CertificateView(x.ctx, c.ID)
			x.must(err)
			switch {
			case revoke && (open != 0 || due || view.Certificate.Status != domain.CertificateRevoked):
				t.Errorf("run %d: %d open jobs, due %t, %s", i, open, due, view.Certificate.Status)
			case !revoke && (open == 1) == due:
				t.Errorf("run %d: %d open jobs and due %t", i, open, due)
			}
			same(t, "cancellations in the trail", len(x.actions("job/"+jobs[0].ID)), 2)
		}
	})
}
