package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/agent/internal/durable"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	domain = "mesh.test"
	agentA = "agt_0000000000000000000000000000000a"
	agentB = "agt_0000000000000000000000000000000b"
	week   = 7 * 24 * time.Hour
)

type mesh struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func newMesh(now time.Time) *mesh {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: now.AddDate(-1, 0, 0), NotAfter: now.AddDate(10, 0, 0)}
	return &mesh{key, must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key))))}
}

func (m *mesh) issue(pub crypto.PublicKey, from time.Time, life time.Duration, uris ...string) []byte {
	tmpl := &x509.Certificate{SerialNumber: must(rand.Int(rand.Reader, big.NewInt(1<<60))), NotBefore: from, NotAfter: from.Add(life),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	for _, u := range uris {
		tmpl.URIs = append(tmpl.URIs, must(url.Parse(u)))
	}
	return must(x509.CreateCertificate(rand.Reader, tmpl, m.cert, pub, m.key))
}

func (m *mesh) token() Token {
	h := sha256.Sum256(m.cert.Raw)
	return must(ParseToken("cmjt1.tok." + base64.RawURLEncoding.EncodeToString(bytes.Repeat([]byte{1}, 32)) + "." + hex.EncodeToString(h[:])))
}

// server is a certificate that a server shows.
func (m *mesh) server(now time.Time, uris ...string) tls.Certificate {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	return tls.Certificate{Certificate: [][]byte{m.issue(key.Public(), now.Add(-time.Hour), week, uris...), m.cert.Raw}, PrivateKey: key}
}

// shake makes a handshake in memory and returns the client's verdict.
func shake(client *tls.Config, server tls.Certificate) (*tls.Conn, error) {
	a, b := net.Pipe()
	s := tls.Server(b, &tls.Config{Certificates: []tls.Certificate{server}, ClientAuth: tls.RequestClientCert, SessionTicketsDisabled: true})
	go func() {
		_ = s.Handshake() // the client's side is judged
	}()
	c := tls.Client(a, client)
	err := c.Handshake()
	_, _ = a.Close(), b.Close()
	return c, err
}

type host struct {
	t     *testing.T
	m     *mesh
	files *durable.Memory
	now   time.Time
	ids   *Manager
}

func newHost(t *testing.T) *host {
	h := &host{t: t, files: durable.NewMemory(), now: time.Now()}
	h.m = newMesh(h.now)
	h.open()
	return h
}

func (h *host) open() {
	h.t.Helper()
	var err error
	if h.ids, err = Open(h.files, func() time.Time { return h.now }, slog.New(slog.DiscardHandler)); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) csr() crypto.PublicKey {
	h.t.Helper()
	return must(x509.ParseCertificateRequest(must(h.ids.NextCSR()))).PublicKey
}

func (h *host) bundle(version int64, roots ...*mesh) *agentpb.TrustBundle {
	b := &agentpb.TrustBundle{Version: version}
	for _, r := range roots {
		b.Roots = append(b.Roots, r.cert.Raw)
	}
	return b
}

func (h *host) chain(id string, life time.Duration) [][]byte {
	return [][]byte{h.m.issue(h.csr(), h.now.Add(-time.Minute), life, "spiffe://"+domain+"/agent/"+id)}
}

func (h *host) enrol() {
	h.t.Helper()
	cfg, pin := h.ids.Pinned(h.m.token())
	if _, err := shake(cfg, h.m.server(h.now, "spiffe://"+domain+"/node/n1")); err != nil {
		h.t.Fatal(err)
	}
	if err := h.ids.Enrolled(&agentpb.EnrollResponse{AgentId: agentA, Chain: h.chain(agentA, week), TrustDomain: domain, TrustBundle: h.bundle(1, h.m)}, pin); err != nil {
		h.t.Fatal(err)
	}
}

func TestToken(t *testing.T) {
	t.Parallel()
	good := newMesh(time.Now()).token().Raw()
	parts := strings.Split(good, ".")
	if tok, err := ParseToken("  " + good + "\n"); err != nil || tok.ID != "tok" || fmt.Sprintf("%v %s", tok, tok) != "join token tok join token tok" {
		t.Errorf("%v, %v", tok, err)
	}
	for _, bad := range []string{"", "x", good + ".x", "cmjt2" + good[5:], strings.Replace(good, "tok", "t k", 1), strings.Replace(good, "tok", strings.Repeat("t", 65), 1),
		parts[0] + "." + parts[1] + ".!!." + parts[3], parts[0] + "." + parts[1] + ".AAAA." + parts[3], good[:len(good)-1], good + "0", good[:len(good)-1] + "g"} {
		_, err := ParseToken(bad)
		if !fault.Is(err, fault.Invalid) {
			t.Errorf("%q: %v", bad, err)
		} else if strings.Contains(err.Error(), parts[2]) {
			t.Error("the error repeats the secret")
		}
	}
}

// TestServersThatAreNot: who is refused, while enrolling and afterwards.
func TestServersThatAreNot(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.enrol()
	other := newMesh(h.now)
	node := "spiffe://" + domain + "/node/n1"
	self := tls.Certificate{Certificate: other.server(h.now, node).Certificate}
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	// A stranger that appends the mesh root, which is public, to a leaf of its own.
	self.Certificate = [][]byte{other.issue(key.Public(), h.now.Add(-time.Hour), week, node), h.m.cert.Raw}
	self.PrivateKey = key
	for name, c := range map[string]struct {
		cert             tls.Certificate
		pinned, enrolled bool
	}{
		"a node":                 {h.m.server(h.now, node), true, true},
		"another CA":             {other.server(h.now, node), false, false},
		"foreign leaf, our root": {self, false, false},
		"an agent":               {h.m.server(h.now, "spiffe://"+domain+"/agent/"+agentB), false, false},
		"another trust domain":   {h.m.server(h.now, "spiffe://other.test/node/n1"), true, false},
		"no name":                {h.m.server(h.now), false, false},
		"two names":              {h.m.server(h.now, node, "spiffe://"+domain+"/node/n2"), false, false},
		"expired":                {h.m.server(h.now.Add(-2*week), node), false, false},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, pin := h.ids.Pinned(h.m.token())
			if _, err := shake(cfg, c.cert); (err == nil) != c.pinned || (pin.Err() == nil) != c.pinned {
				t.Errorf("pinned: %v", err)
			}
			cfg, _ = h.ids.Mutual()
			if _, err := shake(cfg, c.cert); (err == nil) != c.enrolled {
				t.Errorf("mutual: %v", err)
			}
			if _, err := shake(h.ids.Anonymous(), c.cert); (err == nil) != c.enrolled {
				t.Errorf("anonymous: %v", err)
			}
		})
	}
}

