package api

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/renew"
	"github.com/certmesh/certmesh/protocol/fault"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

func (a certificates) ListCertificates(ctx context.Context, r *operatorpb.ListCertificatesRequest) (*operatorpb.ListCertificatesResponse, error) {
	all, counts, next, err := a.Store.Certificates(ctx, certificateFilter(r), pageOf(r.GetPage()))
	if err != nil {
		return nil, err
	}
	return &operatorpb.ListCertificatesResponse{NextCursor: next, Certificates: each(all, func(c domain.Certificate) *operatorpb.Certificate {
		return certificatePB(c, counts[c.ID])
	})}, nil
}

func certificateFilter(r *operatorpb.ListCertificatesRequest) domain.CertificateFilter {
	f := domain.CertificateFilter{
		Status: domain.CertificateStatus(r.GetStatus()), IssuerID: r.GetIssuerId(), ProfileID: r.GetProfileId(),
		AgentID: r.GetAgentId(), Owner: r.GetOwner(), NamePrefix: r.GetNamePrefix(), Sort: r.GetSort(),
	}
	if t := r.GetExpiresBefore(); t != nil {
		f.ExpiresBefore = t.AsTime()
	}
	if t := r.GetExpiresAfter(); t != nil {
		f.ExpiresAfter = t.AsTime()
	}
	return f
}

