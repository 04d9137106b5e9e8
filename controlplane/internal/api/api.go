// Package api is the operators' API over gRPC: all services of protocol/operator/v1, and the interceptors that every
// call passes, whichever service it is for:
//
//	observe → authenticate → authorise → validate → handler
//
// observe gives the call a request id, contains panics, audits denials and failed writes (a write that succeeds is
// audited by the store in its own transaction), turns the error into a gRPC status, logs one line and measures. The
// other three refuse. Handlers therefore hold only what is theirs: names to ids, the store's use case, and after the
// commit the wake-ups and notices.
//
// The package makes no decision about certificates itself: which names may be signed is ca's to say, when a leaf is due
// and which policies can be met is renew's, whether a target's settings are good its connector's.
package api

import (
	"context"
	"encoding/json"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"

	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/fair"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// Store is what the services need of the store. Each write is one transaction with its audit row.
type Store interface {
	authz.Keys
	Certificates
	Agents
	Jobs
	Catalogue
	System
}

// Certificates keeps managed certificates.
type Certificates interface {
	CreateCertificate(ctx context.Context, n domain.NewCertificate) (domain.Certificate, []domain.Job, error)
	RenewCertificate(ctx context.Context, certificateID, reason string, op domain.Op) ([]domain.Job, error)
	DeployCertificate(ctx context.Context, certificateID, reason string, op domain.Op) ([]domain.Job, error)
	VerifyCertificate(ctx context.Context, certificateID, reason string, op domain.Op) ([]domain.Job, error)
	RevokeCertificate(ctx context.Context, certificateID string, reason domain.RevocationReason, op domain.Op) (domain.Certificate, []string, error)
	CertificateView(ctx context.Context, idOrName string) (domain.CertificateView, error)
	Certificates(ctx context.Context, f domain.CertificateFilter, p domain.PageRequest) ([]domain.Certificate, map[string]domain.PlacementCounts, string, error)
	Versions(ctx context.Context, certificateID string, p domain.PageRequest) ([]domain.Version, string, error)
}

// Agents keeps hosts and who may join.
type Agents interface {
	Agent(ctx context.Context, idOrName string) (domain.Agent, error)
	Agents(ctx context.Context, state domain.AgentState, p domain.PageRequest) ([]domain.Agent, string, error)
	RetireAgent(ctx context.Context, agentID, reason string, op domain.Op) (domain.Agent, error)
	ReleaseAgent(ctx context.Context, agentID string, op domain.Op) (domain.Agent, error)
	Rejections(ctx context.Context, agentID string) ([]domain.StateRejection, error)
	CreateJoinToken(ctx context.Context, t domain.JoinToken, op domain.Op) error
	JoinTokens(ctx context.Context, p domain.PageRequest) ([]domain.JoinToken, string, error)
	RevokeJoinToken(ctx context.Context, tokenID string, op domain.Op) (domain.JoinToken, error)
	TrustBundle(ctx context.Context) (version int64, roots [][]byte, err error)
}

// Jobs keeps work.
type Jobs interface {
	Jobs(ctx context.Context, f domain.JobFilter, p domain.PageRequest) ([]domain.Job, string, error)
	Job(ctx context.Context, jobID string) (domain.Job, error)
	CancelJob(ctx context.Context, jobID string, op domain.Op) (domain.Job, error)
	// ApproveJob and RejectJob decide on a job that waits for approval; Forbidden for who asked for it.
	ApproveJob(ctx context.Context, jobID, reason string, op domain.Op) (domain.Job, error)
	RejectJob(ctx context.Context, jobID, reason string, op domain.Op) (domain.Job, error)
}

// Catalogue keeps issuers, profiles and targets.
type Catalogue interface {
	CreateIssuer(ctx context.Context, i domain.Issuer, ca domain.CA, keys []domain.SealedKey, op domain.Op) error
	Issuers(ctx context.Context, p domain.PageRequest) ([]domain.Issuer, string, error)
	Issuer(ctx context.Context, idOrName string) (domain.Issuer, error)
	CA(ctx context.Context, issuerID string) (domain.CA, error)
	CAs(ctx context.Context) ([]domain.CA, error)
	Profiles(ctx context.Context, p domain.PageRequest) ([]domain.Profile, string, error)
	Profile(ctx context.Context, idOrName string) (domain.Profile, error)
	CreateTarget(ctx context.Context, t domain.Target, op domain.Op) error
	Targets(ctx context.Context, agentID string, p domain.PageRequest) ([]domain.Target, string, error)
	Target(ctx context.Context, idOrName string) (domain.Target, error)
}

// System counts and keeps the trail.
type System interface {
	Counts(ctx context.Context) (domain.Counts, error)
	AuditEvents(ctx context.Context, resource string, p domain.PageRequest) ([]domain.AuditEvent, string, error)
	Audit(ctx context.Context, events []domain.AuditEvent) error
	// SchemaVersion is what the database has and what this program was built for.
	SchemaVersion(ctx context.Context) (has, wants int64, err error)
}

// Sessions are the agents' streams that this node holds. Calls return at once; for an agent that another node holds
// they do what they can (Wake passes the notice on) or nothing.
type Sessions interface {
	// Wake makes the holder of the agent's stream look at its open jobs. It is called after the commit.
	Wake(agentID string)
	// Holds reports whether this node holds the agent's stream.
	Holds(agentID string) bool
	// Disconnect ends the agent's stream for good.
	Disconnect(agentID, reason string)
	// PushState sends the agent its desired state again.
	PushState(agentID string)
	// Credits are the agent's grants that are not used up, by class ("key", "deploy", "verify"); empty if not held here.
	Credits(agentID string) map[string]int32
	// Count is how many streams this node holds.
	Count() int64
}

// LocalCA asks for a CA of ours: self-signed, or below CertificatePEM when that is given.
type LocalCA struct {
	Name, CommonName string
	KeyAlgorithm     domain.KeyAlgorithm
	// CertificatePEM and KeyPEM are set together.
	CertificatePEM, KeyPEM string
}

// Issuers makes CAs; nothing is stored by it.
type Issuers interface {
	// CreateLocal returns what is to be stored of a new local CA. Errors: Invalid with the field names
	// of ca or of the request.
	CreateLocal(ctx context.Context, r LocalCA) (domain.Issuer, domain.CA, []domain.SealedKey, error)
}

// DutyStatus is what one duty last did on this node.
type DutyStatus struct {
	Name      string
	Interval  time.Duration
	LastRun   time.Time
	LastError string
	Epoch     domain.Epoch
}

// Node describes this process.
type Node struct {
	ID, Version string
	// Store is the dialect in use.
	Store       string
	TrustDomain string
	StartedAt   time.Time
}

// Config is what New needs; every field is required unless it says otherwise.
type Config struct {
	Store    Store
	Sessions Sessions
	Issuers  Issuers
	// CheckTarget reports every problem of a target's settings; an unknown kind is a problem of field "kind".
	CheckTarget func(kind string, settings json.RawMessage) []target.Problem
	Hub         *hub.Hub
	Clock       clockwork.Clock
	Log         *slog.Logger
	Node        Node
	Duties      func() []DutyStatus
	// Changes is how many calls that change something are worked on at the same time, at least 1; 256 fill the commits that
	// they share. ChangesWaiting more wait, a quarter of them of one API key; those beyond are refused.
	Changes, ChangesWaiting int
	// Revoked is called after certificates of an issuer were revoked, and after an issuer was made, so that its CRL is
	// built anew. Optional.
	Revoked func(issuerID string)
	// Metrics may be nil.
	Metrics prometheus.Registerer
}

// API implements the operators' services.
type API struct {
	Config
	calls *prometheus.HistogramVec
	// turned counts the calls that were turned away before anything was done.
	turned *prometheus.CounterVec
	// strangers bounds the audit rows that callers without a key can cause by refused calls, refused those of others.
	strangers, refused *rate.Limiter
	changes            *fair.Gate
	watchers           atomic.Int64
	drain              chan struct{}
	drainOnce          sync.Once
}

// The services are embedded for forward compatibility of the generated interfaces only.
type (
	certificates struct {
		operatorpb.UnimplementedCertificatesServiceServer
		*API
	}
	agents struct {
		operatorpb.UnimplementedAgentsServiceServer
		*API
	}
	jobs struct {
		operatorpb.UnimplementedJobsServiceServer
		*API
	}
	issuers struct {
		operatorpb.UnimplementedIssuersServiceServer
		*API
	}
	targets struct {
		operatorpb.UnimplementedTargetsServiceServer
		*API
	}
	system struct {
		operatorpb.UnimplementedSystemServiceServer
		*API
	}
)

// New returns the API. Errors: Internal when a required part is missing or the metrics are registered already.
func New(c Config) (*API, error) {
	switch {
	case c.Store == nil, c.Sessions == nil, c.Issuers == nil, c.CheckTarget == nil,
		c.Hub == nil, c.Clock == nil, c.Log == nil, c.Duties == nil:
		return nil, fault.New(fault.Internal, "api: a part of Config is missing")
	}
	a := &API{
		Config: c,
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "certmesh", Subsystem: "api", Name: "request_seconds",
			Help:    "Time of operators' calls by method and gRPC code.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, []string{"method", "code"}),
		turned: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "certmesh", Subsystem: "api", Name: "refused_total",
			Help: "Calls to change something that were not begun, by reason: busy, too many wait; left, the caller gave up waiting.",
		}, []string{"reason"}),
		// Ten a second with a burst of fifty: enough to see an attack, too few to fill a disk.
		strangers: rate.NewLimiter(10, 50),
		// A script that repeats a failing call; people do not come near it.
		refused: rate.NewLimiter(50, 500),
		changes: fair.NewGate(c.Changes, (c.ChangesWaiting+waitingShare-1)/waitingShare, c.ChangesWaiting),
		drain:   make(chan struct{}),
	}
	if c.Metrics != nil {
		watchers := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "certmesh", Subsystem: "api", Name: "watchers", Help: "Open Watch streams.",
		}, func() float64 { return float64(a.watchers.Load()) })
		waiting := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "certmesh", Subsystem: "api", Name: "changes_waiting", Help: "Calls that wait for their turn to change something.",
		}, func() float64 { _, n := a.changes.Load(); return float64(n) })
		for _, m := range []prometheus.Collector{a.calls, a.turned, watchers, waiting} {
			if err := c.Metrics.Register(m); err != nil {
				return nil, fault.Wrap(fault.Internal, err, "api: register metrics")
			}
		}
	}
	return a, nil
}

