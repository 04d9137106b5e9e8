package storetest

import (
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// fences: a duty's former holder can write nothing.
func fences(t *testing.T, w *World) {
	ctx := t.Context()
	a := w.Agent(t, "web1")
	g := w.Target(t, a.ID, "one")
	c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
	session := w.Open(t, a.ID, "n1")
	w.Deploy(t, w.Issue(t, jobs[0], session.Epoch, "key")[0], session.Epoch)
	old := w.Duty(t, "renew")
	fresh, err := w.S.TakeDuty(ctx, "renew", "n2", w.Now())
	must(t, err)
	if fresh.Epoch <= old.Epoch || fresh.Holder != "n2" {
		t.Fatalf("%+v %+v", old, fresh)
	}
	elsewhere := fresh
	elsewhere.Holder = "n3"
	w.Pass(24 * 30 * time.Hour)
	now := w.Now()
	items := []domain.NewJob{{CertificateID: c.ID, AgentID: a.ID, TargetID: g.ID}}
	var state [2]string
	dump := func() string {
		v := w.View(t, c.ID)
		return v.Certificate.UpdatedAt.String() + v.Leaves[0].DueAt.String() + string(v.Certificate.Status)
	}
	state[0] = dump()
	for _, f := range []domain.Fence{old, elsewhere, {Duty: "other", Holder: "n1", Epoch: 1}} {
		for name, call := range map[string]func() error{
			"CreateLeafJobs":    func() error { _, err := w.S.CreateLeafJobs(ctx, f, items, w.Op()); return err },
			"CreateDeployments": func() error { _, err := w.S.CreateDeployments(ctx, f, items, w.Op()); return err },
			"PostponeLeaf":      func() error { return w.S.PostponeLeaf(ctx, f, c.ID, a.ID, now.Add(time.Hour)) },
			"ReapJobs":          func() error { _, err := w.S.ReapJobs(ctx, f, domain.ReapLimits{Running: 1}, now, 9); return err },
			"SweepStatuses":     func() error { _, err := w.S.SweepStatuses(ctx, f, domain.ShardOf(c.ID), now, 9); return err },
			"SweepAgents":       func() error { _, err := w.S.SweepAgents(ctx, f, now, now, now); return err },
			"Retain":            func() error { _, err := w.S.Retain(ctx, f, now, now, 9); return err },
		} {
			if err := call(); !fault.Is(err, fault.Conflict) {
				t.Fatalf("%s under %+v: %v", name, f, err)
			}
		}
	}
	if state[1] = dump(); state[0] != state[1] {
		t.Fatalf("something was written: %v", state)
	}
	if _, err := w.S.CreateLeafJobs(ctx, domain.Fence{}, items, w.Op()); !fault.Is(err, fault.Internal) {
		t.Fatalf("no fence: %v", err)
	}
	if jobs, err := w.S.CreateLeafJobs(ctx, fresh, items, w.Op()); err != nil || !jobs[0].Created {
		t.Fatalf("%+v %v", jobs, err)
	}
	w.Check(t)
}

// postponing a due leaf, and what cannot be postponed.
func postponing(t *testing.T, w *World) {
	ctx := t.Context()
	a := w.Agent(t, "web1")
	g := w.Target(t, a.ID, "one")
	c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
	f := w.Duty(t, "renew")
	if err := w.S.PostponeLeaf(ctx, f, c.ID, a.ID, w.Now()); !fault.Is(err, fault.Conflict) {
		t.Fatalf("a leaf with an open job: %v", err)
	}
	session := w.Open(t, a.ID, "n1")
	w.Issue(t, jobs[0], session.Epoch, "key")
	later := w.Now().Add(time.Hour)
	must(t, w.S.PostponeLeaf(ctx, f, c.ID, a.ID, later))
	next, err := w.S.NextDue(ctx)
	must(t, err)
	if !next.Leaf.Equal(later) {
		t.Fatalf("%+v", next)
	}
	must(t, w.S.PostponeLeaf(ctx, f, c.ID, a.ID, time.Time{}))
	if next, err = w.S.NextDue(ctx); err != nil || !next.Leaf.IsZero() {
		t.Fatalf("%+v %v", next, err)
	}
}

// statuses change by time alone.
func statuses(t *testing.T, w *World) {
	ctx := t.Context()
	a := w.Agent(t, "web1")
	g := w.Target(t, a.ID, "one")
	c, jobs := w.Order(t, "a.test", domain.Policy{Disabled: true}, g.ID)
	session := w.Open(t, a.ID, "n1")
	w.Issue(t, jobs[0], session.Epoch, "key") // 40 days
	if l := w.View(t, c.ID).Leaves[0]; !l.DueAt.IsZero() {
		t.Fatalf("renewal is off and the leaf is due: %+v", l)
	}
	f := w.Duty(t, "status")
	for _, step := range []struct {
		pass   time.Duration
		status domain.CertificateStatus
		n      int
	}{{24 * time.Hour, domain.CertificateActive, 0}, {25 * 24 * time.Hour, domain.CertificateExpiring, 1}, {15 * 24 * time.Hour, domain.CertificateExpired, 1},
		{24 * time.Hour, domain.CertificateExpired, 0}} {
		n, err := w.S.SweepStatuses(ctx, f, domain.ShardOf(c.ID), w.Pass(step.pass), 10)
		must(t, err)
		if s := w.View(t, c.ID).Certificate.Status; s != step.status || n != step.n {
			t.Fatalf("%s: %d, want %s: %d", s, n, step.status, step.n)
		}
	}
	next, err := w.S.NextDue(ctx)
	must(t, err)
	if !next.Status.IsZero() {
		t.Fatalf("%+v", next)
	}
	w.Check(t)
}

// reaping: the clock of a job stands while its agent is away.
func reaping(t *testing.T, w *World) {
	ctx := t.Context()
	a := w.Agent(t, "web1")
	g := w.Target(t, a.ID, "one")
	c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
	f := w.Duty(t, "reap")
	limits := domain.ReapLimits{AwaitingCSR: 24 * time.Hour, Running: time.Hour}
	reap := func() []domain.Job {
		t.Helper()
		list, err := w.S.ReapJobs(ctx, f, limits, w.Now(), 10)
		must(t, err)
		return list
	}
	w.Pass(100 * time.Hour)
	if list := reap(); len(list) != 0 {
		t.Fatalf("the agent was never there: %+v", list)
	}
	session := w.Open(t, a.ID, "n1")
	w.Pass(23 * time.Hour)
	w.Beat(t, a.ID)
	if list := reap(); len(list) != 0 {
		t.Fatalf("too early: %+v", list)
	}
	must(t, w.S.CloseSession(ctx, a.ID, session.Epoch, w.Now()))
	w.Pass(100 * time.Hour)
	if list := reap(); len(list) != 0 {
		t.Fatalf("the agent is away: %+v", list)
	}
	session = w.Open(t, a.ID, "n1")
	w.Pass(59 * time.Minute)
	w.Beat(t, a.ID)
	if list := reap(); len(list) != 0 {
		t.Fatalf("a moment too early: %+v", list)
	}
	w.Pass(2 * time.Minute)
	w.Beat(t, a.ID)
	list := reap()
	if len(list) != 1 || list[0].ID != jobs[0].ID || list[0].State != domain.JobFailed || list[0] != w.Job(t, jobs[0].ID) {
		t.Fatalf("%+v", list)
	}
	if l := w.View(t, c.ID).Leaves[0]; l.Failures != 1 || !l.DueAt.Equal(w.Now().Add(time.Hour)) {
		t.Fatalf("%+v", l)
	}
	if n := w.count(t, "SELECT COUNT(*) FROM audit WHERE action = 'job.reaped'"); n != 1 {
		t.Fatalf("%d rows of job.reaped", n)
	}
	w.Check(t)
	outs, err := w.S.CreateLeafJobs(ctx, f, []domain.NewJob{{CertificateID: c.ID, AgentID: a.ID}}, w.Op())
	must(t, err)
	d := w.Issue(t, outs[0].Job, session.Epoch, "key")[0]
	attempt := w.Dispatch(t, d.Job, session.Epoch)
	w.Pass(2 * time.Hour)
	w.Beat(t, a.ID)
	if list := reap(); len(list) != 1 || list[0].ID != d.Job.ID {
		t.Fatalf("%+v", list)
	}
	if o := w.S.CompleteDeployments(ctx, []domain.DeployResult{w.Deployed(d, attempt)})[0]; !fault.Is(o.Err, fault.Conflict) {
		t.Fatalf("the result of a reaped job: %v", o.Err)
	}
	w.Check(t)
}

// retaining: what is over goes, what is open, signed or in the trail stays.
func retaining(t *testing.T, w *World) {
	ctx := t.Context()
	a := w.Agent(t, "web1")
	g := w.Target(t, a.ID, "one")
	c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
	session := w.Open(t, a.ID, "n1")
	attempt := w.Dispatch(t, jobs[0], session.Epoch)
	must(t, w.S.RecordIntents(ctx, []domain.Intent{w.Intent(jobs[0], attempt, "key-1")})[0].Err)
	it := w.S.RecordIntents(ctx, []domain.Intent{w.Intent(jobs[0], attempt, "key-2")})[0]
	must(t, it.Err)
	must(t, w.S.RecordIssued(ctx, []domain.Issued{w.Signed(it.Intent)})[0].Err)
	f := w.Duty(t, "retain")
	trail := w.count(t, "SELECT COUNT(*) FROM audit")
	now := w.Pass(48 * time.Hour)
	n, err := w.S.Retain(ctx, f, now.Add(-time.Hour), now, 100)
	must(t, err)
	if n != 2 { // the issuance and the join token
		t.Fatalf("%d rows went", n)
	}
	for query, want := range map[string]int{"SELECT COUNT(*) FROM job": 1, "SELECT COUNT(*) FROM intent": 1, "SELECT COUNT(*) FROM version": 1,
		"SELECT COUNT(*) FROM join_token": 0, "SELECT COUNT(*) FROM enrollment": 0, "SELECT COUNT(*) FROM audit": trail} {
		if n := w.count(t, query); n != want {
			t.Fatalf("%s: %d, want %d", query, n, want)
		}
	}
	if v := w.View(t, c.ID); v.Leaves[0].Current != 2 {
		t.Fatalf("%+v", v)
	}
	w.Check(t)
}
