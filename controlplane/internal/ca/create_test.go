package ca

import (
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestOpenRefusesAForeignKey(t *testing.T) {
	t.Parallel()
	_, one := newTestCA(t, domain.ECDSAP256)
	_, two := newTestCA(t, domain.ECDSAP256)
	mixed := one
	mixed.CA.Chain = two.CA.Chain
	_, err := Open(mixed.CA, lookup(mixed), testRing(t))
	wantFault(t, err, fault.Rejected, "is not the key of CA")

	swapped := one
	swapped.CA.KeyURI, swapped.CA.RootKeyURI = one.CA.RootKeyURI, one.CA.KeyURI
	_, err = Open(swapped.CA, lookup(swapped), testRing(t))
	wantFault(t, err, fault.Rejected, "is not the key for")

	gone := one
	gone.CA.KeyURI = "pkcs11:token"
	_, err = Open(gone.CA, lookup(gone), testRing(t))
	wantFault(t, err, fault.Unsupported, "pkcs11")
}

func TestNewCAsAreChecked(t *testing.T) {
	t.Parallel()
	base := Params{ID: "iss_1", Name: "Test", Now: epoch}
	for field, change := range map[string]func(*Params){
		"name":             func(p *Params) { p.Name = strings.Repeat("x", 41) },
		"root_name":        func(p *Params) { p.RootName = strings.Repeat("x", 65) },
		"organization":     func(p *Params) { p.Organization = strings.Repeat("x", 65) },
		"root_ttl":         func(p *Params) { p.RootTTL = time.Minute },
		"intermediate_ttl": func(p *Params) { p.IntermediateTTL = 20 * year },
		"public_url":       func(p *Params) { p.PublicURL = "http://user:pass@x/" },
		"key_algorithm":    func(p *Params) { p.KeyAlgorithm = "DSA" },
	} {
		p := base
		change(&p)
		_, err := NewSelfSigned(p, testRing(t))
		if !fault.Is(err, fault.Invalid) || fieldOf(err) != field {
			t.Errorf("%s: %v", field, err)
		}
	}
	m, err := NewSelfSigned(base, testRing(t))
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewSelfSigned(base, testRing(t))
	if err != nil {
		t.Fatal(err)
	}
	a, b := open(t, m), open(t, other)
	if a.Certificate().Subject.String() == b.Certificate().Subject.String() {
		t.Error("two CAs share a subject")
	}
	named := base
	named.RootName = "Example Corp Root CA"
	m, err = NewSelfSigned(named, testRing(t))
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(m.Roots()[0])
	if err != nil || root.Subject.CommonName != named.RootName {
		t.Errorf("the root's common name is %v, %v", root.Subject, err)
	}
	if c := a.Certificate(); !c.MaxPathLenZero || c.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || !c.IsCA {
		t.Errorf("intermediate: %+v", c.KeyUsage)
	}
}