// TestRenewal: two phases, and the former identity until the new one has worked, over restarts.
func TestRenewal(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.enrol()
	first := h.ids.Current()
	pub := h.csr()
	h.open()
	if !pub.(*ecdsa.PublicKey).Equal(h.csr()) {
		t.Fatal("asked again after a restart, it asks with another key")
	}
	if err := h.ids.Issued(h.chain(agentA, week)); err != nil {
		t.Fatal(err)
	}
	if err := h.ids.Issued(nil); !fault.Is(err, fault.Conflict) {
		t.Errorf("an identity that was not asked for: %v", err)
	}
	second := h.ids.Current()
	h.open()
	if h.ids.Current().Serial != second.Serial {
		t.Fatal("the new identity is not on disk")
	}
	if h.ids.Refused(second) {
		t.Error("a former life's identity was judged")
	}
	if !h.ids.Refused(h.ids.Current()) || h.ids.Current().Serial != first.Serial {
		t.Fatal("the former identity is not put back")
	}
	h.open()
	if h.ids.Current().Serial != first.Serial || h.ids.Refused(h.ids.Current()) {
		t.Error("after the fallback there is another one")
	}
	if err := h.ids.Issued(h.chain(agentA, week)); err != nil {
		t.Fatal(err)
	}
	h.ids.Worked(h.ids.Current())
	if h.ids.Refused(h.ids.Current()) {
		t.Error("an identity that has worked falls back")
	}
	// A former identity that has expired is no help.
	if err := h.ids.Issued(h.chain(agentA, 2*week)); err != nil {
		t.Fatal(err)
	}
	h.now = h.now.Add(week + time.Hour)
	if h.ids.Refused(h.ids.Current()) {
		t.Error("an expired identity was put back")
	}
}

