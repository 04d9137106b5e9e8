package api

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// TestLesson3EveryAcceptedFieldRoundTrips: what a request carries is kept and seen again, or decides what is answered.
// The fields come from the descriptors: a new one without a row here fails.
func TestLesson3EveryAcceptedFieldRoundTrips(t *testing.T) {
	t.Parallel()
	eachMethod(t, func(t *testing.T, m method, _ proto.Message) {
		trip, ok := roundTrips[string(m.Input().Name())]
		fields := leafFields(m.Input(), "")
		if !ok {
			if len(fields) > 0 {
				t.Fatalf("%s has no row in roundTrips", m.Input().Name())
			}
			return
		}
		sent, seen := trip(t, newRig(t).estate(t))
		for _, f := range fields {
			var values []string
			for _, req := range sent {
				values = append(values, textAt(req.ProtoReflect(), f)...)
			}
			if len(values) == 0 {
				t.Errorf("%s: the test sends no value, so it proves nothing", f)
				continue
			}
			want := strings.Join(values, "|")
			got, ok := seen[f]
			switch {
			case !ok:
				t.Errorf("%s: accepted and seen nowhere", f)
			case got != want:
				t.Errorf("%s: sent %s, seen %s", f, want, got)
			}
		}
		for f := range seen {
			if !slices.Contains(fields, f) {
				t.Errorf("%s is a row here and no field", f)
			}
		}
	})
}

// leafFields are the paths of a message's fields that hold no other message of ours.
func leafFields(d protoreflect.MessageDescriptor, path string) []string {
	var out []string
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		at := path + string(f.Name())
		if f.Kind() == protoreflect.MessageKind && !f.IsMap() && f.Message().ParentFile().Package() == d.ParentFile().Package() {
			out = append(out, leafFields(f.Message(), at+".")...)
			continue
		}
		out = append(out, at)
	}
	return out
}

// textAt are the values at a path, through lists, as text; none where they are not set.
func textAt(m protoreflect.Message, path string) []string {
	name, rest, deeper := strings.Cut(path, ".")
	fd := m.Descriptor().Fields().ByName(protoreflect.Name(name))
	if fd == nil {
		return []string{"no field " + path}
	}
	if !m.Has(fd) {
		return nil
	}
	var values []protoreflect.Value
	switch v := m.Get(fd); {
	case fd.IsList():
		for i := range v.List().Len() {
			values = append(values, v.List().Get(i))
		}
	case fd.IsMap():
		var pairs []string
		v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
			pairs = append(pairs, k.String()+"="+v.String())
			return true
		})
		slices.Sort(pairs)
		return pairs
	default:
		values = []protoreflect.Value{v}
	}
	var out []string
	for _, v := range values {
		switch {
		case deeper:
			out = append(out, textAt(v.Message(), rest)...)
		case fd.Kind() == protoreflect.MessageKind:
			if d, ok := v.Message().Interface().(*durationpb.Duration); ok {
				out = append(out, d.AsDuration().String())
			}
			if at, ok := v.Message().Interface().(*timestamppb.Timestamp); ok {
				out = append(out, at.AsTime().Format(time.RFC3339Nano))
			}
		default:
			out = append(out, fmt.Sprint(v.Interface()))
		}
	}
	return out
}

// see reads paths of an answer.
func see(answer proto.Message, path string) string {
	return strings.Join(textAt(answer.ProtoReflect(), path), "|")
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

type trip func(t *testing.T, r *rig) (sent []proto.Message, seen map[string]string)

func one(m proto.Message) []proto.Message { return []proto.Message{m} }

// byID is the trip of a request that only names a thing.
func byID[A proto.Message](req proto.Message, path string) trip {
	return func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		answer, err := methodOf(t, req).call(r.as(t, authz.Admin), t, r.conn, req)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := answer.(A); !ok {
			t.Fatalf("the answer is a %T", answer)
		}
		return one(req), map[string]string{"id": see(answer, path)}
	}
}

