package session

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testDomain = "mesh.example"
	testNode   = "node-1"
	patience   = 20 * time.Second
)

func newMesh(t testing.TB, now time.Time) *ca.Authority {
	t.Helper()
	ring, err := secret.NewKeyring(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	m, err := ca.NewMesh(testDomain, ca.Params{Now: now}, ring)
	if err != nil {
		t.Fatal(err)
	}
	a, err := ca.Open(m.CA, func(id string) (domain.SealedKey, error) {
		for _, k := range m.Keys {
			if k.ID == id {
				return k, nil
			}
		}
		return domain.SealedKey{}, errors.New("no such key")
	}, ring)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newCSR(t testing.TB, key any) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "x"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// sign makes an identity of a mesh CA.
func sign(t testing.TB, mesh *ca.Authority, kind, name string, key *ecdsa.PrivateKey, now time.Time, ttl time.Duration) (tls.Certificate, domain.Identity) {
	t.Helper()
	r := ca.IdentityRequest{PublicKey: key.Public(), Kind: kind, ID: name, TTL: ttl, Now: now}
	if kind == ca.KindNode {
		r.DNS = []string{"localhost"}
	}
	p, err := mesh.PrepareIdentity(r)
	if err != nil {
		t.Fatal(err)
	}
	der, err := mesh.Sign(p.TBS())
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key},
		domain.Identity{Serial: p.Serial(), AgentID: name, SPKI: p.SPKI(), NotBefore: p.NotBefore(), NotAfter: p.NotAfter()}
}

// plane is a control plane's agent side on a real listener.
type plane struct {
	t     *testing.T
	mesh  *ca.Authority
	store *fakeStore
	srv   *Server
	addr  string
	grpc  *grpc.Server
	hub   *hub.Hub
}

func newPlane(t *testing.T, change ...func(*Config)) *plane {
	t.Helper()
	mesh := newMesh(t, time.Now())
	return newPlaneOver(t, mesh, newFakeStore([][]byte{mesh.Root().Raw}), change...)
}

// newPlaneOver is one of several nodes over one store.
func newPlaneOver(t *testing.T, mesh *ca.Authority, store *fakeStore, change ...func(*Config)) *plane {
	t.Helper()
	p := &plane{t: t, mesh: mesh, store: store, hub: hub.New()}
	cfg := Config{NodeID: testNode, TrustDomain: testDomain, Store: p.store, Mesh: func() *ca.Authority { return mesh }, Issue: p.store, Hub: p.hub,
		Clock: clockwork.NewRealClock(), Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(), NewID: id.New,
		IdentityTTL: time.Hour, VerifyTimeout: 5 * time.Second, BeatInterval: 30 * time.Second, Handshakes: 64}
	for _, c := range change {
		c(&cfg)
	}
	var err error
	if p.srv, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	node, _ := sign(t, mesh, ca.KindNode, testNode, newKey(t), time.Now(), time.Hour)
	pool := x509.NewCertPool()
	pool.AddCert(mesh.Root())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.addr = l.Addr().String()
	p.grpc = grpc.NewServer(append(p.srv.Options(), grpc.Creds(credentials.NewTLS(TLS(
		func() *tls.Certificate { return &node }, func() *x509.CertPool { return pool }))))...)
	p.srv.Register(p.grpc)
	p.srv.Start()
	var wg sync.WaitGroup
	wg.Go(func() { _ = p.grpc.Serve(l) }) // ends with Stop
	t.Cleanup(func() {
		p.store.onCall(nil)
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := p.srv.Stop(ctx); err != nil {
			t.Errorf("stop: %v", err)
		}
		p.grpc.Stop()
		wg.Wait()
	})
	return p
}

// host is an agent that the plane knows, with an identity.
type host struct {
	p      *plane
	id     string
	key    *ecdsa.PrivateKey
	cert   tls.Certificate
	serial string
}

func (p *plane) host(name string) *host {
	p.t.Helper()
	h := &host{p: p, id: "agt_" + name, key: newKey(p.t)}
	var i domain.Identity
	h.cert, i = sign(p.t, p.mesh, ca.KindAgent, h.id, h.key, time.Now(), time.Hour)
	h.serial = i.Serial
	p.store.mu.Lock()
	defer p.store.mu.Unlock()
	p.store.agents[h.id] = domain.Agent{ID: h.id, Name: name, State: domain.AgentOffline}
	p.store.identities[i.Serial] = i
	return h
}

// dial connects with certs (none: without a client certificate). The server's certificate is verified by the mesh root.
func (p *plane) dial(certs ...tls.Certificate) *grpc.ClientConn {
	p.t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(p.mesh.Root())
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool, ServerName: "localhost"}
	if len(certs) > 0 {
		// Sent whatever the server says it accepts.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &certs[0], nil }
	}
	return p.dialTLS(credentials.NewTLS(cfg))
}

