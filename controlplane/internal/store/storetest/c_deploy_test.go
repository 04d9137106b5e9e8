package storetest_test

import (
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

func (w *world) placement(certificateID, targetID string) domain.Placement {
	w.t.Helper()
	for _, p := range w.View(w.t, certificateID).Placements {
		if p.TargetID == targetID {
			return p
		}
	}
	w.t.Fatalf("no placement at %s", targetID)
	return domain.Placement{}
}

func TestDeployAgainNow(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		a, b := w.Agent(t, "web1"), w.Agent(t, "web2")
		one, two := w.Target(t, a.ID, "one"), w.Target(t, b.ID, "two")
		sa := w.Open(t, a.ID, "n1")
		_, err := w.S.DeployCertificate(ctx, "none", "r", w.Op())
		refused(t, err, fault.NotFound)
		c, jobs := w.Order(t, "a.test", domain.Policy{}, one.ID, two.ID)
		_, err = w.S.DeployCertificate(ctx, c.ID, "r", w.Op())
		refused(t, err, fault.Conflict, "nothing", "issued yet")
		issuance := jobs[0]
		if issuance.AgentID != a.ID {
			issuance = jobs[1]
		}
		first := w.Issue(t, issuance, sa.Epoch, "key-a")[0]

		// The open one is answered and nothing is made.
		got, err := w.S.DeployCertificate(ctx, "a.test", "r", w.Op())
		w.must(err)
		same(t, "open job", got, []domain.Job{w.Job(t, first.Job.ID)})
		same(t, "trail", w.actions("certificate/"+c.ID), []string{"certificate.created", "certificate.issued"})
		w.Deploy(t, first, sa.Epoch)

		// Current already: it is deployed again all the same. The other agent has nothing to deploy yet.
		got, err = w.S.DeployCertificate(ctx, c.ID, "requested", w.Op())
		w.must(err)
		if len(got) != 1 || got[0].Kind != domain.JobDeployment || got[0].TargetID != one.ID || got[0].Generation != 1 || got[0].Reason != "requested" ||
			got[0] != w.Job(t, got[0].ID) {
			t.Fatalf("%+v", got)
		}
		if p := w.placement(c.ID, one.ID); p.State != domain.PlacementServed {
			t.Fatalf("%+v", p)
		}
		w.Check(t)
		d := w.work(a.ID)[got[0].ID]
		if d.Version.Generation != 1 {
			t.Fatalf("%+v", d)
		}

		// It fails for good: the placement is shown so, and is due again although it held what is wanted.
		attempt := w.Dispatch(t, d.Job, sa.Epoch)
		w.must(w.S.FailJobs(ctx, []domain.Failure{{JobID: d.Job.ID, AgentID: a.ID, Attempt: attempt, Class: string(fault.Rejected), Message: "no", At: w.Now()}})[0].Err)
		if p := w.placement(c.ID, one.ID); p.State != domain.PlacementFailed || p.Failures != 1 || !p.BackoffUntil.Equal(w.Now().Add(time.Hour)) {
			t.Fatalf("%+v", p)
		}
		w.Pass(time.Hour)
		due, err := w.S.DuePlacements(ctx, domain.ShardOf(c.ID), w.Now(), 10)
		w.must(err)
		if len(due) != 1 || due[0].Placement.TargetID != one.ID {
			t.Fatalf("%+v", due)
		}
		outs, err := w.S.CreateDeployments(ctx, w.Duty(t, "retry"), []domain.NewJob{{CertificateID: c.ID, TargetID: one.ID}}, w.Op())
		w.must(err)
		if !outs[0].Created {
			t.Fatalf("%+v", outs)
		}
		attempt = w.Dispatch(t, outs[0].Job, sa.Epoch)
		w.must(w.S.FailJobs(ctx, []domain.Failure{{JobID: outs[0].Job.ID, AgentID: a.ID, Attempt: attempt, Class: string(fault.Rejected), Message: "no", At: w.Now()}})[0].Err)

		// Whatever its back-off.
		got, err = w.S.DeployCertificate(ctx, c.ID, "mended", w.Op())
		w.must(err)
		if p := w.placement(c.ID, one.ID); !p.BackoffUntil.IsZero() {
			t.Fatalf("%+v", p)
		}
		w.Deploy(t, w.work(a.ID)[got[0].ID], sa.Epoch)
		if p := w.placement(c.ID, one.ID); p.State != domain.PlacementServed || p.Failures != 0 {
			t.Fatalf("%+v", p)
		}
		same(t, "trail of the last", w.actions("job/"+got[0].ID), []string{"job.created"})
		w.Check(t)

		_, _, err = w.S.RevokeCertificate(ctx, c.ID, 0, w.Op())
		w.must(err)
		_, err = w.S.DeployCertificate(ctx, c.ID, "r", w.Op())
		refused(t, err, fault.Conflict, "Revoked")
	})
}

