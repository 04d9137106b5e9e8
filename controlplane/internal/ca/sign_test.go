package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// countingKey counts how often a CA's key is used.
type countingKey struct {
	crypto.Signer
	used atomic.Int64
}

func (k *countingKey) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	k.used.Add(1)
	return k.Signer.Sign(r, digest, o)
}

func counting(a *Authority) *countingKey {
	k := &countingKey{Signer: a.key}
	a.key = k
	return k
}

func ask(t testing.TB) Request {
	return Request{PublicKey: testKey(t, domain.ECDSAP256).Public(), Names: domain.Names{DNS: []string{"x.example.test"}},
		Profile: profile(domain.EKUServerAuth), Now: epoch}
}

// forge builds to-be-signed bytes as somebody who can write intents, but not sign, might leave them.
func forge(t testing.TB, a *Authority, parent *x509.Certificate, change func(*x509.Certificate)) []byte {
	t.Helper()
	serial, err := NewSerial(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: serial, NotBefore: epoch, NotAfter: epoch.Add(time.Hour), DNSNames: []string{"x.example.test"},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
		SubjectKeyId: []byte{1, 2, 3}, SignatureAlgorithm: a.scheme.x509}
	change(c)
	rec := &recorder{public: parent.PublicKey}
	if _, err := x509.CreateCertificate(rand.Reader, c, parent, testKey(t, domain.ECDSAP256).Public(), rec); !errors.Is(err, errRecorded) {
		t.Fatal(err)
	}
	return rec.message
}

func TestSignRefusesWhatPrepareWouldNotMake(t *testing.T) {
	t.Parallel()
	a, _ := newTestCA(t, domain.ECDSAP256)
	other, _ := newTestCA(t, domain.ECDSAP256)
	key := counting(a)
	foreign, err := other.Prepare(ask(t))
	if err != nil {
		t.Fatal(err)
	}
	good := forge(t, a, a.Certificate(), func(*x509.Certificate) {})
	same := func(*x509.Certificate) {}
	for name, tbs := range map[string][]byte{
		"nothing":       nil,
		"garbage":       []byte("garbage"),
		"trailing data": append(bytes.Clone(good), 0),
		"cut short":     good[:len(good)-3],
		"another CA's":  foreign.TBS(),
		"the root's":    forge(t, a, a.Root(), same),
		"a CA": forge(t, a, a.Certificate(), func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign
		}),
		"the right to sign certificates": forge(t, a, a.Certificate(), func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }),
		"the right to sign CRLs":         forge(t, a, a.Certificate(), func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }),
		"outlives its CA":                forge(t, a, a.Certificate(), func(c *x509.Certificate) { c.NotAfter = a.NotAfter().Add(time.Second) }),
		"lints fail": forge(t, a, a.Certificate(), func(c *x509.Certificate) {
			c.ExtKeyUsage, c.KeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, x509.KeyUsageKeyEncipherment
		}),
		"a serial of zero": forge(t, a, a.Certificate(), func(c *x509.Certificate) { c.SerialNumber = big.NewInt(0) }),
	} {
		der, err := a.Sign(tbs)
		if der != nil || !fault.Is(err, fault.Rejected) {
			t.Errorf("%s: %d bytes, %v (%s)", name, len(der), err, fault.ClassOf(err))
		}
	}
	if n := key.used.Load(); n != 0 {
		t.Fatalf("the CA's key was used %d times", n)
	}
	if _, err := a.Sign(good); err != nil {
		t.Fatalf("the control was refused too: %v", err)
	}
}