func (a certificates) GetCertificate(ctx context.Context, r *operatorpb.GetCertificateRequest) (*operatorpb.GetCertificateResponse, error) {
	v, err := a.Store.CertificateView(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	return &operatorpb.GetCertificateResponse{Certificate: viewPB(v)}, nil
}

func (a certificates) CreateCertificate(ctx context.Context, r *operatorpb.CreateCertificateRequest) (*operatorpb.CreateCertificateResponse, error) {
	names, err := namesOf(r.GetNames())
	if err != nil {
		return nil, err
	}
	parts, err := a.orderParts(ctx, r)
	if err != nil {
		return nil, err
	}
	policy := policyOf(r.GetPolicy())
	if err := profileFits(parts.profile, names); err != nil {
		return nil, err
	}
	if err := renew.CheckPolicy(policy, parts.profile); err != nil {
		return nil, err
	}
	op := a.opFor(ctx, r.GetRequestId())
	cert, jobs, err := a.Store.CreateCertificate(ctx, domain.NewCertificate{
		Certificate: domain.Certificate{
			ID: newID(id.Certificate), Name: r.GetName(), Names: names, IssuerID: parts.issuer.ID, ProfileID: parts.profile.ID,
			Owner: r.GetOwner(), Policy: policy, CreatedBy: op.Actor, CreatedAt: op.At,
		},
		TargetIDs: parts.targetIDs(), RequestID: r.GetRequestId(), Op: op,
	})
	if err != nil {
		return nil, renamed(err, orderField)
	}
	a.Hub.Publish(hub.Notice{Kind: hub.Certificates, ID: cert.ID})
	a.changed(jobs)
	return &operatorpb.CreateCertificateResponse{Certificate: a.shown(ctx, cert), Jobs: each(jobs, jobPB)}, nil
}

func (a certificates) RenewCertificate(ctx context.Context, r *operatorpb.RenewCertificateRequest) (*operatorpb.RenewCertificateResponse, error) {
	op := a.opFor(ctx, r.GetRequestId())
	jobs, err := a.Store.RenewCertificate(ctx, r.GetId(), "requested by "+op.Actor, op)
	if err != nil {
		return nil, err
	}
	if len(jobs) > 0 {
		a.Hub.Publish(hub.Notice{Kind: hub.Certificates, ID: jobs[0].CertificateID})
	}
	a.changed(jobs)
	return &operatorpb.RenewCertificateResponse{Jobs: each(jobs, jobPB)}, nil
}

func (a certificates) DeployCertificate(ctx context.Context, r *operatorpb.DeployCertificateRequest) (*operatorpb.DeployCertificateResponse, error) {
	op := a.opFor(ctx, r.GetRequestId())
	jobs, err := a.Store.DeployCertificate(ctx, r.GetId(), "requested by "+op.Actor, op)
	if err != nil {
		return nil, err
	}
	if len(jobs) > 0 {
		a.Hub.Publish(hub.Notice{Kind: hub.Certificates, ID: jobs[0].CertificateID})
	}
	a.changed(jobs)
	return &operatorpb.DeployCertificateResponse{Jobs: each(jobs, jobPB)}, nil
}

func (a certificates) VerifyCertificate(ctx context.Context, r *operatorpb.VerifyCertificateRequest) (*operatorpb.VerifyCertificateResponse, error) {
	op := a.opFor(ctx, r.GetRequestId())
	jobs, err := a.Store.VerifyCertificate(ctx, r.GetId(), "requested by "+op.Actor, op)
	if err != nil {
		return nil, err
	}
	if len(jobs) > 0 {
		a.Hub.Publish(hub.Notice{Kind: hub.Certificates, ID: jobs[0].CertificateID})
	}
	a.changed(jobs)
	return &operatorpb.VerifyCertificateResponse{Jobs: each(jobs, jobPB)}, nil
}

func (a certificates) RevokeCertificate(ctx context.Context, r *operatorpb.RevokeCertificateRequest) (*operatorpb.RevokeCertificateResponse, error) {
	reason, err := domain.ParseRevocationReason(r.GetReason())
	if err != nil {
		return nil, err
	}
	// The open jobs are read first: afterwards those that the revocation cancels cannot be told from others.
	open, err := a.openJobs(ctx, domain.JobFilter{CertificateID: r.GetId()})
	if err != nil {
		return nil, err
	}
	cert, serials, err := a.Store.RevokeCertificate(ctx, r.GetId(), reason, a.op(ctx))
	if err != nil {
		return nil, err
	}
	// Also when it was revoked before: the former call may have ended between the commit and the CRL.
	if a.Revoked != nil && len(serials) > 0 {
		a.Revoked(cert.IssuerID)
	}
	a.Hub.Publish(hub.Notice{Kind: hub.Certificates, ID: cert.ID})
	a.changed(open)
	return &operatorpb.RevokeCertificateResponse{Certificate: a.shown(ctx, cert), Serials: serials}, nil
}

func (a certificates) ListVersions(ctx context.Context, r *operatorpb.ListVersionsRequest) (*operatorpb.ListVersionsResponse, error) {
	all, next, err := a.Store.Versions(ctx, r.GetCertificateId(), pageOf(r.GetPage()))
	if err != nil {
		return nil, err
	}
	return &operatorpb.ListVersionsResponse{Versions: each(all, versionPB), NextCursor: next}, nil
}

// shown is a certificate as Get shows it. It is called after a commit, so that a failure to read must not look like a
// failure to write: the answer then lacks leaves and placements.
func (a *API) shown(ctx context.Context, c domain.Certificate) *operatorpb.Certificate {
	v, err := a.Store.CertificateView(ctx, c.ID)
	if err != nil {
		a.Log.Warn("read after a write failed", "certificate", c.ID, "request_id", callOf(ctx).requestID, "error", err)
		return certificatePB(c, domain.PlacementCounts{})
	}
	return viewPB(v)
}

// openJobs reads the first page of the open jobs that f selects.
func (a *API) openJobs(ctx context.Context, f domain.JobFilter) ([]domain.Job, error) {
	f.Open = true
	jobs, _, err := a.Store.Jobs(ctx, f, domain.PageRequest{Size: domain.MaxPageSize})
	return jobs, err
}

// parts are what an order names.
type parts struct {
	issuer  domain.Issuer
	profile domain.Profile
	targets []domain.Target
}

func (p parts) targetIDs() []string {
	return each(p.targets, func(t domain.Target) string { return t.ID })
}

// orderParts finds issuer, profile and targets of an order, and says of everything that is wrong with them at once.
// Whether targets are enabled is the store's to say, which looks at a repeated request first.
func (a *API) orderParts(ctx context.Context, r *operatorpb.CreateCertificateRequest) (parts, error) {
	var p parts
	var wrong violations
	var err error
	if p.issuer, err = found(&wrong, "issuer", "issuer", r.GetIssuer(), "certmesh issuers list", func(k string) (domain.Issuer, error) { return a.Store.Issuer(ctx, k) }); err != nil {
		return p, err
	}
	if p.profile, err = found(&wrong, "profile", "profile", r.GetProfile(), "certmesh issuers list", func(k string) (domain.Profile, error) { return a.Store.Profile(ctx, k) }); err != nil {
		return p, err
	}
	agents := map[string]domain.Agent{}
	seen := map[string]bool{}
	for i, key := range r.GetTargets() {
		field := fmt.Sprintf("targets[%d]", i)
		before := len(wrong)
		t, err := found(&wrong, field, "target", key, "certmesh targets list", func(k string) (domain.Target, error) { return a.Store.Target(ctx, k) })
		switch {
		case err != nil:
			return p, err
		case len(wrong) > before:
			continue
		case seen[t.ID]:
			wrong.add(field, "%q is there twice", key)
			continue
		}
		seen[t.ID] = true
		p.targets = append(p.targets, t)
		agent, known := agents[t.AgentID]
		if !known {
			if agent, err = a.Store.Agent(ctx, t.AgentID); err != nil {
				return p, err
			}
			agents[t.AgentID] = agent
		}
		if !canServe(agent, t.Kind) {
			wrong.add(field, "agent %s cannot serve targets of kind %s; it announces %s", agent.Name, t.Kind, announced(agent))
		}
	}
	return p, wrong.err()
}

// found looks up what a request names. That it is not there is added to wrong; other errors are returned.
func found[T any](wrong *violations, field, noun, key, list string, get func(string) (T, error)) (T, error) {
	v, err := get(key)
	if fault.Is(err, fault.NotFound) {
		wrong.add(field, "there is no %s %q; %s shows them", noun, key, list)
		return v, nil
	}
	return v, err
}

// canServe reports whether an agent has announced a kind of target. One that has never connected has announced
// nothing, and is believed.
func canServe(a domain.Agent, kind string) bool {
	if a.LastSeen.IsZero() && len(a.Capabilities) == 0 {
		return true
	}
	return slices.ContainsFunc(a.Capabilities, func(c string) bool {
		name, _, _ := strings.Cut(c, "@")
		return name == "target/"+kind
	})
}

func announced(a domain.Agent) string {
	if len(a.Capabilities) == 0 {
		return "none"
	}
	const most = 20
	if len(a.Capabilities) > most {
		return strings.Join(a.Capabilities[:most], ", ") + ", …"
	}
	return strings.Join(a.Capabilities, ", ")
}

// profileFits refuses orders whose leaves nobody could use, or that could not be signed, under the profile.
func profileFits(p domain.Profile, n domain.Names) error {
	has := func(e domain.EKU) bool { return slices.Contains(p.EKUs, e) }
	host := len(n.DNS)+len(n.IP) > 0
	switch {
	case !slices.Contains(domain.KeyAlgorithms, p.KeyAlgorithm) || !slices.Contains(p.Allowed, p.KeyAlgorithm):
		return fault.InvalidField("profile", "profile %s wants keys of kind %q, which it does not allow; choose another profile", p.Name, p.KeyAlgorithm)
	case len(p.EKUs) == 0:
		return fault.InvalidField("profile", "profile %s has no extended key usage; choose another profile", p.Name)
	case has(domain.EKUTimeStamping) && len(p.EKUs) > 1:
		return fault.InvalidField("profile", "profile %s joins timeStamping with other usages, which RFC 3161 section 2.3 forbids; choose another profile", p.Name)
	case has(domain.EKUEmailProtection) && len(n.Email) == 0:
		return fault.InvalidField("names.email", "profile %s is for S/MIME; give the e-mail address that the certificate is for", p.Name)
	case has(domain.EKUServerAuth) && !has(domain.EKUClientAuth) && !host:
		return fault.InvalidField("names.dns", "profile %s is for servers; give the DNS name or IP address that clients connect to", p.Name)
	case has(domain.EKUServerAuth) && !host && len(n.URI) == 0:
		return fault.InvalidField("names.dns", "profile %s is for servers and their peers; give a DNS name, an IP address or a URI", p.Name)
	}
	return nil
}

// orderField translates the store's fields of an order to the request's.
func orderField(field string) string {
	switch field {
	case "issuer_id":
		return "issuer"
	case "profile_id":
		return "profile"
	case "target_ids":
		return "targets"
	}
	return field
}
