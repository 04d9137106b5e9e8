package storetest

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/store"
)

// Start is the time at which a World begins.
var Start = time.Date(2026, 1, 5, 12, 0, 0, 0, time.UTC)

// World is a store with a small estate in it, made only through the store's own methods, and a clock of its own.
type World struct {
	Engine  Engine
	DSN     string
	S       *store.Store
	Issuer  string
	Profile string

	mu     sync.Mutex
	now    time.Time
	serial int
	db     *sql.DB
}

// NewWorld opens a store of e and makes a profile and an issuer.
func NewWorld(t testing.TB, e Engine, change ...func(*store.Config)) *World {
	t.Helper()
	dsn := e.New(t)
	w := &World{Engine: e, DSN: dsn, now: Start}
	w.S = e.OpenAt(t, dsn, change...)
	w.seed(t)
	return w
}

func (w *World) seed(t testing.TB) {
	t.Helper()
	ctx := t.Context()
	w.Profile, w.Issuer = id.New(id.Profile), id.New(id.Issuer)
	must(t, w.S.SeedProfiles(ctx, []domain.Profile{{ID: w.Profile, Name: "tls", KeyAlgorithm: domain.ECDSAP256,
		Allowed: domain.KeyAlgorithms, EKUs: []domain.EKU{domain.EKUServerAuth}, TTL: 47 * 24 * time.Hour, MaxTTL: 90 * 24 * time.Hour, CreatedAt: Start}}))
	must(t, w.S.CreateIssuer(ctx, domain.Issuer{ID: w.Issuer, Name: "ca", Kind: domain.IssuerLocal},
		domain.CA{Chain: [][]byte{der(1), der(2)}, KeyURI: "sealed:x", PublicURL: "http://pki.test"}, nil, w.Op()))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// der is a DER SEQUENCE around one byte.
func der(b byte) []byte { return []byte{0x30, 0x03, 0x04, 0x01, b} }

// openWork is all work of an agent that has not much.
func openWork(ctx context.Context, s *store.Store, agentID string) ([]domain.Work, error) {
	all, err := s.OpenWork(ctx, []domain.WorkQuery{{AgentID: agentID}})
	if err != nil {
		return nil, err
	}
	return all[0].Work, nil
}

// Now is the world's time.
func (w *World) Now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

// Pass lets time pass.
func (w *World) Pass(d time.Duration) time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.now.Add(d)
	return w.now
}

// Op is an operator's.
func (w *World) Op() domain.Op {
	return domain.Op{Actor: "operator:test", RequestID: id.New(id.Request), At: w.Now()}
}

// DB is the database past the store.
func (w *World) DB(t testing.TB) *sql.DB {
	t.Helper()
	if w.db == nil {
		w.db = w.Engine.SQL(t, w.DSN)
	}
	return w.db
}

// Agent enrols a host, with an identity whose serial is "id-" and the agent's id.
func (w *World) Agent(t testing.TB, name string) domain.Agent {
	t.Helper()
	ctx, op := t.Context(), w.Op()
	hash := sha256.Sum256([]byte(name))
	token := domain.JoinToken{ID: id.New(id.Token), Hash: hash[:], Labels: map[string]string{"site": "a"}, MaxUses: 1, ExpiresAt: op.At.Add(time.Hour), CreatedBy: op.Actor}
	must(t, w.S.CreateJoinToken(ctx, token, op))
	a, err := w.S.Enroll(ctx, domain.Enrollment{TokenID: token.ID, TokenHash: hash[:], SPKI: domain.HashHex([]byte(name)), AgentID: id.New(id.Agent), Name: name, Op: op})
	must(t, err)
	must(t, w.S.RecordIdentity(ctx, domain.Identity{Serial: "id-" + a.ID, AgentID: a.ID, SPKI: domain.HashHex([]byte(name)),
		NotBefore: op.At, NotAfter: op.At.Add(7 * 24 * time.Hour)}, op))
	return a
}