// Register adds the services to a server that was made with Interceptors.
func (a *API) Register(r grpc.ServiceRegistrar) {
	operatorpb.RegisterCertificatesServiceServer(r, certificates{API: a})
	operatorpb.RegisterAgentsServiceServer(r, agents{API: a})
	operatorpb.RegisterJobsServiceServer(r, jobs{API: a})
	operatorpb.RegisterIssuersServiceServer(r, issuers{API: a})
	operatorpb.RegisterTargetsServiceServer(r, targets{API: a})
	operatorpb.RegisterSystemServiceServer(r, system{API: a})
}

// Drain ends every Watch with UNAVAILABLE, so that a graceful stop of the server is not held up by them. Twice is fine.
func (a *API) Drain() { a.drainOnce.Do(func() { close(a.drain) }) }

func (a *API) now() time.Time { return domain.Micro(a.Clock.Now()) }

// op is on whose behalf this call changes something.
func (a *API) op(ctx context.Context) domain.Op {
	c := callOf(ctx)
	return domain.Op{Actor: c.actor(), RequestID: c.requestID, RemoteAddr: c.remote, At: a.now()}
}

// opFor is op under the id that the caller gave the request itself, where there is one: the jobs and audit rows of a
// call that is repeated then carry the same.
func (a *API) opFor(ctx context.Context, requestID string) domain.Op {
	op := a.op(ctx)
	if requestID != "" {
		op.RequestID = requestID
	}
	return op
}

// changed follows the commit that made or ended jobs: the holders of their agents' streams look at the open jobs again
// and send or take back, and watchers are told.
func (a *API) changed(jobs []domain.Job) {
	woken := map[string]bool{}
	for _, j := range jobs {
		a.Hub.Publish(hub.Notice{Kind: hub.Jobs, ID: j.ID})
		if j.AgentID != "" && !woken[j.AgentID] {
			woken[j.AgentID] = true
			a.Sessions.Wake(j.AgentID)
		}
	}
}

func newID(prefix string) string { return id.New(prefix) }
