package node

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/certmesh/certmesh/agent/agentd"
	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
	"github.com/certmesh/certmesh/protocol/fault"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// sites are servers that exist in memory alone and serve at once what is committed.
type sites struct {
	mu  sync.Mutex
	now map[string]*x509.Certificate
}

type siteSettings struct {
	Site string `json:"site" doc:"name of the site"`
}

type siteReceipt struct{ Before, After []byte }

func (s *sites) kind() target.Kind {
	return target.Define("site", 1, target.Facts{Atomic: true, Undo: true}, nil,
		func(_ context.Context, _ target.Env, c siteSettings) (target.Target, error) {
			return &site{s, c.Site}, nil
		})
}

func (s *sites) get(name string) *x509.Certificate {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now[name]
}

func (s *sites) set(name string, der []byte) error {
	var c *x509.Certificate
	if len(der) > 0 {
		var err error
		if c, err = x509.ParseCertificate(der); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now[name] = c
	return nil
}

func (s *sites) probe(_ context.Context, address, _ string) (target.Proof, error) {
	name, _, _ := net.SplitHostPort(address)
	c := s.get(name)
	if c == nil {
		return target.Proof{}, fault.New(fault.Retryable, "nothing is served at %s", address)
	}
	return target.Proof{Leaf: target.FingerprintOf(c), Address: address, At: time.Now()}, nil
}

type site struct {
	all  *sites
	name string
}

func (s *site) Current(context.Context) (target.Served, error) {
	c := s.all.get(s.name)
	if c == nil {
		return target.Served{}, nil
	}
	return target.Served{Leaf: target.FingerprintOf(c), NotAfter: c.NotAfter}, nil
}

type siteStaged struct {
	*site
	r siteReceipt
}

func (s *site) Stage(_ context.Context, m target.Material) (target.Staged, error) {
	if _, err := m.KeyPEM(); err != nil {
		return nil, err
	}
	st := &siteStaged{site: s, r: siteReceipt{After: m.Chain[0].Raw}}
	if c := s.all.get(s.name); c != nil {
		st.r.Before = c.Raw
	}
	return st, nil
}

func (s *siteStaged) Receipt() target.Receipt {
	b, err := json.Marshal(s.r)
	if err != nil {
		panic(err)
	}
	return b
}

func (s *siteStaged) Commit(context.Context) error { return s.all.set(s.name, s.r.After) }

func (s *site) Undo(_ context.Context, r target.Receipt) error {
	var back siteReceipt
	if err := json.Unmarshal(r, &back); err != nil {
		return err
	}
	return s.all.set(s.name, back.Before)
}

// world is one estate in this process: a database, a host's directory, and sites.
type world struct {
	t      testing.TB
	dsn    string
	data   string            // of the node
	set    map[string]string // settings of the node besides those of every test
	host   string            // of the agent
	sites  *sites
	ports  [4]string
	faults *storetest.Cutter
	wrap   func(net.Conn) net.Conn
	node   *Node
	// operator is the connection to node.
	operator *grpc.ClientConn
	octx     context.Context
	stop     context.CancelFunc
	stopped  chan struct{}

	mu    sync.Mutex
	cutAt int
	seen  int
	point string
	wire  bool // cut the connection instead of the agent
	conns []net.Conn
}

// pollEvery is how often an operator looks: rarely enough to leave the processors to what is being watched.
const pollEvery = 8 * time.Millisecond

func pause(ctx context.Context) {
	select {
	case <-time.After(pollEvery):
	case <-ctx.Done():
	}
}

var errAgentCut = errors.New("the agent was cut here")

// cut is the agent's seam: at the cutAt-th point it dies, or with wire set loses its connections.
func (w *world) cut(point string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen++
	if w.cutAt == 0 || w.seen != w.cutAt {
		return nil
	}
	w.point = point
	if !w.wire {
		return errAgentCut
	}
	for _, c := range w.conns {
		_ = c.Close()
	}
	w.conns = nil
	return nil
}

func (w *world) arm(at int, wire bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cutAt, w.seen, w.wire, w.point = at, 0, wire, ""
}

// fired reports whether the agent's cut has come, and where.
func (w *world) fired() (string, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.point, w.point != ""
}

func (w *world) startNode() {
	w.t.Helper()
	set := map[string]string{"store.dsn": w.dsn, "store.max_readers": "2"}
	maps.Copy(set, w.set)
	for i, l := range []string{"api", "grpc", "mesh", "pki"} {
		if w.ports[i] != "" {
			set["listen."+l] = w.ports[i]
		}
	}
	n, err := Start(w.t.Context(), Options{Configuration: devConfiguration(w.t, w.data, set), Mode: Dev, Version: "test", Log: quiet(),
		faults: w.faults, targets: []target.Kind{w.sites.kind()}})
	if err != nil {
		w.t.Fatalf("start the node: %v", err)
	}
	w.node = n
	a := n.Addresses()
	w.ports = [4]string{a.API, a.GRPC, a.Mesh, a.PKI}
}

// killNode ends the node as a crash does: its store has been dead since the cut, so nothing is written any more.
func (w *world) killNode() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = w.node.Stop(ctx) // it is dead: whatever it says of that is no news
}

