package api

import (
	"context"
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/renew"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

func (a certificates) ExplainCertificate(ctx context.Context, r *operatorpb.ExplainCertificateRequest) (*operatorpb.ExplainCertificateResponse, error) {
	v, err := a.Store.CertificateView(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	profile, err := a.Store.Profile(ctx, v.Certificate.ProfileID)
	if err != nil {
		return nil, err
	}
	leafJobs, placementJobs, err := a.openWork(ctx, v.Certificate.ID)
	if err != nil {
		return nil, err
	}
	now := a.now()
	out := &operatorpb.ExplainCertificateResponse{Certificate: viewPB(v)}
	leaves := map[string]domain.Leaf{}
	for _, l := range v.Leaves {
		leaves[l.AgentID] = l
		job, open := leafJobs[l.AgentID]
		d := renew.Why(l, v.Certificate.Policy, profile, v.Certificate.Status, now, open)
		if open && job.State == domain.JobAwaitingApproval {
			d.Reason = "it " + approvalWords(job)
		}
		out.Leaves = append(out.Leaves, &operatorpb.LeafExplanation{AgentId: l.AgentID, Due: d.Due, Reason: d.Reason, DueAt: stamp(d.At)})
	}
	hosts := map[string]host{}
	for _, p := range v.Placements {
		e := &operatorpb.PlacementExplanation{
			TargetId: p.TargetID, TargetName: v.TargetNames[p.TargetID], Current: current(p, leaves[p.AgentID].Current),
		}
		out.Placements = append(out.Placements, e)
		job := placementJobs[p.TargetID]
		if e.Current && (job == nil || job.Kind != domain.JobValidation) {
			continue
		}
		h, known := hosts[p.AgentID]
		if !known {
			if h, err = a.host(ctx, p.AgentID); err != nil {
				return nil, err
			}
			hosts[p.AgentID] = h
		}
		if e.Current {
			e.WaitsFor = lagging{placementJob: job, host: h, now: now}.verification()
			continue
		}
		t, err := a.Store.Target(ctx, p.TargetID)
		if err != nil {
			return nil, err
		}
		e.WaitsFor = lagging{
			status: v.Certificate.Status, leaf: leaves[p.AgentID], placement: p, target: t, host: h,
			leafJob: leafJobs[p.AgentID], placementJob: job, now: now,
		}.waitsFor()
	}
	return out, nil
}

// openWork is a certificate's open jobs: those for its leaves by agent, those for its placements by target. There is at
// most one of each.
func (a *API) openWork(ctx context.Context, certificateID string) (leaves, placements map[string]*domain.Job, err error) {
	leaves, placements = map[string]*domain.Job{}, map[string]*domain.Job{}
	page := domain.PageRequest{Size: domain.MaxPageSize}
	for {
		jobs, next, err := a.Store.Jobs(ctx, domain.JobFilter{CertificateID: certificateID, Open: true}, page)
		if err != nil {
			return nil, nil, err
		}
		for i := range jobs {
			switch j := &jobs[i]; j.Kind {
			case domain.JobIssuance, domain.JobRenewal:
				leaves[j.AgentID] = j
			case domain.JobDeployment, domain.JobValidation:
				placements[j.TargetID] = j
			}
		}
		if next == "" {
			return leaves, placements, nil
		}
		page.After = next
	}
}

// host is an agent with the states that it refuses.
type host struct {
	domain.Agent
	rejected []domain.StateRejection
}

func (a *API) host(ctx context.Context, agentID string) (host, error) {
	agent, err := a.Store.Agent(ctx, agentID)
	if err != nil {
		return host{}, err
	}
	rejected, err := a.Store.Rejections(ctx, agentID)
	return host{agent, rejected}, err
}

// lagging is a placement that does not hold what is wanted, and all that it could wait for.
type lagging struct {
	status    domain.CertificateStatus
	leaf      domain.Leaf
	placement domain.Placement
	target    domain.Target
	host      host
	// The open jobs of the leaf and of the placement; nil when there is none.
	leafJob, placementJob *domain.Job
	now                   time.Time
}

// waitsFor says in words what the placement waits for, what stands in the way, and what went wrong last.
func (w lagging) waitsFor() string {
	switch {
	case w.status == domain.CertificateRevoked || w.status == domain.CertificateArchived:
		return fmt.Sprintf("nothing: the certificate is %s and is not deployed any more", w.status)
	case w.host.State == domain.AgentRetired:
		return fmt.Sprintf("nothing: agent %s is retired%s", w.host.Name, inBrackets(w.host.Reason))
	case w.leaf.Revoked:
		return fmt.Sprintf("nothing: the leaf of agent %s is revoked and is not deployed any more", w.host.Name)
	}
	parts := []string{w.next()}
	if at := w.placement.DriftedAt; !at.IsZero() {
		parts = append(parts, "its agent found it changed by somebody else at "+clock(at))
	}
	if s := w.hostWords(); s != "" {
		parts = append(parts, s)
	}
	if !w.target.Enabled {
		parts = append(parts, fmt.Sprintf("target %s is disabled", w.target.Name))
	}
	for _, r := range w.host.rejected {
		if r.Kind == "target" && r.Name == w.target.ID {
			parts = append(parts, fmt.Sprintf("agent %s refuses version %d of the target's settings: %s", w.host.Name, r.Version, oneLine(r.Reason)))
		}
	}
	if s := w.lastError(); s != "" {
		parts = append(parts, "last error: "+s)
	}
	return strings.Join(parts, "; ")
}

// next is the step that comes next.
func (w lagging) next() string {
	switch {
	case w.leaf.Current == 0 && w.leafJob != nil:
		return "the first issuance: " + w.jobWords(w.leafJob)
	case w.leaf.Current == 0 && w.leaf.BackoffUntil.After(w.now):
		return fmt.Sprintf("the first issuance, which is tried again at %s after %s", clock(w.leaf.BackoffUntil), failures(w.leaf.Failures))
	case w.leaf.Current == 0:
		return "the first issuance: the renewal duty opens a job for it at its next run"
	case w.placementJob != nil && w.placementJob.Kind == domain.JobValidation:
		return fmt.Sprintf("its verification, after which generation %d can be deployed: %s", w.leaf.Current, w.jobWords(w.placementJob))
	case w.placementJob != nil:
		return fmt.Sprintf("the deployment of generation %d: %s", w.leaf.Current, w.jobWords(w.placementJob))
	case !w.target.Enabled:
		return fmt.Sprintf("the deployment of generation %d, which begins when the target is enabled", w.leaf.Current)
	case w.placement.BackoffUntil.After(w.now):
		return fmt.Sprintf("the deployment of generation %d, which is tried again at %s after %s", w.leaf.Current, clock(w.placement.BackoffUntil), failures(w.placement.Failures))
	default:
		return fmt.Sprintf("the deployment of generation %d: the placement duty opens a job for it at its next run", w.leaf.Current)
	}
}

// verification says what an open verification of a placement that has what is wanted waits for.
func (w lagging) verification() string {
	parts := []string{"its verification waits for: " + w.jobWords(w.placementJob)}
	if s := w.hostWords(); s != "" {
		parts = append(parts, s)
	}
	if s := oneLine(w.placementJob.Error); s != "" {
		parts = append(parts, "last error: "+s)
	}
	return strings.Join(parts, "; ")
}

func (w lagging) jobWords(j *domain.Job) string {
	if j.State == domain.JobAwaitingApproval {
		return "it " + approvalWords(j)
	}
	var doing string
	switch {
	case j.RunAt.After(w.now):
		doing = fmt.Sprintf("is %s and is tried again at %s", j.State, clock(j.RunAt))
	case !j.AcceptedAt.IsZero():
		doing = fmt.Sprintf("is %s; the agent accepted it at %s", j.State, clock(j.AcceptedAt))
	case j.Attempt > 0:
		doing = fmt.Sprintf("is %s; it was sent to the agent, which has not accepted it yet", j.State)
	case j.Kind == domain.JobValidation:
		doing = fmt.Sprintf("is %s and is sent when the agent has credit for verifications, which one that is too old for them never grants", j.State)
	default:
		doing = fmt.Sprintf("is %s and is sent when the agent has credit for it", j.State)
	}
	if j.Tries > 0 {
		doing += fmt.Sprintf(" (%d of %d tries used)", j.Tries, j.MaxTries)
	}
	return "job " + j.ID + " " + doing
}

// approvalWords go on with "it".
func approvalWords(j *domain.Job) string {
	return "waits for approval of " + j.ID + " by somebody who did not ask for it: certmesh jobs approve or reject"
}

// hostWords is empty for an agent that can work.
func (w lagging) hostWords() string {
	a := w.host.Agent
	switch {
	case a.State == domain.AgentOnline:
		return ""
	case a.State == domain.AgentQuarantined:
		return fmt.Sprintf("agent %s is quarantined%s and works again when an operator releases it", a.Name, inBrackets(a.Reason))
	case a.LastSeen.IsZero():
		return fmt.Sprintf("agent %s has not connected yet", a.Name)
	case a.State == domain.AgentOffline && !a.OfflineSince.IsZero():
		return fmt.Sprintf("agent %s is offline since %s", a.Name, clock(a.OfflineSince))
	default:
		return fmt.Sprintf("agent %s is %s, last seen %s", a.Name, strings.ToLower(string(a.State)), clock(a.LastSeen))
	}
}

// lastError is that of the step that comes next.
func (w lagging) lastError() string {
	job, kept := w.placementJob, w.placement.LastError
	if w.leaf.Current == 0 {
		job, kept = w.leafJob, w.leaf.LastError
	}
	if job != nil && job.Error != "" {
		kept = job.Error
	}
	return oneLine(kept)
}

func inBrackets(reason string) string {
	if reason = oneLine(reason); reason == "" {
		return ""
	}
	return " (" + reason + ")"
}

func failures(n int) string {
	if n == 1 {
		return "1 failure"
	}
	return fmt.Sprintf("%d failures", n)
}

func clock(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// oneLine makes the text of an agent or a person part of a sentence: no control characters, bounded.
func oneLine(s string) string {
	const most = 500
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, ""))
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return strings.TrimSpace(s)
}
