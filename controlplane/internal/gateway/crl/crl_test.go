package crl

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"go.uber.org/goleak"

	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var epoch = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

const validity = 24 * time.Hour

// memory is a store of issuers in one page each.
type memory struct {
	mu      sync.Mutex
	issuers []domain.Issuer
	cas     map[string]domain.CA
	revoked map[string][]domain.RevokedEntry
	crls    map[string]domain.CRL
	fence   domain.Fence
	down    error
	reads   int
	hold    chan struct{} // reads of CRLs wait for it
}

func (m *memory) Issuers(_ context.Context, p domain.PageRequest) ([]domain.Issuer, string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := 0
	if p.After != "" {
		i = 1 + slices.IndexFunc(m.issuers, func(x domain.Issuer) bool { return x.ID == p.After })
	}
	if m.down != nil || i >= len(m.issuers) {
		return nil, "", m.down
	}
	after := ""
	if i+1 < len(m.issuers) {
		after = m.issuers[i].ID
	}
	return m.issuers[i : i+1], after, nil
}

func (m *memory) CA(_ context.Context, id string) (domain.CA, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c, ok := m.cas[id]; ok || m.down != nil {
		return c, m.down
	}
	return domain.CA{}, fault.New(fault.NotFound, "no CA %s", id)
}

func (m *memory) Revoked(_ context.Context, id string, now time.Time) ([]domain.RevokedEntry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []domain.RevokedEntry
	for _, e := range m.revoked[id] {
		if e.NotAfter.After(now) {
			out = append(out, e)
		}
	}
	return out, m.down
}

func (m *memory) CRL(_ context.Context, id string, shard int) (domain.CRL, error) {
	m.mu.Lock()
	hold := m.hold
	m.reads++
	m.mu.Unlock()
	if hold != nil {
		<-hold
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if c, ok := m.crls[id]; ok && shard == 0 || m.down != nil {
		return c, m.down
	}
	return domain.CRL{}, fault.New(fault.NotFound, "no CRL of %s", id)
}

func (m *memory) SaveCRL(_ context.Context, f domain.Fence, c domain.CRL) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case f != m.fence:
		return fault.New(fault.Conflict, "the duty was lost")
	case c.Number <= m.crls[c.IssuerID].Number:
		return fault.New(fault.Conflict, "the number does not rise")
	}
	m.crls[c.IssuerID] = c
	return nil
}

func (m *memory) set(change func(*memory)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	change(m)
}

type world struct {
	t       *testing.T
	store   *memory
	builder *Builder
	cas     map[string]*ca.Authority
	clk     *clockwork.FakeClock
	fence   domain.Fence
	server  *httptest.Server
}

func newWorld(t *testing.T, ids ...string) *world {
	t.Helper()
	w := &world{t: t, clk: clockwork.NewFakeClockAt(epoch), fence: domain.Fence{Duty: "crl_generation", Holder: "n1", Epoch: 3}, cas: map[string]*ca.Authority{},
		store: &memory{cas: map[string]domain.CA{}, revoked: map[string][]domain.RevokedEntry{}, crls: map[string]domain.CRL{}}}
	w.store.fence = w.fence
	ring, err := secret.NewKeyring(bytes.Repeat([]byte{7}, secret.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		m, err := ca.NewSelfSigned(ca.Params{ID: id, Name: "Test", PublicURL: "http://pki.example.test", Now: epoch}, ring)
		if err != nil {
			t.Fatal(err)
		}
		a, err := ca.Open(m.CA, func(id string) (domain.SealedKey, error) {
			return m.Keys[slices.IndexFunc(m.Keys, func(k domain.SealedKey) bool { return k.ID == id })], nil
		}, ring)
		if err != nil {
			t.Fatal(err)
		}
		w.cas[id], w.store.cas[id] = a, m.CA
		w.store.issuers = append(w.store.issuers, domain.Issuer{ID: id, Name: id, Kind: domain.IssuerLocal})
	}
	w.builder = &Builder{Store: w.store, Validity: validity, Log: slog.New(slog.DiscardHandler), Signer: func(_ context.Context, id string) (Signer, error) {
		if a, ok := w.cas[id]; ok {
			return a, nil
		}
		return nil, fault.New(fault.Unauthorized, "the key of %s is sealed under another key", id)
	}}
	w.server = httptest.NewServer(NewServer(w.store, w.clk.Now, slog.New(slog.DiscardHandler)).Handler())
	t.Cleanup(w.server.Close)
	return w
}

func (w *world) build() time.Time {
	w.t.Helper()
	next, err := w.builder.Build(w.t.Context(), w.fence, w.clk.Now())
	if err != nil {
		w.t.Fatal(err)
	}
	return next
}

func (w *world) list(id string) *x509.RevocationList {
	w.t.Helper()
	l, err := x509.ParseRevocationList(w.store.crls[id].DER)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := l.CheckSignatureFrom(w.cas[id].Certificate()); err != nil {
		w.t.Fatal(err)
	}
	return l
}

// answer is a response whose body was read.
type answer struct {
	StatusCode int
	Header     http.Header
}

func (w *world) get(path string, header ...string) (answer, []byte) {
	w.t.Helper()
	r, err := http.NewRequestWithContext(w.t.Context(), http.MethodGet, w.server.URL+path, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := w.server.Client().Do(r)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header}, body
}

func TestBuiltWhenDueAndNotBefore(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "iss_1")
	if next := w.build(); !next.Equal(epoch.Add(validity / 2)) {
		t.Fatalf("next at %s", next)
	}
	first := w.list("iss_1")
	w.clk.Advance(validity/2 - time.Second)
	w.build()
	if n := w.list("iss_1").Number; n.Cmp(first.Number) != 0 {
		t.Fatal("rebuilt before half its validity was gone")
	}
	w.clk.Advance(time.Second)
	if next := w.build(); !next.Equal(epoch.Add(validity)) {
		t.Fatalf("next at %s", next)
	}
	if second := w.list("iss_1"); second.Number.Cmp(first.Number) <= 0 || !second.NextUpdate.Equal(epoch.Add(validity/2+validity)) {
		t.Fatalf("number %s after %s, until %s", second.Number, first.Number, second.NextUpdate)
	}
}