func (p *plane) dialTLS(creds credentials.TransportCredentials) *grpc.ClientConn {
	p.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+p.addr, grpc.WithTransportCredentials(creds), grpc.WithDisableServiceConfig(),
		grpc.WithInitialWindowSize(64<<10), grpc.WithInitialConnWindowSize(64<<10))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = conn.Close() }) // given up either way
	return conn
}

// talk is one stream of an in-memory agent.
type talk struct {
	t      *testing.T
	st     grpc.BidiStreamingClient[agentpb.ConnectRequest, agentpb.ConnectResponse]
	cancel context.CancelFunc
	in     chan *agentpb.ConnectResponse
	done   chan struct{}
	err    error // valid once done is closed
	// states holds the states that came, answered or not.
	states []*agentpb.State
}

// open begins a stream whose messages are read from the start.
func (p *plane) open(conn *grpc.ClientConn) *talk {
	p.t.Helper()
	return p.openWith(conn, true)
}

func (p *plane) openWith(conn *grpc.ClientConn, reads bool) *talk {
	p.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	p.t.Cleanup(cancel)
	st, err := agentpb.NewAgentServiceClient(conn).Connect(ctx)
	k := &talk{t: p.t, st: st, cancel: cancel, in: make(chan *agentpb.ConnectResponse, 4096), done: make(chan struct{})}
	if err != nil {
		// Refused before there was a stream.
		k.err = err
		close(k.done)
		return k
	}
	if reads {
		go k.read()
	}
	return k
}

func (k *talk) read() {
	defer close(k.done)
	for {
		m, err := k.st.Recv()
		if err != nil {
			k.err = err
			return
		}
		k.in <- m
	}
}

func (k *talk) send(m *agentpb.ConnectRequest) {
	k.t.Helper()
	// An end of the stream shows at the receiving side, with its reason.
	if k.st != nil {
		_ = k.st.Send(m)
	}
}

func (k *talk) next() *agentpb.ConnectResponse {
	k.t.Helper()
	select {
	case m := <-k.in:
		return m
	default:
	}
	select {
	case m := <-k.in:
		return m
	case <-k.done:
		select {
		case m := <-k.in:
			return m
		default:
		}
		k.t.Fatalf("the stream ended: %v", k.err)
	case <-time.After(patience):
		k.t.Fatal("no message came")
	}
	return nil
}

// until returns the first message that pick likes; states before it are kept, others dropped.
func until[T any](k *talk, pick func(*agentpb.ConnectResponse) (T, bool)) T {
	k.t.Helper()
	for {
		m := k.next()
		if s := m.GetState(); s != nil {
			k.states = append(k.states, s)
		}
		if v, ok := pick(m); ok {
			return v
		}
	}
}

func (k *talk) welcome() *agentpb.Welcome {
	k.t.Helper()
	m := k.next()
	if m.GetWelcome() == nil {
		k.t.Fatalf("the first message is %v", m)
	}
	return m.GetWelcome()
}

func (k *talk) assignment() *agentpb.Assignment {
	k.t.Helper()
	return until(k, func(m *agentpb.ConnectResponse) (*agentpb.Assignment, bool) {
		return m.GetAssignment(), m.GetAssignment() != nil
	})
}

func (k *talk) settled() *agentpb.Settled {
	k.t.Helper()
	return until(k, func(m *agentpb.ConnectResponse) (*agentpb.Settled, bool) {
		return m.GetSettled(), m.GetSettled() != nil
	})
}

func (k *talk) goodbye() *agentpb.Goodbye {
	k.t.Helper()
	return until(k, func(m *agentpb.ConnectResponse) (*agentpb.Goodbye, bool) {
		return m.GetGoodbye(), m.GetGoodbye() != nil
	})
}

