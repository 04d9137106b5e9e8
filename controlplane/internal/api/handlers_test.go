package api

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

func TestCreateCertificate(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	o := order("shop")
	o.Targets = []string{"spare", lbTarget}
	got, err := r.certificates().CreateCertificate(r.as(t, authz.Operator), o)
	if err != nil {
		t.Fatal(err)
	}
	c := got.GetCertificate()
	if c.GetStatus() != "Pending" || c.GetPlacementsTotal() != 2 || c.GetPlacementsCurrent() != 0 || len(c.GetLeaves()) != 2 || len(c.GetPlacements()) != 2 || len(got.GetJobs()) != 2 {
		t.Errorf("created %v", got)
	}
	wantList(t, "woken", r.sessions.take(&r.sessions.woken), []string{webAgent, mailAgent})
	trail := r.store.trail()
	if len(trail) != 1 || trail[0].Actor != "operator:operator" || trail[0].RemoteAddr == "" || trail[0].RequestID == "" || !trail[0].At.Equal(start) {
		t.Errorf("trail %+v", trail)
	}
	_, err = r.certificates().CreateCertificate(r.as(t, authz.Operator), o)
	wantCode(t, err, codes.Aborted, "taken")
	wantList(t, "woken by a refusal", r.sessions.take(&r.sessions.woken), nil)
}

// TestCreateCertificateTwice: the same request id with the same content is one certificate, however often and at once.
func TestCreateCertificateTwice(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	ctx := r.as(t, authz.Operator)
	o := order("shop")
	o.RequestId = "deploy-1"
	const callers = 8
	ids := make([]string, callers)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			got, err := r.certificates().CreateCertificate(ctx, o)
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = got.GetCertificate().GetId() + got.GetJobs()[0].GetId()
		})
	}
	wg.Wait()
	for _, id := range ids {
		if id != ids[0] {
			t.Errorf("%s and %s", id, ids[0])
		}
	}
	for name, change := range map[string]func(*operatorpb.CreateCertificateRequest){
		"name":    func(o *operatorpb.CreateCertificateRequest) { o.Name, o.Targets = "other", []string{"balancer"} },
		"names":   func(o *operatorpb.CreateCertificateRequest) { o.Names.Dns = []string{"b.example.com"} },
		"owner":   func(o *operatorpb.CreateCertificateRequest) { o.Owner = "somebody" },
		"targets": func(o *operatorpb.CreateCertificateRequest) { o.Targets = []string{"spare", "balancer"} },
		"profile": func(o *operatorpb.CreateCertificateRequest) { o.Profile = "tls-peer" },
		"policy":  func(o *operatorpb.CreateCertificateRequest) { o.Policy = &operatorpb.RenewalPolicy{Fraction: .5} },
	} {
		other := proto.CloneOf(o)
		change(other)
		_, err := r.certificates().CreateCertificate(ctx, other)
		if wantCode(t, err, codes.Aborted, "differently"); t.Failed() {
			t.Fatalf("another %s under the same request id", name)
		}
	}
	// The answer stays the same when the target has been disabled since.
	r.store.mu.Lock()
	for _, id := range []string{spareTarget, lbTarget} {
		g := r.store.targets[id]
		g.Enabled = false
		r.store.targets[id] = g
	}
	r.store.mu.Unlock()
	if _, err := r.certificates().CreateCertificate(ctx, o); err != nil {
		t.Error(err)
	}
	o.RequestId, o.Name, o.Targets = "deploy-2", "shop2", []string{"balancer"}
	_, err := r.certificates().CreateCertificate(ctx, o)
	wantField(t, err, "targets", "disabled")
}

// TestOneCertificateAtATarget: a target that holds a certificate takes no other until that one is revoked.
func TestOneCertificateAtATarget(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	ctx := r.as(t, authz.Operator)
	o := order("shop")
	o.Targets = []string{"spare", "site"}
	_, err := r.certificates().CreateCertificate(ctx, o)
	wantCode(t, err, codes.Aborted, `target "site" holds certificate "www"`, "renew that certificate, or place this one at another target")
	if trail := r.store.trail(); len(trail) != 1 || trail[0].Action != "api.failed" || trail[0].Outcome != "conflict" {
		t.Errorf("trail of a refusal %+v", trail)
	}
	wantList(t, "woken by a refusal", r.sessions.take(&r.sessions.woken), nil)
	// A name that is taken is what is wrong, whichever target is named with it.
	o.Name = "www"
	_, err = r.certificates().CreateCertificate(ctx, o)
	wantCode(t, err, codes.Aborted, "taken")
	if _, err := r.certificates().RevokeCertificate(ctx, &operatorpb.RevokeCertificateRequest{Id: "www"}); err != nil {
		t.Fatal(err)
	}
	o.Name = "shop"
	if _, err := r.certificates().CreateCertificate(ctx, o); err != nil {
		t.Error(err)
	}
}

