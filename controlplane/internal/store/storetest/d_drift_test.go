package storetest_test

import (
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// dueNow opens the deployments that are due, and returns their work.
func (w *world) dueNow(certificateID, agentID string) []domain.Work {
	w.t.Helper()
	due, err := w.S.DuePlacements(w.t.Context(), domain.ShardOf(certificateID), w.Now(), 10)
	w.must(err)
	var items []domain.NewJob
	for _, d := range due {
		items = append(items, domain.NewJob{CertificateID: d.Placement.CertificateID, TargetID: d.Placement.TargetID, Reason: "due"})
	}
	outs, err := w.S.CreateDeployments(w.t.Context(), w.Duty(w.t, "retry"), items, w.Op())
	w.must(err)
	open := w.work(agentID)
	var all []domain.Work
	for _, o := range outs {
		w.must(o.Err)
		all = append(all, open[o.Job.ID])
	}
	return all
}

func TestDrift(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		a, b := w.Agent(t, "web1"), w.Agent(t, "web2")
		g := w.Target(t, a.ID, "one")
		s := w.Open(t, a.ID, "n1")
		c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
		first := w.Issue(t, jobs[0], s.Epoch, "key")[0]
		o := domain.Observation{AgentID: a.ID, CertificateID: c.ID, TargetID: g.ID, Generation: 1, InstalledFingerprint: domain.HashHex([]byte("other")),
			Problem: "it holds another certificate", RequestID: "req", At: w.Now()}
		observe := func(what string, o domain.Observation, want bool) domain.Placement {
			t.Helper()
			o.At = w.Now()
			changed, err := w.S.RecordObservation(ctx, o)
			w.must(err)
			// A run after an unanswered commit says changed to be safe.
			if want && !changed {
				t.Fatalf("%s: changed nothing", what)
			}
			return w.placement(c.ID, g.ID)
		}
		if p := observe("a deployment is open", o, false); !p.DriftedAt.IsZero() {
			t.Fatalf("%+v", p)
		}
		w.Deploy(t, first, s.Epoch)
		before := w.placement(c.ID, g.ID)
		for _, bad := range map[string]func(*domain.Observation){
			"another agent's":     func(o *domain.Observation) { o.AgentID = b.ID },
			"unknown target":      func(o *domain.Observation) { o.TargetID = "none" },
			"unknown certificate": func(o *domain.Observation) { o.CertificateID = "none" },
			"unknown generation":  func(o *domain.Observation) { o.Generation = 7 },
		} {
			wrong := o
			bad(&wrong)
			_, err := w.S.RecordObservation(ctx, wrong)
			refused(t, err, fault.NotFound, "of this agent")
		}
		same(t, "placement", w.placement(c.ID, g.ID), before)

		w.Pass(time.Minute)
		p := observe("drift", o, true)
		if p.State != domain.PlacementPending || !p.DriftedAt.Equal(w.Now()) || p.InstalledGeneration != 0 || p.LastError != o.Problem ||
			p.InstalledFingerprint != o.InstalledFingerprint || p.ServedGeneration != 0 {
			t.Fatalf("%+v", p)
		}
		w.Check(t)
		w.Pass(time.Second)
		if again := observe("the same", o, false); again != p {
			t.Fatalf("%+v", again)
		}

		// It is due at once; while the deployment is open nothing else counts.
		work := w.dueNow(c.ID, a.ID)
		if len(work) != 1 || work[0].Job.Kind != domain.JobDeployment {
			t.Fatalf("%+v", work)
		}
		well := o
		well.Problem, well.InstalledFingerprint, well.ServedFingerprint = "", before.InstalledFingerprint, before.ServedFingerprint
		if p := observe("open", well, false); p.DriftedAt.IsZero() {
			t.Fatalf("%+v", p)
		}
		w.Deploy(t, work[0], s.Epoch)
		if p := w.placement(c.ID, g.ID); p.State != domain.PlacementServed || !p.DriftedAt.IsZero() || p.LastError != "" {
			t.Fatalf("%+v", p)
		}
		same(t, "trail", w.actions("certificate/"+c.ID), []string{"certificate.created", "certificate.issued", "certificate.deployed",
			"placement.drifted", "certificate.deployed", "placement.restored"})

		// Again within the hour: after the back-off.
		w.Pass(time.Minute)
		if p := observe("second", o, true); p.Failures != 1 || !p.BackoffUntil.Equal(w.Now().Add(time.Hour)) {
			t.Fatalf("%+v", p)
		}
		if work := w.dueNow(c.ID, a.ID); len(work) != 0 {
			t.Fatalf("%+v", work)
		}
		if p := observe("by itself", well, true); p.State != domain.PlacementServed || !p.DriftedAt.IsZero() || p.InstalledGeneration != 1 {
			t.Fatalf("%+v", p)
		}
		w.Check(t)
	})
}