func TestARevocationRebuilds(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "iss_1")
	w.build()
	first := w.list("iss_1")
	// In the same second: the number rises nevertheless.
	w.store.revoked["iss_1"] = []domain.RevokedEntry{{Serial: "1f", RevokedAt: epoch, Reason: 1, NotAfter: epoch.Add(30 * time.Hour)}}
	w.build()
	second := w.list("iss_1")
	if second.Number.Cmp(first.Number) <= 0 || len(second.RevokedCertificateEntries) != 1 {
		t.Fatalf("number %s, %d entries", second.Number, len(second.RevokedCertificateEntries))
	}
	// A changed reason is a change.
	w.store.revoked["iss_1"][0].Reason = 4
	w.build()
	if l := w.list("iss_1"); l.RevokedCertificateEntries[0].ReasonCode != 4 {
		t.Fatalf("reason %d", l.RevokedCertificateEntries[0].ReasonCode)
	}
	// RFC 5280 section 3.3: listed on a CRL from after its expiry, then gone.
	w.clk.Advance(31 * time.Hour)
	w.build()
	if n := len(w.list("iss_1").RevokedCertificateEntries); n != 1 {
		t.Fatal("dropped although no CRL from after its expiry listed it")
	}
	w.clk.Advance(validity)
	w.build()
	if n := len(w.list("iss_1").RevokedCertificateEntries); n != 0 {
		t.Fatalf("%d entries long after expiry", n)
	}
}

// A restore from backup brings an old number back: the next is still greater than any that was published.
func TestNumbersRiseAcrossARestore(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "iss_1")
	w.build()
	backup := w.store.crls["iss_1"]
	w.clk.Advance(validity)
	w.build()
	published := w.list("iss_1").Number
	w.store.crls["iss_1"] = backup
	w.clk.Advance(time.Minute)
	w.build()
	if n := w.list("iss_1").Number; n.Cmp(published) <= 0 {
		t.Fatalf("number %s after %s", n, published)
	}
}

func TestALostFenceWritesNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "iss_1", "iss_2")
	stale := w.fence
	stale.Epoch--
	if _, err := w.builder.Build(t.Context(), stale, epoch); !fault.Is(err, fault.Conflict) || len(w.store.crls) != 0 {
		t.Fatalf("%v, %d CRLs", err, len(w.store.crls))
	}
	// Also behind a CA that is broken: the runner must learn that the duty was lost.
	delete(w.cas, "iss_1")
	if _, err := w.builder.Build(t.Context(), stale, epoch); !fault.Is(err, fault.Conflict) {
		t.Fatalf("hidden: %v", err)
	}
}

func TestOneBrokenCADoesNotStopTheOthers(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "iss_1", "iss_2", "iss_3")
	delete(w.cas, "iss_2")
	w.store.issuers = append(w.store.issuers, domain.Issuer{ID: "iss_4", Kind: "acme"})
	next, err := w.builder.Build(t.Context(), w.fence, epoch)
	if err == nil || !strings.Contains(err.Error(), "iss_2") || strings.Contains(err.Error(), "iss_4") || next.IsZero() {
		t.Fatalf("next %s, %v", next, err)
	}
	w.list("iss_1")
	w.list("iss_3")
}

func TestAnExpiredCAIsLeftInPeace(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "iss_1")
	w.clk.Advance(w.cas["iss_1"].Certificate().NotAfter.Sub(epoch) + time.Second)
	if next := w.build(); !next.IsZero() || len(w.store.crls) != 0 {
		t.Fatalf("next %s, %d CRLs", next, len(w.store.crls))
	}
}

