// Package issue turns a certificate request into a recorded certificate: the order is compared with the request, the
// to-be-signed bytes are built and linted, recorded as an intent, signed, and recorded as a version.
//
// The intent is written down before the CA's key is used, because a signature cannot be undone: a crash at any point
// leaves either nothing, or an intent whose very bytes the next try signs, or a version that the next try answers with.
// So there is at most one certificate for each (certificate, agent, generation), and a certificate leaves the package
// only after it was recorded.
//
// The package decides nothing about jobs: an error's class says what may be done. Invalid and Rejected are final for
// this request, Conflict means that the job has moved on and the work is to be dropped, RateLimited that the request was not
// looked at yet, the rest may be tried again.
package issue

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"runtime"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/renew"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Request is a certificate request of an agent for a job that awaits it.
type Request struct {
	// Work is the job with its order; Work.Job.Attempt is the attempt that the agent answers.
	Work domain.Work
	// CSR is PKCS#10 in DER, as it came: nothing of it is trusted.
	CSR []byte
	// RequestID goes into audit rows and onto the deployments; empty: the job's.
	RequestID string
}

// Outcome is a certificate that is recorded.
type Outcome struct {
	Version domain.Version
	// Generation is the version's; it is above the job's former one if the agent has lost an earlier key.
	Generation int64
	// Deployments are the open deployment jobs of the version, ready for dispatch.
	Deployments []domain.Work
}

// Store is what is read and written; see controlplane/internal/store for what each outcome means.
type Store interface {
	RecordIntents(ctx context.Context, items []domain.Intent) []domain.IntentOutcome
	RecordIssued(ctx context.Context, items []domain.Issued) []domain.IssuedOutcome
}

// Authority is a CA of ours that is able to sign; *ca.Authority is one. It is safe for concurrent use.
type Authority interface {
	// Prepare builds and lints the to-be-signed bytes without using the CA's key.
	Prepare(r ca.Request) (ca.Prepared, error)
	// Sign signs bytes of a Prepare, of this process or a former one, and returns the certificate.
	Sign(tbs []byte) ([]byte, error)
	// Chain is what a server sends after the leaf.
	Chain() [][]byte
	// NotAfter bounds whatever is issued.
	NotAfter() time.Time
}

// Permits cap the calls in flight toward an issuer.
type Permits interface {
	// Do waits for a permit, runs fn under it and returns fn's error; or ctx's, if it ends first.
	Do(ctx context.Context, issuerID string, fn func(context.Context) error) error
}

// Config is what a Pipeline needs.
type Config struct {
	Store Store
	// Authority opens an issuer's CA by the issuer's id. It is called for each request and is expected to keep CAs open.
	Authority func(ctx context.Context, issuerID string) (Authority, error)
	// Permits are taken for calls to issuers that are not ours. Own CAs take none: they cost CPU alone, which the pipeline
	// bounds itself. Nil: no caps.
	Permits Permits
	Clock   clockwork.Clock
	// NewID makes the id of an intent from its prefix; nil means id.New.
	NewID   func(prefix string) string
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Pipeline issues. It is safe for concurrent use and holds no state about any certificate.
type Pipeline struct {
	cfg      Config
	careless careless
	cpu      chan struct{}
	issued   *prometheus.CounterVec
	refused  *prometheus.CounterVec
	seconds  prometheus.Histogram
}

// maxDraws is how many serial numbers are tried: of 159 random bits even a second is never needed, unless randomness
// itself is broken.
const maxDraws = 3

// New checks cfg and makes a Pipeline.
func New(cfg Config) (*Pipeline, error) {
	if cfg.Store == nil || cfg.Authority == nil || cfg.Clock == nil || cfg.Log == nil {
		return nil, fault.New(fault.Internal, "issue: a store, an authority, a clock and a log are needed")
	}
	if cfg.NewID == nil {
		cfg.NewID = id.New
	}
	p := &Pipeline{
		cfg: cfg,
		// Waiting here costs a request's memory; more at once would only slow each down.
		cpu: make(chan struct{}, 2*runtime.GOMAXPROCS(0)),
		issued: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "certmesh_issue_total", Help: "Certificate requests of agents by outcome: issued, repeated (recorded before) or an error class.",
		}, []string{"outcome"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "certmesh_issue_refused_total",
			Help: "Certificate requests that were not looked at and wait, by reason: careless, their agent sent too many bad ones.",
		}, []string{"reason"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "certmesh_issue_seconds", Help: "Time from a certificate request to the recorded certificate.",
			Buckets: []float64{.002, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10},
		}),
	}
	if cfg.Metrics != nil {
		for _, c := range []prometheus.Collector{p.issued, p.refused, p.seconds} {
			if err := cfg.Metrics.Register(c); err != nil {
				return nil, fault.Wrap(fault.Internal, err, "register the pipeline's metrics")
			}
		}
	}
	return p, nil
}

