package session

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

func (p *plane) enroll(r *agentpb.EnrollRequest) (*agentpb.EnrollResponse, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return agentpb.NewAgentServiceClient(p.dial()).Enroll(ctx, r)
}

// TestEnroll: a token and a key become an agent that can connect; the same again gets the same agent and identity.
func TestEnroll(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	_, token := p.token(1, time.Now().Add(time.Hour))
	key := newKey(t)
	r := &agentpb.EnrollRequest{Token: token, Csr: newCSR(t, key), Facts: &agentpb.Facts{Hostname: "web1.example.com\x07"}}
	first, err := p.enroll(r)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(first.GetAgentId(), "agt_") || first.GetTrustDomain() != testDomain || first.GetTrustBundle().GetVersion() != 1 ||
		len(first.GetTrustBundle().GetRoots()) != 1 || len(first.GetChain()) != 1 {
		t.Fatalf("response %v", first)
	}
	if a := p.store.agent(first.GetAgentId()); a.Name != "web1.example.com" {
		t.Errorf("the agent is called %q", a.Name)
	}
	leaf, err := x509.ParseCertificate(first.GetChain()[0])
	if err != nil {
		t.Fatal(err)
	}
	if td, kind, name, err := ca.ParseSPIFFE(leaf); err != nil || td != testDomain || kind != ca.KindAgent || name != first.GetAgentId() {
		t.Errorf("the identity is %s %s %s, %v", td, kind, name, err)
	}
	// Asked again with another signature of the same key: the answer was lost.
	r.Csr = newCSR(t, key)
	again, err := p.enroll(r)
	if err != nil || again.GetAgentId() != first.GetAgentId() || string(again.GetChain()[0]) != string(first.GetChain()[0]) {
		t.Fatalf("again: %v, %v", again.GetAgentId(), err)
	}
	k := p.open(p.dial(tls.Certificate{Certificate: first.GetChain(), PrivateKey: key}))
	k.send(hello())
	k.welcome()
	// A revoked identity is not handed out again.
	p.store.mu.Lock()
	serial := ca.SerialText(leaf.SerialNumber)
	i := p.store.identities[serial]
	i.RevokedAt = time.Now()
	p.store.identities[serial] = i
	p.store.mu.Unlock()
	if third, err := p.enroll(r); err != nil || string(third.GetChain()[0]) == string(first.GetChain()[0]) {
		t.Fatalf("after a revocation: %v", err)
	}
	// Another key needs another use.
	r.Csr = newCSR(t, newKey(t))
	_, err = p.enroll(r)
	wantCode(t, err, codes.Unauthenticated)
}

