package targettest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"testing"
	"time"

	"github.com/certmesh/certmesh/connectors/target"
)

// CA signs test certificates through one intermediate.
type CA struct {
	inter *x509.Certificate
	key   *ecdsa.PrivateKey
	n     int64
}

// NewCA makes an intermediate under a root that is thrown away.
func NewCA(t testing.TB) *CA {
	t.Helper()
	rootKey, root := issue(t, &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Suite Root"}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, nil, nil)
	key, inter := issue(t, &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "Suite Intermediate"}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, root, rootKey)
	return &CA{inter: inter, key: key, n: 100}
}

func issue(t testing.TB, tmpl, parent *x509.Certificate, by *ecdsa.PrivateKey) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if parent == nil {
		parent, by = tmpl, key
	}
	// Fixed and long: the suite has no opinion on time.
	tmpl.NotBefore = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	tmpl.NotAfter = time.Date(2070, 1, 1, 0, 0, 0, 0, time.UTC)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), by)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, cert
}

// Material issues a new leaf with a new key.
func (c *CA) Material(t testing.TB) target.Material {
	t.Helper()
	c.n++
	key, leaf := issue(t, &x509.Certificate{SerialNumber: big.NewInt(c.n), Subject: pkix.Name{CommonName: "site.example.test"},
		DNSNames: []string{"site.example.test"}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, c.inter, c.key)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	doc := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	return target.Material{CertificateID: "cert_suite", Generation: c.n, Chain: []*x509.Certificate{leaf, c.inter},
		// A copy: connectors wipe what they were given.
		KeyPEM: func() ([]byte, error) { return bytes.Clone(doc), nil }}
}

// ServedAt shakes hands with address until it serves want, and fails the test after ten seconds.
func ServedAt(t testing.TB, address string, want target.Fingerprint) {
	t.Helper()
	if _, err := target.ProbeTLS(t.Context(), address, "", want, target.ProbeOptions{Timeout: patience, Now: fixedNow}); err != nil {
		t.Fatal(err)
	}
}

// ServesNow makes one handshake with address and returns the serial that was served; 0 if nothing answers.
func ServesNow(t testing.TB, address string) int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	d := tls.Dialer{NetDialer: &net.Dialer{}, Config: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}} // looks at what is served, trusts nothing
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return 0
	}
	defer func() { _ = c.Close() }()
	tc, ok := c.(*tls.Conn)
	if !ok {
		return 0
	}
	return tc.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
}

const patience = 10 * time.Second

func fixedNow() time.Time { return time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC) }