func (w *world) startAgent(token string) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	w.stop, w.stopped = cancel, done
	cfg := agentd.Config{
		Servers: []string{w.ports[2]}, DataDir: w.host, Name: "web1", JoinToken: token, Kinds: []target.Kind{w.sites.kind()},
		Probe: w.sites.probe, Cut: w.cut, WrapConn: w.wrap, Log: quiet(),
		Backoff: agentd.Backoff{First: 5 * time.Millisecond, Young: 20 * time.Millisecond, YoungFor: time.Minute, Old: 50 * time.Millisecond, Stable: time.Second},
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			var d net.Dialer
			c, err := d.DialContext(ctx, "tcp", addr)
			if err == nil {
				w.mu.Lock()
				w.conns = append(w.conns, c)
				w.mu.Unlock()
			}
			return c, err
		},
	}
	go func() {
		defer close(done)
		_ = agentd.Run(ctx, cfg) // a cut ends it with an error, which is no news
	}()
}

func (w *world) stopAgent() {
	w.stop()
	<-w.stopped
}

// call repeats an operator's call until the node answers it: the node may be dying or starting.
func call[Out any](w *world, ctx context.Context, what string, f func(context.Context, clients) (Out, error)) Out {
	w.t.Helper()
	for {
		if w.operator == nil {
			w.octx, w.operator = operator(w.t, w.node)
		}
		out, err := f(w.octx, clientsOf(w.operator))
		if err == nil {
			return out
		}
		if c := status.Code(err); c != codes.Unavailable && c != codes.Internal && c != codes.Canceled && c != codes.DeadlineExceeded || ctx.Err() != nil {
			w.t.Fatalf("%s: %v", what, err)
		}
		w.revive()
	}
}

// revive replaces whatever has died.
func (w *world) revive() {
	if w.faults.Dead() {
		w.killNode()
		_ = w.operator.Close()
		w.operator = nil
		w.faults.Arm(0)
		w.startNode()
	}
	select {
	case <-w.stopped:
		w.startAgent("")
	default:
	}
}

type clients struct {
	certs   operatorpb.CertificatesServiceClient
	jobs    operatorpb.JobsServiceClient
	issuers operatorpb.IssuersServiceClient
	targets operatorpb.TargetsServiceClient
	agents  operatorpb.AgentsServiceClient
}

// place makes targets for the sites of one order: a target holds one certificate. They are made past the API, which
// would tell the agent of each: when such a message comes is left to chance, and would move the points of the next cut.
func (w *world) place(sites ...string) []string {
	w.t.Helper()
	for _, s := range sites {
		if err := w.node.store.CreateTarget(w.t.Context(), domain.Target{ID: id.New(id.Target), Name: s, AgentID: "web1", Kind: "site", Enabled: true,
			Settings: fmt.Appendf(nil, `{"site": %q}`, s), VerifyAddress: s + ":443"}, domain.Op{Actor: "test", At: time.Now()}); err != nil {
			w.t.Fatalf("target %s: %v", s, err)
		}
	}
	return sites
}

// order has a certificate of its own ordered, served, renewed and served again, whatever dies on the way.
func (w *world) order(name string, sites ...string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	call(w, ctx, "order", func(ctx context.Context, c clients) (*operatorpb.CreateCertificateResponse, error) {
		return c.certs.CreateCertificate(ctx, &operatorpb.CreateCertificateRequest{Name: name, Issuer: "internal", Profile: "tls-server",
			Names: &operatorpb.Names{Dns: []string{name + ".test"}}, Targets: sites, RequestId: name})
	})
	w.served(ctx, name, 1)
	call(w, ctx, "renew", func(ctx context.Context, c clients) (*operatorpb.RenewCertificateResponse, error) {
		return c.certs.RenewCertificate(ctx, &operatorpb.RenewCertificateRequest{Id: name})
	})
	w.served(ctx, name, 2)
}

