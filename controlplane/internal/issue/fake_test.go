package issue

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	"github.com/certmesh/certmesh/protocol/fault"
)

var epoch = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

// memory is a store that keeps the promises of the real one for one job at a time.
type memory struct {
	mu       sync.Mutex
	jobs     map[string]*domain.Job
	intents  map[string]domain.Intent // by job: the one of its generation
	versions map[string]domain.Version
	history  []domain.Version
	dueAt    map[string]time.Time
	// taken serials are refused; loseIssued drops that many answers after the commit; beforeSign runs after an intent.
	taken       int
	loseIssued  int
	failIntents error
}

func newMemory(jobs ...domain.Job) *memory {
	m := &memory{jobs: map[string]*domain.Job{}, intents: map[string]domain.Intent{}, versions: map[string]domain.Version{}, dueAt: map[string]time.Time{}}
	for _, j := range jobs {
		m.jobs[j.ID] = &j
	}
	return m
}

func (m *memory) RecordIntents(_ context.Context, items []domain.Intent) []domain.IntentOutcome {
	m.mu.Lock()
	defer m.mu.Unlock()
	outs := make([]domain.IntentOutcome, len(items))
	for i, it := range items {
		outs[i] = m.intendLocked(it)
	}
	return outs
}

func (m *memory) intendLocked(it domain.Intent) domain.IntentOutcome {
	j := m.jobs[it.JobID]
	former, has := m.intents[it.JobID]
	switch {
	case m.failIntents != nil:
		return domain.IntentOutcome{Err: m.failIntents}
	case has && former.State == domain.IntentConsumed && former.SPKI == it.SPKI && j.Attempt == it.Attempt:
		v := m.versions[it.JobID]
		return domain.IntentOutcome{Intent: former, Existing: true, Issued: &v}
	case !j.State.Open() || j.Attempt != it.Attempt:
		return domain.IntentOutcome{Err: fault.New(fault.Conflict, "attempt %d is not awaited", it.Attempt)}
	case m.taken > 0:
		m.taken--
		return domain.IntentOutcome{SerialTaken: true, Err: fault.New(fault.Conflict, "serial is taken")}
	case has && former.SPKI == it.SPKI:
		return domain.IntentOutcome{Intent: former, Existing: true}
	case has:
		j.Generation++
	}
	it.Generation = j.Generation
	m.intents[it.JobID] = it
	return domain.IntentOutcome{Intent: it}
}

func (m *memory) RecordIssued(_ context.Context, items []domain.Issued) []domain.IssuedOutcome {
	m.mu.Lock()
	defer m.mu.Unlock()
	outs := make([]domain.IssuedOutcome, len(items))
	for i, it := range items {
		outs[i] = m.issuedLocked(it)
	}
	return outs
}

func (m *memory) issuedLocked(it domain.Issued) domain.IssuedOutcome {
	j, in := m.jobs[it.JobID], m.intents[it.JobID]
	if in.ID != it.IntentID || in.Serial != it.Version.Serial || in.SPKI != it.Version.SPKI || j.Generation != it.Version.Generation {
		return domain.IssuedOutcome{Err: fault.New(fault.Conflict, "not the intent of job %s", j.ID)}
	}
	if in.State == domain.IntentOpen {
		if j.Attempt != it.Attempt || !j.State.Open() {
			return domain.IssuedOutcome{Err: fault.New(fault.Conflict, "attempt %d is not awaited", it.Attempt)}
		}
		in.State, j.State = domain.IntentConsumed, domain.JobCompleted
		m.intents[it.JobID], m.versions[it.JobID], m.dueAt[it.JobID] = in, it.Version, it.DueAt
		m.history = append(m.history, it.Version)
	}
	if m.loseIssued > 0 {
		m.loseIssued--
		return domain.IssuedOutcome{Err: fault.New(fault.Retryable, "no answer")}
	}
	v := m.versions[it.JobID]
	return domain.IssuedOutcome{Version: v, Deployments: []domain.Work{{Job: domain.Job{ID: "job_deploy", Kind: domain.JobDeployment}, Version: v}}}
}

