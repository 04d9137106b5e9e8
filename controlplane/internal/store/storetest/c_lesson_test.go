package storetest_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Tests that are named after what went wrong in other products of this kind.

// TestLesson1WorkThatNobodyRunsIsSeenAndRunAgain: a deployment belongs to one agent, whoever issued; while that agent does
// not do it, it is open and shown, the certificate counts as lagging, and when it stands still it fails and is due again.
func TestLesson1WorkThatNobodyRunsIsSeenAndRunAgain(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, e storetest.Engine) {
		w := &world{World: storetest.NewWorld(t, e), t: t}
		ctx := t.Context()
		a, other := w.Agent(t, "web1"), w.Agent(t, "web2")
		s, so := w.Open(t, a.ID, "n1"), w.Open(t, other.ID, "n1")
		c, jobs := w.Order(t, "a.test", domain.Policy{}, w.Target(t, a.ID, "one").ID)
		d := w.Issue(t, jobs[0], s.Epoch, "key")[0]

		err := w.S.Dispatch(ctx, []domain.Dispatch{{JobID: d.Job.ID, AgentID: other.ID, Epoch: so.Epoch, At: w.Now()}})[0]
		refused(t, err, fault.NotFound)
		if work := w.work(other.ID); len(work) != 0 {
			t.Fatalf("another's work: %+v", work)
		}
		w.Dispatch(t, d.Job, s.Epoch)
		counts, err := w.S.Counts(ctx)
		w.must(err)
		if v := w.View(t, c.ID); v.Certificate.Status != domain.CertificateActive || v.Placements[0].State != domain.PlacementPending ||
			counts.PlacementsLagging != 1 || counts.OpenJobs[domain.JobRunning] != 1 {
			t.Fatalf("%+v %+v", v, counts)
		}
		// The node dies with it; the next holder of the session finds it.
		s = w.Open(t, a.ID, "n2")
		if work := w.work(a.ID); len(work) != 1 || work[d.Job.ID].Job.State != domain.JobRunning {
			t.Fatalf("%+v", work)
		}
		w.Pass(2 * time.Hour)
		w.Beat(t, a.ID)
		f := w.Duty(t, "reap")
		if list := w.reap(f); len(list) != 1 || list[0].State != domain.JobFailed || !strings.Contains(list[0].Error, "reported no result") {
			t.Fatalf("%+v", list)
		}
		w.Pass(time.Hour)
		outs, err := w.S.CreateDeployments(ctx, f, []domain.NewJob{{CertificateID: c.ID, TargetID: d.Target.ID, Reason: "lags"}}, w.Op())
		w.must(err)
		w.Deploy(t, w.work(a.ID)[outs[0].Job.ID], s.Epoch)
		if p := w.placement(c.ID, d.Target.ID); p.State != domain.PlacementServed {
			t.Fatalf("%+v", p)
		}
		w.Check(t)
	})
}

// TestLesson9CountsAreQueries: they do not stop at a page, and a page that is too great is refused, not cut.
func TestLesson9CountsAreQueries(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, e storetest.Engine) {
		w := &world{World: storetest.NewWorld(t, e), t: t}
		ctx := t.Context()
		a := w.Agent(t, "web1")
		const n = 60 // more than the page that is given when none is asked for
		for i := range n {
			w.Order(t, fmt.Sprintf("c%d.test", i), domain.Policy{}, w.Target(t, a.ID, fmt.Sprintf("t%d", i)).ID)
		}
		page, _, next, err := w.S.Certificates(ctx, domain.CertificateFilter{}, domain.PageRequest{})
		w.must(err)
		counts, err := w.S.Counts(ctx)
		w.must(err)
		if len(page) != 50 || next == "" || counts.Certificates[domain.CertificatePending] != n || counts.OpenJobs[domain.JobAwaitingCSR] != n {
			t.Fatalf("%d on the page, %+v", len(page), counts)
		}
		_, _, _, err = w.S.Certificates(ctx, domain.CertificateFilter{}, domain.PageRequest{Size: 10_000})
		refused(t, err, fault.Invalid, "page.size", "1000")
		_, _, err = w.S.Jobs(ctx, domain.JobFilter{}, domain.PageRequest{Size: domain.MaxPageSize + 1})
		refused(t, err, fault.Invalid, "page.size")
	})
}

// watched counts the statements of a store that change something, by their beginning.
type watched struct {
	mu     sync.Mutex
	writes []string
}

func (o *watched) observe(query string, _ []any) {
	text := strings.TrimSpace(query)
	if strings.HasPrefix(text, "WITH v") {
		if _, rest, ok := strings.Cut(text, "\n"); ok {
			text = rest
		}
	}
	if strings.HasPrefix(text, "SELECT") {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.writes = append(o.writes, text)
}

func (o *watched) take() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	all := o.writes
	o.writes = nil
	return all
}

// TestLesson11NothingIsWrittenForAnIdleAgent but the batched time at which it was last heard: no row a beat, and none in
// the trail, neither for beats nor for a stream that comes and goes. That beats reach no store before the flush is held by
// the session's test of the same number.
func TestLesson11NothingIsWrittenForAnIdleAgent(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, e storetest.Engine) {
		o := &watched{}
		w := &world{World: storetest.NewWorld(t, e, func(c *store.Config) {
			before := c.Observe
			c.Observe = func(q string, args []any) {
				if before != nil {
					before(q, args)
				}
				o.observe(q, args)
			}
		}), t: t}
		const n = 250
		var ids []string
		for i := range n {
			ids = append(ids, w.Agent(t, fmt.Sprintf("h%d", i)).ID)
		}
		for _, a := range ids {
			w.Open(t, a, "n1")
		}
		rows := func(table string) (k int) {
			t.Helper()
			w.must(w.DB(t).QueryRowContext(t.Context(), "SELECT COUNT(*) FROM "+table).Scan(&k))
			return k
		}
		trail := rows("audit")
		o.take()
		for range 6 { // six flushes, of a minute of beats
			w.Pass(10 * time.Second)
			seen := make([]domain.Seen, n)
			for i, a := range ids {
				seen[i] = domain.Seen{AgentID: a, At: w.Now()}
			}
			w.must(w.S.FlushSeen(t.Context(), seen))
			writes := o.take()
			if len(writes) != 3 { // of 100, 100 and 50
				t.Fatalf("%d writes for %d agents: %q", len(writes), n, writes)
			}
			for _, text := range writes {
				if !strings.HasPrefix(text, "UPDATE agent SET last_seen") {
					t.Fatalf("a beat wrote %q", text)
				}
			}
		}
		// A stream that ends and comes back touches its agent, its session and, where there is one, its open jobs.
		session := w.Open(t, ids[0], "n1")
		w.must(w.S.CloseSession(t.Context(), ids[0], session.Epoch, w.Now()))
		w.Pass(time.Hour)
		w.Open(t, ids[0], "n1")
		if now := rows("audit"); now != trail {
			t.Fatalf("%d rows in the trail, %d before", now, trail)
		}
		if now := rows("job"); now != 0 {
			t.Fatalf("%d jobs", now)
		}
	})
}

// TestFirstStartHasNoFailure: the first look for the schema's steps, where there is no table yet, is no failed transaction.
func TestFirstStartHasNoFailure(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, e storetest.Engine) {
		reg := prometheus.NewRegistry()
		e.Open(t, func(c *store.Config) { c.Metrics = reg })
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() != "certmesh_store_failures_total" {
				continue
			}
			for _, m := range f.GetMetric() {
				t.Errorf("failed: %s", m)
			}
		}
	})
}