func TestVerifyNow(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		a := w.Agent(t, "web1")
		g := w.Target(t, a.ID, "one")
		s := w.Open(t, a.ID, "n1")
		c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
		_, err := w.S.VerifyCertificate(ctx, c.ID, "r", w.Op())
		refused(t, err, fault.Conflict, "deployed nowhere")
		first := w.Issue(t, jobs[0], s.Epoch, "key")[0]
		got, err := w.S.VerifyCertificate(ctx, c.ID, "r", w.Op())
		w.must(err)
		same(t, "open job", got, []domain.Job{w.Job(t, first.Job.ID)})
		w.Deploy(t, first, s.Epoch)
		before := w.placement(c.ID, g.ID)

		verify := func() (domain.Work, int64) {
			t.Helper()
			got, err := w.S.VerifyCertificate(ctx, "a.test", "requested", w.Op())
			w.must(err)
			if len(got) != 1 || got[0].Kind != domain.JobValidation || got[0].State != domain.JobPending || got[0].Generation != 1 {
				t.Fatalf("%+v", got)
			}
			again, err := w.S.VerifyCertificate(ctx, "a.test", "requested", w.Op())
			w.must(err)
			same(t, "asked twice", again, got)
			w.Check(t)
			d := w.work(a.ID)[got[0].ID]
			return d, w.Dispatch(t, d.Job, s.Epoch)
		}
		fail := func(d domain.Work, attempt int64, class fault.Class) domain.Job {
			t.Helper()
			out := w.S.FailJobs(ctx, []domain.Failure{{JobID: d.Job.ID, AgentID: a.ID, Attempt: attempt, Class: string(class), Message: "it serves another", At: w.Now()}})[0]
			w.must(out.Err)
			return out.Job
		}

		// Seen: the proof is newer.
		w.Pass(time.Minute)
		d, attempt := verify()
		r := w.Deployed(d, attempt)
		r.ServedAt = w.Now()
		w.must(w.S.CompleteDeployments(ctx, []domain.DeployResult{r})[0].Err)
		if p := w.placement(c.ID, g.ID); p.State != domain.PlacementServed || !p.ServedAt.Equal(w.Now()) || p.InstalledGeneration != before.InstalledGeneration {
			t.Fatalf("%+v", p)
		}

		// It could not be asked: tried again, and nothing is said of the placement.
		d, attempt = verify()
		if j := fail(d, attempt, fault.Retryable); !j.State.Open() {
			t.Fatalf("%+v", j)
		}
		if p := w.placement(c.ID, g.ID); p.State != domain.PlacementServed || p.LastError != "" {
			t.Fatalf("%+v", p)
		}
		_, err = w.S.CancelJob(ctx, d.Job.ID, w.Op())
		w.must(err)
		if p := w.placement(c.ID, g.ID); p.State != domain.PlacementServed || p.LastError != "" || p.Failures != 0 {
			t.Fatalf("%+v", p)
		}

		// Something else is there: failed at once, and deployed again.
		d, attempt = verify()
		if j := fail(d, attempt, fault.Conflict); j.State != domain.JobFailed {
			t.Fatalf("%+v", j)
		}
		if p := w.placement(c.ID, g.ID); p.State != domain.PlacementPending || p.DriftedAt.IsZero() || p.LastError != "it serves another" || p.Failures != 0 {
			t.Fatalf("%+v", p)
		}
		work := w.dueNow(c.ID, a.ID)
		if len(work) != 1 || work[0].Job.Kind != domain.JobDeployment {
			t.Fatalf("%+v", work)
		}
		w.Deploy(t, work[0], s.Epoch)
		if p := w.placement(c.ID, g.ID); p.State != domain.PlacementServed || !p.DriftedAt.IsZero() {
			t.Fatalf("%+v", p)
		}

		// A newer generation is issued meanwhile: the validation gives way to its deployment.
		d, _ = verify()
		renewals, err := w.S.RenewCertificate(ctx, c.ID, "r", w.Op())
		w.must(err)
		next := w.Issue(t, renewals[0], s.Epoch, "key2")[0]
		if next.Job.Kind != domain.JobDeployment || next.Job.Generation != 2 || w.Job(t, d.Job.ID).State != domain.JobCancelled {
			t.Fatalf("%+v", next.Job)
		}
		w.Deploy(t, next, s.Epoch)
	})
}

