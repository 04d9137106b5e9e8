package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

func pemText(kind string, ders ...[]byte) []byte {
	var b bytes.Buffer
	for _, der := range ders {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	return b.Bytes()
}

func keyText(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pemText("PRIVATE KEY", der)
}

func subTemplate() *x509.Certificate {
	return &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "Company Sub"}, NotBefore: epoch.Add(-time.Hour), NotAfter: epoch.Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: []byte{1, 2, 3, 4}}
}

func TestSubCAFromFiles(t *testing.T) {
	t.Parallel()
	for _, alg := range []domain.KeyAlgorithm{domain.ECDSAP384, domain.RSA2048, domain.Ed25519} {
		key := testKey(t, alg)
		chain := signedChain(t, key, subTemplate())
		m, err := FromPEM(Import{ID: "iss_sub", PublicURL: testURL, Now: epoch, Certificates: pemText("CERTIFICATE", chain...), Key: keyText(t, key)}, testRing(t))
		if err != nil {
			t.Fatalf("%s: %v", alg, err)
		}
		a := open(t, m)
		if m.CA.RootKeyURI != "" || len(a.Chain()) != 1 || a.NotAfter() != epoch.Add(1000*time.Hour) {
			t.Errorf("%s: %+v", alg, m.CA)
		}
		c := issue(t, a, ask(t))
		verify(t, a, c, x509.ExtKeyUsageServerAuth)
		dir := t.TempDir()
		out, err := openssl(t, "verify", "-x509_strict", "-attime", strconv.FormatInt(epoch.Unix(), 10), "-CAfile", pemFile(t, dir, "root", "CERTIFICATE", chain[1]),
			"-untrusted", pemFile(t, dir, "sub", "CERTIFICATE", chain[0]), pemFile(t, dir, "leaf", "CERTIFICATE", c.Raw))
		if err != nil && !strings.Contains(out, "Missing Authority Key Identifier") {
			t.Errorf("%s: openssl: %v\n%s", alg, err, out)
		}
	}
}

func TestBadSubCAsAreRefusedByField(t *testing.T) {
	t.Parallel()
	key := testKey(t, domain.ECDSAP256)
	stranger := testKey(t, domain.ECDSAP384)
	good := signedChain(t, key, subTemplate())
	with := func(change func(*x509.Certificate)) []byte {
		c := subTemplate()
		change(c)
		return pemText("CERTIFICATE", signedChain(t, key, c)...)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	two := signedChain(t, key, subTemplate())
	secretText := string(keyText(t, key))
	for _, c := range []struct {
		name        string
		certs, key  []byte
		url         string
		field, says string
		class       fault.Class
	}{
		{name: "empty", certs: nil, field: "certificates", says: "no certificate"},
		{name: "not PEM", certs: []byte("hello"), field: "certificates", says: "no certificate"},
		{name: "a key among them", certs: append(pemText("CERTIFICATE", good...), keyText(t, key)...), field: "certificates", says: "PRIVATE KEY"},
		{name: "broken DER", certs: pemText("CERTIFICATE", good[0][:50]), field: "certificates", says: "certificate 1 does not parse"},
		{name: "no root", certs: pemText("CERTIFICATE", good[0]), field: "certificates", says: "not a root"},
		{name: "wrong order", certs: pemText("CERTIFICATE", good[1], good[0]), field: "certificates", says: "order them"},
		{name: "another root", certs: pemText("CERTIFICATE", good[0], two[1]), field: "certificates", says: "not signed by"},
		{name: "nine", certs: pemText("CERTIFICATE", good[0], good[0], good[0], good[0], good[0], good[0], good[0], good[0], good[1]), field: "certificates", says: "more than 8"},
		{name: "not a CA", certs: with(func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false }), field: "certificates", says: "not a CA's"},
		{name: "no keyCertSign", certs: with(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }), field: "certificates", says: "keyCertSign"},
		{name: "no cRLSign", certs: with(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCertSign }), field: "certificates", says: "cRLSign"},
		{name: "expired", certs: with(func(c *x509.Certificate) { c.NotAfter = epoch.Add(-time.Minute) }), field: "certificates", says: "expired"},
		{name: "not yet valid", certs: with(func(c *x509.Certificate) { c.NotBefore = epoch.Add(time.Minute) }), field: "certificates", says: "not valid before"},
		{name: "no subject", certs: with(func(c *x509.Certificate) { c.Subject = pkix.Name{} }), field: "certificates", says: "empty subject"},
		{name: "another key", key: keyText(t, stranger), field: "key", says: "does not belong"},
		{name: "no key", key: []byte{}, field: "key", says: "0 bytes"},
		{name: "no key in it", key: pemText("CERTIFICATE", good[0]), field: "key"},
		{name: "public key", key: pemText("PUBLIC KEY", marshalPublic(t, key)), field: "key"},
		{name: "broken key", key: bytes.Replace(keyText(t, key), []byte("M"), []byte("!"), 1), field: "key"},
		{name: "public URL", url: "ftp://x", field: "public_url"},
		{name: "weak curve", certs: pemText("CERTIFICATE", signedChain(t, p224, subTemplate())...), key: keyText(t, p224), says: "P-224", class: fault.Rejected},
	} {
		in := Import{ID: "iss_sub", PublicURL: testURL, Now: epoch, Certificates: c.certs, Key: c.key}
		if c.certs == nil && c.name != "empty" {
			in.Certificates = pemText("CERTIFICATE", good...)
		}
		if c.key == nil {
			in.Key = keyText(t, key)
		}
		if c.url != "" {
			in.PublicURL = c.url
		}
		m, err := FromPEM(in, testRing(t))
		class := c.class
		if class == "" {
			class = fault.Invalid
		}
		var f *fault.Error
		if !errors.As(err, &f) || f.Class != class || f.Field != c.field || !strings.Contains(err.Error(), c.says) || m.Keys != nil {
			t.Errorf("%s: %v (field %q), want field %q and %q", c.name, err, fieldOf(err), c.field, c.says)
		}
		for line := range strings.Lines(secretText) {
			if line = strings.TrimSpace(line); len(line) > 20 && !strings.HasPrefix(line, "---") && strings.Contains(err.Error(), line) {
				t.Errorf("%s: the error quotes the key", c.name)
			}
		}
	}
}