// What the process that prepared them linted is not linted again; what comes from a former process is.
func TestIntentsOfAFormerProcessAreLintedAgain(t *testing.T) {
	t.Parallel()
	a, m := newTestCA(t, domain.ECDSAP256)
	p, err := a.Prepare(ask(t))
	if err != nil {
		t.Fatal(err)
	}
	later := open(t, m)
	key := counting(later)
	bad := forge(t, later, later.Certificate(), func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment })
	if _, err := later.Sign(bad); !fault.Is(err, fault.Rejected) || key.used.Load() != 0 {
		t.Fatalf("an intent that no longer lints clean was signed: %v", err)
	}
	if _, err := later.Sign(p.TBS()); err != nil || key.used.Load() != 1 {
		t.Fatalf("a good intent of a former process: %v", err)
	}
}

func TestLintFailureStopsBeforeTheKeyIsUsed(t *testing.T) {
	t.Parallel()
	a, _ := newTestCA(t, domain.ECDSAP256)
	key := counting(a)
	r := ask(t)
	r.Serial = big.NewInt(0)
	if _, err := a.Prepare(r); err == nil {
		t.Error("a serial of zero was prepared")
	}
	r = ask(t)
	r.Profile.EKUs = []domain.EKU{domain.EKUTimeStamping, domain.EKUServerAuth}
	_, err := a.Prepare(r)
	wantFault(t, err, fault.Invalid, "profile.ekus")
	r.Profile.EKUs = nil
	_, err = a.Prepare(r)
	wantFault(t, err, fault.Invalid, "profile.ekus")
	if _, err := a.Prepare(ask(t)); err != nil {
		t.Fatal(err)
	}
	if n := key.used.Load(); n != 0 {
		t.Fatalf("Prepare used the CA's key %d times", n)
	}
}

func TestNoLintIsExcusedWithoutAReason(t *testing.T) {
	t.Parallel()
	for name, reason := range excusedLints {
		if len(reason) < 20 {
			t.Errorf("lint %s is excused by %q", name, reason)
		}
	}
	l, err := newLinter()
	if err != nil {
		t.Fatal(err)
	}
	if len(l.certificate) < 50 || len(l.crl) < 5 {
		t.Errorf("only %d and %d lints run", len(l.certificate), len(l.crl))
	}
}