// Issue checks r against its order, signs what was recorded for it, and records the certificate. The same request again
// gets the same certificate. Another key for an open generation gets the next generation.
func (p *Pipeline) Issue(ctx context.Context, r Request) (Outcome, error) {
	start := p.cfg.Clock.Now()
	out, repeated, err := p.issue(ctx, r)
	p.seconds.Observe(p.cfg.Clock.Since(start).Seconds())
	switch {
	case err != nil:
		p.issued.WithLabelValues(string(fault.ClassOf(err))).Inc()
		return Outcome{}, fmt.Errorf("issue certificate %s for agent %s: %w", r.Work.Job.CertificateID, r.Work.Job.AgentID, err)
	case repeated:
		p.issued.WithLabelValues("repeated").Inc()
	default:
		p.issued.WithLabelValues("issued").Inc()
	}
	p.cfg.Log.Info("certificate issued", "certificate", out.Version.CertificateID, "agent", out.Version.AgentID, "generation", out.Generation,
		"issuer", out.Version.IssuerID, "serial", out.Version.Serial, "not_after", out.Version.NotAfter, "job_id", r.Work.Job.ID,
		"repeated", repeated, "request_id", r.requestID())
	return out, nil
}

func (r Request) requestID() string {
	if r.RequestID != "" {
		return r.RequestID
	}
	return r.Work.Job.RequestID
}

func (p *Pipeline) issue(ctx context.Context, r Request) (out Outcome, repeated bool, err error) {
	j := r.Work.Job
	if j.Kind != domain.JobIssuance && j.Kind != domain.JobRenewal {
		return Outcome{}, false, fault.New(fault.Internal, "job %s is a %s and takes no certificate request", j.ID, j.Kind)
	}
	if !p.careless.mayCheck(j.AgentID, p.cfg.Clock.Now()) {
		p.refused.WithLabelValues("careless").Inc()
		return Outcome{}, false, fault.Limited(p.cfg.Clock.Now().Add(time.Second/carelessRate), "agent %s sends too many bad certificate requests; the next is looked at in a moment", j.AgentID)
	}
	release, err := p.enter(ctx)
	if err != nil {
		return Outcome{}, false, err
	}
	csr, err := ca.CheckCSR(r.CSR, r.Work.Names, r.Work.Profile)
	release()
	if err != nil {
		p.careless.wasBad(j.AgentID, p.cfg.Clock.Now())
		return Outcome{}, false, err
	}
	recorded, err := p.intend(ctx, r, csr)
	if err != nil {
		return Outcome{}, false, err
	}
	version := recorded.Issued
	if version == nil {
		if version, err = p.sign(ctx, r.Work, recorded.Intent, csr.KeyAlgorithm); err != nil {
			return Outcome{}, false, err
		}
	}
	done, err := p.record(ctx, r, recorded.Intent, *version)
	if err != nil {
		return Outcome{}, false, err
	}
	return Outcome{Version: done.Version, Generation: done.Version.Generation, Deployments: done.Deployments}, recorded.Issued != nil, nil
}

// enter waits for a share of the processors.
func (p *Pipeline) enter(ctx context.Context) (release func(), err error) {
	select {
	case p.cpu <- struct{}{}:
		return func() { <-p.cpu }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for a processor: %w", context.Cause(ctx))
	}
}

// intend prepares a certificate and records the intent to sign it; what comes back is what is to be signed, or was.
func (p *Pipeline) intend(ctx context.Context, r Request, csr *ca.CSR) (domain.IntentOutcome, error) {
	j := r.Work.Job
	authority, err := p.cfg.Authority(ctx, r.Work.IssuerID)
	if err != nil {
		return domain.IntentOutcome{}, fmt.Errorf("open issuer %s: %w", r.Work.IssuerID, err)
	}
	for draw := 1; ; draw++ {
		prepared, err := p.prepare(ctx, authority, r.Work, csr)
		if err != nil {
			return domain.IntentOutcome{}, err
		}
		out := p.cfg.Store.RecordIntents(ctx, []domain.Intent{{
			ID: p.cfg.NewID(id.Intent), CertificateID: j.CertificateID, AgentID: j.AgentID, Generation: j.Generation,
			JobID: j.ID, Attempt: j.Attempt, IssuerID: r.Work.IssuerID, Serial: prepared.Serial(), TBS: prepared.TBS(),
			SPKI: csr.SPKI, State: domain.IntentOpen, CreatedAt: p.cfg.Clock.Now(),
			StaleBefore: p.cfg.Clock.Now().Add(-r.Work.Profile.TTL / 20),
		}})[0]
		switch {
		case out.SerialTaken && draw < maxDraws:
			p.cfg.Log.Warn("serial number is taken, drawing another", "issuer", r.Work.IssuerID, "serial", prepared.Serial(), "job_id", j.ID)
			continue
		case out.SerialTaken:
			return out, fault.Wrap(fault.Internal, out.Err, "%d serial numbers in a row are taken; check the random source of this host", draw)
		case out.Err != nil:
			return out, fmt.Errorf("record the intent: %w", out.Err)
		case out.Intent.SPKI != csr.SPKI, out.Intent.CertificateID != j.CertificateID, out.Intent.AgentID != j.AgentID:
			return out, fault.New(fault.Internal, "intent %s is not about the key of this request", out.Intent.ID)
		}
		return out, nil
	}
}

