package ca

import (
	"crypto/x509"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// successor makes the mesh CA that follows a.
func successor(t *testing.T, a *Authority) *Authority {
	t.Helper()
	m, err := NewSuccessor(a, Params{Now: epoch}, testRing(t))
	if err != nil {
		t.Fatal(err)
	}
	return open(t, m)
}

// shown is what a node shows: the leaf and what follows it.
func shown(t *testing.T, a *Authority) []*x509.Certificate {
	t.Helper()
	p, err := a.PrepareIdentity(IdentityRequest{PublicKey: testKey(t, domain.ECDSAP256).Public(), Kind: KindNode, ID: "n1", Now: epoch})
	if err != nil {
		t.Fatal(err)
	}
	der, err := a.Sign(p.TBS())
	if err != nil {
		t.Fatal(err)
	}
	chain, err := parseChain(append(append([][]byte{der}, a.Chain()...), a.Roots()...))
	if err != nil {
		t.Fatal(err)
	}
	return chain
}

// accepts verifies chain as one that trusts roots alone.
func accepts(chain []*x509.Certificate, at time.Time, roots ...*x509.Certificate) error {
	pool, above := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range roots {
		pool.AddCert(r)
	}
	for _, c := range chain[1:] {
		above.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: above, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	return err
}

func TestSuccessorIsAcceptedUnderEitherRoot(t *testing.T) {
	t.Parallel()
	first := newTestMesh(t)
	second := successor(t, first)
	third := successor(t, second)
	stranger := newTestMesh(t)
	if first.Generation() != 1 || second.Generation() != 2 || third.Generation() != 3 || second.TrustDomain() != first.TrustDomain() {
		t.Errorf("generations %d, %d, %d of %q and %q", first.Generation(), second.Generation(), third.Generation(), first.TrustDomain(), second.TrustDomain())
	}
	chain := shown(t, second)
	if last := chain[len(chain)-1]; !last.Equal(second.Root()) {
		t.Errorf("the last certificate is %s, not the present root", last.Subject)
	}
	for name, roots := range map[string][]*x509.Certificate{
		"former": {first.Root()}, "present": {second.Root()}, "both": {first.Root(), second.Root()},
	} {
		if err := accepts(chain, epoch, roots...); err != nil {
			t.Errorf("who trusts the %s root: %v", name, err)
		}
	}
	if err := accepts(shown(t, third), epoch, second.Root()); err != nil {
		t.Errorf("the next rollover: %v", err)
	}
	if err := accepts(chain, epoch, stranger.Root()); err == nil {
		t.Error("who trusts another mesh accepts it")
	}
	if err := accepts(shown(t, third), epoch, first.Root()); err == nil {
		t.Error("who slept through two rollovers accepts the third CA")
	}
	// What the former CA signed is nothing to who trusts the present one alone.
	if err := accepts(shown(t, first), epoch, second.Root()); err == nil {
		t.Error("the former CA's identity is accepted under the present root")
	}
	if second.GenerationOf(chain[0]) != 2 || second.GenerationOf(shown(t, first)[0]) != 1 || first.GenerationOf(chain[0]) != 1 {
		t.Error("an identity is of another generation")
	}
	if len(chain) != 4 || chain[1].NotAfter.After(first.NotAfter()) || chain[1].MaxPathLen != 0 || !chain[1].MaxPathLenZero {
		t.Errorf("what vouches: %d certificates, path length %d, until %s", len(chain), chain[1].MaxPathLen, chain[1].NotAfter)
	}
}

func TestRootWithoutRoomVouchesForNobody(t *testing.T) {
	t.Parallel()
	p := Params{ID: domain.MeshCA, Name: "certmesh", Now: epoch}
	p, err := p.check()
	if err != nil {
		t.Fatal(err)
	}
	old := meshTemplate("mesh.example.test", p)
	old.MaxPathLen, old.MaxPathLenZero = 0, true
	root, err := newCertificate(p, old, nil)
	if err != nil {
		t.Fatal(err)
	}
	m, err := material(p, testRing(t), root, root)
	if err != nil {
		t.Fatal(err)
	}
	first := open(t, m)
	next := successor(t, first)
	if CanVouch(first.Root()) || len(next.Chain()) != 0 || len(next.Roots()) != 1 || next.Generation() != 2 {
		t.Errorf("chain %d, roots %d, generation %d", len(next.Chain()), len(next.Roots()), next.Generation())
	}
}

func TestNoSuccessorOfWhatIsNotAValidMesh(t *testing.T) {
	t.Parallel()
	issuing, _ := newTestCA(t, domain.ECDSAP256)
	if _, err := NewSuccessor(issuing, Params{Now: epoch}, testRing(t)); !fault.Is(err, fault.Internal) {
		t.Errorf("of an issuing CA: %v", err)
	}
	mesh := newTestMesh(t)
	_, err := NewSuccessor(mesh, Params{Now: mesh.NotAfter()}, testRing(t))
	wantFault(t, err, fault.Rejected, "expired", "join again")
}

func TestSameCA(t *testing.T) {
	t.Parallel()
	first := newTestMesh(t)
	m, err := NewSuccessor(first, Params{Now: epoch}, testRing(t))
	if err != nil {
		t.Fatal(err)
	}
	a := open(t, m)
	finished := m.CA
	finished.Vouched = nil
	if !a.SameCA(m.CA) || a.SameCA(finished) || first.SameCA(m.CA) {
		t.Error("a CA is taken for another")
	}
}