// TestEnrollHostile: every refusal is precise, in the trail without the secret, and changes nothing.
func TestEnrollHostile(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	valid := time.Now().Add(time.Hour)
	_, good := p.token(1, valid)
	_, used := p.token(0, valid)
	_, expired := p.token(1, time.Now().Add(-time.Minute))
	root := sha256.Sum256(p.mesh.Root().Raw)
	unknown := authz.JoinTokenString("jt_unknown", authz.NewSecret(), fmt.Sprintf("%x", root))
	key := newKey(t)
	csr := newCSR(t, key)
	forged := append([]byte(nil), csr...)
	forged[len(forged)-1] ^= 1
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(good, ".")
	parts[2] = authz.NewSecret()
	for name, c := range map[string]struct {
		token string
		csr   []byte
		code  codes.Code
		part  string
	}{
		"no token":        {"", csr, codes.Unauthenticated, "malformed"},
		"malformed token": {"cmjt1.x.y", csr, codes.Unauthenticated, "malformed"},
		"wrong secret":    {strings.Join(parts, "."), csr, codes.Unauthenticated, "not known"},
		"unknown token":   {unknown, csr, codes.Unauthenticated, "not known"},
		"used token":      {used, csr, codes.Unauthenticated, "used up"},
		"expired token":   {expired, csr, codes.Unauthenticated, "expired"},
		"no CSR":          {good, nil, codes.InvalidArgument, "csr"},
		"garbage CSR":     {good, []byte("0123456789"), codes.InvalidArgument, "PKCS#10"},
		"PEM CSR":         {good, []byte("-----BEGIN CERTIFICATE REQUEST-----"), codes.InvalidArgument, "DER"},
		"forged CSR":      {good, forged, codes.InvalidArgument, "signature"},
		"weak key":        {good, newCSR(t, weak), codes.FailedPrecondition, ""},
		"wrong curve":     {good, newCSR(t, p384), codes.FailedPrecondition, "ECDSA-P256"},
	} {
		// Each from a control plane's point of view a peer that has not failed before.
		p.srv.guard.mu.Lock()
		clear(p.srv.guard.peers)
		p.srv.guard.mu.Unlock()
		before := len(p.store.audited("agent.enroll_refused"))
		_, err := p.enroll(&agentpb.EnrollRequest{Token: c.token, Csr: c.csr, Name: "x"})
		st := status.Convert(err)
		if st.Code() != c.code || !strings.Contains(st.Message(), c.part) {
			t.Errorf("%s: %v", name, err)
		}
		if len(st.Details()) == 0 {
			t.Errorf("%s: no details", name)
		} else if _, ok := st.Details()[0].(*errdetails.ErrorInfo); !ok {
			t.Errorf("%s: details %v", name, st.Details())
		}
		trail := p.store.audited("agent.enroll_refused")
		if len(trail) != before+1 {
			t.Errorf("%s: %d rows in the trail", name, len(trail)-before)
			continue
		}
		text := fmt.Sprint(trail[len(trail)-1], st.Message())
		for secret := range strings.SplitSeq(c.token, ".") {
			if len(secret) == 43 && strings.Contains(text, secret) {
				t.Errorf("%s: the secret is in %s", name, text)
			}
		}
	}
	if n := len(p.store.agents); n != 0 {
		t.Errorf("%d agents were made", n)
	}
	if _, err := p.enroll(&agentpb.EnrollRequest{Token: good, Csr: csr, Name: "x"}); err != nil {
		t.Errorf("the good token was lost: %v", err)
	}
	_, err = p.enroll(&agentpb.EnrollRequest{Token: good, Csr: make([]byte, 80<<10)})
	wantCode(t, err, codes.ResourceExhausted)
}

// TestGuessingIsSlowedDown: a peer that fails again and again is asked to wait, before its token is looked at.
func TestGuessingIsSlowedDown(t *testing.T) {
	t.Parallel()
	clk := clockwork.NewFakeClockAt(time.Now())
	p := newPlane(t, func(c *Config) { c.Clock = clk })
	_, good := p.token(1, time.Now().Add(24*time.Hour))
	r := &agentpb.EnrollRequest{Token: "cmjt1.x.y.z", Csr: newCSR(t, newKey(t))}
	for range failBurst {
		_, err := p.enroll(r)
		wantCode(t, err, codes.Unauthenticated)
	}
	r.Token = good
	_, err := p.enroll(r)
	wantCode(t, err, codes.ResourceExhausted)
	if n := p.store.count("Enroll"); n != 0 {
		t.Errorf("the store was asked %d times", n)
	}
	clk.Advance(failEvery + time.Second)
	if _, err := p.enroll(r); err != nil {
		t.Fatalf("after a pause: %v", err)
	}
}