// listed is the trip of a list: the page decides what is answered, the filters reach the store.
func listed(req proto.Message, filters func(r *rig) map[string]string) trip {
	return func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		var asked domain.PageRequest
		r.listened(&asked)
		if _, err := methodOf(t, req).call(r.as(t, authz.Admin), t, r.conn, req); err != nil {
			t.Fatal(err)
		}
		seen := map[string]string{}
		if filters != nil {
			seen = filters(r)
		}
		seen["page.size"], seen["page.cursor"] = fmt.Sprint(asked.Size), asked.After
		return one(req), seen
	}
}

// inTurn is the trip of a list whose filters do not all go together: each request of the same kind brings some of them. The
// first has the page.
func inTurn(filters func(r *rig) map[string]string, reqs ...proto.Message) trip {
	return func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		sent, seen := []proto.Message{}, map[string]string{}
		for _, req := range reqs {
			one, some := listed(req, filters)(t, r)
			sent = append(sent, one...)
			for field, v := range some {
				if v != "" && seen[field] == "" {
					seen[field] = v
				}
			}
		}
		return sent, seen
	}
}

func timeText(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.Format(time.RFC3339Nano)
}

// listened makes the rig's store copy the next page request to p.
func (r *rig) listened(p *domain.PageRequest) {
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	r.store.page = p
}

var aPage = &operatorpb.Page{Size: 17, Cursor: "a"}

