package api

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// TestWaitsFor: every reason for a placement to lag is said in words.
func TestWaitsFor(t *testing.T) {
	t.Parallel()
	const at = "2026-11-25T10:00:00Z"
	later := start.Add(time.Hour)
	base := func() lagging {
		return lagging{
			status: domain.CertificateActive, now: start,
			leaf:      domain.Leaf{AgentID: webAgent, Generation: 3, Current: 3},
			placement: domain.Placement{TargetID: webTarget, AgentID: webAgent, State: domain.PlacementPending},
			target:    domain.Target{ID: webTarget, Name: "site", Enabled: true},
			host:      host{Agent: domain.Agent{ID: webAgent, Name: "web1", State: domain.AgentOnline, LastSeen: start}},
		}
	}
	job := func(change func(*domain.Job)) *domain.Job {
		j := &domain.Job{ID: "job_1", Kind: domain.JobDeployment, State: domain.JobPending, MaxTries: 5, RunAt: start}
		change(j)
		return j
	}
	for name, c := range map[string]struct {
		change func(*lagging)
		want   string
	}{
		"revoked":           {func(w *lagging) { w.status = domain.CertificateRevoked }, "nothing: the certificate is Revoked"},
		"archived":          {func(w *lagging) { w.status = domain.CertificateArchived }, "nothing: the certificate is Archived"},
		"retired":           {func(w *lagging) { w.host.State, w.host.Reason = domain.AgentRetired, "scrapped" }, "nothing: agent web1 is retired (scrapped)"},
		"leaf revoked":      {func(w *lagging) { w.leaf.Revoked = true }, "nothing: the leaf of agent web1 is revoked"},
		"no job yet":        {func(*lagging) {}, "the deployment of generation 3: the placement duty opens a job for it at its next run"},
		"not issued":        {func(w *lagging) { w.leaf.Current = 0 }, "the first issuance: the renewal duty opens a job"},
		"back-off of issue": {func(w *lagging) { w.leaf.Current, w.leaf.BackoffUntil, w.leaf.Failures = 0, later, 1 }, "the first issuance, which is tried again at " + at + " after 1 failure"},
		"error of issue":    {func(w *lagging) { w.leaf.Current, w.leaf.LastError = 0, "the key is\nweak" }, "last error: the key is weak"},
		"awaiting CSR": {func(w *lagging) {
			w.leaf.Current, w.leafJob = 0, job(func(j *domain.Job) { j.State = domain.JobAwaitingCSR })
		}, "the first issuance: job job_1 is AwaitingCSR and is sent when the agent has credit"},
		"awaiting approval": {func(w *lagging) {
			w.leaf.Current, w.leafJob = 0, job(func(j *domain.Job) { j.State = domain.JobAwaitingApproval })
		}, "the first issuance: it waits for approval of job_1 by somebody who did not ask for it"},
		"pending": {func(w *lagging) { w.placementJob = job(func(*domain.Job) {}) }, "the deployment of generation 3: job job_1 is Pending and is sent when"},
		"sent":    {func(w *lagging) { w.placementJob = job(func(j *domain.Job) { j.Attempt = 1 }) }, "job job_1 is Pending; it was sent to the agent, which has not accepted it yet"},
		"running": {func(w *lagging) {
			w.placementJob = job(func(j *domain.Job) { j.State, j.AcceptedAt, j.Tries = domain.JobRunning, later, 2 })
			w.now = later
		}, "job job_1 is Running; the agent accepted it at " + at + " (2 of 5 tries used)"},
		"retry": {func(w *lagging) {
			w.placementJob = job(func(j *domain.Job) { j.RunAt, j.Tries, j.Error = later, 1, "connection refused" })
			w.placement.LastError = "an older one"
		}, "job job_1 is Pending and is tried again at " + at + " (1 of 5 tries used); last error: connection refused"},
		"back-off": {func(w *lagging) {
			w.placement.BackoffUntil, w.placement.Failures, w.placement.LastError = later, 3, "nginx -t failed"
		}, "tried again at " + at + " after 3 failures; last error: nginx -t failed"},
		"drifted": {func(w *lagging) {
			w.placement.DriftedAt, w.placement.LastError = later, "the target holds another"
		}, "the deployment of generation 3: the placement duty opens a job for it at its next run; its agent found it changed by somebody else at " + at +
			"; last error: the target holds another"},
		"verification": {func(w *lagging) { w.placementJob = job(func(j *domain.Job) { j.Kind = domain.JobValidation }) },
			"its verification, after which generation 3 can be deployed: job job_1 is Pending and is sent when the agent has credit for verifications, which one that is too old"},
		"disabled":    {func(w *lagging) { w.target.Enabled = false }, "which begins when the target is enabled; target site is disabled"},
		"offline":     {func(w *lagging) { w.host.State, w.host.OfflineSince = domain.AgentOffline, later }, "; agent web1 is offline since " + at},
		"stale":       {func(w *lagging) { w.host.State, w.host.LastSeen = domain.AgentStale, later }, "; agent web1 is stale, last seen " + at},
		"never seen":  {func(w *lagging) { w.host.State, w.host.LastSeen = domain.AgentOffline, time.Time{} }, "; agent web1 has not connected yet"},
		"quarantined": {func(w *lagging) { w.host.State, w.host.Reason = domain.AgentQuarantined, "two machines" }, "; agent web1 is quarantined (two machines) and works again when an operator releases it"},
		"rejected": {func(w *lagging) {
			w.host.rejected = []domain.StateRejection{{Kind: "target", Name: webTarget, Version: 4, Reason: "outside the roots"}}
		}, "agent web1 refuses version 4 of the target's settings: outside the roots"},
		"rejected else": {func(w *lagging) {
			w.host.rejected = []domain.StateRejection{{Kind: "target", Name: lbTarget, Version: 4, Reason: "x"}}
		}, "at its next run"},
		"long error": {func(w *lagging) { w.placement.LastError = strings.Repeat("ä", 10_000) }, "…"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := base()
			c.change(&w)
			got := w.waitsFor()
			if !strings.Contains(got, c.want) || name == "rejected else" && strings.Contains(got, "refuses") {
				t.Errorf("%q; want %q", got, c.want)
			}
			if len(got) > 1500 || strings.ContainsAny(got, "\n\x1b") {
				t.Errorf("not one bounded line: %q", got)
			}
		})
	}
}