// TestIdentityOverTheStream: renewed for any key, bounded in rate, refused for a wrong key, usable at once.
func TestIdentityOverTheStream(t *testing.T) {
	t.Parallel()
	clk := clockwork.NewFakeClockAt(time.Now())
	p := newPlane(t, func(c *Config) { c.Clock = clk })
	h := p.host("web1")
	k := h.online()
	ask := func(csr []byte) *agentpb.IdentityIssued {
		t.Helper()
		k.send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_IdentityCsr{IdentityCsr: &agentpb.IdentityCsr{Csr: csr}}})
		return until(k, func(m *agentpb.ConnectResponse) (*agentpb.IdentityIssued, bool) {
			return m.GetIdentityIssued(), m.GetIdentityIssued() != nil
		})
	}
	key := newKey(t)
	m := ask(newCSR(t, key))
	if m.GetFailure() != nil || len(m.GetChain()) != 1 {
		t.Fatalf("issued %v", m)
	}
	if f := ask(newCSR(t, key)).GetFailure(); f.GetClass() != "rate_limited" {
		t.Fatalf("a second one at once: %v", f)
	}
	clk.Advance(time.Minute)
	if again := ask(newCSR(t, key)); string(again.GetChain()[0]) != string(m.GetChain()[0]) {
		t.Error("the same key got another identity")
	}
	clk.Advance(time.Minute)
	if f := ask([]byte("garbage")).GetFailure(); f.GetClass() != "invalid" {
		t.Errorf("garbage: %v", f)
	}
	fresh := p.open(p.dial(tls.Certificate{Certificate: m.GetChain(), PrivateKey: key}))
	fresh.send(hello())
	fresh.welcome()
}

// reidentify makes the call with a proof made by change; the default is a good one.
func (p *plane) reidentify(t *testing.T, cert tls.Certificate, csr []byte, change func(r *agentpb.ReidentifyRequest, exported []byte)) (*agentpb.ReidentifyResponse, error) {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(p.mesh.Root())
	creds := &watched{TransportCredentials: credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool, ServerName: "localhost"})}
	conn := p.dialTLS(creds)
	conn.Connect()
	eventually(t, "connected", func() bool { creds.mu.Lock(); defer creds.mu.Unlock(); return creds.state.HandshakeComplete })
	creds.mu.Lock()
	exported, err := creds.state.ExportKeyingMaterial(exporterLabel, nil, exporterLength)
	creds.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	r := &agentpb.ReidentifyRequest{Certificate: cert.Certificate[0], Csr: csr}
	r.ProofOfPossession = proofFor(t, cert.PrivateKey.(*ecdsa.PrivateKey), exported, csr)
	if change != nil {
		change(r, exported)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return agentpb.NewAgentServiceClient(conn).Reidentify(ctx, r)
}

func proofFor(t *testing.T, key *ecdsa.PrivateKey, exported, csr []byte) []byte {
	t.Helper()
	sum := sha256.Sum256(csr)
	digest := sha256.Sum256(append(append([]byte("certmesh reidentify v1\x00"), exported...), sum[:]...))
	proof, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return proof
}

// watched remembers the TLS state of its connection.
type watched struct {
	credentials.TransportCredentials
	mu    sync.Mutex
	state tls.ConnectionState
}

func (w *watched) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, info, err := w.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if ti, ok := info.(credentials.TLSInfo); ok && err == nil {
		w.mu.Lock()
		w.state = ti.State
		w.mu.Unlock()
	}
	return c, info, err
}

func (w *watched) Clone() credentials.TransportCredentials { return w }