var roundTrips = map[string]trip{
	"GetCertificateRequest":     byID[*operatorpb.GetCertificateResponse](&operatorpb.GetCertificateRequest{Id: certID}, "certificate.id"),
	"ExplainCertificateRequest": byID[*operatorpb.ExplainCertificateResponse](&operatorpb.ExplainCertificateRequest{Id: certID}, "certificate.id"),
	"GetAgentRequest":           byID[*operatorpb.GetAgentResponse](&operatorpb.GetAgentRequest{Id: webAgent}, "agent.id"),
	"ReleaseAgentRequest":       byID[*operatorpb.ReleaseAgentResponse](&operatorpb.ReleaseAgentRequest{Id: mailAgent}, "agent.id"),
	"GetJobRequest":             byID[*operatorpb.GetJobResponse](&operatorpb.GetJobRequest{Id: jobID}, "job.id"),
	"CancelJobRequest":          byID[*operatorpb.CancelJobResponse](&operatorpb.CancelJobRequest{Id: jobID}, "job.id"),
	"RevokeJoinTokenRequest":    byID[*operatorpb.RevokeJoinTokenResponse](&operatorpb.RevokeJoinTokenRequest{Id: tokenID}, "token.id"),
	"GetIssuerRequest":          byID[*operatorpb.GetIssuerResponse](&operatorpb.GetIssuerRequest{Id: issuerID}, "issuer.id"),
	"GetTargetRequest":          byID[*operatorpb.GetTargetResponse](&operatorpb.GetTargetRequest{Id: webTarget}, "target.id"),

	"ListCertificatesRequest": inTurn(func(r *rig) map[string]string {
		f := r.store.certFilter
		return map[string]string{"status": string(f.Status), "issuer_id": f.IssuerID, "profile_id": f.ProfileID, "agent_id": f.AgentID,
			"owner": f.Owner, "name_prefix": f.NamePrefix, "sort": f.Sort, "expires_before": timeText(f.ExpiresBefore), "expires_after": timeText(f.ExpiresAfter)}
	}, &operatorpb.ListCertificatesRequest{Page: aPage, Status: "Expiring", Owner: "web team", Sort: "-created"}, &operatorpb.ListCertificatesRequest{IssuerId: issuerID},
		&operatorpb.ListCertificatesRequest{ProfileId: "tls-server"}, &operatorpb.ListCertificatesRequest{AgentId: "web1"}, &operatorpb.ListCertificatesRequest{NamePrefix: "w"},
		&operatorpb.ListCertificatesRequest{ExpiresBefore: timestamppb.New(start), ExpiresAfter: timestamppb.New(start.Add(-time.Hour))}),
	"ListVersionsRequest": func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		sent, seen := listed(&operatorpb.ListVersionsRequest{CertificateId: certID, Page: aPage}, nil)(t, r)
		all := must[*operatorpb.ListVersionsResponse](t)(r.certificates().ListVersions(r.as(t, authz.Viewer), &operatorpb.ListVersionsRequest{CertificateId: certID}))
		if see(all, "versions.serial") == "0a" {
			seen["certificate_id"] = certID
		}
		return sent, seen
	},
	"ListAgentsRequest": listed(&operatorpb.ListAgentsRequest{Page: aPage, State: "Offline"}, func(r *rig) map[string]string {
		return map[string]string{"state": string(r.store.agentState)}
	}),
	"ListJobsRequest": inTurn(func(r *rig) map[string]string {
		f := r.store.jobFilter
		return map[string]string{"state": string(f.State), "certificate_id": f.CertificateID, "agent_id": f.AgentID, "open": map[bool]string{true: "true"}[f.Open]}
	}, &operatorpb.ListJobsRequest{Page: aPage, State: "Running", Open: true}, &operatorpb.ListJobsRequest{CertificateId: certID}, &operatorpb.ListJobsRequest{AgentId: webAgent}),
	"ListJoinTokensRequest": listed(&operatorpb.ListJoinTokensRequest{Page: &operatorpb.Page{Size: 17, Cursor: "a"}}, nil),
	"ListIssuersRequest":    listed(&operatorpb.ListIssuersRequest{Page: aPage}, nil),
	"ListProfilesRequest":   listed(&operatorpb.ListProfilesRequest{Page: aPage}, nil),
	"ListTargetsRequest": listed(&operatorpb.ListTargetsRequest{Page: aPage, AgentId: webAgent}, func(r *rig) map[string]string {
		return map[string]string{"agent_id": r.store.targetAgent}
	}),
	"ListAuditEventsRequest": listed(&operatorpb.ListAuditEventsRequest{Page: aPage, Resource: "certificate/x"}, func(r *rig) map[string]string {
		return map[string]string{"resource": r.store.resource}
	}),

	"CreateCertificateRequest": func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		ctx := r.as(t, authz.Operator)
		req := &operatorpb.CreateCertificateRequest{
			Name: "new", Issuer: issuerID, Profile: "prof_00000000000000000000000000000005", Owner: "the web team", RequestId: "req-77", Targets: []string{"spare", "balancer"},
			Names: &operatorpb.Names{CommonName: "Anna Example", Dns: []string{"a.example.com", "b.example.com"}, Ip: []string{"192.0.2.1", "2001:db8::1"},
				Email: []string{"anna@example.com"}, Uri: []string{"spiffe://example.com/a"}},
			Policy: &operatorpb.RenewalPolicy{Fraction: .5, AlertThresholdsDays: []int32{20, 10}, Disabled: true, RequireApproval: true, Windows: []*operatorpb.RenewalWindow{
				{Days: []int32{1, 2}, StartMinute: 60, EndMinute: 180}, {Days: []int32{5}, StartMinute: 1320, EndMinute: 120}}},
		}
		made := must[*operatorpb.CreateCertificateResponse](t)(r.certificates().CreateCertificate(ctx, req))
		got := must[*operatorpb.GetCertificateResponse](t)(r.certificates().GetCertificate(ctx, &operatorpb.GetCertificateRequest{Id: "new"}))
		if !proto.Equal(made.GetCertificate(), got.GetCertificate()) {
			t.Errorf("created %v, then %v", made.GetCertificate(), got.GetCertificate())
		}
		seen := map[string]string{"targets": see(got, "certificate.placements.target_name"), "issuer": see(got, "certificate.issuer_id"), "profile": see(got, "certificate.profile_id")}
		for _, f := range leafFields(req.ProtoReflect().Descriptor(), "") {
			if f == "name" || f == "owner" || strings.HasPrefix(f, "names.") || strings.HasPrefix(f, "policy.") {
				seen[f] = see(got, "certificate."+f)
			}
		}
		all := must[*operatorpb.ListJobsResponse](t)(r.jobs().ListJobs(ctx, &operatorpb.ListJobsRequest{CertificateId: got.GetCertificate().GetId()}))
		if ids := see(all, "jobs.request_id"); ids == "req-77|req-77" {
			seen["request_id"] = "req-77"
		}
		return one(req), seen
	},
	"RenewCertificateRequest": func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		delete(r.store.jobs, jobID)
		req := &operatorpb.RenewCertificateRequest{Id: certID, RequestId: "req-78"}
		got := must[*operatorpb.RenewCertificateResponse](t)(r.certificates().RenewCertificate(r.as(t, authz.Operator), req))
		return one(req), map[string]string{"id": see(got, "jobs.certificate_id"), "request_id": see(got, "jobs.request_id")}
	},
	"VerifyCertificateRequest": func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		req := &operatorpb.VerifyCertificateRequest{Id: certID, RequestId: "req-80"}
		got := must[*operatorpb.VerifyCertificateResponse](t)(r.certificates().VerifyCertificate(r.as(t, authz.Operator), req))
		return one(req), map[string]string{"id": see(got, "jobs.certificate_id"), "request_id": see(got, "jobs.request_id")}
	},
	"DeployCertificateRequest": func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		delete(r.store.jobs, jobID)
		req := &operatorpb.DeployCertificateRequest{Id: certID, RequestId: "req-79"}
		got := must[*operatorpb.DeployCertificateResponse](t)(r.certificates().DeployCertificate(r.as(t, authz.Operator), req))
		return one(req), map[string]string{"id": see(got, "jobs.certificate_id"), "request_id": see(got, "jobs.request_id")}
	},
	"ApproveJobRequest": func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		req := &operatorpb.ApproveJobRequest{Id: waitingJob, Reason: "seen"}
		got := must[*operatorpb.ApproveJobResponse](t)(r.jobs().ApproveJob(r.as(t, authz.Approver), req))
		trail := r.store.trail()
		return one(req), map[string]string{"id": see(got, "job.id"), "reason": trail[len(trail)-1].Detail["reason"]}
	},
	"RejectJobRequest": func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		req := &operatorpb.RejectJobRequest{Id: waitingJob, Reason: "wrong names"}
		got := must[*operatorpb.RejectJobResponse](t)(r.jobs().RejectJob(r.as(t, authz.Approver), req))
		return one(req), map[string]string{"id": see(got, "job.id"), "reason": see(got, "job.error")}
	},
	"RevokeCertificateRequest": func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		req := &operatorpb.RevokeCertificateRequest{Id: certID, Reason: "keyCompromise"}
		got := must[*operatorpb.RevokeCertificateResponse](t)(r.certificates().RevokeCertificate(r.as(t, authz.Operator), req))
		all := must[*operatorpb.ListVersionsResponse](t)(r.certificates().ListVersions(r.as(t, authz.Viewer), &operatorpb.ListVersionsRequest{CertificateId: certID}))
		return one(req), map[string]string{"id": see(got, "certificate.id"), "reason": see(all, "versions.revocation_reason")}
	},
	"RetireAgentRequest": func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		req := &operatorpb.RetireAgentRequest{Id: webAgent, Reason: "scrapped"}
		must[*operatorpb.RetireAgentResponse](t)(r.agents().RetireAgent(r.as(t, authz.Admin), req))
		got := must[*operatorpb.GetAgentResponse](t)(r.agents().GetAgent(r.as(t, authz.Viewer), &operatorpb.GetAgentRequest{Id: webAgent}))
		return one(req), map[string]string{"id": see(got, "agent.id"), "reason": see(got, "agent.reason")}
	},
	"CreateJoinTokenRequest": func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		req := &operatorpb.CreateJoinTokenRequest{Ttl: durationpb.New(26 * time.Hour), MaxUses: 12, Labels: map[string]string{"rack": "r7", "site": "b"}}
		got := must[*operatorpb.CreateJoinTokenResponse](t)(r.agents().CreateJoinToken(r.as(t, authz.Admin), req))
		k := r.store.tokens[got.GetId()]
		if !k.ExpiresAt.Equal(got.GetExpiresAt().AsTime()) {
			t.Errorf("stored until %s, told %s", k.ExpiresAt, got.GetExpiresAt().AsTime())
		}
		return one(req), map[string]string{"ttl": k.ExpiresAt.Sub(start).String(), "max_uses": fmt.Sprint(k.MaxUses),
			"labels": "rack=" + k.Labels["rack"] + "|site=" + k.Labels["site"]}
	},
	"CreateIssuerRequest": func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		root := &operatorpb.CreateIssuerRequest{Name: "second", Kind: "local", CommonName: "Example Root", KeyAlgorithm: "RSA-4096"}
		sub := &operatorpb.CreateIssuerRequest{Name: "third", Kind: "local", CaCertificatePem: "the certificate\n", CaKeyPem: "the key\n"}
		must[*operatorpb.CreateIssuerResponse](t)(r.issuing().CreateIssuer(r.as(t, authz.Admin), root))
		seen := map[string]string{"common_name": r.issuers.last.CommonName, "key_algorithm": string(r.issuers.last.KeyAlgorithm)}
		must[*operatorpb.CreateIssuerResponse](t)(r.issuing().CreateIssuer(r.as(t, authz.Admin), sub))
		seen["ca_certificate_pem"], seen["ca_key_pem"] = r.issuers.last.CertificatePEM, r.issuers.last.KeyPEM
		a := must[*operatorpb.GetIssuerResponse](t)(r.issuing().GetIssuer(r.as(t, authz.Viewer), &operatorpb.GetIssuerRequest{Id: "second"}))
		b := must[*operatorpb.GetIssuerResponse](t)(r.issuing().GetIssuer(r.as(t, authz.Viewer), &operatorpb.GetIssuerRequest{Id: "third"}))
		seen["name"], seen["kind"] = see(a, "issuer.name")+"|"+see(b, "issuer.name"), see(a, "issuer.kind")+"|"+see(b, "issuer.kind")
		return []proto.Message{root, sub}, seen
	},
	"CreateTargetRequest": func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		req := &operatorpb.CreateTargetRequest{Name: "new", Agent: webAgent, Kind: "nginx", SettingsJson: goodSettings, VerifyAddress: "[2001:db8::1]:8443", ServerName: "new.example.com"}
		made := must[*operatorpb.CreateTargetResponse](t)(r.targets().CreateTarget(r.as(t, authz.Operator), req))
		got := must[*operatorpb.GetTargetResponse](t)(r.targets().GetTarget(r.as(t, authz.Viewer), &operatorpb.GetTargetRequest{Id: "new"}))
		if !proto.Equal(made.GetTarget(), got.GetTarget()) {
			t.Errorf("created %v, then %v", made.GetTarget(), got.GetTarget())
		}
		seen := map[string]string{"agent": see(got, "target.agent_id")}
		for _, f := range []string{"name", "kind", "settings_json", "verify_address", "server_name"} {
			seen[f] = see(got, "target."+f)
		}
		return one(req), seen
	},
	"WatchRequest": func(t *testing.T, r *rig) ([]proto.Message, map[string]string) {
		req := &operatorpb.WatchRequest{Kinds: []string{"jobs", "agents"}, Id: "x"}
		w := r.watch(t, req)
		r.Hub.Publish(hub.Notice{Kind: hub.Jobs, ID: "x"}, hub.Notice{Kind: hub.Jobs, ID: "y"}, hub.Notice{Kind: hub.Targets, ID: "x"}, hub.Notice{Kind: hub.Agents, ID: "x"})
		got := w.next(t)
		seen := map[string]string{"kinds": see(got, "changes.kind")}
		if see(got, "changes.id") == "x|x" {
			seen["id"] = "x"
		}
		return one(req), seen
	},
}