func TestValidityIsCapped(t *testing.T) {
	t.Parallel()
	a, _ := newTestCA(t, domain.ECDSAP256)
	const day = 24 * time.Hour
	for _, c := range []struct {
		name     string
		ttl, max time.Duration
		now      time.Time
		want     time.Time // latest notAfter
		class    fault.Class
	}{
		{name: "as asked", ttl: 47 * day, max: 90 * day, now: epoch, want: epoch.Add(47 * day)},
		{name: "by the profile", ttl: 90 * day, max: 47 * day, now: epoch, want: epoch.Add(47 * day)},
		{name: "short-lived", ttl: 10 * time.Minute, max: time.Hour, now: epoch, want: epoch.Add(10 * time.Minute)},
		{name: "by the CA", ttl: 47 * day, max: 90 * day, now: a.NotAfter().Add(-time.Hour), want: a.NotAfter()},
		{name: "too short", ttl: 59 * time.Second, now: epoch, class: fault.Invalid},
		{name: "expired CA", ttl: 47 * day, now: a.NotAfter(), class: fault.Rejected},
		{name: "CA from the future", ttl: 47 * day, now: epoch.Add(-day), class: fault.Rejected},
	} {
		r := ask(t)
		r.Profile.TTL, r.Profile.MaxTTL, r.Now = c.ttl, c.max, c.now
		p, err := a.Prepare(r)
		if c.class != "" {
			if !fault.Is(err, c.class) {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if p.NotAfter().After(c.want) || p.NotAfter().Before(c.want.Add(-2*time.Minute)) {
			t.Errorf("%s: ends %s, want %s", c.name, p.NotAfter(), c.want)
		}
		if p.NotBefore().After(c.now) || c.now.Sub(p.NotBefore()) > backdate {
			t.Errorf("%s: begins %s at %s", c.name, p.NotBefore(), c.now)
		}
		// Both ends count (RFC 5280 section 4.1.2.5).
		if c.max > 0 && p.NotAfter().Sub(p.NotBefore())+time.Second > c.max {
			t.Errorf("%s: is valid for %s, more than %s", c.name, p.NotAfter().Sub(p.NotBefore()), c.max)
		}
	}
}

func TestCertificateSaysWhereItsCRLIs(t *testing.T) {
	t.Parallel()
	a, _ := newTestCA(t, domain.ECDSAP256)
	r := ask(t)
	r.Shard = 3
	c := issue(t, a, r)
	if len(c.CRLDistributionPoints) != 1 || c.CRLDistributionPoints[0] != testURL+"/.well-known/pki/crl/iss_test/3" {
		t.Errorf("CRL at %v", c.CRLDistributionPoints)
	}
	if len(c.IssuingCertificateURL) != 1 || c.IssuingCertificateURL[0] != testURL+"/.well-known/pki/ca/iss_test" || len(c.OCSPServer) != 0 {
		t.Errorf("issuer at %v, OCSP at %v", c.IssuingCertificateURL, c.OCSPServer)
	}
	if len(c.SubjectKeyId) != 20 || !bytes.Equal(c.AuthorityKeyId, a.Certificate().SubjectKeyId) || !c.BasicConstraintsValid || c.IsCA {
		t.Error("key identifiers or basic constraints are wrong")
	}
}

func TestConcurrentIssue(t *testing.T) {
	t.Parallel()
	a, _ := newTestCA(t, domain.ECDSAP256)
	serials := sync.Map{}
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 10 {
				p, err := a.Prepare(ask(t))
				if err != nil {
					t.Error(err)
					return
				}
				if _, twice := serials.LoadOrStore(p.Serial(), true); twice {
					t.Error("one serial twice")
				}
				if _, err := a.Sign(p.TBS()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// A constrained sub-CA refuses what relying parties would refuse, before it signs.
func TestNameConstraintsOfTheCAAreHeld(t *testing.T) {
	t.Parallel()
	key := testKey(t, domain.ECDSAP256)
	sub := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "Constrained"}, NotBefore: epoch.Add(-time.Hour), NotAfter: epoch.Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: []byte{1},
		PermittedDNSDomainsCritical: true, PermittedDNSDomains: []string{"inside.test"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	chain := signedChain(t, key, sub)
	m, err := FromPEM(Import{ID: "iss_sub", PublicURL: testURL, Now: epoch, Certificates: pemText("CERTIFICATE", chain...), Key: keyText(t, key)}, testRing(t))
	if err != nil {
		t.Fatal(err)
	}
	a := open(t, m)
	used := counting(a)
	r := ask(t)
	_, err = a.Prepare(r)
	wantFault(t, err, fault.Rejected, "name constraints")
	r.Names = domain.Names{DNS: []string{"www.inside.test"}}
	c := issue(t, a, r)
	verify(t, a, c, x509.ExtKeyUsageServerAuth)
	r.Profile.EKUs = []domain.EKU{domain.EKUClientAuth}
	_, err = a.Prepare(r)
	wantFault(t, err, fault.Rejected, "extended key usage")
	if used.used.Load() != 1 {
		t.Fatalf("the key was used %d times", used.used.Load())
	}
}

// signedChain signs sub, whose key is key, by a root of its own and returns both in DER.
func signedChain(t testing.TB, key crypto.Signer, sub *x509.Certificate) [][]byte {
	t.Helper()
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Company Root"}, NotBefore: epoch.Add(-time.Hour), NotAfter: epoch.Add(5000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: []byte{9}}
	rootDER, err := x509.CreateCertificate(rand.Reader, root, root, rootKey.Public(), rootKey)
	if err != nil {
		t.Fatal(err)
	}
	if root, err = x509.ParseCertificate(rootDER); err != nil {
		t.Fatal(err)
	}
	subDER, err := x509.CreateCertificate(rand.Reader, sub, root, key.Public(), rootKey)
	if err != nil {
		t.Fatal(err)
	}
	return [][]byte{subDER, rootDER}
}