// TestReidentify: an expired identity is renewed with proof; every weaker claim is refused and in the trail.
func TestReidentify(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	now := time.Now()
	add := func(mesh *ca.Authority, name string, at time.Time, ttl time.Duration) (tls.Certificate, string) {
		key := newKey(t)
		cert, i := sign(t, mesh, ca.KindAgent, "agt_"+name, key, at, ttl)
		p.store.mu.Lock()
		defer p.store.mu.Unlock()
		if _, ok := p.store.agents["agt_"+name]; !ok {
			p.store.agents["agt_"+name] = domain.Agent{ID: "agt_" + name, Name: name}
		}
		p.store.identities[i.Serial] = i
		return cert, i.Serial
	}
	// The mesh CA must be older than the identities that have expired.
	old := newMesh(t, now.Add(-90*24*time.Hour))
	p.mesh2(t, old)
	expired, _ := add(old, "expired", now.Add(-48*time.Hour), 24*time.Hour)
	tooOld, _ := add(old, "old", now.Add(-40*24*time.Hour), 24*time.Hour)
	revoked, serial := add(old, "revoked", now.Add(-48*time.Hour), 24*time.Hour)
	retired, _ := add(old, "retired", now.Add(-48*time.Hour), 24*time.Hour)
	p.store.mu.Lock()
	i := p.store.identities[serial]
	i.RevokedAt = now
	p.store.identities[serial] = i
	p.store.mu.Unlock()
	p.store.setAgent("agt_retired", func(a *domain.Agent) { a.State = domain.AgentRetired })
	stranger, _ := sign(t, newMesh(t, now.Add(-90*24*time.Hour)), ca.KindAgent, "agt_expired", newKey(t), now.Add(-48*time.Hour), 24*time.Hour)
	unrecorded, _ := sign(t, old, ca.KindAgent, "agt_expired", newKey(t), now.Add(-48*time.Hour), 24*time.Hour)
	node, _ := sign(t, old, ca.KindNode, "node-9", newKey(t), now.Add(-48*time.Hour), 24*time.Hour)

	key := newKey(t)
	csr := newCSR(t, key)
	for name, c := range map[string]struct {
		cert   tls.Certificate
		change func(r *agentpb.ReidentifyRequest, exported []byte)
		code   codes.Code
	}{
		"too old":      {tooOld, nil, codes.Unauthenticated},
		"revoked":      {revoked, nil, codes.Unauthenticated},
		"retired":      {retired, nil, codes.PermissionDenied},
		"another CA":   {stranger, nil, codes.Unauthenticated},
		"not recorded": {unrecorded, nil, codes.Unauthenticated},
		"a node":       {node, nil, codes.Unauthenticated},
		"no proof":     {expired, func(r *agentpb.ReidentifyRequest, _ []byte) { r.ProofOfPossession = nil }, codes.Unauthenticated},
		"another key's proof": {expired, func(r *agentpb.ReidentifyRequest, x []byte) {
			r.ProofOfPossession = proofFor(t, key, x, csr)
		}, codes.Unauthenticated},
		"another connection's proof": {expired, func(r *agentpb.ReidentifyRequest, x []byte) {
			r.ProofOfPossession = proofFor(t, expired.PrivateKey.(*ecdsa.PrivateKey), make([]byte, len(x)), csr)
		}, codes.Unauthenticated},
		"another request's proof": {expired, func(r *agentpb.ReidentifyRequest, _ []byte) { r.Csr = newCSR(t, newKey(t)) }, codes.Unauthenticated},
		"garbage":                 {expired, func(r *agentpb.ReidentifyRequest, _ []byte) { r.Certificate = []byte("x") }, codes.InvalidArgument},
	} {
		p.srv.guard.mu.Lock()
		clear(p.srv.guard.peers)
		p.srv.guard.mu.Unlock()
		before := len(p.store.audited("agent.reidentify_refused"))
		_, err := p.reidentify(t, c.cert, csr, c.change)
		if status.Code(err) != c.code {
			t.Errorf("%s: %v", name, err)
		}
		if n := len(p.store.audited("agent.reidentify_refused")); n != before+1 {
			t.Errorf("%s: %d rows in the trail", name, n-before)
		}
	}
	r, err := p.reidentify(t, expired, csr, nil)
	if err != nil {
		t.Fatal(err)
	}
	if e := p.store.audited("agent.reidentified"); len(e) != 1 || e[0].Actor != "agent:agt_expired" {
		t.Errorf("trail %+v", e)
	}
	leaf, err := x509.ParseCertificate(r.GetChain()[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, _, name, err := ca.ParseSPIFFE(leaf); err != nil || name != "agt_expired" || !leaf.NotAfter.After(now) {
		t.Errorf("the identity is %s until %s, %v", name, leaf.NotAfter, err)
	}
	if !leaf.PublicKey.(*ecdsa.PublicKey).Equal(key.Public()) {
		t.Error("the identity is for another key")
	}
}

// mesh2 lets the plane trust and sign with another mesh CA; its listener keeps its certificate.
func (p *plane) mesh2(t *testing.T, mesh *ca.Authority) {
	t.Helper()
	p.store.mu.Lock()
	defer p.store.mu.Unlock()
	p.store.roots = append(p.store.roots, mesh.Root().Raw)
	p.srv.cfg.Mesh = func() *ca.Authority { return mesh }
}
