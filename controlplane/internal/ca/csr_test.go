package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"strings"
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

var orderedNames = domain.Names{CommonName: "www.example.test", DNS: []string{"www.example.test", "example.test"}, IP: []string{"192.0.2.7"}}

func extension(id asn1.ObjectIdentifier, critical bool, value any) func(*x509.CertificateRequest) {
	der, err := asn1.Marshal(value)
	if err != nil {
		panic(err)
	}
	return func(r *x509.CertificateRequest) {
		r.ExtraExtensions = append(r.ExtraExtensions, pkix.Extension{Id: id, Critical: critical, Value: der})
	}
}

func TestRequestsOfAnOrder(t *testing.T) {
	t.Parallel()
	key := testKey(t, domain.ECDSAP256)
	names := func(change func(*domain.Names)) domain.Names {
		n := domain.Names{CommonName: orderedNames.CommonName, DNS: append([]string{}, orderedNames.DNS...), IP: append([]string{}, orderedNames.IP...)}
		change(&n)
		return n
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := newCSR(t, key, orderedNames)
	forged := bytes.Clone(good)
	forged[len(forged)-1] ^= 1
	csr := func(k crypto.Signer, n domain.Names, change ...func(*x509.CertificateRequest)) []byte {
		return newCSR(t, k, n, change...)
	}
	for _, c := range []struct {
		name  string
		der   []byte
		class fault.Class // empty: accepted
		says  string
	}{
		{name: "as ordered", der: good},
		{name: "in another order and case", der: csr(key, names(func(n *domain.Names) {
			n.CommonName, n.DNS = "WWW.example.test", []string{"Example.TEST", "www.example.test"}
		}))},
		{name: "without a common name", der: csr(key, names(func(n *domain.Names) { n.CommonName = "" }))},
		{name: "what the profile gives anyway", der: csr(key, orderedNames, extension(oidExtKeyUsage, false, []asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 1}}))},
		{name: "an unknown extension", der: csr(key, orderedNames, extension(asn1.ObjectIdentifier{1, 2, 3, 4}, false, 1))},

		{name: "empty", class: fault.Invalid, says: "0 bytes"},
		{name: "too long", der: make([]byte, maxCSR+1), class: fault.Invalid, says: "bytes"},
		{name: "PEM", der: pemText("CERTIFICATE REQUEST", good), class: fault.Invalid, says: "send DER"},
		{name: "garbage", der: []byte("\x30\x03\x02\x01\x01"), class: fault.Invalid, says: "PKCS#10"},
		{name: "cut short", der: good[:len(good)-5], class: fault.Invalid},
		{name: "trailing data", der: append(bytes.Clone(good), 0), class: fault.Invalid},
		{name: "wrong signature", der: forged, class: fault.Invalid, says: "signature"},
		{name: "extra name", der: csr(key, names(func(n *domain.Names) { n.DNS = append(n.DNS, "evil.example.test") })), class: fault.Invalid, says: "evil.example.test"},
		{name: "wildcard over an ordered name", der: csr(key, names(func(n *domain.Names) { n.DNS = append(n.DNS, "*.example.test") })), class: fault.Invalid, says: "*.example.test"},
		{name: "extra address", der: csr(key, names(func(n *domain.Names) { n.IP = append(n.IP, "192.0.2.8") })), class: fault.Invalid, says: "192.0.2.8"},
		{name: "extra URI", der: csr(key, names(func(n *domain.Names) { n.URI = []string{"spiffe://example.test/root"} })), class: fault.Invalid, says: "spiffe"},
		{name: "extra e-mail", der: csr(key, names(func(n *domain.Names) { n.Email = []string{"root@example.test"} })), class: fault.Invalid, says: "root@example.test"},
		{name: "missing name", der: csr(key, names(func(n *domain.Names) { n.DNS = n.DNS[:1] })), class: fault.Invalid, says: "lacks"},
		{name: "another common name", der: csr(key, names(func(n *domain.Names) { n.CommonName = "Domain Admin" })), class: fault.Invalid, says: "Domain Admin"},
		{name: "an organisation", der: csr(key, orderedNames, func(r *x509.CertificateRequest) { r.Subject.Organization = []string{"Bank"} }), class: fault.Invalid, says: "2.5.4.10"},
		{name: "a name that cannot be", der: csr(key, names(func(n *domain.Names) { n.DNS = append(n.DNS, "a..b") })), class: fault.Invalid},
		{name: "a NUL in a name", der: csr(key, names(func(n *domain.Names) { n.DNS = append(n.DNS, "www.example.test\x00.evil.test") })), class: fault.Invalid},
		{name: "otherName", der: csr(key, domain.Names{CommonName: "www.example.test"}, sanOf(t, asn1.RawValue{Class: 2, Tag: 0, IsCompound: true, Bytes: []byte{6, 1, 42}})), class: fault.Invalid, says: "otherName"},
		{name: "a CA", der: csr(key, orderedNames, extension(oidBasicConstraints, true, struct{ IsCA bool }{true})), class: fault.Invalid, says: "CA certificate"},
		{name: "keyCertSign", der: csr(key, orderedNames, extension(oidKeyUsage, true, asn1.BitString{Bytes: []byte{0x04}, BitLength: 8})), class: fault.Invalid, says: "right to sign"},
		{name: "another usage", der: csr(key, orderedNames, extension(oidExtKeyUsage, false, []asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 3}})), class: fault.Invalid, says: "codeSigning"},
		{name: "any usage", der: csr(key, orderedNames, extension(oidExtKeyUsage, false, []asn1.ObjectIdentifier{{2, 5, 29, 37, 0}})), class: fault.Invalid, says: "2.5.29.37.0"},
		{name: "a critical unknown", der: csr(key, orderedNames, extension(asn1.ObjectIdentifier{1, 2, 3, 4}, true, 1)), class: fault.Invalid, says: "1.2.3.4"},
		{name: "RSA-1024", der: csr(small, orderedNames), class: fault.Rejected, says: "1024"},
		{name: "P-521", der: csr(p521, orderedNames), class: fault.Rejected, says: "P-521"},
		{name: "SHA-1", der: sha1Request(t), class: fault.Invalid, says: "SHA1"},
	} {
		got, err := CheckCSR(c.der, orderedNames, profile(domain.EKUServerAuth))
		switch {
		case c.class == "" && (err != nil || got.KeyAlgorithm != domain.ECDSAP256 || len(got.SPKI) != 64):
			t.Errorf("%s: %v", c.name, err)
		case c.class != "" && (!fault.Is(err, c.class) || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%s: %v (%s), want %s and %q", c.name, err, fault.ClassOf(err), c.class, c.says)
		}
	}
	only := profile(domain.EKUServerAuth)
	only.KeyAlgorithm, only.Allowed = domain.RSA3072, []domain.KeyAlgorithm{domain.RSA3072}
	_, err = CheckCSR(good, orderedNames, only)
	wantFault(t, err, fault.Rejected, "RSA-3072")
}

