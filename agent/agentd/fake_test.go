package agentd_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/agent/agentd"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait of these tests; it is reached only when something is wrong.
const patience = 20 * time.Second

const trustDomain = "mesh.test"

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// authority is a small CA, for the mesh and for what the agents deploy.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

var serials atomic.Int64

func newAuthority() *authority {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	a := &authority{key: key}
	tmpl := &x509.Certificate{Subject: pkix.Name{CommonName: "test root"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().AddDate(-1, 0, 0), NotAfter: time.Now().AddDate(10, 0, 0)}
	a.cert = tmpl
	a.cert = must(x509.ParseCertificate(a.sign(tmpl, key.Public())))
	return a
}

func (a *authority) sign(tmpl *x509.Certificate, pub crypto.PublicKey) []byte {
	tmpl.SerialNumber = big.NewInt(1000 + serials.Add(1))
	return must(x509.CreateCertificate(rand.Reader, tmpl, a.cert, pub, a.key))
}

func (a *authority) fingerprint() string {
	h := sha256.Sum256(a.cert.Raw)
	return hex.EncodeToString(h[:])
}

// identity signs what the mesh CA would.
func (a *authority) identity(path string, pub crypto.PublicKey, from, to time.Time) []byte {
	return a.sign(&x509.Certificate{NotBefore: from, NotAfter: to, KeyUsage: x509.KeyUsageDigitalSignature,
		URIs:        []*url.URL{must(url.Parse("spiffe://" + trustDomain + path))},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}, pub)
}

// leaf answers a CSR as an issuing CA would.
func (a *authority) leaf(csr []byte) []byte {
	r := must(x509.ParseCertificateRequest(csr))
	return a.sign(&x509.Certificate{Subject: r.Subject, DNSNames: r.DNSNames, IPAddresses: r.IPAddresses,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(0, 0, 47)}, r.PublicKey)
}

const agentID = "agt_0123456789abcdef0123456789abcdef"

// fake is a control-plane node on a loopback port. Its fields may be set before the first agent starts.
type fake struct {
	agentpb.UnimplementedAgentServiceServer
	t    testing.TB
	mesh *authority
	addr string

	// now is the server's clock; life the validity of identities issued at that moment.
	now  func() time.Time
	life func(now time.Time) (from, to time.Time)
	// judge refuses identities; nil accepts what is valid.
	judge func(*x509.Certificate) error
	// enrol overrides the answer of Enroll.
	enrol func(*agentpb.EnrollRequest, *agentpb.EnrollResponse) error
	// reported is what Report answers.
	reports chan []*agentpb.HeldLeaf

	token    string
	streams  chan *stream
	enrols   atomic.Int64
	renewals atomic.Int64
}

// newFake starts a node; mesh may be shared by several.
func newFake(t testing.TB, mesh *authority, set func(*fake)) *fake {
	f := &fake{t: t, mesh: mesh, now: time.Now, streams: make(chan *stream, 256), reports: make(chan []*agentpb.HeldLeaf, 16),
		life:  func(n time.Time) (time.Time, time.Time) { return n.Add(-time.Minute), n.Add(7 * 24 * time.Hour) },
		token: "cmjt1.tok_1." + base64.RawURLEncoding.EncodeToString(bytes.Repeat([]byte{7}, 32)) + "." + mesh.fingerprint()}
	if set != nil {
		set(f)
	}
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	node := mesh.identity("/node/n1", key.Public(), time.Now().AddDate(0, 0, -90), time.Now().AddDate(1, 0, 0))
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	f.addr = l.Addr().String()
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert,
		Certificates: []tls.Certificate{{Certificate: [][]byte{node, mesh.cert.Raw}, PrivateKey: key}}})),
		grpc.MaxRecvMsgSize(64<<10))
	agentpb.RegisterAgentServiceServer(s, f)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	return f
}

func (f *fake) issue(csr []byte) ([][]byte, error) {
	r, err := x509.ParseCertificateRequest(csr)
	if err != nil || r.CheckSignature() != nil {
		return nil, status.Error(codes.InvalidArgument, "bad csr")
	}
	from, to := f.life(f.now())
	return [][]byte{f.mesh.identity("/agent/"+agentID, r.PublicKey, from, to)}, nil
}