func TestExplainCertificate(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	ctx := r.as(t, authz.Viewer)
	got, err := r.certificates().ExplainCertificate(ctx, &operatorpb.ExplainCertificateRequest{Id: "www"})
	if err != nil {
		t.Fatal(err)
	}
	l, p := got.GetLeaves()[0], got.GetPlacements()[0]
	if l.GetAgentId() != webAgent || l.GetDue() || l.GetReason() == "" || !l.GetDueAt().AsTime().After(start) {
		t.Errorf("leaf %v", l)
	}
	if p.GetTargetId() != webTarget || p.GetTargetName() != "site" || p.GetCurrent() || !strings.Contains(p.GetWaitsFor(), "job "+jobID+" is Pending") ||
		!strings.Contains(p.GetWaitsFor(), "outside the roots") {
		t.Errorf("placement %v", p)
	}
	if got.GetCertificate().GetPlacementsCurrent() != 0 || got.GetCertificate().GetPlacementsTotal() != 1 {
		t.Errorf("certificate %v", got.GetCertificate())
	}

	// Served: nothing is waited for. Past two thirds of its life the leaf is due.
	r.store.mu.Lock()
	r.store.placements[certID][0].ServedGeneration = 2
	delete(r.store.jobs, jobID)
	r.store.mu.Unlock()
	r.clock.Advance(40 * 24 * time.Hour)
	got, err = r.certificates().ExplainCertificate(ctx, &operatorpb.ExplainCertificateRequest{Id: certID})
	if err != nil {
		t.Fatal(err)
	}
	if p := got.GetPlacements()[0]; !p.GetCurrent() || p.GetWaitsFor() != "" {
		t.Errorf("placement %v", p)
	}
	if l := got.GetLeaves()[0]; !l.GetDue() {
		t.Errorf("leaf %v", l)
	}
	// A renewal that is open already is not due again.
	if _, err := r.certificates().RenewCertificate(r.as(t, authz.Operator), &operatorpb.RenewCertificateRequest{Id: certID}); err != nil {
		t.Fatal(err)
	}
	got, err = r.certificates().ExplainCertificate(ctx, &operatorpb.ExplainCertificateRequest{Id: certID})
	if l := got.GetLeaves()[0]; err != nil || l.GetDue() || !strings.Contains(l.GetReason(), "open") {
		t.Errorf("leaf %v, %v", l, err)
	}
	_, err = r.certificates().ExplainCertificate(ctx, &operatorpb.ExplainCertificateRequest{Id: "nothing"})
	wantCode(t, err, codes.NotFound)
}

// TestLesson2ServedIsAnotherFact: a placement is current only when it is in the state that proves it.
func TestLesson2ServedIsAnotherFact(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		p      domain.Placement
		wanted int64
		want   bool
	}{
		{domain.Placement{State: domain.PlacementServed, ServedGeneration: 2}, 2, true},
		{domain.Placement{State: domain.PlacementServed, ServedGeneration: 1, InstalledGeneration: 2}, 2, false},
		{domain.Placement{State: domain.PlacementInstalled, InstalledGeneration: 2}, 2, true},
		{domain.Placement{State: domain.PlacementInstalled, InstalledGeneration: 1}, 2, false},
		{domain.Placement{State: domain.PlacementFailed, ServedGeneration: 2, InstalledGeneration: 2}, 2, false},
		{domain.Placement{State: domain.PlacementPending}, 0, false},
	} {
		if got := current(c.p, c.wanted); got != c.want {
			t.Errorf("%+v of %d: %v", c.p, c.wanted, got)
		}
	}
}
