package ca

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	"github.com/certmesh/certmesh/protocol/fault"
)

// epoch is the present of all tests: openssl is told the same.
var epoch = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

const testURL = "http://pki.example.test:8080"

// testKeys are made once: RSA keys are slow.
var testKeys struct {
	sync.Mutex
	m map[string]crypto.Signer
}

func testKey(t testing.TB, a domain.KeyAlgorithm) crypto.Signer {
	t.Helper()
	testKeys.Lock()
	defer testKeys.Unlock()
	if k := testKeys.m[string(a)]; k != nil {
		return k
	}
	kind, err := keyTypeOf(a)
	if err != nil {
		t.Fatal(err)
	}
	k, err := kind.generate()
	if err != nil {
		t.Fatal(err)
	}
	if testKeys.m == nil {
		testKeys.m = map[string]crypto.Signer{}
	}
	testKeys.m[string(a)] = k
	return k
}

func testRing(t testing.TB) *secret.Keyring {
	t.Helper()
	ring, err := secret.NewKeyring(bytes.Repeat([]byte{7}, secret.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	return ring
}

func lookup(m Material) func(string) (domain.SealedKey, error) {
	return func(id string) (domain.SealedKey, error) {
		for _, k := range m.Keys {
			if k.ID == id {
				return k, nil
			}
		}
		return domain.SealedKey{}, fault.New(fault.NotFound, "no key %s", id)
	}
}

func open(t testing.TB, m Material) *Authority {
	t.Helper()
	a, err := Open(m.CA, lookup(m), testRing(t))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newTestCA(t testing.TB, a domain.KeyAlgorithm) (*Authority, Material) {
	t.Helper()
	m, err := NewSelfSigned(Params{ID: "iss_test", Name: "Test", PublicURL: testURL, Now: epoch, KeyAlgorithm: a}, testRing(t))
	if err != nil {
		t.Fatal(err)
	}
	return open(t, m), m
}

func newTestMesh(t testing.TB) *Authority {
	t.Helper()
	m, err := NewMesh("mesh.example.test", Params{Now: epoch}, testRing(t))
	if err != nil {
		t.Fatal(err)
	}
	return open(t, m)
}

func profile(ekus ...domain.EKU) domain.Profile {
	return domain.Profile{ID: "prof_test", Name: "test", KeyAlgorithm: domain.ECDSAP256, Allowed: domain.KeyAlgorithms, EKUs: ekus,
		TTL: 47 * 24 * time.Hour, MaxTTL: 398 * 24 * time.Hour}
}

func issue(t testing.TB, a *Authority, r Request) *x509.Certificate {
	t.Helper()
	p, err := a.Prepare(r)
	if err != nil {
		t.Fatal(err)
	}
	der, err := a.Sign(p.TBS())
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// verify checks c as a relying party that trusts a's root does.
func verify(t testing.TB, a *Authority, c *x509.Certificate, use x509.ExtKeyUsage) {
	t.Helper()
	roots, above := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(a.Root())
	for _, der := range a.Chain() {
		i, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		above.AddCert(i)
	}
	if _, err := c.Verify(x509.VerifyOptions{Roots: roots, Intermediates: above, CurrentTime: epoch, KeyUsages: []x509.ExtKeyUsage{use}}); err != nil {
		t.Fatalf("verify: %v", err)
	}
}

// newCSR makes a request; change edits the template.
func newCSR(t testing.TB, key crypto.Signer, n domain.Names, change ...func(*x509.CertificateRequest)) []byte {
	t.Helper()
	r := &x509.CertificateRequest{Subject: pkix.Name{CommonName: n.CommonName}, DNSNames: n.DNS, EmailAddresses: n.Email}
	for _, s := range n.IP {
		r.IPAddresses = append(r.IPAddresses, net.ParseIP(s))
	}
	for _, s := range n.URI {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		r.URIs = append(r.URIs, u)
	}
	for _, c := range change {
		c(r)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, r, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func wantFault(t testing.TB, err error, class fault.Class, parts ...string) {
	t.Helper()
	if !fault.Is(err, class) {
		t.Fatalf("error %v has class %q, want %q", err, fault.ClassOf(err), class)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Fatalf("error %q does not say %q", err, p)
		}
	}
}

func pemFile(t testing.TB, dir, name, kind string, ders ...[]byte) string {
	t.Helper()
	var b bytes.Buffer
	for _, der := range ders {
		if err := pem.Encode(&b, &pem.Block{Type: kind, Bytes: der}); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func openssl(t testing.TB, args ...string) (string, error) {
	t.Helper()
	out, err := exec.Command("openssl", args...).CombinedOutput()
	return string(out), err
}
