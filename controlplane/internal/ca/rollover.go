package ca

import (
	"crypto/x509"
	"fmt"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	"github.com/certmesh/certmesh/protocol/fault"
)

// NewSuccessor makes the mesh CA that is to follow present, of the same trust domain and with present's vouching for it:
// who trusts present's root alone accepts what the new one signs, until present's root expires. p is as for NewMesh.
// CanVouch says whether Vouched is there.
func NewSuccessor(present *Authority, p Params, ring *secret.Keyring) (Material, error) {
	if present.trustDomain == "" {
		return Material{}, fault.New(fault.Internal, "CA %q is not the mesh CA", present.id)
	}
	if !p.Now.Before(present.notAfter) {
		return Material{}, fault.New(fault.Rejected, "the mesh CA expired at %s and vouches for nobody any more; agents have to join again", present.notAfter)
	}
	m, err := NewMesh(present.trustDomain, p, ring)
	if err != nil {
		return Material{}, err
	}
	m.CA.Generation = present.generation + 1
	if !CanVouch(present.Root()) {
		return m, nil
	}
	next, err := x509.ParseCertificate(m.CA.Chain[0])
	if err != nil {
		return Material{}, fault.Wrap(fault.Internal, err, "read back the next mesh CA")
	}
	cross, err := vouch(present, next, p)
	if err != nil {
		return Material{}, fmt.Errorf("vouch for the next mesh CA: %w", err)
	}
	m.CA.Vouched = [][]byte{cross.Raw, present.Root().Raw}
	return m, nil
}

// CanVouch says whether a root allows a CA below it. The first ones that were made did not.
func CanVouch(root *x509.Certificate) bool { return !root.MaxPathLenZero }

// vouch signs next's subject and key with present's key.
func vouch(present *Authority, next *x509.Certificate, p Params) (*x509.Certificate, error) {
	pub, err := inspectKey(next.PublicKey)
	if err != nil {
		return nil, err
	}
	t := meshTemplate(present.trustDomain, Params{Now: p.Now, Name: "certmesh", Organization: p.Organization, RootTTL: DefaultRootTTL})
	t.Subject, t.NotAfter = next.Subject, next.NotAfter
	t.MaxPathLen, t.MaxPathLenZero = 0, true
	if present.notAfter.Before(t.NotAfter) {
		t.NotAfter = present.notAfter
	}
	return certify(t, pub, &authority{certificate: present.Certificate(), key: present.key, scheme: present.scheme})
}

// GenerationOf is that of the mesh CA which signed a verified identity: this one or, while there are two, the one before.
func (a *Authority) GenerationOf(identity *x509.Certificate) int64 {
	if string(identity.AuthorityKeyId) == string(a.Certificate().SubjectKeyId) {
		return a.generation
	}
	return max(a.generation-1, 1)
}

// SameCA says whether a is open with exactly this material.
func (a *Authority) SameCA(c domain.CA) bool {
	same := func(have []*x509.Certificate, want [][]byte) bool {
		if len(have) != len(want) {
			return false
		}
		for i, h := range have {
			if string(h.Raw) != string(want[i]) {
				return false
			}
		}
		return true
	}
	return same(a.chain, c.Chain) && same(a.vouched, c.Vouched)
}