// served waits until every placement serves generation or a later one.
func (w *world) served(ctx context.Context, name string, generation int64) {
	w.t.Helper()
	var last *operatorpb.Certificate
	for {
		got := call(w, ctx, "get", func(ctx context.Context, c clients) (*operatorpb.GetCertificateResponse, error) {
			return c.certs.GetCertificate(ctx, &operatorpb.GetCertificateRequest{Id: name})
		})
		last = got.GetCertificate()
		if last.GetLeaves()[0].GetGeneration() >= generation && last.GetPlacementsCurrent() == last.GetPlacementsTotal() {
			return
		}
		w.revive()
		select {
		case <-ctx.Done():
			jobs := call(w, w.t.Context(), "jobs", func(ctx context.Context, c clients) (*operatorpb.ListJobsResponse, error) {
				return c.jobs.ListJobs(ctx, &operatorpb.ListJobsRequest{CertificateId: last.GetId()})
			})
			w.t.Fatalf("generation %d of %s is not served:\n%v\n%v", generation, name, last, jobs)
		case <-time.After(pollEvery):
		}
	}
}

// check holds the end of an order to what is promised.
func (w *world) check(name string, at string, sites ...string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 15*time.Second)
	defer cancel()
	got := call(w, ctx, "get", func(ctx context.Context, c clients) (*operatorpb.GetCertificateResponse, error) {
		return c.certs.GetCertificate(ctx, &operatorpb.GetCertificateRequest{Id: name})
	}).GetCertificate()
	leaf := got.GetLeaves()[0]
	versions := call(w, ctx, "versions", func(ctx context.Context, c clients) (*operatorpb.ListVersionsResponse, error) {
		return c.certs.ListVersions(ctx, &operatorpb.ListVersionsRequest{CertificateId: got.GetId()})
	}).GetVersions()
	var generations []int64
	for _, v := range versions {
		generations = append(generations, v.GetGeneration())
	}
	slices.Sort(generations)
	want := make([]int64, leaf.GetGeneration())
	for i := range want {
		want[i] = int64(i) + 1
	}
	// A renewal whose answer was lost is asked for again, and is then another renewal: never two leaves of one generation.
	if !slices.Equal(generations, want) || leaf.GetGeneration() < 2 || leaf.GetGeneration() > 3 {
		w.t.Fatalf("%s: generations %v, leaf %v", at, generations, leaf)
	}
	for _, s := range sites {
		if c := w.sites.get(s); c == nil || c.SerialNumber.Text(16) != leaf.GetSerial() {
			w.t.Fatalf("%s: site %s does not serve %s", at, s, leaf.GetSerial())
		}
	}
	for {
		open := call(w, ctx, "jobs", func(ctx context.Context, c clients) (*operatorpb.ListJobsResponse, error) {
			return c.jobs.ListJobs(ctx, &operatorpb.ListJobsRequest{CertificateId: got.GetId(), Open: true})
		}).GetJobs()
		keys := w.keys(got.GetId())
		if len(open) == 0 && len(keys) == 1 {
			break
		}
		if ctx.Err() != nil {
			w.t.Fatalf("%s: open jobs %v, keys %v", at, open, keys)
		}
		w.revive()
		pause(ctx)
	}
	if got := call(w, ctx, "get", func(ctx context.Context, c clients) (*operatorpb.GetCertificateResponse, error) {
		return c.certs.GetCertificate(ctx, &operatorpb.GetCertificateRequest{Id: name})
	}).GetCertificate(); got.GetStatus() != "Active" {
		w.t.Fatalf("%s: %s", at, got.GetStatus())
	}
	// A target holds one certificate: the next order takes these over.
	call(w, ctx, "revoke", func(ctx context.Context, c clients) (*operatorpb.RevokeCertificateResponse, error) {
		return c.certs.RevokeCertificate(ctx, &operatorpb.RevokeCertificateRequest{Id: name, Reason: "superseded"})
	})
}

