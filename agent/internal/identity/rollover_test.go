package identity

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"testing"
	"time"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// vouch is what former signs for next: its key, below former.
func vouch(now time.Time, former, next *mesh) []byte {
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: next.cert.Subject.CommonName}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: now.AddDate(-1, 0, 0), NotAfter: now.AddDate(9, 0, 0), SubjectKeyId: next.cert.SubjectKeyId}
	return must(x509.CreateCertificate(rand.Reader, tmpl, former.cert, next.key.Public(), former.key))
}

// changedOver is what a node shows between the activation of next and the end of the rollover.
func changedOver(now time.Time, former, next *mesh) tls.Certificate {
	c := next.server(now, "spiffe://"+domain+"/node/n1")
	c.Certificate = [][]byte{c.Certificate[0], vouch(now, former, next), former.cert.Raw, next.cert.Raw}
	return c
}

// An agent that was off from before the start of a rollover comes back while it is not finished, with its identity good or
// lapsed, and one that was off until after its end does not.
func TestComingBackDuringARollover(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.enrol()
	next := newMesh(h.now)
	next.cert = must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, named("next", next), named("next", next), next.key.Public(), next.key))))
	cfg, _ := h.ids.Mutual()
	if _, err := shake(cfg, changedOver(h.now, h.m, next)); err != nil {
		t.Fatalf("a node that was changed over is not accepted: %v", err)
	}
	finished := next.server(h.now, "spiffe://"+domain+"/node/n1")
	if _, err := shake(cfg, finished); err == nil {
		t.Error("a node of a root it never heard of is accepted")
	}
	if _, err := shake(h.ids.Anonymous(), changedOver(h.now, h.m, next)); err != nil {
		t.Fatalf("to be reidentified: %v", err)
	}
	former := h.m
	h.m = next
	chain := append(h.chain(agentA, week), vouch(h.now, former, next))
	if err := h.ids.Reidentified(&agentpb.ReidentifyResponse{Chain: chain, TrustBundle: h.bundle(3, next, former)}); err != nil {
		t.Fatalf("the answer: %v", err)
	}
	if h.ids.Bundle() != 3 {
		t.Errorf("bundle %d", h.ids.Bundle())
	}
	cfg, _ = h.ids.Mutual()
	if _, err := shake(cfg, finished); err != nil {
		t.Errorf("at the end of the rollover: %v", err)
	}
	if err := h.ids.ApplyBundle(h.bundle(4, next)); err != nil {
		t.Errorf("the last bundle: %v", err)
	}
	if _, err := shake(cfg, former.server(h.now, "spiffe://"+domain+"/node/n1")); err == nil {
		t.Error("a node of the dropped root is accepted")
	}
}

func named(name string, m *mesh) *x509.Certificate {
	c := *m.cert
	c.Subject, c.RawSubject, c.PublicKey, c.SignatureAlgorithm = pkix.Name{CommonName: name}, nil, nil, 0
	return &c
}

// A token that names the former root is good until the rollover is finished, one that names the next root from the
// activation on.
func TestTokensDuringARollover(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	next := newMesh(h.now)
	next.cert = must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, named("next", next), named("next", next), next.key.Public(), next.key))))
	both, last := changedOver(h.now, h.m, next), next.server(h.now, "spiffe://"+domain+"/node/n1")
	for name, c := range map[string]struct {
		token Token
		node  tls.Certificate
		good  bool
	}{
		"former, under way": {h.m.token(), both, true}, "next, under way": {next.token(), both, true},
		"former, finished": {h.m.token(), last, false}, "next, finished": {next.token(), last, true},
	} {
		cfg, pin := h.ids.Pinned(c.token)
		_, err := shake(cfg, c.node)
		if (err == nil) != c.good {
			t.Errorf("%s: %v", name, err)
		}
		if !c.good && !fault.Is(pin.Err(), fault.Rejected) {
			t.Errorf("%s: %v", name, pin.Err())
		}
	}
}

// The identity is renewed soon after the control plane's CA was changed, and not because a root was only added.
func TestRenewalWhenTheCAChanges(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.enrol()
	next := newMesh(h.now)
	id := h.ids.Current()
	usual := id.RenewAt()
	apply := func(b *agentpb.TrustBundle) time.Time {
		t.Helper()
		if err := h.ids.ApplyBundle(b); err != nil {
			t.Fatal(err)
		}
		return h.ids.RenewAt(id)
	}
	if at := apply(h.bundle(2, h.m, next)); !at.Equal(usual) {
		t.Errorf("a root was added: renewal at %s, want %s", at, usual)
	}
	h.now = h.now.Add(time.Hour)
	at := apply(h.bundle(3, next, h.m))
	if at.Before(h.now) || at.After(h.now.Add(changeSpread)) {
		t.Errorf("another CA signs: renewal at %s, now is %s", at, h.now)
	}
	if again := h.ids.RenewAt(id); !again.Equal(at) {
		t.Errorf("asked again: %s, then %s", at, again)
	}
	// After a restart it is as soon again, and an identity of the CA that signs has its usual time.
	h.now = h.now.Add(time.Hour)
	h.open()
	if at := h.ids.RenewAt(h.ids.Current()); at.Before(h.now) || at.After(h.now.Add(changeSpread)) {
		t.Errorf("after a restart: renewal at %s, now is %s", at, h.now)
	}
	h.m = next
	if err := h.ids.Issued(h.chain(agentA, week)); err != nil {
		t.Fatal(err)
	}
	if id := h.ids.Current(); !h.ids.RenewAt(id).Equal(id.RenewAt()) {
		t.Error("an identity of the CA that signs is renewed early")
	}
	// A life that is shorter than the spread.
	h.now = h.now.Add(time.Minute)
	if err := h.ids.Issued(h.chain(agentA, 10*time.Minute)); err != nil {
		t.Fatal(err)
	}
	third := newMesh(h.now)
	id = h.ids.Current()
	if at := apply(h.bundle(4, third, next)); at.After(h.now.Add(time.Minute)) {
		t.Errorf("renewal of a short life at %s, now is %s", at, h.now)
	}
}
