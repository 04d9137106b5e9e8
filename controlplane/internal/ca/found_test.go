package ca

import (
	"slices"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// What a CA signed is known as its own, with the chain that a server sends; what another signed is nobody's.
func TestFound(t *testing.T) {
	t.Parallel()
	for _, alg := range []domain.KeyAlgorithm{domain.ECDSAP256, domain.RSA2048, domain.Ed25519} {
		a, m := newTestCA(t, alg)
		other, theirs := newTestCA(t, domain.ECDSAP256)
		ours := m.CA
		ours.ID = "iss_1"
		theirs.CA.ID = "iss_2"
		leaf := issue(t, a, ask(t))
		f, err := Found(leaf.Raw, []domain.CA{theirs.CA, ours})
		if err != nil {
			t.Fatalf("%s: %v", alg, err)
		}
		if f.IssuerID != "iss_1" || f.Serial != SerialText(leaf.SerialNumber) || f.Fingerprint != domain.HashHex(leaf.Raw) || f.KeyAlgorithm != domain.ECDSAP256 ||
			!f.NotAfter.Equal(leaf.NotAfter) || !domain.SameNames(f.Names, ask(t).Names) {
			t.Errorf("%s: %+v", alg, f)
		}
		if !slices.EqualFunc(f.Chain, a.Chain(), slices.Equal) {
			t.Errorf("%s: a chain of %d, %d are sent", alg, len(f.Chain), len(a.Chain()))
		}
		_, err = Found(leaf.Raw, []domain.CA{theirs.CA})
		wantFault(t, err, fault.NotFound)
		mesh := ours
		mesh.ID = domain.MeshCA
		_, err = Found(leaf.Raw, []domain.CA{mesh})
		wantFault(t, err, fault.NotFound)
		_, err = Found(a.Certificate().Raw, []domain.CA{ours})
		wantFault(t, err, fault.Invalid)
		_, err = Found([]byte("junk"), []domain.CA{ours})
		wantFault(t, err, fault.Invalid)
		_, err = Found(issue(t, other, ask(t)).Raw, []domain.CA{ours})
		wantFault(t, err, fault.NotFound)

		der, err := a.CRL(41, 0, []domain.RevokedEntry{{Serial: "1f", RevokedAt: epoch, Reason: 4}}, epoch, epoch.Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		l, err := ReadCRL(der, []domain.CA{theirs.CA, ours})
		if err != nil || l.IssuerID != "iss_1" || l.Number != 41 || len(l.Entries) != 1 || l.Entries[0].Serial != "1f" || l.Entries[0].Reason != 4 {
			t.Errorf("%s: %+v %v", alg, l, err)
		}
		_, err = ReadCRL(der, []domain.CA{theirs.CA})
		wantFault(t, err, fault.Invalid)
		_, err = ReadCRL([]byte("junk"), []domain.CA{ours})
		wantFault(t, err, fault.Invalid)
	}
}