// keys lists the key files that the host holds of a certificate.
func (w *world) keys(certificate string) []string {
	var out []string
	err := filepath.WalkDir(filepath.Join(w.host, "keys"), func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // it is being renamed or removed
		}
		if !d.IsDir() && strings.Contains(path, certificate) && filepath.Ext(path) == ".pem" {
			out = append(out, filepath.Base(path))
		}
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

func newWorld(t *testing.T, e storetest.Engine) *world {
	t.Helper()
	return newWorldWith(t, e, nil)
}

// newWorldWith puts wrap around the agent's connections, where it sees plain text.
func newWorldWith(t testing.TB, e storetest.Engine, wrap func(net.Conn) net.Conn) *world {
	t.Helper()
	w := &world{wrap: wrap, t: t, dsn: e.New(t), data: t.TempDir(), host: filepath.Join(t.TempDir(), "agent"), sites: &sites{now: map[string]*x509.Certificate{}},
		faults: &storetest.Cutter{}}
	w.startNode()
	t.Cleanup(func() { stopNode(t, w.node) })
	ctx := t.Context()
	call(w, ctx, "issuer", func(ctx context.Context, c clients) (*operatorpb.CreateIssuerResponse, error) {
		return c.issuers.CreateIssuer(ctx, &operatorpb.CreateIssuerRequest{Name: "internal", Kind: "local"})
	})
	token := call(w, ctx, "token", func(ctx context.Context, c clients) (*operatorpb.CreateJoinTokenResponse, error) {
		return c.agents.CreateJoinToken(ctx, &operatorpb.CreateJoinTokenRequest{})
	})
	w.startAgent(token.GetToken())
	t.Cleanup(func() { w.stopAgent() })
	deadline, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		a := call(w, ctx, "agents", func(ctx context.Context, c clients) (*operatorpb.ListAgentsResponse, error) {
			return c.agents.ListAgents(ctx, &operatorpb.ListAgentsRequest{State: "Online"})
		})
		if len(a.GetAgents()) == 1 {
			break
		}
		if deadline.Err() != nil {
			t.Fatal("the agent did not come online")
		}
		pause(deadline)
	}
	return w
}

// step is the distance between two cuts: with the race detector on two cores all of them take a quarter of an hour.
// CERTMESH_CUT_EVERY=1 cuts at every event (make chaos does).
func step(t *testing.T, e storetest.Engine) int {
	t.Helper()
	if s := os.Getenv("CERTMESH_CUT_EVERY"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			t.Fatalf("CERTMESH_CUT_EVERY=%q is not a number above zero", s)
		}
		return n
	}
	if e.Name == "sqlite" {
		return 2
	}
	return 5
}

// The server is cut at every single statement and commit of an order, its deployment, a renewal and its deployment; the
// next server takes it to its end.
func TestServerCutAnywhere(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, e storetest.Engine) {
		w := newWorld(t, e)
		w.place("one", "two")
		at := 0
		for done := false; !done; {
			at += step(t, e)
			name := fmt.Sprintf("s%d", at)
			w.faults.Arm(at)
			w.order(name, "one", "two")
			done = w.faults.Events() > 0 && w.faults.Events() < at && !w.faults.Dead()
			if !done {
				done = at > 5000
			}
			w.faults.Arm(0)
			w.check(name, fmt.Sprintf("server cut at event %d", at), "one", "two")
			if at > 5000 {
				t.Fatal("the flow never ends")
			}
		}
		t.Logf("cut at every %d. of %d events", step(t, e), at-1)
		if at < 40 {
			t.Fatalf("the flow has only %d events", at)
		}
	})
}

// The agent is cut at every message, every durable write and every step at a target; and, apart from that, its connection
// at each of these points.
func TestAgentCutAnywhere(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, e storetest.Engine) {
		for _, wire := range []bool{false, true} {
			w := newWorld(t, e)
			w.place("one", "two")
			at := 0
			for done := false; !done; {
				at += step(t, e)
				name := fmt.Sprintf("a%d", at)
				w.arm(at, wire)
				w.order(name, "one", "two")
				point, fired := w.fired()
				done = !fired
				w.arm(0, false)
				w.check(name, fmt.Sprintf("agent cut at point %d (%s), wire %v", at, point, wire), "one", "two")
			}
			t.Logf("cut at every %d. of %d points, wire %v", step(t, e), at-1, wire)
			if at < 30 {
				t.Fatalf("the flow has only %d points", at)
			}
		}
	})
}

func clientsOf(conn *grpc.ClientConn) clients {
	return clients{operatorpb.NewCertificatesServiceClient(conn), operatorpb.NewJobsServiceClient(conn), operatorpb.NewIssuersServiceClient(conn),
		operatorpb.NewTargetsServiceClient(conn), operatorpb.NewAgentsServiceClient(conn)}
}
