package issue

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/renew"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func mustIssue(t *testing.T, b *bench, r Request) Outcome {
	t.Helper()
	out, err := b.p.Issue(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestIssuedAsOrdered(t *testing.T) {
	t.Parallel()
	b, key := newBench(t), newKey(t)
	out := mustIssue(t, b, b.request(key))
	c, err := x509.ParseCertificate(out.Version.DER)
	if err != nil {
		t.Fatal(err)
	}
	v := out.Version
	if !key.PublicKey.Equal(c.PublicKey) || c.Subject.CommonName != "www.example.test" || len(c.DNSNames) != 2 || len(c.IPAddresses) != 1 {
		t.Errorf("issued %s for %v, %v", c.Subject, c.DNSNames, c.IPAddresses)
	}
	if v.CertificateID != "cert_1" || v.AgentID != "agt_1" || v.Generation != 1 || out.Generation != 1 || v.IssuerID != "iss_1" ||
		v.KeyAlgorithm != domain.ECDSAP256 || v.Fingerprint != domain.HashHex(v.DER) || len(v.Chain) != 1 || !v.NotAfter.Equal(c.NotAfter) {
		t.Errorf("version: %+v", v)
	}
	if len(out.Deployments) != 1 || !bytes.Equal(out.Deployments[0].Version.DER, v.DER) {
		t.Errorf("deployments: %+v", out.Deployments)
	}
	if want := renew.DueAt(v.NotBefore, v.NotAfter, domain.Policy{}, renew.Seed("cert_1", "agt_1")); !b.store.dueAt["job_1"].Equal(want) {
		t.Errorf("due at %s, want %s", b.store.dueAt["job_1"], want)
	}
	if n := b.ca.signed.Load(); n != 1 {
		t.Errorf("signed %d times", n)
	}
}

func TestRefusedBeforeTheKeyIsUsed(t *testing.T) {
	t.Parallel()
	good := newKey(t)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal("the weak key that must be refused cannot be made: ", err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	extra := ordered
	extra.DNS = append([]string{"other.example.test"}, ordered.DNS...)
	missing := ordered
	missing.DNS = ordered.DNS[:1]
	tampered := func(r *Request) { r.CSR[len(r.CSR)-1] ^= 1 }
	csr := func(key crypto.Signer, n domain.Names) func(*Request) {
		return func(r *Request) { r.CSR = newCSR(t, key, n) }
	}
	for _, c := range []struct {
		name   string
		change func(*Request)
		setup  func(*bench)
		class  fault.Class
		says   string
	}{
		{"extra names", csr(good, extra), nil, fault.Invalid, "other.example.test"},
		{"missing names", csr(good, missing), nil, fault.Invalid, "it lacks"},
		{"weak key", csr(weak, ordered), nil, fault.Rejected, "1024"},
		{"algorithm that the profile does not allow", csr(edKey, ordered), nil, fault.Rejected, "Ed25519"},
		{"wrong signature", tampered, nil, fault.Invalid, "signature"},
		{"no request", func(r *Request) { r.CSR = nil }, nil, fault.Invalid, "0 bytes"},
		{"garbage", func(r *Request) { r.CSR = []byte("garbage") }, nil, fault.Invalid, "PKCS#10"},
		{"stale attempt", func(r *Request) { r.Work.Job.Attempt = 7 }, nil, fault.Conflict, "attempt 7"},
		{"deployment", func(r *Request) { r.Work.Job.Kind = domain.JobDeployment }, nil, fault.Internal, "takes no certificate request"},
		{"unknown issuer", func(r *Request) { r.Work.IssuerID = "iss_2" }, nil, fault.NotFound, "iss_2"},
		{"lint failure", nil, func(b *bench) { b.ca.prepareErr = fault.New(fault.Rejected, "lint e_x: error") }, fault.Rejected, "lint e_x"},
		{"expired CA", nil, func(b *bench) { b.clk.Advance(40 * 365 * 24 * time.Hour) }, fault.Rejected, "expired"},
		{"store down", nil, func(b *bench) { b.store.failIntents = fault.New(fault.Retryable, "the database is away") }, fault.Retryable, "away"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			if c.setup != nil {
				c.setup(b)
			}
			r := b.request(good)
			if c.change != nil {
				c.change(&r)
			}
			out, err := b.p.Issue(t.Context(), r)
			if !fault.Is(err, c.class) || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("got %v (%s), want %s and %q", err, fault.ClassOf(err), c.class, c.says)
			}
			if out.Version.DER != nil || b.ca.signed.Load() != 0 || len(b.store.history) != 0 {
				t.Fatal("something was signed or recorded")
			}
			if c.class != fault.Retryable && len(b.store.intents) != 0 {
				t.Fatal("an intent was recorded")
			}
		})
	}
}

// A crash after the intent: the next try signs the recorded bytes, although it would build others by now.
func TestRecordedIntentIsSignedAsItIs(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	r := b.request(newKey(t))
	b.ca.signErr = fault.New(fault.Retryable, "the process dies here")
	if _, err := b.p.Issue(t.Context(), r); !fault.Is(err, fault.Retryable) {
		t.Fatal(err)
	}
	intended := b.store.intents["job_1"]
	b.ca.signErr = nil
	b.clk.Advance(90 * time.Minute)
	b.restart()
	out := mustIssue(t, b, r)
	c, err := x509.ParseCertificate(out.Version.DER)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(c.RawTBSCertificate, intended.TBS) || out.Version.Serial != intended.Serial || out.Generation != 1 {
		t.Fatal("another certificate than the recorded one was signed")
	}
}