// TestDriftDuringVerification: what an agent says while a validation is open counts, once, and is due when that has ended. Whatever
// deploys the placement again ends the drift, a new generation too.
func TestDriftDuringVerification(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		a := w.Agent(t, "web1")
		g := w.Target(t, a.ID, "one")
		s := w.Open(t, a.ID, "n1")
		c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
		w.Deploy(t, w.Issue(t, jobs[0], s.Epoch, "key")[0], s.Epoch)
		verify, err := w.S.VerifyCertificate(ctx, c.ID, "r", w.Op())
		w.must(err)
		attempt := w.Dispatch(t, verify[0], s.Epoch)
		o := domain.Observation{AgentID: a.ID, CertificateID: c.ID, TargetID: g.ID, Generation: 1, Problem: "it holds another", At: w.Now()}
		changed, err := w.S.RecordObservation(ctx, o)
		w.must(err)
		if p := w.placement(c.ID, g.ID); !changed || p.DriftedAt.IsZero() {
			t.Fatalf("%v %+v", changed, p)
		}
		w.Check(t)
		due, err := w.S.DuePlacements(ctx, domain.ShardOf(c.ID), w.Now(), 10)
		w.must(err)
		if len(due) != 0 {
			t.Fatalf("due beside the open validation: %+v", due)
		}
		w.must(w.S.FailJobs(ctx, []domain.Failure{{JobID: verify[0].ID, AgentID: a.ID, Attempt: attempt, Class: string(fault.Conflict), Message: "it holds another", At: w.Now()}})[0].Err)
		due, err = w.S.DuePlacements(ctx, domain.ShardOf(c.ID), w.Now(), 10)
		w.must(err)
		if len(due) != 1 {
			t.Fatalf("%+v", due)
		}

		renewals, err := w.S.RenewCertificate(ctx, c.ID, "r", w.Op())
		w.must(err)
		w.Deploy(t, w.Issue(t, renewals[0], s.Epoch, "key2")[0], s.Epoch)
		if p := w.placement(c.ID, g.ID); p.State != domain.PlacementServed || !p.DriftedAt.IsZero() || p.InstalledGeneration != 2 {
			t.Fatalf("%+v", p)
		}
		// What the agent saw before, and said late.
		w.Pass(time.Minute)
		o.At = w.Now()
		_, err = w.S.RecordObservation(ctx, o)
		w.must(err)
		if p := w.placement(c.ID, g.ID); p.State != domain.PlacementServed || !p.DriftedAt.IsZero() {
			t.Fatalf("%+v", p)
		}
		n := 0
		for _, action := range w.actions("certificate/" + c.ID) {
			if action == "placement.drifted" {
				n++
			}
		}
		if n != 1 {
			t.Errorf("placement.drifted %d times in the trail", n)
		}
		w.Check(t)
	})
}
