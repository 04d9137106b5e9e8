package api

import (
	"encoding/pem"
	"fmt"
	"math"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// stamp leaves out what has not happened.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func pageOf(p *operatorpb.Page) domain.PageRequest {
	return domain.PageRequest{Size: int(p.GetSize()), After: p.GetCursor()}
}

func each[A, B any](in []A, f func(A) B) []B {
	out := make([]B, 0, len(in))
	for _, a := range in {
		out = append(out, f(a))
	}
	return out
}

func policyOf(p *operatorpb.RenewalPolicy) domain.Policy {
	out := domain.Policy{Fraction: p.GetFraction(), Disabled: p.GetDisabled(), RequireApproval: p.GetRequireApproval()}
	for _, d := range p.GetAlertThresholdsDays() {
		out.AlertThresholdsDays = append(out.AlertThresholdsDays, int(d))
	}
	for _, w := range p.GetWindows() {
		window := domain.Window{Start: int(w.GetStartMinute()), End: int(w.GetEndMinute())}
		for _, d := range w.GetDays() {
			window.Days = append(window.Days, int(d))
		}
		out.Windows = append(out.Windows, window)
	}
	return out
}

func policyPB(p domain.Policy) *operatorpb.RenewalPolicy {
	out := &operatorpb.RenewalPolicy{Fraction: p.Fraction, Disabled: p.Disabled, RequireApproval: p.RequireApproval}
	for _, d := range p.AlertThresholdsDays {
		out.AlertThresholdsDays = append(out.AlertThresholdsDays, int32Of(d))
	}
	for _, w := range p.Windows {
		window := &operatorpb.RenewalWindow{StartMinute: int32Of(w.Start), EndMinute: int32Of(w.End)}
		for _, d := range w.Days {
			window.Days = append(window.Days, int32Of(d))
		}
		out.Windows = append(out.Windows, window)
	}
	return out
}

// int32Of is a number of the store as messages carry it; one that does not fit is the greatest that does.
func int32Of[N int | int64](n N) int32 { return int32(max(min(n, math.MaxInt32), math.MinInt32)) }

func certificatePB(c domain.Certificate, n domain.PlacementCounts) *operatorpb.Certificate {
	return &operatorpb.Certificate{
		Id: c.ID, Name: c.Name,
		Names: &operatorpb.Names{
			CommonName: c.Names.CommonName, Dns: c.Names.DNS, Ip: c.Names.IP, Email: c.Names.Email, Uri: c.Names.URI,
		},
		IssuerId: c.IssuerID, ProfileId: c.ProfileID, Owner: c.Owner, Policy: policyPB(c.Policy), Status: string(c.Status),
		NotAfter: stamp(c.NotAfter), CreatedAt: stamp(c.CreatedAt), UpdatedAt: stamp(c.UpdatedAt), Revision: c.Revision,
		PlacementsCurrent: int32Of(n.Current), PlacementsTotal: int32Of(n.Total),
	}
}

// viewPB is a certificate with its leaves and placements.
func viewPB(v domain.CertificateView) *operatorpb.Certificate {
	wanted := map[string]int64{}
	for _, l := range v.Leaves {
		wanted[l.AgentID] = l.Current
	}
	counts := domain.PlacementCounts{Total: len(v.Placements)}
	placements := make([]*operatorpb.Placement, 0, len(v.Placements))
	for _, p := range v.Placements {
		now := current(p, wanted[p.AgentID])
		if now {
			counts.Current++
		}
		placements = append(placements, &operatorpb.Placement{
			TargetId: p.TargetID, TargetName: v.TargetNames[p.TargetID], AgentId: p.AgentID, State: string(p.State),
			InstalledGeneration: p.InstalledGeneration, ServedGeneration: p.ServedGeneration,
			InstalledFingerprint: p.InstalledFingerprint, ServedFingerprint: p.ServedFingerprint,
			ServedAt: stamp(p.ServedAt), LastError: p.LastError, Current: now, DriftedAt: stamp(p.DriftedAt),
		})
	}
	out := certificatePB(v.Certificate, counts)
	out.Placements = placements
	out.Leaves = each(v.Leaves, leafPB)
	return out
}

// current reports whether a placement serves the wanted generation or, where it is not probed, holds it. Lists count by
// the same rule.
func current(p domain.Placement, wanted int64) bool {
	return wanted > 0 && (p.State == domain.PlacementServed && p.ServedGeneration == wanted ||
		p.State == domain.PlacementInstalled && p.InstalledGeneration == wanted)
}