func (p *Pipeline) prepare(ctx context.Context, a Authority, w domain.Work, csr *ca.CSR) (ca.Prepared, error) {
	release, err := p.enter(ctx)
	if err != nil {
		return ca.Prepared{}, err
	}
	defer release()
	return a.Prepare(ca.Request{PublicKey: csr.PublicKey, Names: w.Names, Profile: w.Profile, Now: p.cfg.Clock.Now()})
}

// sign signs the intent's bytes, with the CA that they were prepared for, and makes sure that the result is what the
// intent says.
func (p *Pipeline) sign(ctx context.Context, w domain.Work, in domain.Intent, alg domain.KeyAlgorithm) (*domain.Version, error) {
	authority, err := p.cfg.Authority(ctx, in.IssuerID)
	if err != nil {
		return nil, fmt.Errorf("open issuer %s: %w", in.IssuerID, err)
	}
	var der []byte
	err = p.permitted(ctx, w, in.IssuerID, func(ctx context.Context) error {
		release, err := p.enter(ctx)
		if err != nil {
			return err
		}
		defer release()
		der, err = authority.Sign(in.TBS)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("sign intent %s: %w", in.ID, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the certificate signed for intent %s does not parse", in.ID)
	}
	if ca.SerialText(cert.SerialNumber) != in.Serial || domain.HashHex(cert.RawSubjectPublicKeyInfo) != in.SPKI {
		return nil, fault.New(fault.Internal, "the certificate signed for intent %s is not the one it describes", in.ID)
	}
	return &domain.Version{
		IssuerID: in.IssuerID, Serial: in.Serial, CertificateID: in.CertificateID, AgentID: in.AgentID, Generation: in.Generation,
		DER: der, Chain: authority.Chain(), Fingerprint: domain.HashHex(der), SPKI: in.SPKI, KeyAlgorithm: alg,
		NotBefore: cert.NotBefore.UTC(), NotAfter: cert.NotAfter.UTC(), CreatedAt: domain.Micro(p.cfg.Clock.Now()),
	}, nil
}

func (p *Pipeline) permitted(ctx context.Context, w domain.Work, issuerID string, fn func(context.Context) error) error {
	if p.cfg.Permits == nil || w.IssuerKind == domain.IssuerLocal {
		return fn(ctx)
	}
	return p.cfg.Permits.Do(ctx, issuerID, fn)
}

// record writes the version down. It is called for one that was recorded before, too: the answer brings its deployments.
func (p *Pipeline) record(ctx context.Context, r Request, in domain.Intent, v domain.Version) (domain.IssuedOutcome, error) {
	now := p.cfg.Clock.Now()
	dueAt, err := p.dueAt(ctx, r.Work, v, now)
	if err != nil {
		return domain.IssuedOutcome{}, err
	}
	out := p.cfg.Store.RecordIssued(ctx, []domain.Issued{{
		Version: v, IntentID: in.ID, JobID: r.Work.Job.ID, Attempt: r.Work.Job.Attempt, DueAt: dueAt,
		StatusAt:  domain.ExpiringAt(v.NotBefore, v.NotAfter, r.Work.Policy.AlertThresholdsDays),
		RequestID: r.requestID(), At: now,
	}})[0]
	if out.Err != nil {
		return out, fmt.Errorf("record the certificate: %w", out.Err)
	}
	return out, nil
}

// dueAt is when the leaf is to be renewed. One that ends with its CA rests for at least a twentieth of the profile's
// validity: its successors would end at the same moment, each after a shorter life, and renew faster and faster.
func (p *Pipeline) dueAt(ctx context.Context, w domain.Work, v domain.Version, now time.Time) (time.Time, error) {
	at := renew.DueAt(v.NotBefore, v.NotAfter, w.Policy, renew.Seed(v.CertificateID, v.AgentID))
	if at.IsZero() {
		return at, nil
	}
	authority, err := p.cfg.Authority(ctx, v.IssuerID)
	if err != nil {
		return at, fmt.Errorf("open issuer %s: %w", v.IssuerID, err)
	}
	if rest := domain.Micro(now.Add(w.Profile.TTL / 20)); !v.NotAfter.Before(authority.NotAfter().UTC()) && at.Before(rest) {
		at = rest
	}
	return at, nil
}
