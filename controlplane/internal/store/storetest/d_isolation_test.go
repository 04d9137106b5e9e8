package storetest

import (
	"fmt"
	"sync"
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Issuance runs at READ COMMITTED. What these tests race is what SERIALIZABLE would have kept apart: two leaves of one
// certificate, issued by two nodes at once, and an issuance against the end of what it is for.

func TestTwoNodesIssueForOneCertificate(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		nodes := []*store.Store{w.S, e.OpenAt(t, w.DSN, func(c *store.Config) { c.NodeID = "n2" })}
		agents := []domain.Agent{w.Agent(t, "web1"), w.Agent(t, "web2")}
		epochs := []domain.Epoch{w.Open(t, agents[0].ID, "n1").Epoch, w.Open(t, agents[1].ID, "n2").Epoch}
		for i := range 25 {
			var targets []string
			for n, a := range agents {
				targets = append(targets, w.Target(t, a.ID, fmt.Sprintf("t%d-%d", i, n)).ID)
			}
			c, jobs := w.Order(t, fmt.Sprintf("c%d.test", i), domain.Policy{}, targets...)
			issued := make([]domain.Issued, len(jobs))
			for n, j := range jobs {
				at := 0
				if j.AgentID == agents[1].ID {
					at = 1
				}
				it := w.S.RecordIntents(t.Context(), []domain.Intent{w.Intent(j, w.Dispatch(t, j, epochs[at]), fmt.Sprintf("spki-%d-%d", i, n))})[0]
				must(t, it.Err)
				issued[n] = w.Signed(it.Intent)
			}
			var wg sync.WaitGroup
			for n, s := range nodes {
				wg.Go(func() {
					if err := s.RecordIssued(t.Context(), []domain.Issued{issued[n]})[0].Err; err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if v := w.View(t, c.ID); v.Certificate.Status != domain.CertificateActive {
				t.Fatalf("round %d: both leaves are issued and the certificate is %s", i, v.Certificate.Status)
			}
		}
		w.Check(t)
	})
}

func TestIssuanceAgainstRevocationAndRetirement(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		other := e.OpenAt(t, w.DSN, func(c *store.Config) { c.NodeID = "n2" })
		for i := range 25 {
			a := w.Agent(t, fmt.Sprintf("web%d", i))
			epoch := w.Open(t, a.ID, "n1").Epoch
			c, jobs := w.Order(t, fmt.Sprintf("c%d.test", i), domain.Policy{}, w.Target(t, a.ID, fmt.Sprintf("t%d", i)).ID)
			intent := w.Intent(jobs[0], w.Dispatch(t, jobs[0], epoch), fmt.Sprintf("spki-%d", i))
			end := func() error {
				_, _, err := other.RevokeCertificate(t.Context(), c.ID, 0, w.Op())
				return err
			}
			if i%2 == 1 {
				end = func() error { _, err := other.RetireAgent(t.Context(), a.ID, "gone", w.Op()); return err }
			}
			var wg sync.WaitGroup
			wg.Go(func() {
				out := w.S.RecordIntents(t.Context(), []domain.Intent{intent})[0]
				if out.Err == nil {
					out.Err = w.S.RecordIssued(t.Context(), []domain.Issued{w.Signed(out.Intent)})[0].Err
				}
				if out.Err != nil && !fault.Is(out.Err, fault.Conflict) {
					t.Error(out.Err)
				}
			})
			wg.Go(func() {
				if err := end(); err != nil {
					t.Error(err)
				}
			})
			wg.Wait()
			if n := w.count(t, "SELECT COUNT(*) FROM job WHERE certificate_id = '"+c.ID+"' AND finished_at IS NULL"); n != 0 {
				t.Fatalf("round %d: %d jobs are open of what has ended", i, n)
			}
			if n := w.count(t, "SELECT COUNT(*) FROM version WHERE certificate_id = '"+c.ID+"' AND revoked_at IS NULL"); i%2 == 0 && n != 0 {
				t.Fatalf("round %d: %d versions of a revoked certificate are good", i, n)
			}
		}
		w.Check(t)
	})
}
