package storetest_test

import (
	"slices"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
	"github.com/certmesh/certmesh/protocol/fault"
)

var approved = domain.Policy{RequireApproval: true}

// waits checks that a job waits for approval and that nobody is given it.
func (w *world) waits(j domain.Job, epoch domain.Epoch) {
	w.t.Helper()
	if j.State != domain.JobAwaitingApproval || w.Job(w.t, j.ID).State != domain.JobAwaitingApproval {
		w.t.Fatalf("%+v", j)
	}
	if work := w.work(j.AgentID); len(work) != 0 {
		w.t.Fatalf("work for the agent: %+v", work)
	}
	err := w.S.Dispatch(w.t.Context(), []domain.Dispatch{{JobID: j.ID, AgentID: j.AgentID, Attempt: j.Attempt, Epoch: epoch, At: w.Now()}})[0]
	refused(w.t, err, fault.Conflict)
}

// TestApprovalHoldsEveryLeafJob, made by the order, by the duty or on request, until somebody else has looked at it.
func TestApprovalHoldsEveryLeafJob(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		a := w.Agent(t, "web1")
		g := w.Target(t, a.ID, "one")
		session := w.Open(t, a.ID, "n1")
		c, jobs := w.Order(t, "a.test", approved, g.ID) // by operator:test
		w.waits(jobs[0], session.Epoch)
		if v := w.View(t, c.ID); !v.Certificate.Policy.RequireApproval || v.Certificate.Status != domain.CertificatePending {
			t.Fatalf("%+v", v.Certificate)
		}
		counts, err := w.S.Counts(ctx)
		w.must(err)
		same(t, "open jobs", counts.OpenJobs, map[domain.JobState]int64{domain.JobAwaitingApproval: 1})

		_, err = w.S.ApproveJob(ctx, jobs[0].ID, "mine", w.by("test"))
		refused(t, err, fault.Forbidden, "operator:test ordered this certificate")
		_, err = w.S.RejectJob(ctx, jobs[0].ID, "mine", w.by("test"))
		refused(t, err, fault.Forbidden, "somebody else")
		_, err = w.S.ApproveJob(ctx, "job_none", "", w.by("eve"))
		refused(t, err, fault.NotFound)
		w.waits(jobs[0], session.Epoch)

		w.Pass(time.Hour)
		op := w.by("eve")
		j, err := w.S.ApproveJob(ctx, jobs[0].ID, "seen", op)
		w.must(err)
		want := jobs[0]
		want.State, want.RunAt, want.UpdatedAt = domain.JobAwaitingCSR, w.Now(), w.Now()
		same(t, "approved", j, want)
		same(t, "as read", w.Job(t, j.ID), want)
		same(t, "trail", w.actions("job/"+j.ID), []string{"job.created", "job.approved"})
		events, _, err := w.S.AuditEvents(ctx, "job/"+j.ID, domain.PageRequest{})
		w.must(err)
		if e := events[0]; e.Actor != "operator:eve" || e.Detail["reason"] != "seen" || e.RequestID != op.RequestID {
			t.Fatalf("%+v", e)
		}
		_, err = w.S.ApproveJob(ctx, j.ID, "again", w.by("eve"))
		refused(t, err, fault.Conflict, "AwaitingCSR")

		// A try that fails goes on without another approval.
		attempt := w.Dispatch(t, j, session.Epoch)
		out := w.S.FailJobs(ctx, []domain.Failure{{JobID: j.ID, AgentID: a.ID, Attempt: attempt, Class: string(fault.Retryable), Message: "busy", At: w.Now()}})[0]
		w.must(out.Err)
		if out.Job.State != domain.JobAwaitingCSR {
			t.Fatalf("%+v", out.Job)
		}
		d := w.Issue(t, out.Job, session.Epoch, "key-1")[0]
		if d.Job.State != domain.JobPending {
			t.Fatalf("a deployment waits: %+v", d.Job)
		}
		w.Deploy(t, d, session.Epoch)

		// On request: neither who ordered nor who asked decides.
		renewals, err := w.S.RenewCertificate(ctx, c.ID, "now", w.by("bob"))
		w.must(err)
		w.waits(renewals[0], session.Epoch)
		if s := w.View(t, c.ID).Certificate.Status; s != domain.CertificateRenewalInProgress {
			t.Fatal(s)
		}
		_, err = w.S.ApproveJob(ctx, renewals[0].ID, "", w.by("bob"))
		refused(t, err, fault.Forbidden, "asked for job")
		_, err = w.S.ApproveJob(ctx, renewals[0].ID, "", w.by("test"))
		refused(t, err, fault.Forbidden)
		j, err = w.S.ApproveJob(ctx, renewals[0].ID, "", w.by("eve"))
		w.must(err)
		w.Deploy(t, w.Issue(t, j, session.Epoch, "key-2")[0], session.Epoch)

		// By the duty.
		w.Pass(30 * 24 * time.Hour)
		outs, err := w.S.CreateLeafJobs(ctx, w.Duty(t, "renew"), []domain.NewJob{{CertificateID: c.ID, AgentID: a.ID, Reason: "due"}},
			domain.Op{Actor: "node:n1", At: w.Now()})
		w.must(err)
		w.waits(outs[0].Job, session.Epoch)
		_, err = w.S.ApproveJob(ctx, outs[0].Job.ID, "", w.by("bob"))
		w.must(err)
	})
}