// Target makes an enabled target of the agent.
func (w *World) Target(t testing.TB, agentID, name string) domain.Target {
	t.Helper()
	g := domain.Target{ID: id.New(id.Target), Name: name, AgentID: agentID, Kind: "file", VerifyAddress: "127.0.0.1:443", Enabled: true}
	must(t, w.S.CreateTarget(t.Context(), g, w.Op()))
	return g
}

// Order orders a certificate for the targets.
func (w *World) Order(t testing.TB, name string, policy domain.Policy, targets ...string) (domain.Certificate, []domain.Job) {
	t.Helper()
	n := w.order(name, targets...)
	n.Certificate.Policy = policy
	c, jobs, err := w.S.CreateCertificate(t.Context(), n)
	must(t, err)
	return c, jobs
}

func (w *World) order(name string, targets ...string) domain.NewCertificate {
	return domain.NewCertificate{TargetIDs: targets, Op: w.Op(),
		Certificate: domain.Certificate{ID: id.New(id.Certificate), Name: name, IssuerID: w.Issuer, ProfileID: w.Profile,
			Names: domain.Names{CommonName: name, DNS: []string{name, "www." + name}, IP: []string{"192.0.2.1"}}}}
}

// Hello is the agent's, from the node.
func (w *World) Hello(agentID, node string) domain.SessionOpen {
	return domain.SessionOpen{AgentID: agentID, Node: node, BootID: "boot-1", Protocol: 1, Capabilities: []string{"target/file@1"},
		Facts: domain.Facts{OS: "linux", Hostname: "h"}, Labels: map[string]string{"rack": "7"}, IdentitySerial: "id-" + agentID, At: w.Now()}
}

// Open opens a session.
func (w *World) Open(t testing.TB, agentID, node string) domain.SessionOpened {
	t.Helper()
	out := w.S.OpenSessions(t.Context(), []domain.SessionOpen{w.Hello(agentID, node)})[0]
	must(t, out.Err)
	return out
}

// Beat is the agent's, written.
func (w *World) Beat(t testing.TB, agentID string) {
	t.Helper()
	must(t, w.S.FlushSeen(t.Context(), []domain.Seen{{AgentID: agentID, At: w.Now()}}))
}

// Dispatch gives a job to its agent and lets it accept; it returns the attempt.
func (w *World) Dispatch(t testing.TB, j domain.Job, epoch domain.Epoch) int64 {
	t.Helper()
	ctx := t.Context()
	must(t, w.S.Dispatch(ctx, []domain.Dispatch{{JobID: j.ID, AgentID: j.AgentID, Attempt: j.Attempt, Epoch: epoch, At: w.Now()}})[0])
	must(t, w.S.Accept(ctx, []domain.Acceptance{{JobID: j.ID, AgentID: j.AgentID, Attempt: j.Attempt + 1, At: w.Now()}})[0])
	return j.Attempt + 1
}

// Intent is one for the job's attempt with the key named spki and a serial of its own.
func (w *World) Intent(j domain.Job, attempt int64, spki string) domain.Intent {
	w.mu.Lock()
	w.serial++
	serial := fmt.Sprintf("%x", 0x1000+w.serial)
	w.mu.Unlock()
	return domain.Intent{ID: id.New(id.Intent), CertificateID: j.CertificateID, AgentID: j.AgentID, JobID: j.ID, Attempt: attempt, IssuerID: w.Issuer,
		Serial: serial, TBS: []byte("tbs " + serial), OrderKey: "order-" + serial, SPKI: spki, CreatedAt: w.Now()}
}

// Signed is the version of an intent, valid for 40 days, due after 20.
func (w *World) Signed(it domain.Intent) domain.Issued {
	now := w.Now()
	na := now.Add(40 * 24 * time.Hour)
	return domain.Issued{IntentID: it.ID, JobID: it.JobID, Attempt: it.Attempt, At: now, DueAt: now.Add(20 * 24 * time.Hour),
		Version: domain.Version{IssuerID: it.IssuerID, Serial: it.Serial, CertificateID: it.CertificateID, AgentID: it.AgentID, Generation: it.Generation,
			DER: []byte("der " + it.Serial), Chain: [][]byte{der(1)}, Fingerprint: domain.HashHex([]byte("der " + it.Serial)), SPKI: it.SPKI,
			KeyAlgorithm: domain.ECDSAP256, NotBefore: now, NotAfter: na}}
}