// counted is a CA that counts what is asked of it.
type counted struct {
	Authority
	signed     atomic.Int64
	prepareErr error
	signErr    error
}

func (c *counted) Prepare(r ca.Request) (ca.Prepared, error) {
	if c.prepareErr != nil {
		return ca.Prepared{}, c.prepareErr
	}
	return c.Authority.Prepare(r)
}

func (c *counted) Sign(tbs []byte) ([]byte, error) {
	if c.signErr != nil {
		return nil, c.signErr
	}
	c.signed.Add(1)
	return c.Authority.Sign(tbs)
}

type bench struct {
	t     *testing.T
	store *memory
	ca    *counted
	clk   *clockwork.FakeClock
	p     *Pipeline
	cfg   Config
	job   domain.Job
}

// newBench is a pipeline of one job over a real CA and a store in memory.
func newBench(t *testing.T) *bench {
	t.Helper()
	ring, err := secret.NewKeyring(bytes.Repeat([]byte{7}, secret.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	m, err := ca.NewSelfSigned(ca.Params{ID: "iss_1", Name: "Test", PublicURL: "http://pki.example.test", Now: epoch}, ring)
	if err != nil {
		t.Fatal(err)
	}
	open := func() *ca.Authority {
		a, err := ca.Open(m.CA, func(id string) (domain.SealedKey, error) {
			i := slices.IndexFunc(m.Keys, func(k domain.SealedKey) bool { return k.ID == id })
			if i < 0 {
				return domain.SealedKey{}, fault.New(fault.NotFound, "no key %s", id)
			}
			return m.Keys[i], nil
		}, ring)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	b := &bench{t: t, clk: clockwork.NewFakeClockAt(epoch), ca: &counted{Authority: open()},
		job: domain.Job{ID: "job_1", Kind: domain.JobIssuance, State: domain.JobAwaitingCSR, CertificateID: "cert_1", AgentID: "agt_1", Generation: 1, Attempt: 1, RequestID: "req_job"}}
	b.store = newMemory(b.job)
	ids := atomic.Int64{}
	b.cfg = Config{Store: b.store, Clock: b.clk, Log: slog.New(slog.DiscardHandler),
		Authority: func(_ context.Context, issuerID string) (Authority, error) {
			if issuerID != "iss_1" {
				return nil, fault.New(fault.NotFound, "there is no issuer %s", issuerID)
			}
			return b.ca, nil
		},
		NewID: func(prefix string) string { return prefix + "_" + strconv.FormatInt(ids.Add(1), 10) }}
	b.restart()
	return b
}

// restart is a new process over the same store.
func (b *bench) restart() {
	b.t.Helper()
	cfg := b.cfg
	cfg.Metrics = prometheus.NewRegistry()
	p, err := New(cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	b.p = p
}

var ordered = domain.Names{CommonName: "www.example.test", DNS: []string{"www.example.test", "example.test"}, IP: []string{"192.0.2.7"}}

func (b *bench) work() domain.Work {
	return domain.Work{Job: b.job, Names: ordered, KeyAlgorithm: domain.ECDSAP256, IssuerID: "iss_1", IssuerKind: domain.IssuerLocal,
		Profile: domain.Profile{ID: "prof_1", KeyAlgorithm: domain.ECDSAP256, Allowed: []domain.KeyAlgorithm{domain.ECDSAP256, domain.RSA2048},
			EKUs: []domain.EKU{domain.EKUServerAuth}, TTL: 47 * 24 * time.Hour, MaxTTL: 47 * 24 * time.Hour}}
}

func (b *bench) request(key crypto.Signer) Request {
	return Request{Work: b.work(), CSR: newCSR(b.t, key, ordered)}
}

func newCSR(t testing.TB, key crypto.Signer, n domain.Names) []byte {
	t.Helper()
	r := &x509.CertificateRequest{Subject: pkix.Name{CommonName: n.CommonName}, DNSNames: n.DNS}
	for _, ip := range n.IP {
		r.IPAddresses = append(r.IPAddresses, net.ParseIP(ip))
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, r, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}
