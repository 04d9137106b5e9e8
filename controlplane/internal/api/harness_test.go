package api

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var start = time.Date(2026, 11, 25, 9, 0, 0, 0, time.UTC)

// sessions records what the API asks of the streams.
type sessions struct {
	mu                  sync.Mutex
	woken, pushed, ends []string
	credits             map[string]int32
}

func (s *sessions) Wake(a string)            { s.add(&s.woken, a) }
func (s *sessions) PushState(a string)       { s.add(&s.pushed, a) }
func (s *sessions) Disconnect(a, why string) { s.add(&s.ends, a+": "+why) }
func (s *sessions) Holds(string) bool        { return true }
func (s *sessions) Count() int64             { return 3 }

func (s *sessions) Credits(string) map[string]int32 { return s.credits }

func (s *sessions) add(list *[]string, v string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*list = append(*list, v)
}

func (s *sessions) take(list *[]string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := *list
	*list = nil
	return out
}

// makeCA is an Issuers that remembers what it was asked.
type makeCA struct {
	last LocalCA
	err  func(LocalCA) error
	der  []byte
}

func (m *makeCA) CreateLocal(_ context.Context, r LocalCA) (domain.Issuer, domain.CA, []domain.SealedKey, error) {
	m.last = r
	if m.err != nil {
		if err := m.err(r); err != nil {
			return domain.Issuer{}, domain.CA{}, nil, err
		}
	}
	i := domain.Issuer{ID: id.New(id.Issuer), Name: r.Name, Kind: domain.IssuerLocal, CreatedAt: start}
	return i, domain.CA{ID: i.ID, Chain: [][]byte{m.der}, KeyURI: "sealed:x", PublicURL: "http://pki.example.com"}, nil, nil
}

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// rig is the API behind a real gRPC server.
type rig struct {
	*API
	store    *memory
	sessions *sessions
	issuers  *makeCA
	clock    *clockwork.FakeClock
	log      *logBuffer
	conn     *grpc.ClientConn
	keys     map[authz.Role]string
	mu       sync.Mutex
	crls     []string
}

