package storetest

import (
	"strconv"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// wholeFlow goes the way of every certificate: ordered, issued, deployed to two targets, due, renewed.
func wholeFlow(t *testing.T, w *World) {
	ctx := t.Context()
	a := w.Agent(t, "web1")
	one, two := w.Target(t, a.ID, "one"), w.Target(t, a.ID, "two")
	c, jobs := w.Order(t, "a.test", domain.Policy{Fraction: 0.5}, one.ID, two.ID)
	if len(jobs) != 1 || jobs[0].Kind != domain.JobIssuance || jobs[0].State != domain.JobAwaitingCSR || jobs[0].Generation != 1 {
		t.Fatalf("jobs: %+v", jobs)
	}
	session := w.Open(t, a.ID, "n1")
	if session.Epoch != 1 || session.Previous != (domain.Session{}) || session.Agent.State != domain.AgentOnline ||
		session.Agent.Labels["site"] != "a" || session.Agent.Labels["rack"] != "7" {
		t.Fatalf("session: %+v", session)
	}
	work, err := openWork(ctx, w.S, a.ID)
	must(t, err)
	if len(work) != 1 || work[0].KeyAlgorithm != domain.ECDSAP256 || work[0].Names.CommonName != "a.test" || len(work[0].Names.DNS) != 2 {
		t.Fatalf("work: %+v", work)
	}
	if o := work[0]; o.IssuerID != c.IssuerID || o.IssuerKind != domain.IssuerLocal || o.Profile.ID != c.ProfileID || o.Profile.TTL != 47*24*time.Hour ||
		len(o.Profile.Allowed) == 0 || len(o.Profile.EKUs) == 0 || o.Policy.Fraction != 0.5 {
		t.Fatalf("the order's rules: %+v", o)
	}
	ids, err := w.S.AgentsWithOpenJobs(ctx, "n1", 10)
	must(t, err)
	if len(ids) != 1 || ids[0] != a.ID {
		t.Fatalf("agents with open jobs: %v", ids)
	}

	deployments := w.Issue(t, jobs[0], session.Epoch, "spki-1")
	if len(deployments) != 2 || deployments[0].Job.State != domain.JobPending || deployments[0].Version.Generation != 1 || deployments[0].Target.Kind != "file" {
		t.Fatalf("deployments: %+v", deployments)
	}
	v := w.View(t, c.ID)
	if v.Certificate.Status != domain.CertificateActive || v.Leaves[0].Current != 1 || !v.Certificate.NotAfter.Equal(v.Leaves[0].NotAfter) {
		t.Fatalf("after issue: %+v", v)
	}
	w.Check(t)
	work, err = openWork(ctx, w.S, a.ID)
	must(t, err)
	if len(work) != 2 || string(work[0].Version.DER) != string(deployments[0].Version.DER) || len(work[0].Version.Chain) != 1 {
		t.Fatalf("work: %+v", work)
	}
	for _, d := range deployments {
		out := w.Deploy(t, d, session.Epoch)
		if out.Settlement.State != domain.JobCompleted || out.Settlement.RetireBelow != 1 || out.Settlement.Open {
			t.Fatalf("settlement: %+v", out.Settlement)
		}
	}
	for _, p := range w.View(t, c.ID).Placements {
		if p.State != domain.PlacementServed || p.InstalledGeneration != 1 || p.ServedGeneration != 1 || p.ServedAt.IsZero() {
			t.Fatalf("placement: %+v", p)
		}
	}
	w.Check(t)

	next, err := w.S.NextDue(ctx)
	must(t, err)
	if !next.Leaf.Equal(Start.Add(20*24*time.Hour)) || !next.Placement.IsZero() || next.Status.IsZero() {
		t.Fatalf("next due: %+v", next)
	}
	w.Pass(21 * 24 * time.Hour)
	w.renewal(t, c, a, session.Epoch)
}

// renewal follows wholeFlow: the duty finds the leaf, one placement moves to the new generation, the other lags.
func (w *World) renewal(t *testing.T, c domain.Certificate, a domain.Agent, epoch domain.Epoch) {
	t.Helper()
	ctx := t.Context()
	shard := domain.ShardOf(c.ID)
	due, err := w.S.DueLeaves(ctx, shard, w.Now(), 10)
	must(t, err)
	if len(due) != 1 || due[0].OpenJob || due[0].Profile.TTL != 47*24*time.Hour || due[0].Status != domain.CertificateActive {
		t.Fatalf("due: %+v", due)
	}
	f := w.Duty(t, "renew")
	outs, err := w.S.CreateLeafJobs(ctx, f, []domain.NewJob{{CertificateID: c.ID, AgentID: a.ID, Reason: "2/3 of its life"}, {CertificateID: c.ID, AgentID: "agt_x"}}, w.Op())
	must(t, err)
	if !outs[0].Created || outs[0].Job.Kind != domain.JobRenewal || outs[0].Job.Generation != 2 || !fault.Is(outs[1].Err, fault.NotFound) {
		t.Fatalf("jobs: %+v", outs)
	}
	again, err := w.S.CreateLeafJobs(ctx, f, []domain.NewJob{{CertificateID: c.ID, AgentID: a.ID}}, w.Op())
	must(t, err)
	if again[0].Created || again[0].Job.ID != outs[0].Job.ID {
		t.Fatalf("a second renewal: %+v", again)
	}
	if s := w.View(t, c.ID).Certificate.Status; s != domain.CertificateRenewalInProgress {
		t.Fatalf("status %s", s)
	}
	w.Check(t)
	deployments := w.Issue(t, outs[0].Job, epoch, "spki-2")
	out := w.Deploy(t, deployments[0], epoch)
	if out.Settlement.RetireBelow != 1 {
		t.Fatalf("the key of generation 1 is in use at the other target: %+v", out.Settlement)
	}
	out = w.Deploy(t, deployments[1], epoch)
	if out.Settlement.RetireBelow != 2 {
		t.Fatalf("the key of generation 1 is not in use: %+v", out.Settlement)
	}
	w.Check(t)
	list, err := w.S.Settlements(ctx, a.ID, []domain.JobRef{{JobID: deployments[0].Job.ID, Attempt: 1}, {JobID: "job_unknown", Attempt: 1}})
	must(t, err)
	if list[0].State != domain.JobCompleted || list[0].RetireBelow != 2 || list[1].State != "" {
		t.Fatalf("settlements: %+v", list)
	}
}

// staleWriters: whoever is late is refused, and changes nothing.
func staleWriters(t *testing.T, w *World) {
	ctx := t.Context()
	a, other := w.Agent(t, "web1"), w.Agent(t, "web2")
	g := w.Target(t, a.ID, "one")
	c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
	j := jobs[0]
	first := w.Open(t, a.ID, "n1")
	w.Open(t, other.ID, "n1")
	second := w.Open(t, a.ID, "n2")
	if second.Epoch != first.Epoch+1 || second.Previous.Holder != "n1" || second.Previous.Epoch != first.Epoch {
		t.Fatalf("second session: %+v", second)
	}

	dispatch := func(d domain.Dispatch) error { d.At = w.Now(); return w.S.Dispatch(ctx, []domain.Dispatch{d})[0] }
	accept := func(x domain.Acceptance) error { x.At = w.Now(); return w.S.Accept(ctx, []domain.Acceptance{x})[0] }
	expect := func(what string, err error, class fault.Class) {
		t.Helper()
		if !fault.Is(err, class) {
			t.Fatalf("%s: %v, want %s", what, err, class)
		}
	}
	unchanged := func(what string, job domain.Job) {
		t.Helper()
		if now := w.Job(t, job.ID); now != job {
			t.Fatalf("%s changed the job:\n%+v\n%+v", what, now, job)
		}
	}
	before := w.Job(t, j.ID)
	expect("an attempt that was never dispatched", accept(domain.Acceptance{JobID: j.ID, AgentID: a.ID, Attempt: 0}), fault.Conflict)
	expect("a stale epoch", dispatch(domain.Dispatch{JobID: j.ID, AgentID: a.ID, Attempt: 0, Epoch: first.Epoch}), fault.Conflict)
	expect("another agent's session", dispatch(domain.Dispatch{JobID: j.ID, AgentID: other.ID, Attempt: 0, Epoch: 1}), fault.NotFound)
	expect("a stale attempt", dispatch(domain.Dispatch{JobID: j.ID, AgentID: a.ID, Attempt: 3, Epoch: second.Epoch}), fault.Conflict)
	expect("an unknown job", dispatch(domain.Dispatch{JobID: "job_x", AgentID: a.ID, Attempt: 0, Epoch: second.Epoch}), fault.NotFound)
	unchanged("a refused dispatch", before)
	expect("closing another's session", w.S.CloseSession(ctx, a.ID, first.Epoch, w.Now()), fault.Conflict)

	must(t, dispatch(domain.Dispatch{JobID: j.ID, AgentID: a.ID, Attempt: 0, Epoch: second.Epoch}))
	before = w.Job(t, j.ID)
	expect("the former attempt", accept(domain.Acceptance{JobID: j.ID, AgentID: a.ID, Attempt: 0}), fault.Conflict)
	expect("another agent's job", accept(domain.Acceptance{JobID: j.ID, AgentID: other.ID, Attempt: 1}), fault.NotFound)
	unchanged("a refused acceptance", before)
	for range 2 {
		must(t, accept(domain.Acceptance{JobID: j.ID, AgentID: a.ID, Attempt: 1}))
	}
	if now := w.Job(t, j.ID); now.Tries != 1 || now.State != domain.JobAwaitingCSR || now.AcceptedAt.IsZero() {
		t.Fatalf("accepted twice: %+v", now)
	}
	before = w.Job(t, j.ID)
	w.staleIntents(t, j, other, before)
	unchanged("a refused intent", before)

	it := w.S.RecordIntents(ctx, []domain.Intent{w.Intent(j, 1, "spki-1")})[0]
	must(t, it.Err)
	issued := w.Signed(it.Intent)
	late := issued
	late.Attempt = 0
	expect("a version of a stale attempt", w.S.RecordIssued(ctx, []domain.Issued{late})[0].Err, fault.Conflict)
	foreign := issued
	foreign.Version.SPKI = "spki-other"
	expect("a version with another key", w.S.RecordIssued(ctx, []domain.Issued{foreign})[0].Err, fault.Conflict)
	out := w.S.RecordIssued(ctx, []domain.Issued{issued})[0]
	must(t, out.Err)
	twice := w.S.RecordIssued(ctx, []domain.Issued{issued})[0]
	must(t, twice.Err)
	if len(twice.Deployments) != 1 || twice.Deployments[0].Job != out.Deployments[0].Job {
		t.Fatalf("the same version again: %+v", twice)
	}
	// Two nodes sign the same bytes: signatures differ, and the one that was recorded counts.
	rival := issued
	rival.Version.DER, rival.Version.Fingerprint = []byte("another signature"), "another"
	lost := w.S.RecordIssued(ctx, []domain.Issued{rival})[0]
	must(t, lost.Err)
	if v := issued.Version.Fingerprint; lost.Version.Fingerprint != v || out.Version.Fingerprint != v || lost.Deployments[0].Version.Fingerprint != v {
		t.Fatalf("a second signature of the same bytes: %+v", lost)
	}
	expect("a failure after the end", w.S.FailJobs(ctx, []domain.Failure{{JobID: j.ID, AgentID: a.ID, Attempt: 1, Class: "retryable", At: w.Now()}})[0].Err, fault.Conflict)
	w.staleResults(t, out.Deployments[0], other, second.Epoch)
	w.Check(t)
	if s := w.View(t, c.ID).Certificate.Status; s != domain.CertificateActive {
		t.Fatalf("status %s", s)
	}
}

func (w *World) staleIntents(t *testing.T, j domain.Job, other domain.Agent, _ domain.Job) {
	t.Helper()
	late, foreign, mixed := w.Intent(j, 4, "spki-1"), w.Intent(j, 1, "spki-1"), w.Intent(j, 1, "spki-1")
	foreign.AgentID = other.ID
	mixed.CertificateID = "cert_other"
	outs := w.S.RecordIntents(t.Context(), []domain.Intent{late})
	if !fault.Is(outs[0].Err, fault.Conflict) {
		t.Fatalf("an intent of a stale attempt: %v", outs[0].Err)
	}
	if o := w.S.RecordIntents(t.Context(), []domain.Intent{foreign})[0]; !fault.Is(o.Err, fault.NotFound) {
		t.Fatalf("an intent of another agent: %v", o.Err)
	}
	if o := w.S.RecordIntents(t.Context(), []domain.Intent{mixed})[0]; !fault.Is(o.Err, fault.Invalid) {
		t.Fatalf("an intent for another certificate: %v", o.Err)
	}
}

func (w *World) staleResults(t *testing.T, d domain.Work, other domain.Agent, epoch domain.Epoch) {
	t.Helper()
	ctx := t.Context()
	attempt := w.Dispatch(t, d.Job, epoch)
	before := w.Job(t, d.Job.ID)
	if before.State != domain.JobRunning {
		t.Fatalf("an accepted deployment is %s", before.State)
	}
	good := w.Deployed(d, attempt)
	late, foreign, wrong, served := good, good, good, good
	late.Attempt--
	foreign.AgentID = other.ID
	wrong.InstalledFingerprint = domain.HashHex([]byte("another"))
	served.ServedFingerprint = wrong.InstalledFingerprint
	for want, r := range map[fault.Class]domain.DeployResult{fault.Conflict: late, fault.NotFound: foreign, fault.Invalid: wrong} {
		if o := w.S.CompleteDeployments(ctx, []domain.DeployResult{r})[0]; !fault.Is(o.Err, want) {
			t.Fatalf("%v, want %s", o.Err, want)
		}
	}
	if o := w.S.CompleteDeployments(ctx, []domain.DeployResult{served})[0]; !fault.Is(o.Err, fault.Invalid) {
		t.Fatalf("served another certificate: %v", o.Err)
	}
	if now := w.Job(t, d.Job.ID); now != before {
		t.Fatalf("a refused result changed the job: %+v", now)
	}
	must(t, w.S.CompleteDeployments(ctx, []domain.DeployResult{good})[0].Err)
	after := w.Job(t, d.Job.ID)
	w.Pass(time.Second)
	o := w.S.CompleteDeployments(ctx, []domain.DeployResult{w.Deployed(d, attempt)})[0]
	if !fault.Is(o.Err, fault.Conflict) || o.Settlement.State != domain.JobCompleted || o.Settlement.RetireBelow != d.Job.Generation {
		t.Fatalf("a replayed result: %+v", o)
	}
	if now := w.Job(t, d.Job.ID); now != after {
		t.Fatalf("a replayed result changed the job: %+v", now)
	}
}

// oneOfMany: a stale item among good ones gets its own verdict.
func oneOfMany(t *testing.T, w *World) {
	ctx := t.Context()
	a := w.Agent(t, "web1")
	session := w.Open(t, a.ID, "n1")
	var items []domain.Dispatch
	for i := range 7 {
		g := w.Target(t, a.ID, "g"+strconv.Itoa(i))
		_, jobs := w.Order(t, "c"+strconv.Itoa(i)+".test", domain.Policy{}, g.ID)
		items = append(items, domain.Dispatch{JobID: jobs[0].ID, AgentID: a.ID, Epoch: session.Epoch, At: w.Now()})
	}
	items[3].Attempt = 9
	items = append(items, domain.Dispatch{JobID: items[0].JobID, AgentID: a.ID, Attempt: 1, Epoch: session.Epoch, At: w.Now()})
	errs := w.S.Dispatch(ctx, items)
	for i, err := range errs {
		if i == 3 && !fault.Is(err, fault.Conflict) || i != 3 && err != nil {
			t.Fatalf("item %d: %v", i, err)
		}
	}
	if j := w.Job(t, items[0].JobID); j.Attempt != 2 {
		t.Fatalf("two dispatches of one job in one call are two commits, in order: attempt %d", j.Attempt)
	}
	w.Check(t)
}