// TestForeignIdentity: nothing is written for an identity that is not this agent's.
func TestForeignIdentity(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.enrol()
	was := h.ids.Current().Serial
	pub, now := h.csr(), h.now
	id := "spiffe://" + domain + "/agent/" + agentA
	other := newMesh(now)
	stranger := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	for name, chain := range map[string][][]byte{
		"none": nil, "garbage": {[]byte("x")},
		"another agent":  {h.m.issue(pub, now, week, "spiffe://"+domain+"/agent/"+agentB)},
		"a node":         {h.m.issue(pub, now, week, "spiffe://"+domain+"/node/n1")},
		"another domain": {h.m.issue(pub, now, week, "spiffe://other.test/agent/"+agentA)},
		"another key":    {h.m.issue(stranger.Public(), now, week, id)},
		"another CA":     {other.issue(pub, now, week, id)},
		"expired":        {h.m.issue(pub, now.Add(-2*week), week, id)},
		"not yet":        {h.m.issue(pub, now.Add(time.Hour), week, id)},
	} {
		if err := h.ids.Issued(chain); !fault.Is(err, fault.Rejected) {
			t.Errorf("%s: %v", name, err)
		}
		// A bundle that would lock out the server it comes from vouches for nothing.
		if _, err := shake(h.ids.Anonymous(), h.m.server(now, "spiffe://"+domain+"/node/n1")); err != nil {
			t.Fatal(err)
		}
		if err := h.ids.Reidentified(&agentpb.ReidentifyResponse{Chain: chain, TrustBundle: h.bundle(9, other)}); !fault.Is(err, fault.Conflict) {
			t.Errorf("%s, reidentified with another's bundle: %v", name, err)
		}
		if err := h.ids.Reidentified(&agentpb.ReidentifyResponse{Chain: chain}); !fault.Is(err, fault.Rejected) {
			t.Errorf("%s, reidentified: %v", name, err)
		}
		h.open()
		if h.ids.Current().Serial != was {
			t.Fatalf("%s: it is on disk", name)
		}
	}
}

// TestReidentifyBundle: a roll-over that happened while the host was off arrives with the renewed identity, over a
// connection that the old bundle verified.
func TestReidentifyBundle(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.enrol()
	if _, err := shake(h.ids.Anonymous(), h.m.server(h.now, "spiffe://"+domain+"/node/n1")); err != nil {
		t.Fatal(err)
	}
	next := newMesh(h.now)
	if err := h.ids.Reidentified(&agentpb.ReidentifyResponse{Chain: h.chain(agentA, week), TrustBundle: h.bundle(2, h.m, next)}); err != nil {
		t.Fatal(err)
	}
	h.open()
	if h.ids.Bundle() != 2 {
		t.Errorf("bundle %d", h.ids.Bundle())
	}
	cfg, _ := h.ids.Mutual()
	if _, err := shake(cfg, next.server(h.now, "spiffe://"+domain+"/node/n1")); err != nil {
		t.Error(err)
	}
}

func TestStanding(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	if h.ids.Current().StandingAt(h.now) != Missing {
		t.Error("an identity out of nothing")
	}
	h.enrol()
	i := h.ids.Current()
	for at, want := range map[time.Time]Standing{i.NotAfter.Add(-1): Good, i.NotAfter: Lapsed, i.NotAfter.Add(Grace - 1): Lapsed, i.NotAfter.Add(Grace): Lost} {
		if got := i.StandingAt(at); got != want {
			t.Errorf("at %v: %v, want %v", at, got, want)
		}
	}
	life := i.NotAfter.Sub(i.NotBefore)
	if d := i.RenewAt().Sub(i.NotBefore); d < life/2 || d > life/2+life/20 {
		t.Errorf("renewed after %s of %s", d, life)
	}
}

// TestProof is bound to its connection and its CSR.
func TestProof(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.enrol()
	srv := h.m.server(h.now, "spiffe://"+domain+"/node/n1")
	a, err := shake(h.ids.Anonymous(), srv)
	if err != nil {
		t.Fatal(err)
	}
	b, err := shake(h.ids.Anonymous(), srv)
	if err != nil {
		t.Fatal(err)
	}
	proof := must(h.ids.Current().Prove(a.ConnectionState(), []byte("csr")))
	pub := must(x509.ParseCertificate(h.ids.Current().Certificate())).PublicKey.(*ecdsa.PublicKey)
	check := func(c *tls.Conn, csr string) bool {
		cs := c.ConnectionState()
		d := sha256.Sum256(ProofMessage(must(cs.ExportKeyingMaterial("EXPORTER-certmesh-reidentify", nil, 32)), []byte(csr)))
		return ecdsa.VerifyASN1(pub, d[:], proof)
	}
	if !check(a, "csr") || check(b, "csr") || check(a, "other") {
		t.Error("the proof proves too little or too much")
	}
	if _, err := h.ids.Current().Prove(tls.ConnectionState{}, nil); err == nil {
		t.Error("a proof without a connection")
	}
}

// TestDamagedFiles are errors that name the file; none is guessed around, and a former identity is no reason to fail.
func TestDamagedFiles(t *testing.T) {
	t.Parallel()
	for _, name := range []string{fileCurrent, fileBundle, fileNext} {
		h := newHost(t)
		h.enrol()
		if err := h.files.Write(name, []byte("damaged")); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(h.files, time.Now, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	h := newHost(t)
	h.enrol()
	if err := h.files.Write(fileOld, []byte("damaged")); err != nil {
		t.Fatal(err)
	}
	h.open()
}