// Issue takes a job of a leaf from dispatch to the recorded version and returns the deployments.
func (w *World) Issue(t testing.TB, j domain.Job, epoch domain.Epoch, spki string) []domain.Work {
	t.Helper()
	attempt := w.Dispatch(t, j, epoch)
	it := w.S.RecordIntents(t.Context(), []domain.Intent{w.Intent(j, attempt, spki)})[0]
	must(t, it.Err)
	out := w.S.RecordIssued(t.Context(), []domain.Issued{w.Signed(it.Intent)})[0]
	must(t, out.Err)
	return out.Deployments
}

// Deployed is the agent's report of success for a deployment's attempt.
func (w *World) Deployed(d domain.Work, attempt int64) domain.DeployResult {
	return domain.DeployResult{JobID: d.Job.ID, AgentID: d.Job.AgentID, Attempt: attempt, InstalledFingerprint: d.Version.Fingerprint,
		ServedFingerprint: d.Version.Fingerprint, Address: "127.0.0.1:443", ServedAt: w.Now(), At: w.Now()}
}

// Deploy takes a deployment from dispatch to its result.
func (w *World) Deploy(t testing.TB, d domain.Work, epoch domain.Epoch) domain.DeployOutcome {
	t.Helper()
	attempt := w.Dispatch(t, d.Job, epoch)
	out := w.S.CompleteDeployments(t.Context(), []domain.DeployResult{w.Deployed(d, attempt)})[0]
	must(t, out.Err)
	return out
}

// Duty takes a duty.
func (w *World) Duty(t testing.TB, duty string) domain.Fence {
	t.Helper()
	f, err := w.S.TakeDuty(t.Context(), duty, "n1", w.Now())
	must(t, err)
	return f
}

// View reads a certificate.
func (w *World) View(t testing.TB, certificateID string) domain.CertificateView {
	t.Helper()
	v, err := w.S.CertificateView(t.Context(), certificateID)
	must(t, err)
	return v
}

// Job reads a job.
func (w *World) Job(t testing.TB, jobID string) domain.Job {
	t.Helper()
	j, err := w.S.Job(t.Context(), jobID)
	must(t, err)
	return j
}