// sanOf replaces the names of a request by one of a form that crypto/x509 passes over.
func sanOf(t testing.TB, one asn1.RawValue) func(*x509.CertificateRequest) {
	t.Helper()
	der, err := asn1.Marshal([]asn1.RawValue{{Class: 2, Tag: 2, Bytes: []byte("www.example.test")}, one})
	if err != nil {
		t.Fatal(err)
	}
	return func(r *x509.CertificateRequest) {
		r.ExtraExtensions = append(r.ExtraExtensions, pkix.Extension{Id: oidSubjectAltName, Value: der})
	}
}

// sha1Request takes openssl: Go signs nothing with SHA-1.
func sha1Request(t testing.TB) []byte {
	t.Helper()
	dir := t.TempDir()
	der, err := x509.MarshalPKCS8PrivateKey(testKey(t, domain.RSA2048))
	if err != nil {
		t.Fatal(err)
	}
	out, err := openssl(t, "req", "-new", "-sha1", "-key", pemFile(t, dir, "key", "PRIVATE KEY", der), "-subj", "/CN=www.example.test", "-outform", "DER")
	if err != nil {
		t.Fatalf("openssl: %v\n%s", err, out)
	}
	return []byte(out)
}

func TestWeakRSAKeysAreRefusedWithoutUsingThem(t *testing.T) {
	t.Parallel()
	k := testKey(t, domain.RSA2048).(*rsa.PrivateKey).PublicKey
	even := k
	even.N = new(big.Int).Lsh(big.NewInt(1), 2047)
	odd := k
	odd.N = new(big.Int).Lsh(k.N, 500)
	odd.N.SetBit(odd.N, 0, 1)
	three := k
	three.E = 3
	for name, pub := range map[string]*rsa.PublicKey{"even modulus": &even, "odd size": &odd, "exponent 3": &three} {
		if _, err := inspectKey(pub); !fault.Is(err, fault.Rejected) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzCheckCSR(f *testing.F) {
	f.Add(newCSR(f, testKey(f, domain.ECDSAP256), orderedNames))
	f.Add(newCSR(f, testKey(f, domain.Ed25519), domain.Names{URI: []string{"spiffe://x/y"}}))
	f.Add([]byte{0x30, 0})
	p := profile(domain.EKUServerAuth)
	f.Fuzz(func(t *testing.T, der []byte) {
		c, err := CheckCSR(der, orderedNames, p)
		if (err == nil) != (c != nil) {
			t.Fatal("neither a request nor an error")
		}
		if err != nil && fault.ClassOf(err) != fault.Invalid && fault.ClassOf(err) != fault.Rejected {
			t.Fatalf("hostile input is answered with %s: %v", fault.ClassOf(err), err)
		}
	})
}
