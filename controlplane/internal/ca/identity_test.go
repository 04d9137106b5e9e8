package ca

import (
	"crypto/x509"
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestIdentitiesOfTheMesh(t *testing.T) {
	t.Parallel()
	a := newTestMesh(t)
	key := testKey(t, domain.ECDSAP256)
	csr, err := CheckIdentityCSR(newCSR(t, key, domain.Names{DNS: []string{"ignored.example.test"}}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := CheckIdentityCSR(newCSR(t, testKey(t, domain.Ed25519), domain.Names{})); !fault.Is(err, fault.Rejected) {
		t.Errorf("an Ed25519 identity: %v", err)
	}
	p, err := a.PrepareIdentity(IdentityRequest{PublicKey: csr.PublicKey, Kind: KindAgent, ID: "agt_1", Now: epoch})
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
	verify(t, a, c, x509.ExtKeyUsageClientAuth)
	td, kind, id, err := ParseSPIFFE(c)
	if err != nil || td != "mesh.example.test" || kind != KindAgent || id != "agt_1" || len(c.DNSNames) != 0 {
		t.Fatalf("%s %s %s %v, %v", td, kind, id, c.DNSNames, err)
	}
	if c.NotAfter.Sub(epoch) != DefaultIdentityTTL {
		t.Errorf("ends %s", c.NotAfter)
	}
	for name, r := range map[string]IdentityRequest{
		"slash":      {Kind: KindAgent, ID: "a/../node/x"},
		"no id":      {Kind: KindAgent},
		"kind":       {Kind: "admin", ID: "x"},
		"host names": {Kind: KindAgent, ID: "x", DNS: []string{"x.test"}},
	} {
		r.PublicKey, r.Now = csr.PublicKey, epoch
		if _, err := a.PrepareIdentity(r); err == nil {
			t.Errorf("%s: prepared", name)
		}
	}
	if _, err := a.Prepare(ask(t)); err == nil {
		t.Error("the mesh CA prepared a leaf")
	}
	issuing, _ := newTestCA(t, domain.ECDSAP256)
	if _, err := issuing.PrepareIdentity(IdentityRequest{PublicKey: csr.PublicKey, Kind: KindAgent, ID: "agt_1", Now: epoch}); err == nil {
		t.Error("an issuing CA prepared an identity")
	}
	r := ask(t)
	r.Names = domain.Names{URI: []string{"spiffe://mesh.example.test/agent/agt_1", "spiffe://mesh.example.test/agent/agt_2"}}
	if _, _, _, err := ParseSPIFFE(issue(t, issuing, r)); !fault.Is(err, fault.Unauthorized) {
		t.Errorf("two identities in one certificate: %v", err)
	}
}