func (f *fake) bundle() *agentpb.TrustBundle {
	return &agentpb.TrustBundle{Version: 1, Roots: [][]byte{f.mesh.cert.Raw}}
}

func (f *fake) Enroll(_ context.Context, r *agentpb.EnrollRequest) (*agentpb.EnrollResponse, error) {
	f.enrols.Add(1)
	if r.GetToken() != f.token {
		return nil, status.Error(codes.Unauthenticated, "the join token is unknown, used up or expired")
	}
	chain, err := f.issue(r.GetCsr())
	if err != nil {
		return nil, err
	}
	out := &agentpb.EnrollResponse{AgentId: agentID, Chain: chain, TrustDomain: trustDomain, TrustBundle: f.bundle()}
	if f.enrol != nil {
		if err := f.enrol(r, out); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (f *fake) Reidentify(ctx context.Context, r *agentpb.ReidentifyRequest) (*agentpb.ReidentifyResponse, error) {
	c, err := x509.ParseCertificate(r.GetCertificate())
	if err != nil || c.CheckSignatureFrom(f.mesh.cert) != nil {
		return nil, status.Error(codes.Unauthenticated, "not an identity of this mesh")
	}
	p, _ := peer.FromContext(ctx)
	cs := p.AuthInfo.(credentials.TLSInfo).State
	exported := must(cs.ExportKeyingMaterial("EXPORTER-certmesh-reidentify", nil, 32))
	h := sha256.Sum256(r.GetCsr())
	digest := sha256.Sum256(append(append([]byte("certmesh reidentify v1\x00"), exported...), h[:]...))
	if !ecdsa.VerifyASN1(c.PublicKey.(*ecdsa.PublicKey), digest[:], r.GetProofOfPossession()) {
		return nil, status.Error(codes.Unauthenticated, "the proof does not verify")
	}
	chain, err := f.issue(r.GetCsr())
	if err != nil {
		return nil, err
	}
	f.renewals.Add(1)
	return &agentpb.ReidentifyResponse{Chain: chain, TrustBundle: f.bundle()}, nil
}

func (f *fake) Report(st agentpb.AgentService_ReportServer) error {
	var all []*agentpb.HeldLeaf
	for {
		m, err := st.Recv()
		if errors.Is(err, io.EOF) {
			f.reports <- all
			return st.SendAndClose(&agentpb.ReportResponse{Unknown: int32(len(all))})
		}
		if err != nil {
			return err
		}
		all = append(all, m.GetLeaves().GetLeaves()...)
	}
}

// stream is one Connect, seen from the server.
type stream struct {
	t     testing.TB
	hello *agentpb.Hello
	cert  *x509.Certificate
	st    agentpb.AgentService_ConnectServer
	in    chan *agentpb.ConnectRequest
	end   chan error // the handler returns what is sent here
	gone  chan struct{}
	sendM sync.Mutex
}

func (f *fake) Connect(st agentpb.AgentService_ConnectServer) error {
	p, _ := peer.FromContext(st.Context())
	certs := p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates
	if len(certs) == 0 {
		return status.Error(codes.Unauthenticated, "no client certificate")
	}
	if certs[0].CheckSignatureFrom(f.mesh.cert) != nil || !f.now().Before(certs[0].NotAfter) {
		return status.Error(codes.Unauthenticated, "the identity is not valid")
	}
	if f.judge != nil {
		if err := f.judge(certs[0]); err != nil {
			return err
		}
	}
	first, err := st.Recv()
	if err != nil {
		return err
	}
	if first.GetHello() == nil {
		return status.Error(codes.InvalidArgument, "Hello comes first")
	}
	s := &stream{t: f.t, hello: first.GetHello(), cert: certs[0], st: st, in: make(chan *agentpb.ConnectRequest, 4096),
		end: make(chan error, 1), gone: make(chan struct{})}
	f.streams <- s
	go func() {
		defer close(s.gone)
		defer close(s.in)
		for {
			m, err := st.Recv()
			if err != nil {
				return
			}
			s.in <- m
		}
	}()
	select {
	case err := <-s.end:
		return err
	case <-s.gone:
		return nil
	}
}

// next returns the next stream whose Hello has arrived.
func (f *fake) next() *stream {
	f.t.Helper()
	select {
	case s := <-f.streams:
		return s
	case <-time.After(patience):
		f.t.Fatal("no agent came")
		return nil
	}
}

func (s *stream) send(m *agentpb.ConnectResponse) {
	s.sendM.Lock()
	defer s.sendM.Unlock()
	_ = s.st.Send(m) // an agent that is gone shows elsewhere
}

func (s *stream) welcome(verdicts ...*agentpb.Verdict) {
	s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Welcome{Welcome: &agentpb.Welcome{Protocol: 1, Epoch: 1, Verdicts: verdicts}}})
}

