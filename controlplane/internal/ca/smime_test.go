package ca

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// S/MIME from the order to a message: the profile's certificate signs and decrypts nothing it should not.
func TestSMIMEEndToEnd(t *testing.T) {
	t.Parallel()
	a, m := newTestCA(t, domain.ECDSAP256)
	names := domain.Names{CommonName: "Anna Example", Email: []string{"anna@example.test"}}
	for _, alg := range []domain.KeyAlgorithm{domain.RSA2048, domain.ECDSAP256} {
		key := testKey(t, alg)
		csr, err := CheckCSR(newCSR(t, key, names), names, profile(domain.EKUEmailProtection))
		if err != nil {
			t.Fatal(err)
		}
		c := issue(t, a, Request{PublicKey: csr.PublicKey, Names: names, Profile: profile(domain.EKUEmailProtection), Now: epoch})
		if len(c.EmailAddresses) != 1 || c.EmailAddresses[0] != "anna@example.test" || len(c.DNSNames) != 0 || c.Subject.CommonName != "Anna Example" {
			t.Fatalf("%s: issued for %v, %v", alg, c.EmailAddresses, c.DNSNames)
		}
		verify(t, a, c, x509.ExtKeyUsageEmailProtection)
		if _, err := c.Verify(x509.VerifyOptions{Roots: pool(a.Root()), Intermediates: pool(a.Certificate()), CurrentTime: epoch, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err == nil {
			t.Fatalf("%s: an S/MIME certificate serves TLS", alg)
		}

		dir := t.TempDir()
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		letter := filepath.Join(dir, "letter")
		if err := os.WriteFile(letter, []byte("Dear all,\r\nthe key is under the mat.\r\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		signed := filepath.Join(dir, "signed")
		out, err := openssl(t, "cms", "-sign", "-in", letter, "-signer", pemFile(t, dir, "leaf", "CERTIFICATE", c.Raw), "-inkey", pemFile(t, dir, "key", "PRIVATE KEY", der),
			"-certfile", pemFile(t, dir, "above", "CERTIFICATE", a.Chain()...), "-out", signed)
		if err != nil {
			t.Fatalf("%s: sign: %v\n%s", alg, err, out)
		}
		out, err = openssl(t, "cms", "-verify", "-in", signed, "-CAfile", pemFile(t, dir, "root", "CERTIFICATE", m.Roots()...), "-purpose", "smimesign",
			"-attime", strconv.FormatInt(epoch.Unix(), 10), "-out", os.DevNull)
		if err != nil || !strings.Contains(out, "uccessful") {
			t.Errorf("%s: verify: %v\n%s", alg, err, out)
		}
	}
}

func pool(certs ...*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}