func TestDeployRefusesWhatIsDisabledOrRetired(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		a := w.Agent(t, "web1")
		g := w.Target(t, a.ID, "one")
		s := w.Open(t, a.ID, "n1")
		c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
		w.Deploy(t, w.Issue(t, jobs[0], s.Epoch, "key")[0], s.Epoch)
		if _, err := w.DB(t).ExecContext(ctx, "UPDATE target SET enabled = FALSE WHERE id = $1", g.ID); err != nil {
			t.Fatal(err)
		}
		_, err := w.S.DeployCertificate(ctx, c.ID, "r", w.Op())
		refused(t, err, fault.Conflict, "disabled")
		_, err = w.S.RetireAgent(ctx, a.ID, "gone", w.Op())
		w.must(err)
		_, err = w.S.DeployCertificate(ctx, c.ID, "r", w.Op())
		refused(t, err, fault.Conflict, "retired agents")
	})
}

// TestIssuedDeploymentsAreInTheTrail like all jobs.
func TestIssuedDeploymentsAreInTheTrail(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w *world) {
		a := w.Agent(t, "web1")
		s := w.Open(t, a.ID, "n1")
		_, jobs := w.Order(t, "a.test", domain.Policy{}, w.Target(t, a.ID, "one").ID, w.Target(t, a.ID, "two").ID)
		deployments := w.Issue(t, jobs[0], s.Epoch, "key")
		if len(deployments) != 2 {
			t.Fatalf("%+v", deployments)
		}
		for _, d := range deployments {
			events, _, err := w.S.AuditEvents(t.Context(), "job/"+d.Job.ID, domain.PageRequest{})
			w.must(err)
			if len(events) != 1 || events[0].Action != "job.created" || events[0].Actor != "node:n1" || events[0].Detail["target"] != d.Target.ID {
				t.Fatalf("%+v", events)
			}
		}
	})
}

func TestJoinTokensListedAndRevoked(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		first, second := x.token(2), x.token(1)
		joined, err := x.Enroll(x.ctx, x.enrollment(first, "spki-1", "web"))
		x.must(err)
		page, next, err := x.JoinTokens(x.ctx, domain.PageRequest{Size: 1})
		x.must(err)
		want := second
		want.Hash, want.CreatedAt, want.ExpiresAt = nil, domain.Micro(x.now), domain.Micro(second.ExpiresAt)
		same(t, "newest first", page, []domain.JoinToken{want})
		page, last, err := x.JoinTokens(x.ctx, domain.PageRequest{Size: 1, After: next})
		x.must(err)
		if len(page) != 1 || page[0].ID != first.ID || page[0].Uses != 1 || last != "" || next == "" || page[0].Hash != nil {
			t.Fatalf("%+v %q", page, last)
		}
		_, _, err = x.JoinTokens(x.ctx, domain.PageRequest{Size: 1001})
		refused(t, err, fault.Invalid)

		k, err := x.RevokeJoinToken(x.ctx, first.ID, x.op())
		x.must(err)
		if !k.RevokedAt.Equal(domain.Micro(x.now)) || k.Hash != nil {
			t.Fatalf("%+v", k)
		}
		again, err := x.RevokeJoinToken(x.ctx, first.ID, x.op(time.Minute))
		x.must(err)
		same(t, "once more", again, k)
		same(t, "trail", x.actions("token/"+first.ID), []string{"token.created", "token.revoked"})
		_, err = x.Enroll(x.ctx, x.enrollment(first, "spki-2", "web2"))
		refused(t, err, fault.Unauthorized, "was revoked; make one with certmesh agents token create")
		if a, err := x.Agent(x.ctx, joined.ID); err != nil || a.State != domain.AgentOffline {
			t.Fatalf("%+v %v", a, err)
		}
		_, err = x.RevokeJoinToken(x.ctx, id.New(id.Token), x.op())
		refused(t, err, fault.NotFound)
		_, err = x.RevokeJoinToken(x.ctx, "\x00", x.op())
		refused(t, err, fault.NotFound)
	})
}

// TestDeploymentGoesBeforeAValidation, which would find the old state.
func TestDeploymentGoesBeforeAValidation(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		a := w.Agent(t, "web1")
		s := w.Open(t, a.ID, "n1")
		c, jobs := w.Order(t, "a.test", domain.Policy{}, w.Target(t, a.ID, "one").ID)
		w.Deploy(t, w.Issue(t, jobs[0], s.Epoch, "key")[0], s.Epoch)
		looks, err := w.S.VerifyCertificate(ctx, c.ID, "look", w.Op())
		w.must(err)
		got, err := w.S.DeployCertificate(ctx, c.ID, "requested", w.Op())
		w.must(err)
		if len(looks) != 1 || len(got) != 1 || got[0].Kind != domain.JobDeployment || w.Job(t, looks[0].ID).State != domain.JobCancelled {
			t.Fatalf("%+v %+v", looks, got)
		}
		same(t, "trail", w.actions("job/"+looks[0].ID), []string{"job.created", "job.cancelled"})
		w.Deploy(t, w.work(a.ID)[got[0].ID], s.Epoch)
	})
}