// TestRejectedJobIsCancelledAndItsLeafRests, and the next one waits for approval again.
func TestRejectedJobIsCancelledAndItsLeafRests(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		a := w.Agent(t, "web1")
		session := w.Open(t, a.ID, "n1")
		c, jobs := w.Order(t, "a.test", approved, w.Target(t, a.ID, "one").ID)
		_, err := w.S.RejectJob(ctx, jobs[0].ID, "", w.by("eve"))
		refused(t, err, fault.Invalid, "say why")
		w.waits(jobs[0], session.Epoch)
		j, err := w.S.RejectJob(ctx, jobs[0].ID, "wrong names", w.by("eve"))
		w.must(err)
		if j.State != domain.JobCancelled || j.Error != "rejected by operator:eve: wrong names" || j != w.Job(t, j.ID) {
			t.Fatalf("%+v", j)
		}
		same(t, "trail", w.actions("job/"+j.ID), []string{"job.created", "job.rejected"})
		l := w.View(t, c.ID).Leaves[0]
		if l.Failures != 0 || !l.DueAt.Equal(w.Now().Add(time.Hour)) || !l.BackoffUntil.Equal(l.DueAt) || l.LastError != j.Error {
			t.Fatalf("%+v", l)
		}
		_, err = w.S.RejectJob(ctx, j.ID, "again", w.by("eve"))
		refused(t, err, fault.Conflict, "Cancelled")
		w.Pass(time.Hour)
		outs, err := w.S.CreateLeafJobs(ctx, w.Duty(t, "renew"), []domain.NewJob{{CertificateID: c.ID, AgentID: a.ID, Reason: "due"}}, w.Op())
		w.must(err)
		w.waits(outs[0].Job, session.Epoch)
	})
}

// TestNobodyApprovesInTime: the job fails with its reason, and the leaf is due again after its back-off.
func TestNobodyApprovesInTime(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		a := w.Agent(t, "web1")
		c, jobs := w.Order(t, "a.test", approved, w.Target(t, a.ID, "one").ID)
		f := w.Duty(t, "reap")
		limits := domain.ReapLimits{AwaitingCSR: time.Hour, AwaitingApproval: 168 * time.Hour, Running: time.Hour}
		w.Pass(168 * time.Hour)
		list, err := w.S.ReapJobs(ctx, f, limits, w.Now(), 10)
		w.must(err)
		if len(list) != 0 {
			t.Fatalf("too early: %+v", list)
		}
		// The agent has never been there: whether it is online is nothing to an operator's decision.
		w.Pass(time.Second)
		list, err = w.S.ReapJobs(ctx, f, limits, w.Now(), 10)
		w.must(err)
		if len(list) != 1 || list[0] != w.Job(t, jobs[0].ID) || list[0].State != domain.JobFailed ||
			list[0].ErrorClass != string(fault.Exhausted) || list[0].Error != "nobody approved it for 168h0m0s" {
			t.Fatalf("%+v", list)
		}
		if l := w.View(t, c.ID).Leaves[0]; l.Failures != 1 || !l.DueAt.Equal(w.Now().Add(time.Hour)) {
			t.Fatalf("%+v", l)
		}
		_, err = w.S.ApproveJob(ctx, jobs[0].ID, "too late", w.by("eve"))
		refused(t, err, fault.Conflict, "Failed")
	})
}

// TestOneOfManyDecides: a job is approved or rejected once, whoever comes first.
func TestOneOfManyDecides(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, e storetest.Engine) {
		w := &world{World: storetest.NewWorld(t, e), t: t}
		a := w.Agent(t, "web1")
		_, jobs := w.Order(t, "a.test", approved, w.Target(t, a.ID, "one").ID)
		errs := make(chan error, 8)
		for i := range cap(errs) {
			op := w.by(string(rune('a' + i)))
			go func() {
				var err error
				if i%2 == 0 {
					_, err = w.S.ApproveJob(t.Context(), jobs[0].ID, "", op)
				} else {
					_, err = w.S.RejectJob(t.Context(), jobs[0].ID, "no", op)
				}
				errs <- err
			}()
		}
		won := 0
		for range cap(errs) {
			if err := <-errs; err == nil {
				won++
			} else {
				refused(t, err, fault.Conflict)
			}
		}
		trail := w.actions("job/" + jobs[0].ID)
		if won != 1 || len(trail) != 2 || !slices.Contains([]string{"job.approved", "job.rejected"}, trail[1]) {
			t.Fatalf("%d decided: %v", won, trail)
		}
		w.Check(t)
	})
}