// rules are queries that return a row for each breach of an invariant.
var rules = []struct{ name, query string }{
	{"a leaf is due exactly while no job of it is open, except when it is over",
		`SELECT leaf.certificate_id || ' at ' || leaf.agent_id FROM leaf
JOIN agent ON agent.id = leaf.agent_id JOIN certificate ON certificate.id = leaf.certificate_id
LEFT JOIN job ON job.open_key = 'leaf:' || leaf.certificate_id || ':' || leaf.agent_id
WHERE CASE WHEN leaf.revoked OR agent.state = 'Retired' OR certificate.status = 'Revoked' THEN leaf.due_at IS NOT NULL OR job.id IS NOT NULL
 WHEN certificate.policy LIKE '%"disabled":true%' AND leaf.current_generation > 0 THEN leaf.due_at IS NOT NULL AND job.id IS NOT NULL
 ELSE (leaf.due_at IS NULL) <> (job.id IS NOT NULL) END`},
	{"a placement holds what is wanted, or is due, or has an open job; never two of the last",
		`SELECT placement.certificate_id || ' at ' || placement.target_id FROM placement
JOIN leaf ON leaf.certificate_id = placement.certificate_id AND leaf.agent_id = placement.agent_id
JOIN agent ON agent.id = leaf.agent_id JOIN certificate ON certificate.id = leaf.certificate_id
LEFT JOIN job ON job.open_key = 'placement:' || placement.certificate_id || ':' || placement.target_id
WHERE (placement.due_at IS NOT NULL AND job.id IS NOT NULL)
 OR (placement.due_at IS NULL AND job.id IS NULL AND placement.installed_generation < leaf.current_generation
  AND NOT leaf.revoked AND agent.state <> 'Retired' AND certificate.status <> 'Revoked')`},
	{"an open job has its key and no end, a finished one has its end and no key",
		`SELECT id FROM job WHERE (state IN ('Pending', 'AwaitingCSR', 'AwaitingApproval', 'Running')) <> (finished_at IS NULL) OR (finished_at IS NULL) <> (open_key IS NOT NULL)`},
	{"no job has more accepted tries than attempts",
		`SELECT id FROM job WHERE tries > attempt`},
	{"a version has a consumed intent and the reverse",
		`SELECT version.serial FROM version LEFT JOIN intent ON intent.certificate_id = version.certificate_id AND intent.agent_id = version.agent_id
 AND intent.generation = version.generation AND intent.state = 'Consumed' WHERE intent.id IS NULL
UNION ALL SELECT intent.id FROM intent LEFT JOIN version ON intent.certificate_id = version.certificate_id AND intent.agent_id = version.agent_id
 AND intent.generation = version.generation WHERE version.serial IS NULL AND intent.state = 'Consumed'`},
	{"every version is in the trail once",
		`SELECT version.serial FROM version WHERE 1 <> (SELECT COUNT(*) FROM audit WHERE audit.action IN ('certificate.issued', 'certificate.adopted') AND audit.resource = 'certificate/' || version.certificate_id
 AND audit.detail LIKE '%"serial":"' || version.serial || '"%')`},
	{"every end of a deployment is in the trail once",
		`SELECT job.id FROM job WHERE job.target_id <> '' AND job.state IN ('Completed', 'Failed', 'Cancelled') AND 1 <> (SELECT COUNT(*) FROM audit
 WHERE audit.action IN ('certificate.deployed', 'certificate.verified', 'job.failed', 'job.reaped', 'job.cancelled') AND audit.detail LIKE '%' || job.id || '%'
 OR audit.action IN ('job.cancelled') AND audit.resource = 'job/' || job.id AND audit.detail NOT LIKE '%' || job.id || '%')`},
	{"the leaf's current version exists and is its newest",
		`SELECT leaf.certificate_id FROM leaf WHERE leaf.current_generation <> COALESCE((SELECT MAX(version.generation) FROM version
 WHERE version.certificate_id = leaf.certificate_id AND version.agent_id = leaf.agent_id AND (version.revoked_at IS NULL OR leaf.revoked OR version.generation = leaf.current_generation)), 0)
 OR leaf.current_generation > leaf.generation`},
	{"a certificate's expiry is its earliest leaf's",
		`SELECT certificate.id FROM certificate WHERE certificate.not_after <> COALESCE((SELECT MIN(leaf.not_after) FROM leaf
 WHERE leaf.certificate_id = certificate.id AND leaf.current_generation > 0), 0)`},
	{"renewal in progress means an open leaf job",
		`SELECT certificate.id FROM certificate WHERE certificate.status = 'RenewalInProgress' AND NOT EXISTS (SELECT 1 FROM job
 WHERE job.certificate_id = certificate.id AND job.target_id = '' AND job.finished_at IS NULL)`},
}

// Check holds the rows against the invariants of ARCHITECTURE.md section 5.
func (w *World) Check(t testing.TB) {
	t.Helper()
	broken, err := w.Broken(t.Context(), w.DB(t))
	must(t, err)
	for _, b := range broken {
		t.Errorf("broken: %s", b)
	}
}

// Broken lists the breaches of the invariants.
func (w *World) Broken(ctx context.Context, db *sql.DB) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var broken []string
	for _, r := range rules {
		err := func() error {
			rows, err := db.QueryContext(ctx, r.query)
			if err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
			defer func() { _ = rows.Close() }()
			for rows.Next() {
				var what string
				if err := rows.Scan(&what); err != nil {
					return err
				}
				broken = append(broken, r.name+": "+what)
			}
			return rows.Err()
		}()
		if err != nil {
			return nil, err
		}
	}
	return broken, nil
}