func testDER(t testing.TB) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test Root"}, NotBefore: start, NotAfter: start.AddDate(5, 0, 0)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{
		store: newMemory(), sessions: &sessions{}, issuers: &makeCA{der: testDER(t)}, clock: clockwork.NewFakeClockAt(start), log: &logBuffer{},
		keys: map[authz.Role]string{},
	}
	for _, role := range []authz.Role{authz.Admin, authz.Operator, authz.Approver, authz.Viewer} {
		r.keys[role] = r.addKey(t, string(role), role, time.Time{}, false)
	}
	a, err := New(Config{
		Store: r.store, Sessions: r.sessions, Issuers: r.issuers, CheckTarget: checkTarget, Hub: hub.New(), Clock: r.clock,
		Log:  slog.New(slog.NewJSONHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Node: Node{ID: "node-1", Version: "1.2.3", Store: "sqlite", TrustDomain: "example.com", StartedAt: start},
		Duties: func() []DutyStatus {
			return []DutyStatus{{Name: "renewal", Interval: time.Minute, LastRun: start, LastError: "none of it", Epoch: 9}}
		},
		Changes: 256, ChangesWaiting: 2000,
		Revoked: func(issuer string) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.crls = append(r.crls, issuer)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	r.API = a
	r.serve(t)
	return r
}

func (r *rig) serve(t testing.TB) {
	t.Helper()
	l := bufconn.Listen(1 << 16)
	server := grpc.NewServer(r.Interceptors()...)
	r.Register(server)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///api", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	r.conn = conn
	t.Cleanup(func() {
		r.Drain()
		_ = conn.Close()
		server.GracefulStop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func checkTarget(kind string, settings json.RawMessage) []target.Problem {
	if kind != "file" && kind != "nginx" {
		return []target.Problem{{Field: "kind", Message: "is not known; use file or nginx"}}
	}
	var s map[string]any
	if err := json.Unmarshal(settings, &s); err != nil {
		return []target.Problem{{Message: "is not JSON"}}
	}
	var ps []target.Problem
	for _, k := range []string{"directory", "owner"} {
		if v, ok := s[k].(string); ok && strings.Contains(v, "..") {
			ps = append(ps, target.Problem{Field: k, Message: "contains .."})
		}
	}
	return ps
}

func (r *rig) addKey(t testing.TB, name string, role authz.Role, expires time.Time, revoked bool) string {
	t.Helper()
	text, k, err := authz.NewKey(name, role, expires, start)
	if err != nil {
		t.Fatal(err)
	}
	if revoked {
		k.RevokedAt = start
	}
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	r.store.keys = append(r.store.keys, k)
	return text
}

// as is a context that carries the key of a role; it ends with the test.
func (r *rig) as(t testing.TB, role authz.Role) context.Context {
	return r.with(t, "Bearer "+r.keys[role])
}

func (r *rig) with(t testing.TB, authorization string) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	if authorization == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", authorization)
}

func (r *rig) certificates() operatorpb.CertificatesServiceClient {
	return operatorpb.NewCertificatesServiceClient(r.conn)
}
func (r *rig) agents() operatorpb.AgentsServiceClient {
	return operatorpb.NewAgentsServiceClient(r.conn)
}
func (r *rig) jobs() operatorpb.JobsServiceClient { return operatorpb.NewJobsServiceClient(r.conn) }
func (r *rig) issuing() operatorpb.IssuersServiceClient {
	return operatorpb.NewIssuersServiceClient(r.conn)
}
func (r *rig) targets() operatorpb.TargetsServiceClient {
	return operatorpb.NewTargetsServiceClient(r.conn)
}
func (r *rig) system() operatorpb.SystemServiceClient {
	return operatorpb.NewSystemServiceClient(r.conn)
}

const (
	webAgent, mailAgent = "agt_00000000000000000000000000000001", "agt_00000000000000000000000000000002"
	webTarget, lbTarget = "tgt_00000000000000000000000000000001", "tgt_00000000000000000000000000000002"
	spareTarget         = "tgt_00000000000000000000000000000003"
	issuerID            = "iss_00000000000000000000000000000001"
	serverProfile       = "prof_00000000000000000000000000000001"
	certID              = "cert_00000000000000000000000000000001"
	jobID               = "job_00000000000000000000000000000001"
	otherCert           = "cert_00000000000000000000000000000002"
	waitingJob          = "job_00000000000000000000000000000002"
	tokenID             = "jt_00000000000000000000000000000001"
	goodSettings        = `{"directory":"/etc/ssl/site"}`
)

// estate puts one of everything into the store: two agents, three targets (two of which hold nothing), an issuer, profiles, and a certificate with a
// version and an open job.
func (r *rig) estate(t testing.TB) *rig {
	t.Helper()
	m := r.store
	m.mu.Lock()
	defer m.mu.Unlock()
	m.roots = [][]byte{r.issuers.der}
	for i, a := range []domain.Agent{
		{ID: webAgent, Name: "web1", State: domain.AgentOnline, Labels: map[string]string{"site": "a"}, Capabilities: []string{"target/file@1", "target/nginx@1"},
			Facts: domain.Facts{OS: "linux", Platform: "debian", Architecture: "amd64", IPAddress: "192.0.2.1", Hostname: "web1.example.com", Version: "1.2.3"}},
		{ID: mailAgent, Name: "mail1", State: domain.AgentQuarantined, Reason: "two machines", Capabilities: []string{"target/file@1"}},
	} {
		a.CreatedAt, a.LastSeen = start.Add(time.Duration(i)*time.Second), start
		m.agents[a.ID] = a
	}
	for _, g := range []domain.Target{
		{ID: webTarget, Name: "site", AgentID: webAgent, Kind: "nginx", Settings: []byte(goodSettings), VerifyAddress: "localhost:443", ServerName: "www.example.com"},
		{ID: lbTarget, Name: "balancer", AgentID: mailAgent, Kind: "file", Settings: []byte(`{}`)},
		{ID: spareTarget, Name: "spare", AgentID: webAgent, Kind: "nginx", Settings: []byte(goodSettings)},
	} {
		g.Enabled, g.CreatedAt, g.Revision = true, start, 1
		m.targets[g.ID] = g
	}
	m.issuers[issuerID] = domain.Issuer{ID: issuerID, Name: "internal", Kind: domain.IssuerLocal, CreatedAt: start}
	m.cas[issuerID] = domain.CA{ID: issuerID, Chain: [][]byte{r.issuers.der}, PublicURL: "http://pki.example.com"}
	for i, p := range []domain.Profile{
		{Name: "tls-server", EKUs: []domain.EKU{domain.EKUServerAuth}},
		{Name: "tls-peer", EKUs: []domain.EKU{domain.EKUServerAuth, domain.EKUClientAuth}},
		{Name: "smime", EKUs: []domain.EKU{domain.EKUEmailProtection}},
		{Name: "tls-client", EKUs: []domain.EKU{domain.EKUClientAuth}},
		{Name: "all", EKUs: []domain.EKU{domain.EKUServerAuth, domain.EKUClientAuth, domain.EKUEmailProtection}},
		{Name: "broken", EKUs: []domain.EKU{domain.EKUServerAuth}},
	} {
		p.ID, p.KeyAlgorithm, p.Allowed = fmt.Sprintf("prof_%032d", i+1), domain.ECDSAP256, domain.KeyAlgorithms
		p.TTL, p.MaxTTL, p.CreatedAt = 47*24*time.Hour, 398*24*time.Hour, start
		if p.Name == "broken" {
			p.Allowed = nil
		}
		m.profiles[p.ID] = p
	}
	m.certs[certID] = domain.Certificate{ID: certID, Name: "www", Names: domain.Names{DNS: []string{"www.example.com"}}, IssuerID: issuerID,
		ProfileID: serverProfile, Owner: "web team", Status: domain.CertificateActive, CreatedAt: start, UpdatedAt: start, Revision: 4}
	m.leaves[certID] = []domain.Leaf{{CertificateID: certID, AgentID: webAgent, Generation: 2, Current: 2, Serial: "0a", NotBefore: start, NotAfter: start.AddDate(0, 0, 47)}}
	m.placements[certID] = []domain.Placement{{CertificateID: certID, TargetID: webTarget, AgentID: webAgent, State: domain.PlacementServed, InstalledGeneration: 1, ServedGeneration: 1}}
	m.versions[certID] = []domain.Version{{IssuerID: issuerID, Serial: "0a", CertificateID: certID, AgentID: webAgent, Generation: 2, DER: r.issuers.der, NotBefore: start, NotAfter: start.AddDate(0, 0, 47), CreatedAt: start}}
	m.jobs[jobID] = domain.Job{ID: jobID, Kind: domain.JobDeployment, State: domain.JobPending, CertificateID: certID, AgentID: webAgent, TargetID: webTarget,
		Generation: 2, MaxTries: 5, RunAt: start, CreatedAt: start, UpdatedAt: start}
	m.jobs[waitingJob] = domain.Job{ID: waitingJob, Kind: domain.JobRenewal, State: domain.JobAwaitingApproval, CertificateID: otherCert, AgentID: mailAgent,
		Generation: 3, MaxTries: 5, RunAt: start, CreatedAt: start, UpdatedAt: start}
	m.tokens[tokenID] = domain.JoinToken{ID: tokenID, MaxUses: 3, Uses: 1, Labels: map[string]string{"rack": "7"}, ExpiresAt: start.Add(time.Hour), CreatedBy: "operator:ann", CreatedAt: start}
	m.rejections[webAgent] = []domain.StateRejection{{AgentID: webAgent, Kind: "target", Name: webTarget, Version: 3, Reason: "outside the roots"}}
	m.counts = domain.Counts{Certificates: map[domain.CertificateStatus]int64{domain.CertificateActive: 1}, Agents: map[domain.AgentState]int64{domain.AgentOnline: 1},
		OpenJobs: map[domain.JobState]int64{domain.JobPending: 1}, PlacementsLagging: 1}
	r.sessions.credits = map[string]int32{"deploy": 2}
	return r
}

// order is a good order, at a target that holds nothing.
func order(name string) *operatorpb.CreateCertificateRequest {
	return &operatorpb.CreateCertificateRequest{Name: name, Issuer: "internal", Profile: "tls-server", Targets: []string{"spare"},
		Names: &operatorpb.Names{Dns: []string{"a.example.com"}}}
}

// violationsOf are the fields that a status names, with what is wrong.
func violationsOf(err error) map[string]string {
	out := map[string]string{}
	for _, d := range status.Convert(err).Details() {
		if b, ok := d.(*errdetails.BadRequest); ok {
			for _, v := range b.GetFieldViolations() {
				out[v.GetField()] = v.GetDescription()
			}
		}
	}
	return out
}

func infoOf(err error) *errdetails.ErrorInfo {
	for _, d := range status.Convert(err).Details() {
		if i, ok := d.(*errdetails.ErrorInfo); ok {
			return i
		}
	}
	return nil
}

func wantCode(t testing.TB, err error, code codes.Code, says ...string) {
	t.Helper()
	if got := status.Code(err); got != code {
		t.Fatalf("code %s, want %s: %v", got, code, err)
	}
	for _, s := range says {
		if !strings.Contains(status.Convert(err).Message(), s) {
			t.Errorf("%q does not say %q", status.Convert(err).Message(), s)
		}
	}
}

func wantField(t testing.TB, err error, field, says string) {
	t.Helper()
	wantCode(t, err, codes.InvalidArgument)
	got, ok := violationsOf(err)[field]
	if !ok || !strings.Contains(got, says) {
		t.Errorf("violations %q; want %s to say %q", violationsOf(err), field, says)
	}
}

func wantList(t testing.TB, what string, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: %q, want %q", what, got, want)
	}
}

// eventually waits for a condition that another goroutine brings about.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		select {
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-time.After(time.Millisecond):
		}
	}
}

// errPlain is what no caller may see a part of.
var errPlain = fmt.Errorf("pq: relation \"secret_table\" does not exist at 10.1.2.3")
