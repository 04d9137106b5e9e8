// Package clustertest has stand-ins for tests of the cluster: identities, and a network that can be cut.
package clustertest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"testing"
	"time"
)

// Authority signs identities as a mesh CA does.
type Authority struct {
	TrustDomain string
	key         *ecdsa.PrivateKey
	root        *x509.Certificate
}

// NewAuthority makes an Authority with a root of its own.
func NewAuthority(t testing.TB, trustDomain string) *Authority {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test mesh"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign} //nolint:forbidigo // real TLS judges by the real time
	return &Authority{TrustDomain: trustDomain, key: key, root: sign(t, template, template, key, key)}
}

// Roots are what nodes trust.
func (a *Authority) Roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.root)
	return pool
}

// Identity is that of kind ("node" or "agent") and id, valid for ttl from now; a negative one has expired.
func (a *Authority) Identity(t testing.TB, kind, id string, ttl time.Duration) *tls.Certificate {
	t.Helper()
	key := newKey(t)
	now := time.Now() //nolint:forbidigo // real TLS judges by the real time
	template := &x509.Certificate{SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: id},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(ttl), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: a.TrustDomain, Path: "/" + kind + "/" + id}}}
	leaf := sign(t, template, a.root, key, a.key)
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
}

// Node is the identity of a node, for an hour.
func (a *Authority) Node(t testing.TB, id string) *tls.Certificate {
	t.Helper()
	return a.Identity(t, "node", id, time.Hour)
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sign(t testing.TB, template, parent *x509.Certificate, key, with *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), with)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