func fieldOf(err error) string {
	if f, ok := errors.AsType[*fault.Error](err); ok {
		return f.Field
	}
	return ""
}

func marshalPublic(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestEncryptedKeysNeedTheirPassword(t *testing.T) {
	t.Parallel()
	key := testKey(t, domain.ECDSAP256)
	chain := signedChain(t, key, subTemplate())
	dir := t.TempDir()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	clear := pemFile(t, dir, "clear", "PRIVATE KEY", der)
	text, err := openssl(t, "pkcs8", "-topk8", "-in", clear, "-passout", "pass:correct horse")
	if err != nil {
		t.Fatalf("openssl: %v\n%s", err, text)
	}
	for password, field := range map[string]string{"": "password", "wrong": "key", "correct horse": ""} {
		in := Import{ID: "iss_sub", PublicURL: testURL, Now: epoch, Certificates: pemText("CERTIFICATE", chain...), Key: []byte(text), Password: []byte(password)}
		_, err := FromPEM(in, testRing(t))
		if got := fieldOf(err); got != field || (err == nil) != (field == "") {
			t.Errorf("password %q: %v, want a fault of %q", password, err, field)
		}
	}
}

// A path length that the chain itself breaks is refused; one that it keeps is not.
func TestPathLengthOfTheRootIsHeld(t *testing.T) {
	t.Parallel()
	m, err := NewSelfSigned(Params{ID: "iss_root", Name: "Test", Now: epoch}, testRing(t))
	if err != nil {
		t.Fatal(err)
	}
	a := open(t, m)
	// The online intermediate has path length 0: it must not have a CA below it.
	c := subTemplate()
	c.SignatureAlgorithm = a.scheme.x509
	c.AuthorityKeyId = a.Certificate().SubjectKeyId
	key := testKey(t, domain.ECDSAP256)
	der, err := x509.CreateCertificate(rand.Reader, c, a.Certificate(), key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	_, err = FromPEM(Import{ID: "iss_sub", Now: epoch, Certificates: pemText("CERTIFICATE", append([][]byte{der}, m.CA.Chain...)...), Key: keyText(t, key)}, testRing(t))
	wantFault(t, err, fault.Invalid, "path length")
}