func TestProfilesAndNames(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	for i, c := range []struct {
		profile string
		names   *operatorpb.Names
	}{
		{"smime", &operatorpb.Names{CommonName: "Anna Example", Email: []string{"anna@example.com"}}},
		{"tls-server", &operatorpb.Names{Ip: []string{"192.0.2.1"}}},
		{"tls-server", &operatorpb.Names{CommonName: "a.example.com"}},
		{"tls-server", &operatorpb.Names{Dns: []string{"*.example.com"}}},
		{"tls-peer", &operatorpb.Names{Uri: []string{"spiffe://example.com/a"}}},
		{"tls-client", &operatorpb.Names{Email: []string{"robot@example.com"}}},
		{"all", &operatorpb.Names{Dns: []string{"a.example.com"}, Email: []string{"a@example.com"}}},
	} {
		o := order(fmt.Sprintf("fits%d", i))
		o.Profile, o.Names, o.Targets = c.profile, c.names, []string{fmt.Sprintf("place%d", i)}
		if _, err := r.targets().CreateTarget(r.as(t, authz.Operator), &operatorpb.CreateTargetRequest{Name: o.Targets[0], Agent: "web1", Kind: "nginx"}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.certificates().CreateCertificate(r.as(t, authz.Operator), o); err != nil {
			t.Errorf("%s with %v: %v", c.profile, c.names, err)
		}
	}
	for _, p := range []domain.Profile{
		{Name: "no usage", KeyAlgorithm: domain.ECDSAP256, Allowed: domain.KeyAlgorithms},
		{Name: "odd key", KeyAlgorithm: "DSA", Allowed: []domain.KeyAlgorithm{"DSA"}, EKUs: []domain.EKU{domain.EKUServerAuth}},
		{Name: "clock and server", KeyAlgorithm: domain.ECDSAP256, Allowed: domain.KeyAlgorithms, EKUs: []domain.EKU{domain.EKUServerAuth, domain.EKUTimeStamping}},
	} {
		var e *fault.Error
		if err := profileFits(p, domain.Names{DNS: []string{"a.example.com"}}); !errors.As(err, &e) || e.Field != "profile" {
			t.Errorf("%s: %v", p.Name, err)
		}
	}
}

// TestPoliciesThatCannotBeMet are refused when they are saved (lesson 8).
func TestPoliciesThatCannotBeMet(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	r.store.profiles["prof_short"] = domain.Profile{ID: "prof_short", Name: "day", KeyAlgorithm: domain.ECDSAP256, Allowed: domain.KeyAlgorithms,
		EKUs: []domain.EKU{domain.EKUServerAuth}, TTL: 24 * time.Hour, MaxTTL: 24 * time.Hour}
	o := order("new")
	o.Profile, o.Policy = "day", &operatorpb.RenewalPolicy{Windows: []*operatorpb.RenewalWindow{{Days: []int32{0}, StartMinute: 60, EndMinute: 120}}}
	_, err := r.certificates().CreateCertificate(r.as(t, authz.Operator), o)
	wantField(t, err, "policy.windows", "window")
}

// TestAgentThatNeverConnected has announced nothing and is believed; one that has connected is held to its word.
func TestAgentThatNeverConnected(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	r.store.agents["agt_new"] = domain.Agent{ID: "agt_new", Name: "fresh", State: domain.AgentOffline}
	r.store.agents["agt_mute"] = domain.Agent{ID: "agt_mute", Name: "mute", State: domain.AgentOffline, LastSeen: start}
	r.store.agents["agt_gone"] = domain.Agent{ID: "agt_gone", Name: "gone", State: domain.AgentRetired, LastSeen: start, Capabilities: []string{"target/file@1"}}
	place := func(name, agent, kind string) error {
		_, err := r.targets().CreateTarget(r.as(t, authz.Operator), &operatorpb.CreateTargetRequest{Name: name, Agent: agent, Kind: kind})
		return err
	}
	if err := place("t1", "fresh", "nginx"); err != nil {
		t.Error(err)
	}
	wantField(t, place("t2", "mute", "nginx"), "kind", "announces none")
	wantField(t, place("t3", "gone", "file"), "agent", "retired")
	wantList(t, "pushed", r.sessions.take(&r.sessions.pushed), []string{"agt_new"})
	// An agent that came back without a kind is not given new certificates for it.
	r.store.mu.Lock()
	a := r.store.agents[webAgent]
	a.Capabilities = []string{"target/file@1", "target/nginxplus@1"}
	r.store.agents[webAgent] = a
	r.store.mu.Unlock()
	_, err := r.certificates().CreateCertificate(r.as(t, authz.Operator), order("new"))
	wantField(t, err, "targets[0]", "cannot serve targets of kind nginx")
	if err := place("t1", "fresh", "nginx"); err == nil {
		t.Error("a name twice")
	}
	a.Capabilities = repeat(1000, func(i int) string { return fmt.Sprintf("target/k%d@1", i) })
	if s := announced(a); len(s) > 400 {
		t.Errorf("%d bytes of capabilities in a message", len(s))
	}
}

func TestRenewAnswersWithTheOpenJob(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	delete(r.store.jobs, jobID)
	ctx := r.as(t, authz.Operator)
	first, err := r.certificates().RenewCertificate(ctx, &operatorpb.RenewCertificateRequest{Id: "www"})
	if err != nil || len(first.GetJobs()) != 1 || first.GetJobs()[0].GetReason() != "requested by operator:operator" {
		t.Fatalf("%v %v", first, err)
	}
	again, err := r.certificates().RenewCertificate(ctx, &operatorpb.RenewCertificateRequest{Id: certID})
	if err != nil || !proto.Equal(first, again) {
		t.Errorf("first %v, again %v, %v", first, again, err)
	}
	wantList(t, "woken", r.sessions.take(&r.sessions.woken), []string{webAgent, webAgent})
}

func TestRevokeCertificate(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	ctx := r.as(t, authz.Operator)
	for range 2 {
		got, err := r.certificates().RevokeCertificate(ctx, &operatorpb.RevokeCertificateRequest{Id: "www"})
		if err != nil || got.GetCertificate().GetStatus() != "Revoked" || len(got.GetSerials()) != 1 {
			t.Fatalf("%v %v", got, err)
		}
	}
	wantList(t, "CRLs built, also by the second call", r.crls, []string{issuerID, issuerID})
	wantList(t, "woken by its cancelled job, once", r.sessions.take(&r.sessions.woken), []string{webAgent})
	_, err := r.certificates().RenewCertificate(ctx, &operatorpb.RenewCertificateRequest{Id: "www"})
	wantCode(t, err, codes.Aborted, "Revoked")
	_, err = r.certificates().RevokeCertificate(ctx, &operatorpb.RevokeCertificateRequest{Id: "nothing"})
	wantCode(t, err, codes.NotFound)
	if len(r.crls) != 2 {
		t.Errorf("CRLs %q", r.crls)
	}
}

// TestAnswerAfterACommit: what is committed is not answered by an error because it cannot be read back.
func TestAnswerAfterACommit(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	r.store.setBefore(func(method string) error {
		if method == "CertificateView" {
			return errPlain
		}
		return nil
	})
	got, err := r.certificates().CreateCertificate(r.as(t, authz.Operator), order("new"))
	if err != nil || got.GetCertificate().GetName() != "new" || len(got.GetJobs()) != 1 {
		t.Errorf("%v %v", got, err)
	}
	wantList(t, "woken", r.sessions.take(&r.sessions.woken), []string{webAgent})
}

func TestAgentsAPI(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	ctx := r.as(t, authz.Admin)
	got, err := r.agents().GetAgent(ctx, &operatorpb.GetAgentRequest{Id: "web1"})
	if err != nil {
		t.Fatal(err)
	}
	a := got.GetAgent()
	if a.GetCredits()["deploy"] != 2 || see(got, "agent.rejected_states") != "target/"+webTarget+" v3: outside the roots" || a.GetOs() != "linux" ||
		a.GetPlatform() != "debian" || a.GetArchitecture() != "amd64" || a.GetIpAddress() != "192.0.2.1" || a.GetHostname() != "web1.example.com" ||
		a.GetVersion() != "1.2.3" || a.GetLabels()["site"] != "a" || a.GetState() != "Online" || len(a.GetCapabilities()) != 2 || !a.GetLastSeen().AsTime().Equal(start) {
		t.Errorf("agent %v", a)
	}
	released, err := r.agents().ReleaseAgent(ctx, &operatorpb.ReleaseAgentRequest{Id: "mail1"})
	if err != nil || released.GetAgent().GetState() != "Offline" {
		t.Errorf("%v %v", released, err)
	}
	_, err = r.agents().ReleaseAgent(ctx, &operatorpb.ReleaseAgentRequest{Id: "mail1"})
	wantCode(t, err, codes.Aborted, "not quarantined")
	retired, err := r.agents().RetireAgent(ctx, &operatorpb.RetireAgentRequest{Id: "web1", Reason: "scrapped"})
	if err != nil || retired.GetAgent().GetState() != "Retired" {
		t.Errorf("%v %v", retired, err)
	}
	wantList(t, "streams ended", r.sessions.take(&r.sessions.ends), []string{webAgent + ": the agent was retired: scrapped"})
	_, err = r.agents().RetireAgent(ctx, &operatorpb.RetireAgentRequest{Id: "nobody"})
	wantCode(t, err, codes.NotFound)
	wantList(t, "streams ended", r.sessions.take(&r.sessions.ends), nil)
}

func TestJoinTokens(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	ctx := r.as(t, authz.Admin)
	seen := map[string]bool{}
	for range 3 {
		got, err := r.agents().CreateJoinToken(ctx, &operatorpb.CreateJoinTokenRequest{})
		if err != nil {
			t.Fatal(err)
		}
		tokenID, secret, fp, err := authz.ParseJoinToken(got.GetToken())
		if err != nil || tokenID != got.GetId() || fp != domain.HashHex(r.issuers.der) || seen[secret] {
			t.Fatalf("%q %q %v", tokenID, fp, err)
		}
		seen[secret] = true
		k := r.store.tokens[tokenID]
		if string(k.Hash) != string(authz.HashSecret(secret)) || k.MaxUses != 1 || !k.ExpiresAt.Equal(start.Add(time.Hour)) || k.CreatedBy != "operator:admin" {
			t.Errorf("token %+v", k)
		}
		if strings.Contains(fmt.Sprintf("%+v %s", r.store.tokens, r.log), secret) {
			t.Error("the secret is kept")
		}
	}
	r.store.mu.Lock()
	r.store.roots = nil
	r.store.mu.Unlock()
	_, err := r.agents().CreateJoinToken(ctx, &operatorpb.CreateJoinTokenRequest{})
	wantCode(t, err, codes.Unavailable, "not made yet")
}

func TestIssuersAPI(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	ctx := r.as(t, authz.Admin)
	r.store.issuers["iss_ext"] = domain.Issuer{ID: "iss_ext", Name: "elsewhere", Kind: "acme", CreatedAt: start}
	r.store.issuers["iss_odd"] = domain.Issuer{ID: "iss_odd", Name: "odd", Kind: domain.IssuerLocal, CreatedAt: start}
	r.store.cas["iss_odd"] = domain.CA{ID: "iss_odd", Chain: [][]byte{{1, 2, 3}}}
	all, err := r.issuing().ListIssuers(ctx, &operatorpb.ListIssuersRequest{})
	if err != nil || see(all, "issuers.name") != "internal|elsewhere|odd" {
		t.Fatalf("%v %v", see(all, "issuers.name"), err)
	}
	for _, i := range all.GetIssuers() {
		one, err := r.issuing().GetIssuer(ctx, &operatorpb.GetIssuerRequest{Id: i.GetName()})
		if err != nil || !proto.Equal(one.GetIssuer(), i) {
			t.Errorf("list %v, get %v, %v", i, one, err)
		}
	}
	i := all.GetIssuers()[0]
	if !strings.HasPrefix(i.GetChainPem(), "-----BEGIN CERTIFICATE-----") || i.GetPublicUrl() != "http://pki.example.com" || !i.GetNotAfter().AsTime().Equal(start.AddDate(5, 0, 0)) {
		t.Errorf("issuer %v", i)
	}
	_, err = r.issuing().CreateIssuer(ctx, &operatorpb.CreateIssuerRequest{Name: "internal", Kind: "local"})
	wantCode(t, err, codes.Aborted, "taken")
	r.issuers.err = func(LocalCA) error { return fault.InvalidField("ca_certificate_pem", "has expired") }
	_, err = r.issuing().CreateIssuer(ctx, &operatorpb.CreateIssuerRequest{Name: "x", Kind: "local", CaCertificatePem: "a", CaKeyPem: "b"})
	wantField(t, err, "ca_certificate_pem", "has expired")
	for field, want := range map[string]string{"certificates": "ca_certificate_pem", "key": "ca_key_pem", "password": "ca_key_pem", "name": "name", "root_name": "common_name", "key_algorithm": "key_algorithm"} {
		r.issuers.err = func(LocalCA) error { return fault.InvalidField(field, "is wrong") }
		_, err = r.issuing().CreateIssuer(ctx, &operatorpb.CreateIssuerRequest{Name: "x", Kind: "local"})
		wantField(t, err, want, "is wrong")
	}
	wantList(t, "CRLs built for what was not made", r.crls, nil)
	r.issuers.err = nil
	made, err := r.issuing().CreateIssuer(ctx, &operatorpb.CreateIssuerRequest{Name: "x", Kind: "local"})
	if err != nil {
		t.Fatal(err)
	}
	wantList(t, "CRLs built", r.crls, []string{made.GetIssuer().GetId()})
	profiles, err := r.issuing().ListProfiles(ctx, &operatorpb.ListProfilesRequest{})
	if p := profiles.GetProfiles(); err != nil || len(p) != 6 || p[0].GetTtl().AsDuration() != 47*24*time.Hour || p[0].GetMaxTtl().AsDuration() != 398*24*time.Hour ||
		p[0].GetEkus()[0] != "serverAuth" || p[0].GetKeyAlgorithm() != "ECDSA-P256" || len(p[0].GetAllowedKeyAlgorithms()) != len(domain.KeyAlgorithms) {
		t.Errorf("%v %v", profiles, err)
	}
}

func TestGetStatus(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	s, err := r.system().GetStatus(r.as(t, authz.Viewer), &operatorpb.GetStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	d := s.GetDuties()[0]
	if s.GetNodeId() != "node-1" || s.GetVersion() != "1.2.3" || s.GetStore() != "sqlite" || s.GetSchemaVersion() != 7 || !s.GetStartedAt().AsTime().Equal(start) ||
		s.GetCertificatesByStatus()["Active"] != 1 || s.GetAgentsByState()["Online"] != 1 || s.GetOpenJobsByState()["Pending"] != 1 || s.GetSessions() != 3 ||
		s.GetTrustDomain() != "example.com" || s.GetPlacementsLagging() != 1 || d.GetName() != "renewal" || d.GetInterval().AsDuration() != time.Minute ||
		!d.GetLastRun().AsTime().Equal(start) || d.GetLastError() != "none of it" || d.GetEpoch() != 9 {
		t.Errorf("status %v", s)
	}
}

func TestAuditEvents(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	ctx := r.as(t, authz.Admin)
	if _, err := r.jobs().CancelJob(ctx, &operatorpb.CancelJobRequest{Id: jobID}); err != nil {
		t.Fatal(err)
	}
	got, err := r.system().ListAuditEvents(ctx, &operatorpb.ListAuditEventsRequest{Resource: "job/" + jobID})
	if e := got.GetEvents(); err != nil || len(e) != 1 || e[0].GetAction() != "job.cancelled" || e[0].GetActor() != "operator:admin" || e[0].GetOutcome() != "ok" || e[0].GetRequestId() == "" || e[0].GetRemoteAddr() == "" {
		t.Errorf("%v %v", got, err)
	}
	wantList(t, "woken", r.sessions.take(&r.sessions.woken), []string{webAgent})
}

// TestLesson19SecretsStayInside: keys, tokens and CA keys are in no log line, audit row or error, whatever goes wrong.
func TestLesson19SecretsStayInside(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	const line1, line2 = "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg", "c2VjcmV0IG1hdGVyaWFsIG9mIGEgQ0E="
	keyPEM := "-----BEGIN PRIVATE KEY-----\n" + line1 + "\r\n" + line2 + "\n-----END PRIVATE KEY-----\n"
	var answers []string
	note := func(m proto.Message, err error) { answers = append(answers, fmt.Sprint(err)) }
	for _, makeErr := range []func(LocalCA) error{
		nil,
		func(c LocalCA) error { return fmt.Errorf("asn1: cannot parse %q", c.KeyPEM) },
		func(c LocalCA) error { return fmt.Errorf("parse: %w", errors.New(line2)) },
		func(c LocalCA) error {
			return fault.Wrap(fault.Invalid, errors.New(c.KeyPEM), "the key does not parse")
		},
		func(c LocalCA) error { return fault.InvalidField("ca_key_pem", "%s is no key", c.KeyPEM) },
	} {
		r.issuers.err = makeErr
		note(r.issuing().CreateIssuer(r.as(t, authz.Admin), &operatorpb.CreateIssuerRequest{Name: "sub", Kind: "local", CaCertificatePem: "x", CaKeyPem: keyPEM}))
	}
	// Refused for form, and for lack of permission.
	note(r.issuing().CreateIssuer(r.as(t, authz.Admin), &operatorpb.CreateIssuerRequest{Name: "sub", Kind: "local", CaKeyPem: keyPEM}))
	note(r.issuing().CreateIssuer(r.as(t, authz.Admin), &operatorpb.CreateIssuerRequest{Name: "sub", Kind: "local", CaCertificatePem: "x", CaKeyPem: keyPEM + strings.Repeat("x", maxDocument)}))
	note(r.issuing().CreateIssuer(r.as(t, authz.Viewer), &operatorpb.CreateIssuerRequest{Name: "sub", Kind: "local", CaCertificatePem: "x", CaKeyPem: keyPEM}))
	token, err := r.agents().CreateJoinToken(r.as(t, authz.Admin), &operatorpb.CreateJoinTokenRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_, joinSecret, _, err := authz.ParseJoinToken(token.GetToken())
	if err != nil {
		t.Fatal(err)
	}
	old := r.addKey(t, "old", authz.Admin, start, false)
	for _, key := range []string{old, old[:len(old)-1], token.GetToken()} {
		note(r.system().GetStatus(r.with(t, "Bearer "+key), &operatorpb.GetStatusRequest{}))
		note(r.system().GetStatus(r.with(t, key), &operatorpb.GetStatusRequest{}))
	}
	secrets := []string{line1, line2, joinSecret, old[len(old)-40:]}
	for role, key := range r.keys {
		note(r.jobs().GetJob(r.as(t, role), &operatorpb.GetJobRequest{Id: "nothing"}))
		secrets = append(secrets, key[len(key)-40:])
	}
	everything := r.log.String() + fmt.Sprintf("%+v", r.store.trail()) + strings.Join(answers, "\n")
	for _, s := range secrets {
		if strings.Contains(everything, s) {
			t.Errorf("%q got out", s)
		}
	}
	if len(r.log.String()) < 1000 {
		t.Error("the log is empty, so this proves nothing")
	}
}

// TestConcurrentCalls: the API holds no state of its own that calls could fight over.
func TestConcurrentCalls(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	ctx, cancel := context.WithCancel(r.as(t, authz.Admin))
	defer cancel()
	var wg sync.WaitGroup
	for i := range 4 {
		for _, m := range allMethods() {
			wg.Go(func() {
				req := proto.Clone(goodRequests[m.name])
				if n := req.ProtoReflect().Descriptor().Fields().ByName("name"); n != nil {
					setText(req.ProtoReflect(), stringFields(req.ProtoReflect().Descriptor(), nil)[0], fmt.Sprintf("n%d", i))
				}
				_, _ = m.call(ctx, t, r.conn, req)
			})
		}
	}
	wg.Wait()
	if strings.Contains(r.log.String(), `"level":"ERROR"`) {
		t.Errorf("an error of ours:\n%s", r.log)
	}
}