func leafPB(l domain.Leaf) *operatorpb.Leaf {
	return &operatorpb.Leaf{
		AgentId: l.AgentID, Generation: l.Current, OrderedGeneration: l.Generation, Serial: l.Serial,
		NotBefore: stamp(l.NotBefore), NotAfter: stamp(l.NotAfter), DueAt: stamp(l.DueAt), Failures: int32Of(l.Failures),
		BackoffUntil: stamp(l.BackoffUntil), LastError: l.LastError,
	}
}

func pemOf(chain ...[]byte) string {
	var b strings.Builder
	for _, der := range chain {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	return b.String()
}

func versionPB(v domain.Version) *operatorpb.Version {
	out := &operatorpb.Version{
		Serial: v.Serial, AgentId: v.AgentID, Generation: v.Generation, Fingerprint: v.Fingerprint,
		KeyAlgorithm: string(v.KeyAlgorithm), NotBefore: stamp(v.NotBefore), NotAfter: stamp(v.NotAfter),
		RevokedAt: stamp(v.RevokedAt), CreatedAt: stamp(v.CreatedAt), IssuerId: v.IssuerID,
		Pem: pemOf(append([][]byte{v.DER}, v.Chain...)...),
	}
	if !v.RevokedAt.IsZero() {
		out.RevocationReason = v.RevocationReason.String()
	}
	return out
}

func jobPB(j domain.Job) *operatorpb.Job {
	return &operatorpb.Job{
		Id: j.ID, Kind: string(j.Kind), State: string(j.State), CertificateId: j.CertificateID, AgentId: j.AgentID,
		TargetId: j.TargetID, Generation: j.Generation, Attempt: j.Attempt, Tries: int32Of(j.Tries), MaxTries: int32Of(j.MaxTries),
		RunAt: stamp(j.RunAt), ErrorClass: j.ErrorClass, Error: j.Error, Reason: j.Reason, CreatedAt: stamp(j.CreatedAt),
		UpdatedAt: stamp(j.UpdatedAt), FinishedAt: stamp(j.FinishedAt), RequestId: j.RequestID,
	}
}

func agentPB(a domain.Agent) *operatorpb.Agent {
	return &operatorpb.Agent{
		Id: a.ID, Name: a.Name, State: string(a.State), Labels: a.Labels, Os: a.Facts.OS, Platform: a.Facts.Platform,
		Architecture: a.Facts.Architecture, IpAddress: a.Facts.IPAddress, Hostname: a.Facts.Hostname, Version: a.Facts.Version,
		Capabilities: a.Capabilities, CreatedAt: stamp(a.CreatedAt), LastSeen: stamp(a.LastSeen), Reason: a.Reason,
	}
}

func tokenPB(t domain.JoinToken) *operatorpb.JoinToken {
	return &operatorpb.JoinToken{
		Id: t.ID, MaxUses: int32Of(t.MaxUses), Uses: int32Of(t.Uses), Labels: t.Labels, ExpiresAt: stamp(t.ExpiresAt),
		RevokedAt: stamp(t.RevokedAt), CreatedBy: t.CreatedBy, CreatedAt: stamp(t.CreatedAt),
	}
}

func rejectionText(r domain.StateRejection) string {
	return fmt.Sprintf("%s/%s v%d: %s", r.Kind, r.Name, r.Version, r.Reason)
}

func profilePB(p domain.Profile) *operatorpb.Profile {
	return &operatorpb.Profile{
		Id: p.ID, Name: p.Name, KeyAlgorithm: string(p.KeyAlgorithm),
		AllowedKeyAlgorithms: each(p.Allowed, func(k domain.KeyAlgorithm) string { return string(k) }),
		Ekus:                 each(p.EKUs, func(e domain.EKU) string { return string(e) }),
		Ttl:                  durationpb.New(p.TTL), MaxTtl: durationpb.New(p.MaxTTL),
	}
}

func targetPB(t domain.Target) *operatorpb.Target {
	return &operatorpb.Target{
		Id: t.ID, Name: t.Name, AgentId: t.AgentID, Kind: t.Kind, SettingsJson: string(t.Settings),
		VerifyAddress: t.VerifyAddress, ServerName: t.ServerName, Enabled: t.Enabled, CreatedAt: stamp(t.CreatedAt), Revision: t.Revision,
	}
}

func auditPB(e domain.AuditEvent) *operatorpb.AuditEvent {
	return &operatorpb.AuditEvent{
		Id: e.ID, At: stamp(e.At), Actor: e.Actor, Action: e.Action, Resource: e.Resource, Outcome: e.Outcome,
		RequestId: e.RequestID, RemoteAddr: e.RemoteAddr, Detail: e.Detail,
	}
}