func TestLostAnswerGetsTheSameCertificateAgain(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	r := b.request(newKey(t))
	b.store.loseIssued = 1
	if _, err := b.p.Issue(t.Context(), r); !fault.Is(err, fault.Retryable) {
		t.Fatal(err)
	}
	b.restart()
	again := mustIssue(t, b, r)
	if len(b.store.history) != 1 || !bytes.Equal(again.Version.DER, b.store.history[0].DER) || len(again.Deployments) != 1 {
		t.Fatalf("%d versions recorded; the answer is %s", len(b.store.history), again.Version.Serial)
	}
	if n := b.ca.signed.Load(); n != 1 {
		t.Fatalf("signed %d times", n)
	}
}

func TestAnotherKeyGetsTheNextGeneration(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.ca.signErr = fault.New(fault.Retryable, "the process dies here")
	if _, err := b.p.Issue(t.Context(), b.request(newKey(t))); err == nil {
		t.Fatal("signed")
	}
	b.ca.signErr = nil
	key := newKey(t)
	out := mustIssue(t, b, b.request(key))
	c, err := x509.ParseCertificate(out.Version.DER)
	if err != nil {
		t.Fatal(err)
	}
	if out.Generation != 2 || out.Version.Generation != 2 || !key.PublicKey.Equal(c.PublicKey) {
		t.Fatalf("generation %d", out.Generation)
	}
}

func TestSerialCollisionDrawsAgainAndEnds(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.store.taken = maxDraws - 1
	mustIssue(t, b, b.request(newKey(t)))

	b = newBench(t)
	b.store.taken = maxDraws + 5
	_, err := b.p.Issue(t.Context(), b.request(newKey(t)))
	if !fault.Is(err, fault.Internal) || b.store.taken != 5 || b.ca.signed.Load() != 0 {
		t.Fatalf("%v; %d draws left", err, b.store.taken)
	}
}

// A leaf that ends with its CA must not renew ever faster as that end comes near.
func TestLeavesThatEndWithTheirCADoNotRenewFaster(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	end := b.ca.NotAfter()
	b.clk.Advance(end.Sub(epoch) - time.Hour)
	out := mustIssue(t, b, b.request(newKey(t)))
	if !out.Version.NotAfter.Equal(end) {
		t.Fatalf("ends %s, its CA %s", out.Version.NotAfter, end)
	}
	if at, least := b.store.dueAt["job_1"], b.clk.Now().Add(47*24*time.Hour/20); at.Before(least) {
		t.Fatalf("due at %s, before %s", at, least)
	}
}

type permits struct {
	mu  sync.Mutex
	got []string
	err error
}

func (p *permits) Do(ctx context.Context, issuerID string, fn func(context.Context) error) error {
	p.mu.Lock()
	p.got = append(p.got, issuerID)
	err := p.err
	p.mu.Unlock()
	if err != nil {
		return err
	}
	return fn(ctx)
}

func TestOnlyForeignIssuersTakePermits(t *testing.T) {
	t.Parallel()
	for kind, want := range map[string]int{domain.IssuerLocal: 0, "acme": 1} {
		b, p := newBench(t), &permits{}
		b.cfg.Permits = p
		b.restart()
		r := b.request(newKey(t))
		r.Work.IssuerKind = kind
		mustIssue(t, b, r)
		if len(p.got) != want {
			t.Errorf("%s: %d permits", kind, len(p.got))
		}
	}
	b, p := newBench(t), &permits{err: context.Canceled}
	b.cfg.Permits = p
	b.restart()
	r := b.request(newKey(t))
	r.Work.IssuerKind = "acme"
	if _, err := b.p.Issue(t.Context(), r); !errors.Is(err, context.Canceled) || b.ca.signed.Load() != 0 {
		t.Errorf("signed without a permit: %v", err)
	}
}

// The same request at once from several streams: one certificate, whoever wins.
func TestConcurrentRequestsAreOneCertificate(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	r := b.request(newKey(t))
	outs := make([]Outcome, 12)
	var wg sync.WaitGroup
	for i := range outs {
		wg.Go(func() {
			var err error
			if outs[i], err = b.p.Issue(t.Context(), r); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, o := range outs {
		if !bytes.Equal(o.Version.DER, outs[0].Version.DER) {
			t.Fatal("two certificates are about")
		}
	}
	if len(b.store.history) != 1 {
		t.Fatalf("%d versions recorded", len(b.store.history))
	}
}

func TestWaitingEndsWithTheContext(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for range cap(b.p.cpu) {
		b.p.cpu <- struct{}{}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.p.Issue(ctx, b.request(newKey(t))); !fault.Is(err, fault.Retryable) {
		t.Fatal(err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	if _, err := New(Config{}); err == nil {
		t.Fatal("an empty configuration was accepted")
	}
}