func TestServedAsBuilt(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "iss_1")
	w.store.revoked["iss_1"] = []domain.RevokedEntry{{Serial: "1f", RevokedAt: epoch, Reason: 1, NotAfter: epoch.Add(30 * time.Hour)}}
	w.build()
	for _, path := range []string{"/.well-known/pki/crl/iss_1/0", "/.well-known/pki/crl/iss_1"} {
		resp, body := w.get(path)
		if resp.StatusCode != 200 || !bytes.Equal(body, w.store.crls["iss_1"].DER) || resp.Header.Get("Content-Type") != "application/pkix-crl" ||
			resp.Header.Get("Cache-Control") != "public, max-age=300" || resp.Header.Get("ETag") == "" {
			t.Errorf("%s: %d %v", path, resp.StatusCode, resp.Header)
		}
		again, body := w.get(path, "If-None-Match", resp.Header.Get("ETag"))
		if again.StatusCode != http.StatusNotModified || len(body) != 0 {
			t.Errorf("%s: unchanged, and answered %d", path, again.StatusCode)
		}
	}
	resp, body := w.get("/.well-known/pki/ca/iss_1")
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "application/pkix-cert" || !bytes.Equal(body, w.cas["iss_1"].Certificate().Raw) {
		t.Errorf("CA: %d %v", resp.StatusCode, resp.Header)
	}

	// What a relying party with openssl sees.
	dir := t.TempDir()
	_, der := w.get("/.well-known/pki/crl/iss_1/0")
	crlFile, caFile := filepath.Join(dir, "crl"), filepath.Join(dir, "ca")
	err := errors.Join(os.WriteFile(crlFile, der, 0o600), os.WriteFile(caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: body}), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "openssl", "crl", "-inform", "DER", "-in", crlFile, "-noout", "-text", "-verify", "-CAfile", caFile).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "verify OK") || !strings.Contains(string(out), "Key Compromise") {
		t.Errorf("openssl: %v\n%s", err, out)
	}
}

func TestANewCRLIsSeenAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "iss_1")
	w.build()
	_, before := w.get("/.well-known/pki/crl/iss_1/0")
	w.store.set(func(m *memory) {
		m.revoked["iss_1"] = []domain.RevokedEntry{{Serial: "1f", RevokedAt: epoch, NotAfter: epoch.Add(30 * time.Hour)}}
	})
	w.build()
	w.clk.Advance(fresh)
	if _, after := w.get("/.well-known/pki/crl/iss_1/0", "If-Modified-Since", epoch.Format(http.TimeFormat)); len(after) == 0 || bytes.Equal(before, after) {
		t.Fatal("the former CRL is served for longer than a second")
	}
}

func TestTheLastGoodCopyOutlivesTheStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "iss_1")
	w.build()
	w.store.set(func(m *memory) { m.down = fault.New(fault.Retryable, "postgres at 10.0.0.1 is away") })
	resp, body := w.get("/.well-known/pki/crl/iss_1/0")
	if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" || strings.Contains(string(body), "10.0.0.1") {
		t.Fatalf("nothing to serve yet: %d %s", resp.StatusCode, body)
	}
	w.store.set(func(m *memory) { m.down = nil })
	_, good := w.get("/.well-known/pki/crl/iss_1/0")
	w.store.set(func(m *memory) { m.down = fault.New(fault.Retryable, "away") })
	w.clk.Advance(2 * time.Hour)
	if resp, body := w.get("/.well-known/pki/crl/iss_1/0"); resp.StatusCode != 200 || !bytes.Equal(body, good) {
		t.Fatalf("the copy is not served: %d", resp.StatusCode)
	}
	w.clk.Advance(validity)
	if resp, _ := w.get("/.well-known/pki/crl/iss_1/0"); resp.Header.Get("Cache-Control") != "public, max-age=0" {
		t.Errorf("an overdue CRL may be cached: %s", resp.Header.Get("Cache-Control"))
	}
}

func TestUnknownResources(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "iss_1")
	w.build()
	for _, path := range []string{"/.well-known/pki/crl/iss_2/0", "/.well-known/pki/crl/iss_1/1", "/.well-known/pki/crl/iss_1/x", "/.well-known/pki/crl/iss_1/-1",
		"/.well-known/pki/crl/iss_1/00", "/.well-known/pki/crl/iss_1/+0", "/.well-known/pki/crl/iss_1%2F0/x", "/.well-known/pki/ca/iss_2", "/.well-known/pki/ca/..%2Fx", "/", "/.well-known/pki/"} {
		if resp, body := w.get(path); resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %d %q", path, resp.StatusCode, body)
		}
	}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.server.URL+"/.well-known/pki/crl/iss_1/0", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := w.server.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", resp.StatusCode)
	}
}

func TestManyClientsAreOneRead(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "iss_1")
	w.build()
	hold := make(chan struct{})
	w.store.set(func(m *memory) { m.reads, m.hold = 0, hold })
	var wg sync.WaitGroup
	first := make(chan struct{})
	for i := range 20 {
		wg.Go(func() {
			if i == 0 {
				close(first)
			}
			if resp, _ := w.get("/.well-known/pki/crl/iss_1/0"); resp.StatusCode != 200 {
				t.Errorf("%d", resp.StatusCode)
			}
		})
	}
	<-first
	close(hold)
	wg.Wait()
	// Those that came after the first read had ended find its copy: the clock stands.
	if w.store.reads > 2 {
		t.Errorf("%d reads for 20 clients", w.store.reads)
	}
}