func (s *stream) assign(a *agentpb.Assignment) {
	s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Assignment{Assignment: a}})
}

func (s *stream) settle(x *agentpb.Settled) {
	s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Settled{Settled: x}})
}

func (s *stream) state(x *agentpb.State) {
	s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_State{State: x}})
}

func (s *stream) goodbye(g *agentpb.Goodbye) {
	s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Goodbye{Goodbye: g}})
}

// expect returns the next message that pick takes; others are passed over.
func expect[T any](s *stream, pick func(*agentpb.ConnectRequest) (T, bool)) T {
	s.t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case m, ok := <-s.in:
			if !ok {
				s.t.Fatal("the agent left the stream")
			}
			if v, ok := pick(m); ok {
				return v
			}
		case <-deadline:
			s.t.Fatalf("nothing of the kind %T came", *new(T))
		}
	}
}

func csrOf(m *agentpb.ConnectRequest) (*agentpb.Csr, bool) { return m.GetCsr(), m.GetCsr() != nil }
func resultOf(m *agentpb.ConnectRequest) (*agentpb.Result, bool) {
	return m.GetResult(), m.GetResult() != nil
}
func acceptedOf(m *agentpb.ConnectRequest) (*agentpb.Accepted, bool) {
	return m.GetAccepted(), m.GetAccepted() != nil
}
func appliedOf(m *agentpb.ConnectRequest) (*agentpb.Applied, bool) {
	return m.GetApplied(), m.GetApplied() != nil
}
func rejectedOf(m *agentpb.ConnectRequest) (*agentpb.Rejected, bool) {
	return m.GetRejected(), m.GetRejected() != nil
}
func goodbyeOf(m *agentpb.ConnectRequest) (*agentpb.Goodbye, bool) {
	return m.GetGoodbye(), m.GetGoodbye() != nil
}
func identityOf(m *agentpb.ConnectRequest) (*agentpb.IdentityCsr, bool) {
	return m.GetIdentityCsr(), m.GetIdentityCsr() != nil
}

// running is an agent in this process.
type running struct {
	t    testing.TB
	stop context.CancelFunc
	done chan struct{}
	err  error
}

// config is an agent of f with everything in a directory of the test.
func config(t testing.TB, f *fake) agentd.Config {
	cfg := agentd.Config{Servers: []string{f.addr}, DataDir: t.TempDir(), JoinToken: f.token, Name: "host-1",
		Backoff: agentd.Backoff{First: time.Millisecond, Young: 5 * time.Millisecond, YoungFor: time.Minute, Old: 5 * time.Millisecond, Stable: time.Hour},
		Facts:   &agentpb.Facts{Os: "linux", Hostname: "host-1"}}
	if os.Getenv("AGENTD_TEST_LOG") != "" {
		cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	return cfg
}

func start(t testing.TB, cfg agentd.Config) *running {
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{t: t, stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		r.err = agentd.Run(ctx, cfg)
	}()
	t.Cleanup(func() {
		cancel()
		<-r.done
	})
	return r
}

// wait returns how Run ended by itself.
func (r *running) wait() error {
	r.t.Helper()
	select {
	case <-r.done:
		return r.err
	case <-time.After(patience):
		r.t.Fatal("Run did not return")
		return nil
	}
}

// end stops the agent in order.
func (r *running) end() {
	r.t.Helper()
	r.stop()
	if err := r.wait(); err != nil {
		r.t.Fatalf("a clean stop returned %v", err)
	}
}

func equal(t testing.TB, what string, got, want proto.Message) {
	t.Helper()
	if !proto.Equal(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func contains(t testing.TB, text string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(text, w) {
			t.Errorf("%q does not say %q", text, w)
		}
	}
}

// keyOf is the public key of a certificate.
func keyOf(der []byte) string {
	return string(must(x509.ParseCertificate(der)).RawSubjectPublicKeyInfo)
}
