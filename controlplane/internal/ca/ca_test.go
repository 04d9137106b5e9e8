package ca

import (
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"strconv"
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// TestGrid issues every kind of leaf key, name and usage from every kind of CA key and verifies each certificate with
// crypto/x509; one of each pair of CA and leaf keys also goes through openssl's strict checks.
func TestGrid(t *testing.T) {
	t.Parallel()
	kinds := map[string]domain.Names{
		"dns":      {CommonName: "www.example.test", DNS: []string{"www.example.test", "example.test"}},
		"wildcard": {DNS: []string{"*.apps.example.test"}},
		"ip":       {IP: []string{"192.0.2.7", "2001:db8::7"}},
		"uri":      {URI: []string{"spiffe://example.test/service", "urn:uuid:0f8fad5b-d9cb-469f-a165-70867728950e"}},
		"email":    {CommonName: "Anna Example", Email: []string{"Anna.Example@example.test"}},
		"mixed":    {CommonName: "a.example.test", DNS: []string{"b"}, IP: []string{"192.0.2.8"}, Email: []string{"ops@example.test"}, URI: []string{"https://example.test/x"}},
	}
	uses := map[string]struct {
		ekus []domain.EKU
		want []x509.ExtKeyUsage
		key  x509.KeyUsage
		rsa  x509.KeyUsage // more for RSA keys
	}{
		"server": {[]domain.EKU{domain.EKUServerAuth}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, x509.KeyUsageDigitalSignature, x509.KeyUsageKeyEncipherment},
		"client": {[]domain.EKU{domain.EKUClientAuth}, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, x509.KeyUsageDigitalSignature, 0},
		"peer": {[]domain.EKU{domain.EKUServerAuth, domain.EKUClientAuth}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			x509.KeyUsageDigitalSignature, x509.KeyUsageKeyEncipherment},
		"smime": {[]domain.EKU{domain.EKUEmailProtection}, []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection},
			x509.KeyUsageDigitalSignature | x509.KeyUsageContentCommitment, 0},
		"code": {[]domain.EKU{domain.EKUCodeSigning}, []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}, x509.KeyUsageDigitalSignature, 0},
		"time": {[]domain.EKU{domain.EKUTimeStamping}, []x509.ExtKeyUsage{x509.ExtKeyUsageTimeStamping},
			x509.KeyUsageDigitalSignature | x509.KeyUsageContentCommitment, 0},
	}
	for _, caKey := range []domain.KeyAlgorithm{domain.ECDSAP256, domain.ECDSAP384, domain.RSA3072, domain.Ed25519} {
		t.Run("ca="+string(caKey), func(t *testing.T) {
			t.Parallel()
			a, m := newTestCA(t, caKey)
			dir := t.TempDir()
			roots := pemFile(t, dir, "root.pem", "CERTIFICATE", m.Roots()...)
			above := pemFile(t, dir, "above.pem", "CERTIFICATE", a.Chain()...)
			for _, leafKey := range domain.KeyAlgorithms {
				sampled := false
				for name, names := range kinds {
					for use, u := range uses {
						where := fmt.Sprintf("key=%s names=%s use=%s", leafKey, name, use)
						key := testKey(t, leafKey)
						csr, err := CheckCSR(newCSR(t, key, names), names, profile(u.ekus...))
						if err != nil {
							t.Fatalf("%s: %v", where, err)
						}
						if csr.KeyAlgorithm != leafKey {
							t.Fatalf("%s: taken for %s", where, csr.KeyAlgorithm)
						}
						c := issue(t, a, Request{PublicKey: csr.PublicKey, Names: names, Profile: profile(u.ekus...), Now: epoch})
						for _, eku := range u.want {
							verify(t, a, c, eku)
						}
						ku := u.key
						if _, isRSA := key.Public().(interface{ Size() int }); isRSA {
							ku |= u.rsa
						}
						if c.KeyUsage != ku {
							t.Errorf("%s: key usage %b, want %b", where, c.KeyUsage, ku)
						}
						if domain.HashHex(c.RawSubjectPublicKeyInfo) != csr.SPKI {
							t.Errorf("%s: another key was certified", where)
						}
						if !sampled && use == "server" {
							sampled = true
							leaf := pemFile(t, dir, string(leafKey)+".pem", "CERTIFICATE", c.Raw)
							out, err := openssl(t, "verify", "-x509_strict", "-attime", strconv.FormatInt(epoch.Unix(), 10),
								"-purpose", "sslserver", "-CAfile", roots, "-untrusted", above, leaf)
							if err != nil {
								t.Errorf("%s: openssl verify: %v\n%s", where, err, out)
							}
						}
					}
				}
			}
		})
	}
}

func TestSignAgainSignsTheSameBytes(t *testing.T) {
	t.Parallel()
	a, m := newTestCA(t, domain.ECDSAP256)
	p, err := a.Prepare(Request{PublicKey: testKey(t, domain.ECDSAP256).Public(), Names: domain.Names{DNS: []string{"x.example.test"}},
		Profile: profile(domain.EKUServerAuth), Now: epoch})
	if err != nil {
		t.Fatal(err)
	}
	// The process that prepared it, again, and one that was started after a crash.
	for _, by := range []*Authority{a, a, open(t, m)} {
		der, err := by.Sign(p.TBS())
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if string(c.RawTBSCertificate) != string(p.TBS()) || SerialText(c.SerialNumber) != p.Serial() || domain.HashHex(c.RawSubjectPublicKeyInfo) != p.SPKI() ||
			!c.NotBefore.Equal(p.NotBefore()) || !c.NotAfter.Equal(p.NotAfter()) {
			t.Fatal("the certificate is not what was prepared")
		}
	}
}

func benchCA(b *testing.B) (*Authority, Request, []byte) {
	a, _ := newTestCA(b, domain.ECDSAP256)
	key := testKey(b, domain.ECDSAP256)
	names := domain.Names{DNS: []string{"www.example.test", "example.test"}}
	return a, Request{PublicKey: key.Public(), Names: names, Profile: profile(domain.EKUServerAuth), Now: epoch}, newCSR(b, key, names)
}

func BenchmarkPrepare(b *testing.B) {
	a, r, _ := benchCA(b)
	for b.Loop() {
		if _, err := a.Prepare(r); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSign(b *testing.B) {
	a, r, _ := benchCA(b)
	p, err := a.Prepare(r)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := a.seal(p.TBS()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSignFromIntent(b *testing.B) {
	a, r, _ := benchCA(b)
	p, err := a.Prepare(r)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := a.Sign(p.TBS()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCheckCSR(b *testing.B) {
	_, r, csr := benchCA(b)
	for b.Loop() {
		if _, err := CheckCSR(csr, r.Names, r.Profile); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkNewSerial(b *testing.B) {
	for b.Loop() {
		if _, err := NewSerial(rand.Reader); err != nil {
			b.Fatal(err)
		}
	}
}
