package storetest

import (
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

func (w *World) fail(t *testing.T, j domain.Job, attempt int64, class fault.Class) domain.Job {
	t.Helper()
	out := w.S.FailJobs(t.Context(), []domain.Failure{{JobID: j.ID, AgentID: j.AgentID, Attempt: attempt, Class: string(class),
		Message: "disk full", Jitter: 0.5, At: w.Now()}})[0]
	must(t, out.Err)
	return out.Job
}

// failures: retries with a growing delay, then a rest that doubles, and due again after it.
func failures(t *testing.T, w *World) {
	ctx := t.Context()
	a := w.Agent(t, "web1")
	g := w.Target(t, a.ID, "one")
	c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
	session := w.Open(t, a.ID, "n1")
	j := jobs[0]
	for try := 1; try <= domain.DefaultMaxTries; try++ {
		attempt := w.Dispatch(t, j, session.Epoch)
		after := w.fail(t, j, attempt, fault.Retryable)
		stored := w.Job(t, j.ID)
		if stored != after || after.Tries != try || after.ErrorClass != string(fault.Retryable) {
			t.Fatalf("try %d: %+v\nstored %+v", try, after, stored)
		}
		out := w.S.FailJobs(ctx, []domain.Failure{{JobID: j.ID, AgentID: a.ID, Attempt: attempt, Class: "retryable", At: w.Now()}})[0]
		if !fault.Is(out.Err, fault.Conflict) {
			t.Fatalf("the same failure again: %v", out.Err)
		}
		if try < domain.DefaultMaxTries && (after.State != domain.JobAwaitingCSR || !after.RunAt.Equal(w.Now().Add(domain.RetryDelay(try, 0.5)))) {
			t.Fatalf("try %d: %+v", try, after)
		}
		w.Check(t)
		j = after
	}
	leaf := w.View(t, c.ID).Leaves[0]
	if j.State != domain.JobFailed || leaf.Failures != 1 || !leaf.DueAt.Equal(w.Now().Add(time.Hour)) || leaf.LastError != "disk full" {
		t.Fatalf("failed for good: %+v\n%+v", j, leaf)
	}
	if s := w.View(t, c.ID).Certificate.Status; s != domain.CertificateFailed {
		t.Fatalf("status %s", s)
	}

	w.Pass(time.Hour)
	f := w.Duty(t, "renew")
	outs, err := w.S.CreateLeafJobs(ctx, f, []domain.NewJob{{CertificateID: c.ID, AgentID: a.ID}}, w.Op())
	must(t, err)
	if outs[0].Job.Kind != domain.JobIssuance || outs[0].Job.Generation != 2 {
		t.Fatalf("next job: %+v", outs[0])
	}
	// A class that cannot pass ends it at once, accepted or not.
	must(t, w.S.Dispatch(ctx, []domain.Dispatch{{JobID: outs[0].Job.ID, AgentID: a.ID, Epoch: session.Epoch, At: w.Now()}})[0])
	if after := w.fail(t, outs[0].Job, 1, fault.Rejected); after.State != domain.JobFailed {
		t.Fatalf("rejected: %+v", after)
	}
	leaf = w.View(t, c.ID).Leaves[0]
	if leaf.Failures != 2 || !leaf.DueAt.Equal(w.Now().Add(2*time.Hour)) || !leaf.BackoffUntil.Equal(leaf.DueAt) {
		t.Fatalf("second failure: %+v", leaf)
	}
	w.Check(t)
	w.Pass(2 * time.Hour)
	outs, err = w.S.CreateLeafJobs(ctx, f, []domain.NewJob{{CertificateID: c.ID, AgentID: a.ID}}, w.Op())
	must(t, err)
	d := w.Issue(t, outs[0].Job, session.Epoch, "spki")
	leaf = w.View(t, c.ID).Leaves[0]
	if leaf.Failures != 0 || leaf.LastError != "" || leaf.Current != 3 {
		t.Fatalf("after success: %+v", leaf)
	}
	w.failedDeployment(t, c, d[0], session.Epoch, f)
}

func (w *World) failedDeployment(t *testing.T, c domain.Certificate, d domain.Work, epoch domain.Epoch, f domain.Fence) {
	t.Helper()
	ctx := t.Context()
	w.fail(t, d.Job, w.Dispatch(t, d.Job, epoch), fault.Rejected)
	p := w.View(t, c.ID).Placements[0]
	if p.State != domain.PlacementFailed || p.Failures != 1 || !p.BackoffUntil.Equal(w.Now().Add(time.Hour)) {
		t.Fatalf("placement: %+v", p)
	}
	w.Check(t)
	shard := domain.ShardOf(c.ID)
	due, err := w.S.DuePlacements(ctx, shard, w.Now(), 10)
	must(t, err)
	if len(due) != 0 {
		t.Fatalf("due before its rest is over: %+v", due)
	}
	w.Pass(time.Hour)
	due, err = w.S.DuePlacements(ctx, shard, w.Now(), 10)
	must(t, err)
	if len(due) != 1 || due[0].Wanted != 3 || due[0].OpenJob || !due[0].Enabled {
		t.Fatalf("due: %+v", due)
	}
	item := domain.NewJob{CertificateID: c.ID, TargetID: d.Target.ID, Reason: "not served"}
	outs, err := w.S.CreateDeployments(ctx, f, []domain.NewJob{item, {CertificateID: c.ID, TargetID: "tgt_x"}}, w.Op())
	must(t, err)
	if !outs[0].Created || outs[0].Job.Generation != 3 || outs[0].Job.AgentID != d.Job.AgentID || !fault.Is(outs[1].Err, fault.NotFound) {
		t.Fatalf("deployments: %+v", outs)
	}
	again, err := w.S.CreateDeployments(ctx, f, []domain.NewJob{item}, w.Op())
	must(t, err)
	if again[0].Created || again[0].Job.ID != outs[0].Job.ID {
		t.Fatalf("a second deployment: %+v", again)
	}
	w.Check(t)
	d.Job = outs[0].Job
	w.Deploy(t, d, epoch)
	if p := w.View(t, c.ID).Placements[0]; p.State != domain.PlacementServed || p.Failures != 0 || p.LastError != "" {
		t.Fatalf("placement: %+v", p)
	}
	none, err := w.S.CreateDeployments(ctx, f, []domain.NewJob{item}, w.Op())
	must(t, err)
	if !fault.Is(none[0].Err, fault.Conflict) {
		t.Fatalf("a deployment that nothing needs: %+v", none)
	}
	w.Check(t)
}

// lostKey: the agent comes back with another key for an open generation, then signs on with the new one.
func lostKey(t *testing.T, w *World) {
	ctx := t.Context()
	a := w.Agent(t, "web1")
	g := w.Target(t, a.ID, "one")
	c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
	session := w.Open(t, a.ID, "n1")
	j := jobs[0]
	attempt := w.Dispatch(t, j, session.Epoch)
	record := func(it domain.Intent) domain.IntentOutcome {
		t.Helper()
		out := w.S.RecordIntents(ctx, []domain.Intent{it})[0]
		must(t, out.Err)
		return out
	}
	first := record(w.Intent(j, attempt, "key-1"))
	if first.Existing || first.Intent.Generation != 1 || first.Intent.State != domain.IntentOpen {
		t.Fatalf("first: %+v", first)
	}
	same := record(w.Intent(j, attempt, "key-1"))
	if !same.Existing || same.Intent.ID != first.Intent.ID || string(same.Intent.TBS) != string(first.Intent.TBS) || same.Intent.Serial != first.Intent.Serial {
		t.Fatalf("the same key must get the same bytes to sign: %+v", same)
	}
	lost := record(w.Intent(j, attempt, "key-2"))
	if lost.Existing || lost.Intent.Generation != 2 {
		t.Fatalf("another key: %+v", lost)
	}
	if now := w.Job(t, j.ID); now.Generation != 2 || now.Attempt != attempt {
		t.Fatalf("job: %+v", now)
	}
	if l := w.View(t, c.ID).Leaves[0]; l.Generation != 2 || l.Current != 0 {
		t.Fatalf("leaf: %+v", l)
	}
	if out := w.S.RecordIssued(ctx, []domain.Issued{w.Signed(first.Intent)})[0]; !fault.Is(out.Err, fault.Conflict) {
		t.Fatalf("a version of an abandoned intent: %v", out.Err)
	}
	w.Check(t)
	out := w.S.RecordIssued(ctx, []domain.Issued{w.Signed(lost.Intent)})[0]
	must(t, out.Err)
	if len(out.Deployments) != 1 || out.Deployments[0].Job.Generation != 2 {
		t.Fatalf("deployments: %+v", out.Deployments)
	}
	// The answer was lost on the way to the agent, which asks again with the key it has.
	issued := record(w.Intent(j, attempt, "key-2"))
	if issued.Issued == nil || issued.Issued.Serial != lost.Intent.Serial || issued.Issued.Generation != 2 {
		t.Fatalf("signed already: %+v", issued)
	}
	if o := w.S.RecordIntents(ctx, []domain.Intent{w.Intent(j, attempt, "key-3")})[0]; !fault.Is(o.Err, fault.Conflict) {
		t.Fatalf("another key after the job's end: %+v", o)
	}
	taken := w.Intent(j, attempt, "key-9")
	w.takenSerial(t, a, session.Epoch, taken, lost.Intent.Serial)
	if n := w.count(t, "SELECT COUNT(*) FROM audit WHERE action = 'certificate.key_lost'"); n != 1 {
		t.Fatalf("%d rows of certificate.key_lost", n)
	}
	w.Check(t)
}

func (w *World) takenSerial(t *testing.T, a domain.Agent, epoch domain.Epoch, it domain.Intent, serial string) {
	t.Helper()
	g := w.Target(t, a.ID, "two")
	_, jobs := w.Order(t, "b.test", domain.Policy{}, g.ID)
	it.JobID, it.CertificateID, it.Attempt, it.Serial = jobs[0].ID, jobs[0].CertificateID, w.Dispatch(t, jobs[0], epoch), serial
	if o := w.S.RecordIntents(t.Context(), []domain.Intent{it})[0]; !fault.Is(o.Err, fault.Conflict) || !o.SerialTaken {
		t.Fatalf("a serial that is taken: %+v", o)
	}
}

func (w *World) count(t testing.TB, query string) (n int) {
	t.Helper()
	must(t, w.DB(t).QueryRowContext(t.Context(), query).Scan(&n))
	return n
}

// change writes past the store, for what only a restore or another release can do.
func (w *World) change(t testing.TB, statement string, args ...any) {
	t.Helper()
	_, err := w.DB(t).ExecContext(t.Context(), statement, args...)
	must(t, err)
}

// restored: after a restore from backup, what was to be signed before is never signed, and a version that the restored
// rows do not know the job of is revoked when its key is gone.
func restored(t *testing.T, w *World) {
	ctx := t.Context()
	a := w.Agent(t, "web1")
	g := w.Target(t, a.ID, "one")
	c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
	session := w.Open(t, a.ID, "n1")
	attempt := w.Dispatch(t, jobs[0], session.Epoch)
	old := w.S.RecordIntents(ctx, []domain.Intent{w.Intent(jobs[0], attempt, "key-1")})[0]
	must(t, old.Err)
	w.change(t, "INSERT INTO meta (key, value) VALUES ('recovery', '1')")
	if o := w.S.RecordIssued(ctx, []domain.Issued{w.Signed(old.Intent)})[0]; !fault.Is(o.Err, fault.Conflict) {
		t.Fatalf("a version of an intent from before the restore: %v", o.Err)
	}
	fresh := w.S.RecordIntents(ctx, []domain.Intent{w.Intent(jobs[0], attempt, "key-1")})[0]
	must(t, fresh.Err)
	if fresh.Existing || fresh.Intent.Generation != 2 || fresh.Intent.Recovery != 1 {
		t.Fatalf("fresh: %+v", fresh)
	}
	must(t, w.S.RecordIssued(ctx, []domain.Issued{w.Signed(fresh.Intent)})[0].Err)
	w.Check(t)

	// The job's end was lost in the restore, its version was not.
	w.change(t, "UPDATE job SET state = 'AwaitingCSR', finished_at = NULL, open_key = $1 WHERE id = $2", "leaf:"+c.ID+":"+a.ID, jobs[0].ID)
	third := w.S.RecordIntents(ctx, []domain.Intent{w.Intent(jobs[0], attempt, "key-2")})[0]
	must(t, third.Err)
	if third.Intent.Generation != 3 {
		t.Fatalf("third: %+v", third)
	}
	if n := w.count(t, "SELECT COUNT(*) FROM version WHERE generation = 2 AND revoked_at IS NOT NULL AND revocation_reason = 4"); n != 1 {
		t.Fatal("the version whose key is gone was not revoked")
	}
}

// movedDeployment: a newer generation is issued while the deployment of the older one is out.
func movedDeployment(t *testing.T, w *World) {
	ctx := t.Context()
	a := w.Agent(t, "web1")
	g := w.Target(t, a.ID, "one")
	c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
	session := w.Open(t, a.ID, "n1")
	old := w.Issue(t, jobs[0], session.Epoch, "key-1")[0]
	attempt := w.Dispatch(t, old.Job, session.Epoch)
	renewals, err := w.S.RenewCertificate(ctx, c.ID, "operator asked", w.Op())
	must(t, err)
	fresh := w.Issue(t, renewals[0], session.Epoch, "key-2")
	if len(fresh) != 1 || fresh[0].Job.ID != old.Job.ID || fresh[0].Job.Generation != 2 || fresh[0].Job.Attempt != attempt+1 || fresh[0].Job.State != domain.JobPending {
		t.Fatalf("moved: %+v", fresh)
	}
	w.Check(t)
	before := w.Job(t, old.Job.ID)
	if o := w.S.CompleteDeployments(ctx, []domain.DeployResult{w.Deployed(old, attempt)})[0]; !fault.Is(o.Err, fault.Conflict) {
		t.Fatalf("the older generation's result: %v", o.Err)
	}
	if now := w.Job(t, old.Job.ID); now != before {
		t.Fatalf("it changed the job: %+v", now)
	}
	if list, err := w.S.Settlements(ctx, a.ID, []domain.JobRef{{JobID: old.Job.ID, Attempt: attempt}, {JobID: old.Job.ID, Attempt: attempt + 1}}); err != nil ||
		list[0].Open || !list[1].Open || list[0].State != domain.JobPending {
		t.Fatalf("settlements: %+v %v", list, err)
	}
	w.Deploy(t, fresh[0], session.Epoch)
	if p := w.View(t, c.ID).Placements[0]; p.InstalledGeneration != 2 {
		t.Fatalf("placement: %+v", p)
	}
	w.Check(t)
}

// disabledTarget: nothing is deployed there, and it is looked at again later.
func disabledTarget(t *testing.T, w *World) {
	a := w.Agent(t, "web1")
	g := w.Target(t, a.ID, "one")
	c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
	session := w.Open(t, a.ID, "n1")
	w.change(t, "UPDATE target SET enabled = FALSE")
	if d := w.Issue(t, jobs[0], session.Epoch, "key"); len(d) != 0 {
		t.Fatalf("deployments: %+v", d)
	}
	w.Check(t)
	next, err := w.S.NextDue(t.Context())
	must(t, err)
	if !next.Placement.Equal(w.Now().Add(time.Hour)) {
		t.Fatalf("next: %+v", next)
	}
	w.Pass(time.Hour)
	due, err := w.S.DuePlacements(t.Context(), domain.ShardOf(c.ID), w.Now(), 5)
	must(t, err)
	if len(due) != 1 || due[0].Enabled {
		t.Fatalf("due: %+v", due)
	}
	f := w.Duty(t, "deploy")
	outs, err := w.S.CreateDeployments(t.Context(), f, []domain.NewJob{{CertificateID: c.ID, TargetID: g.ID}}, w.Op())
	must(t, err)
	if !fault.Is(outs[0].Err, fault.Conflict) {
		t.Fatalf("%+v", outs)
	}
	w.Check(t)
	next, err = w.S.NextDue(t.Context())
	must(t, err)
	if !next.Placement.Equal(w.Now().Add(time.Hour)) {
		t.Fatalf("it would be looked at without end: %+v", next)
	}
}
