package client_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"testing"
	"time"

	"github.com/certmesh/certmesh/tui/client"
)

type testCA struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

// sign makes a certificate for key, signed by by; nil: by itself.
func sign(t *testing.T, name string, key *ecdsa.PrivateKey, isCA bool, by *testCA, from time.Time, life time.Duration) *x509.Certificate {
	t.Helper()
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: from, NotAfter: from.Add(life),
		BasicConstraintsValid: true, IsCA: isCA, DNSNames: []string{"mesh.test"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if isCA {
		tmpl.KeyUsage, tmpl.DNSNames, tmpl.ExtKeyUsage = x509.KeyUsageCertSign, nil, nil
	}
	if by == nil {
		by = &testCA{key, tmpl}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by.cert, key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newTestCA(t *testing.T, name string, now time.Time) *testCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &testCA{key, sign(t, name, key, true, nil, now, 24*time.Hour)}
}

// While a server's CA is being changed, either root is a pin, and who pins the former one learns of the next; who pins
// another learns of nothing.
func TestPinWhileTheCAChanges(t *testing.T) {
	t.Parallel()
	now := time.Now()
	former, next, stranger := newTestCA(t, "former", now), newTestCA(t, "next", now), newTestCA(t, "stranger", now)
	node := newTestCA(t, "node", now).key
	leaf := sign(t, "node", node, false, next, now, time.Hour)
	cross := sign(t, "next", next.key, true, former, now, time.Hour)
	chain := []*x509.Certificate{leaf, cross, former.cert, next.cert}
	for name, root := range map[string]*x509.Certificate{"former": former.cert, "next": next.cert} {
		got, err := client.Pin("mesh.test:1", chain, client.Fingerprint(root), now)
		if err != nil || !got.Equal(root) {
			t.Errorf("%s root: %v", name, err)
		}
	}
	if _, err := client.Pin("mesh.test:1", chain, client.Fingerprint(stranger.cert), now); err == nil {
		t.Error("a root that is not there is found")
	}
	// Being in the chain is nothing: the leaf must lead to it.
	if _, err := client.Pin("mesh.test:1", append(chain[:3:3], stranger.cert, next.cert), client.Fingerprint(stranger.cert), now); err == nil {
		t.Error("a root that signed nothing is accepted")
	}
	if _, err := client.Pin("mesh.test:1", chain, client.Fingerprint(leaf), now); err == nil {
		t.Error("the leaf is taken for a CA")
	}
	if s := client.Successors(chain, former.cert, now); len(s) != 1 || !s[0].Equal(next.cert) {
		t.Errorf("the former root's successors: %d", len(s))
	}
	forged := sign(t, "next", stranger.key, true, nil, now, time.Hour)
	for name, c := range map[string]struct {
		chain []*x509.Certificate
		root  *x509.Certificate
		at    time.Time
	}{
		"of the next one":     {chain, next.cert, now},
		"of a stranger":       {chain, stranger.cert, now},
		"without a signature": {[]*x509.Certificate{leaf, former.cert, next.cert}, former.cert, now},
		"with another key":    {[]*x509.Certificate{leaf, cross, former.cert, forged}, former.cert, now},
		"out of date":         {chain, former.cert, now.Add(2 * time.Hour)},
	} {
		if s := client.Successors(c.chain, c.root, c.at); len(s) != 0 {
			t.Errorf("successors %s: %d", name, len(s))
		}
	}
}
