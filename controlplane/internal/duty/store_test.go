package duty

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
	"github.com/certmesh/certmesh/protocol/fault"
)

// TestTwoLeadersOverOneStore: leadership goes to and fro between two nodes, and each time the former leader is not told and
// goes on beside the new one. What it begins to write once the duty has been taken the store refuses, and every
// certificate that is due gets one job however many find it.
func TestTwoLeadersOverOneStore(t *testing.T) {
	t.Parallel()
	const certificates, turns = 12, 12
	w := storetest.NewWorld(t, storetest.Engines(t)[0])
	a := w.Agent(t, "web1")
	var due []domain.NewJob
	for i := range certificates {
		c, jobs := w.Order(t, fmt.Sprintf("c%d.test", i), domain.Policy{}, w.Target(t, a.ID, fmt.Sprint("t", i)).ID)
		if _, err := w.S.CancelJob(t.Context(), jobs[0].ID, w.Op()); err != nil {
			t.Fatal(err)
		}
		due = append(due, domain.NewJob{CertificateID: c.ID, AgentID: a.ID, Reason: "due"})
	}
	clk := clockwork.NewFakeClock() // it stands still: nobody takes a duty back by itself
	// taken is the newest epoch that a Lead has returned with.
	var taken, created, refused atomic.Int64
	var stale atomic.Bool
	ran := make(chan string, 1024)
	node := func(name string) *Runner {
		r, err := NewRunner(Config{Node: name, Store: w.S, Clock: clk, Log: slog.New(slog.DiscardHandler), Elected: true,
			Duties: []Duty{{Name: RenewalCheck, Interval: time.Hour, Deadline: time.Minute, Fenced: true,
				Run: func(ctx context.Context, f domain.Fence, _ time.Time) (time.Time, error) {
					newest := taken.Load()
					outcomes, err := w.S.CreateLeafJobs(ctx, f, due, w.Op())
					switch {
					case fault.Is(err, fault.Conflict):
						refused.Add(1)
					case err == nil && int64(f.Epoch) < newest:
						stale.Store(true)
					}
					for _, o := range outcomes {
						if o.Created {
							created.Add(1)
						}
					}
					ran <- f.Holder
					return time.Time{}, err
				}}}})
		if err != nil {
			t.Fatal(err)
		}
		r.Start()
		t.Cleanup(r.Stop)
		return r
	}
	nodes := [2]*Runner{node("n1"), node("n2")}
	for turn := range turns {
		heir, former := nodes[turn%2], nodes[1-turn%2]
		heir.Lapse() // it was replaced before and learns it now
		if err := heir.Lead(t.Context()); err != nil {
			t.Fatal(err)
		}
		taken.Store(int64(turn) + 1)
		for receive(t, ran, "the new leader's run") != heir.cfg.Node {
		}
		if turn == 0 {
			continue
		}
		before := refused.Load()
		former.Trigger(RenewalCheck) // it believes to lead
		for receive(t, ran, "the former leader's run") != former.cfg.Node {
		}
		if refused.Load() != before+1 {
			t.Fatalf("turn %d: the former leader was not refused", turn)
		}
		former.Lapse()
	}
	if stale.Load() {
		t.Error("a write of a former leader was taken")
	}
	if created.Load() != certificates {
		t.Errorf("%d jobs for %d certificates", created.Load(), certificates)
	}
}
