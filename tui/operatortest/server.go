// Package operatortest is a stand-in for a control plane: the operators' API over real gRPC and TLS, with data in memory.
// It records what it is asked, fails where it is told to, and plays changes to whoever watches.
package operatortest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"path"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// Key is the API key that servers accept.
const Key = "cmak1.key_1.S3cretS3cretS3cretS3cretS3cretS3cretS3cretS3c"

// Server is one control plane.
type Server struct {
	// Address is 127.0.0.1:port. The certificate is for that address and for no name.
	Address string
	// CA is the PEM of the root that the chain ends in, Root the certificate.
	CA   string
	Root *x509.Certificate

	grpc *grpc.Server

	mu       sync.Mutex
	data     Data
	calls    []Call
	failures map[string][]*status.Status
	watchers map[chan *operatorpb.WatchResponse]bool
	steps    []func(*Data)
}

// Call is a request as it came.
type Call struct {
	Method  string
	Request proto.Message
}

// Start runs a server until the test ends.
func Start(t testing.TB) *Server {
	t.Helper()
	s, err := New(t.Context())
	if err != nil {
		t.Fatalf("start the stand-in: %v", err)
	}
	t.Cleanup(s.Stop)
	return s
}

// New runs a server; Stop it.
func New(ctx context.Context) (*Server, error) {
	s := &Server{data: Seed(), failures: map[string][]*status.Status{}, watchers: map[chan *operatorpb.WatchResponse]bool{}}
	cert, err := s.certify()
	if err != nil {
		return nil, err
	}
	var l net.ListenConfig
	listener, err := l.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s.Address = listener.Addr().String()
	s.grpc = grpc.NewServer(
		grpc.Creds(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}})),
		grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream),
	)
	operatorpb.RegisterCertificatesServiceServer(s.grpc, certificates{Server: s})
	operatorpb.RegisterAgentsServiceServer(s.grpc, agents{Server: s})
	operatorpb.RegisterJobsServiceServer(s.grpc, jobs{Server: s})
	operatorpb.RegisterIssuersServiceServer(s.grpc, issuers{Server: s})
	operatorpb.RegisterTargetsServiceServer(s.grpc, targets{Server: s})
	operatorpb.RegisterSystemServiceServer(s.grpc, system{Server: s})
	go func() { _ = s.grpc.Serve(listener) }() // it ends by Stop
	return s, nil
}

// Stop ends every call; nothing listens afterwards.
func (s *Server) Stop() { s.grpc.Stop() }

// Change lets f change the data, and tells every watcher.
func (s *Server) Change(f func(*Data)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.change(f)
}

func (s *Server) change(f func(*Data)) {
	f(&s.data)
	for w := range s.watchers {
		select {
		case w <- &operatorpb.WatchResponse{Changes: []*operatorpb.Change{{Kind: "certificates", Id: "any"}}}:
		default: // it has one to read already
		}
	}
}

// Play has the steps follow one another once somebody watches: a step is taken whenever a certificate was read.
func (s *Server) Play(steps ...func(*Data)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps = steps
}

// Fail has the next call of a method (without its service) end with an error, as the real API words them.
func (s *Server) Fail(method string, code codes.Code, message, next string) {
	st := status.New(code, message)
	if next != "" {
		if full, err := st.WithDetails(&errdetails.ErrorInfo{Reason: "TEST", Domain: "certmesh", Metadata: map[string]string{"next": next}}); err == nil {
			st = full
		}
	}
	s.FailWith(method, st)
}

// FailWith has the next call of a method end with a status.
func (s *Server) FailWith(method string, st *status.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failures[method] = append(s.failures[method], st)
}

// Calls are the requests so far of a method (without its service).
func (s *Server) Calls(method string) []proto.Message {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []proto.Message
	for _, c := range s.calls {
		if c.Method == method {
			out = append(out, c.Request)
		}
	}
	return out
}

func (s *Server) admit(ctx context.Context, method string) error {
	if got := metadata.ValueFromIncomingContext(ctx, "authorization"); len(got) != 1 || got[0] != "Bearer "+Key {
		return status.Error(codes.Unauthenticated, "the API key is not known here; check CERTMESH_API_KEY and the server, or log in again with certmesh login")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if queue := s.failures[method]; len(queue) > 0 {
		s.failures[method] = queue[1:]
		if queue[0].Code() == codes.DeadlineExceeded {
			s.mu.Unlock()
			<-ctx.Done()
			s.mu.Lock()
		}
		return queue[0].Err()
	}
	return nil
}

func (s *Server) record(method string, req any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m, ok := req.(proto.Message); ok {
		s.calls = append(s.calls, Call{method, proto.Clone(m)})
	}
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	method := path.Base(info.FullMethod)
	s.record(method, req)
	if err := s.admit(ctx, method); err != nil {
		return nil, err
	}
	return handle(ctx, req)
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	if err := s.admit(ss.Context(), path.Base(info.FullMethod)); err != nil {
		return err
	}
	return handle(srv, ss)
}

// part cuts a page out of a list; cursors are positions.
func part[T any](list []T, p *operatorpb.Page) ([]T, string, error) {
	from := 0
	if p.GetCursor() != "" {
		var err error
		if from, err = strconv.Atoi(p.GetCursor()); err != nil || from < 0 || from > len(list) {
			return nil, "", status.Error(codes.InvalidArgument, "page.cursor: is not a cursor of this API; use next_cursor of the previous answer")
		}
	}
	to := min(len(list), from+int(p.GetSize()))
	next := ""
	if to < len(list) {
		next = strconv.Itoa(to)
	}
	return list[from:to], next, nil
}

// found looks a resource up by id or name.
func found[T interface {
	GetId() string
	GetName() string
}](list []T, ref, what string) (T, error) {
	for _, x := range list {
		if x.GetId() == ref || x.GetName() == ref {
			return x, nil
		}
	}
	var none T
	st, err := status.New(codes.NotFound, "there is no "+what+" "+strconv.Quote(ref)).WithDetails(&errdetails.ErrorInfo{
		Reason: "NOT_FOUND", Domain: "certmesh", Metadata: map[string]string{"next": "check the id or name; the lists show what exists"},
	})
	if err != nil {
		return none, err
	}
	return none, st.Err()
}

// certify makes a root and, below it, the server's certificate for 127.0.0.1.
func (s *Server) certify() (tls.Certificate, error) {
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "stand-in mesh root"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: Now.AddDate(-1, 0, 0), NotAfter: Now.AddDate(9, 0, 0), KeyUsage: x509.KeyUsageCertSign,
	}
	rootDER, err := x509.CreateCertificate(rand.Reader, template, template, rootKey.Public(), rootKey)
	if err != nil {
		return tls.Certificate{}, err
	}
	if s.Root, err = x509.ParseCertificate(rootDER); err != nil {
		return tls.Certificate{}, err
	}
	s.CA = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: rootDER}))
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "node"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"mesh.test"},
		NotBefore: Now.Add(-time.Hour), NotAfter: Now.AddDate(0, 1, 0), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, s.Root, key.Public(), rootKey)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der, rootDER}, PrivateKey: key}, nil
}
