package session

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// ReadmitIdentity implements Recovery.
func (f *fakeStore) ReadmitIdentity(_ context.Context, i domain.Identity, op domain.Op) error {
	if err := f.enter("ReadmitIdentity"); err != nil {
		return err
	}
	defer f.mu.Unlock()
	if f.recovered.IsZero() || i.NotBefore.After(f.recovered) {
		return fault.New(fault.Conflict, "it is not of before")
	}
	f.identities[i.Serial] = i
	f.trail = append(f.trail, domain.AuditEvent{Action: "identity.readmitted", Actor: op.Actor})
	return nil
}

// CAs implements Recovery.
func (f *fakeStore) CAs(context.Context) ([]domain.CA, error) {
	if err := f.enter("CAs"); err != nil {
		return nil, err
	}
	defer f.mu.Unlock()
	return f.cas, nil
}

// AdoptLeaves implements Recovery: everything is a version.
func (f *fakeStore) AdoptLeaves(_ context.Context, leaves []domain.FoundLeaf, _ domain.Op) ([]domain.Adopted, error) {
	if err := f.enter("AdoptLeaves"); err != nil {
		return nil, err
	}
	defer f.mu.Unlock()
	outs := make([]domain.Adopted, len(leaves))
	for i, l := range leaves {
		f.adopted = append(f.adopted, l)
		outs[i].Adoption = domain.AdoptionVersion
	}
	return outs, nil
}

// signer is a CA as small as can be.
type signer struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newSigner(t *testing.T, name string) *signer {
	t.Helper()
	s := &signer{t: t, key: newECKey(t)}
	s.cert = s.sign(&x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<33, 0)}, nil, &s.key.PublicKey)
	return s
}

func newECKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (s *signer) sign(c, parent *x509.Certificate, pub *ecdsa.PublicKey) *x509.Certificate {
	s.t.Helper()
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, s.key)
	if err != nil {
		s.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		s.t.Fatal(err)
	}
	return cert
}

func (s *signer) leaf(serial int64, name string) *x509.Certificate {
	return s.sign(&x509.Certificate{SerialNumber: big.NewInt(serial), DNSNames: []string{name}, NotBefore: time.Unix(1, 0), NotAfter: time.Unix(1<<33, 0)},
		s.cert, &newECKey(s.t).PublicKey)
}

// report sends one list as the agent's.
func report(t *testing.T, p *plane, h *host, leaves []*agentpb.HeldLeaf) int32 {
	t.Helper()
	conn := p.dial(h.cert)
	k := p.open(conn)
	k.send(hello(func(x *agentpb.Hello) { x.LeafCount, x.LeavesHash = int32(len(leaves)), leavesHash(leaves) }))
	if !k.welcome().GetReportLeaves() {
		t.Fatal("the list was not asked for")
	}
	st, err := agentpb.NewAgentServiceClient(conn).Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for len(leaves) > 0 {
		n := min(len(leaves), 40)
		err := st.Send(&agentpb.ReportRequest{Body: &agentpb.ReportRequest_Leaves{Leaves: &agentpb.HeldLeaves{Leaves: leaves[:n], Last: n == len(leaves)}}})
		if err != nil {
			t.Fatal(err)
		}
		leaves = leaves[n:]
	}
	r, err := st.CloseAndRecv()
	if err != nil {
		t.Fatal(err)
	}
	return r.GetUnknown()
}

// Leaves that are not on record are handed to the store if a CA of ours signed them; those of strangers, of the mesh CA and
// of a CA that only calls itself ours are not.
func TestReportAdopts(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	ours, mesh, impostor := newSigner(t, "ours"), newSigner(t, "mesh"), newSigner(t, "ours")
	p.store.cas = []domain.CA{{ID: domain.MeshCA, Chain: [][]byte{mesh.cert.Raw}}, {ID: "iss_1", Chain: [][]byte{ours.cert.Raw}}}
	held := func(c *x509.Certificate) *agentpb.HeldLeaf {
		return &agentpb.HeldLeaf{CertificateId: "cert_1", Generation: 3, Certificate: c.Raw}
	}
	good := ours.leaf(7, "a.test")
	n := report(t, p, h, []*agentpb.HeldLeaf{held(good), held(mesh.leaf(8, "a.test")), held(impostor.leaf(9, "a.test")), held(ours.cert),
		{CertificateId: "cert_1", Generation: 3, Certificate: []byte("junk")}})
	if n != 5 || len(p.store.adopted) != 1 {
		t.Fatalf("%d unknown, adopted %+v", n, p.store.adopted)
	}
	l := p.store.adopted[0]
	if l.IssuerID != "iss_1" || l.Serial != "7" || l.AgentID != h.id || l.CertificateID != "cert_1" || l.Generation != 3 ||
		l.Fingerprint != domain.HashHex(good.Raw) || len(l.Names.DNS) != 1 || l.KeyAlgorithm != domain.ECDSAP256 {
		t.Errorf("%+v", l)
	}
	if n := len(p.store.audited("agent.unknown_leaf")); n != 4 {
		t.Errorf("%d unknown leaves are in the trail", n)
	}
}

// A report of nothing but foreign leaves costs so many signatures and no more.
func TestReportOfStrangersIsBounded(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	ours, impostor := newSigner(t, "ours"), newSigner(t, "ours")
	p.store.cas = []domain.CA{{ID: "iss_1", Chain: [][]byte{ours.cert.Raw}}}
	leaf := impostor.leaf(9, "a.test")
	var leaves []*agentpb.HeldLeaf
	for range maxForeign {
		leaves = append(leaves, &agentpb.HeldLeaf{CertificateId: "cert_1", Generation: 3, Certificate: leaf.Raw})
	}
	// What would be adopted comes too late.
	leaves = append(leaves, &agentpb.HeldLeaf{CertificateId: "cert_1", Generation: 4, Certificate: ours.leaf(10, "a.test").Raw})
	if n := report(t, p, h, leaves); n != maxForeign+1 || len(p.store.adopted) != 0 {
		t.Fatalf("%d unknown, adopted %+v", n, p.store.adopted)
	}
}

// An identity that the restore has lost is known again when the agent shows it, if it is older than the recovery.
func TestIdentityOfBeforeTheRestoreIsReadmitted(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	lose := func() {
		p.store.mu.Lock()
		defer p.store.mu.Unlock()
		clear(p.store.identities)
	}
	lose()
	wantCode(t, h.connect().end().Err(), codes.Unauthenticated)
	p.store.mu.Lock()
	p.store.recovered = time.Now().Add(-24 * time.Hour) // the identity is of after it
	p.store.mu.Unlock()
	wantCode(t, h.connect().end().Err(), codes.Unauthenticated)
	p.store.mu.Lock()
	p.store.recovered = time.Now().Add(time.Hour)
	p.store.mu.Unlock()
	h.online()
	if n := len(p.store.audited("identity.readmitted")); n != 1 {
		t.Errorf("%d readmissions are in the trail", n)
	}
	// One that was revoked stays so.
	p.store.mu.Lock()
	for serial, i := range p.store.identities {
		i.RevokedAt = time.Now()
		p.store.identities[serial] = i
	}
	p.store.mu.Unlock()
	wantCode(t, h.connect().end().Err(), codes.Unauthenticated)
}