func (k *talk) state() *agentpb.State {
	k.t.Helper()
	if len(k.states) > 0 {
		s := k.states[0]
		k.states = k.states[1:]
		return s
	}
	return until(k, func(m *agentpb.ConnectResponse) (*agentpb.State, bool) {
		if m.GetState() != nil {
			k.states = k.states[:len(k.states)-1]
		}
		return m.GetState(), m.GetState() != nil
	})
}

// end waits for the end of the stream and returns its status.
func (k *talk) end() *status.Status {
	k.t.Helper()
	select {
	case <-k.done:
		return status.Convert(k.err)
	case <-time.After(patience):
		k.t.Fatal("the stream did not end")
		return nil
	}
}

func wantCode(t *testing.T, err error, code codes.Code) {
	t.Helper()
	if status.Code(err) != code {
		t.Fatalf("%v; want %s", err, code)
	}
}

type helloOption func(*agentpb.Hello)

func credits(key, deploy int32) helloOption {
	return func(h *agentpb.Hello) {
		h.Credits = []*agentpb.Credit{{Class: agentpb.WorkClass_WORK_CLASS_KEY, Amount: key}, {Class: agentpb.WorkClass_WORK_CLASS_DEPLOY, Amount: deploy}}
	}
}

func bootID(id string) helloOption { return func(h *agentpb.Hello) { h.BootId = id } }

func holds(o ...*agentpb.OpenAssignment) helloOption { return func(h *agentpb.Hello) { h.Open = o } }

func hello(options ...helloOption) *agentpb.ConnectRequest {
	h := &agentpb.Hello{Protocol: 1, ProtocolMin: 1, BootId: "boot-1", Capabilities: []string{"target/file@1"}, Facts: &agentpb.Facts{Os: "linux"}}
	for _, o := range options {
		o(h)
	}
	return &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Hello{Hello: h}}
}

// connect opens a stream of h and says Hello.
func (h *host) connect(options ...helloOption) *talk {
	h.p.t.Helper()
	k := h.p.open(h.p.dial(h.cert))
	k.send(hello(options...))
	return k
}

// online is connect up to the Welcome.
func (h *host) online(options ...helloOption) *talk {
	h.p.t.Helper()
	k := h.connect(options...)
	k.welcome()
	return k
}

func accepted(id string, attempt int64) *agentpb.ConnectRequest {
	return &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Accepted{Accepted: &agentpb.Accepted{Id: id, Attempt: attempt}}}
}

func csrFor(id string, attempt int64, csr []byte) *agentpb.ConnectRequest {
	return &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Csr{Csr: &agentpb.Csr{Id: id, Attempt: attempt, Csr: csr}}}
}

func failedWith(id string, attempt int64, class fault.Class, message string) *agentpb.ConnectRequest {
	return &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Result{Result: &agentpb.Result{Id: id, Attempt: attempt,
		Outcome: &agentpb.Result_Failure{Failure: &agentpb.Failure{Class: string(class), Message: message}}}}}
}

func deployed(id string, attempt int64, leaf []byte) *agentpb.ConnectRequest {
	print := sha256.Sum256(leaf)
	return &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Result{Result: &agentpb.Result{Id: id, Attempt: attempt,
		Outcome: &agentpb.Result_Deployed{Deployed: &agentpb.Deployed{InstalledFingerprint: print[:], ServedFingerprint: print[:],
			ServedUnixUs: time.Now().UnixMicro(), Address: "127.0.0.1:443"}}}}}
}

func grants(class agentpb.WorkClass, n int32) *agentpb.ConnectRequest {
	return &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Credit{Credit: &agentpb.Credit{Class: class, Amount: n}}}
}

// eventually waits for a condition that no message announces.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("it did not come to pass: %s", what)
		case <-tick.C:
		}
	}
}

// token records a join token and returns it as text.
func (p *plane) token(uses int, expires time.Time) (tokenID, text string) {
	secretText := authz.NewSecret()
	tokenID = id.New(id.Token)
	root := sha256.Sum256(p.mesh.Root().Raw)
	p.store.mu.Lock()
	defer p.store.mu.Unlock()
	p.store.tokens[tokenID] = domain.JoinToken{ID: tokenID, Hash: authz.HashSecret(secretText), MaxUses: uses, ExpiresAt: expires}
	return tokenID, authz.JoinTokenString(tokenID, secretText, hex.EncodeToString(root[:]))
}
