package streams

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/pprof"
	"net/url"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

// The bare baseline runs in processes of its own: this test binary, told by the environment which end it is.
const (
	roleEnv  = "STREAMS_ROLE"
	roleArgs = "STREAMS_ROLE_ARGS" // address and number of streams, or the debug address
)

// Role runs the end of the baseline that the environment asks for; false: none is asked for.
func Role() bool {
	var err error
	switch os.Getenv(roleEnv) {
	case "":
		return false
	case "server":
		err = bareServer(os.Getenv(roleArgs))
	case "clients":
		err = bareClients(os.Getenv(roleArgs))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return true
}

// bareCA is a CA whose key both ends derive from nothing secret: it lives for one measurement on the loopback.
type bareCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newBareCA() (*bareCA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bare"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &bareCA{cert, key}, err
}

// leaf makes a certificate as agents have them: each its own key and SPIFFE id.
func (c *bareCA) leaf(n int64) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(n), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs: []*url.URL{{Scheme: "spiffe", Host: "bare", Path: "/agent/agt_" + strconv.FormatInt(n, 10)}}}
	der, err := x509.CreateCertificate(rand.Reader, t, c.cert, &key.PublicKey, c.key)
	return tls.Certificate{Certificate: [][]byte{der, c.cert.Raw}, PrivateKey: key}, err
}

// bareService answers the first message and then reads until the stream ends: the least that a stream can be.
type bareService struct {
	agentpb.UnimplementedAgentServiceServer
}

func (bareService) Connect(st grpc.BidiStreamingServer[agentpb.ConnectRequest, agentpb.ConnectResponse]) error {
	for first := true; ; first = false {
		if _, err := st.Recv(); err != nil {
			return nil //nolint:nilerr // whoever hangs up ends the stream
		}
		if !first {
			continue
		}
		if err := st.Send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Welcome{Welcome: &agentpb.Welcome{Protocol: 1}}}); err != nil {
			return err
		}
	}
}

// bareServer listens with the buffers, windows and keepalives of the mesh listener. The address, the CA's certificate and
// its key are of no use beyond this run, so that clients find them in a file.
func bareServer(args string) error {
	f, err := fields(args, 2)
	if err != nil {
		return err
	}
	ca, err := newBareCA()
	if err != nil {
		return err
	}
	cert, err := ca.leaf(2)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool, SessionTicketsDisabled: true})),
		grpc.ReadBufferSize(1<<10), grpc.WriteBufferSize(4<<10), grpc.InitialWindowSize(64<<10), grpc.InitialConnWindowSize(128<<10),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 30 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 2 * time.Minute, Time: 90 * time.Second, Timeout: 20 * time.Second}))
	agentpb.RegisterAgentServiceServer(s, bareService{})
	l, err := net.Listen("tcp", f[0])
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	debug := &http.Server{Addr: f[1], Handler: mux, ReadHeaderTimeout: time.Minute}
	go func() { _ = debug.ListenAndServe() }() // ends with the process
	key, err := x509.MarshalECPrivateKey(ca.key)
	if err != nil {
		return err
	}
	if err := os.WriteFile("bare-ca.der", ca.cert.Raw, 0o600); err != nil {
		return err
	}
	if err := os.WriteFile("bare-ca.key", key, 0o600); err != nil {
		return err
	}
	return s.Serve(l)
}

// bareClients holds as many streams as it is told until it is killed, and prints "ready" when all are open.
func bareClients(args string) error {
	f, err := fields(args, 2)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(f[1])
	if err != nil {
		return err
	}
	ca := &bareCA{}
	der, err := os.ReadFile("bare-ca.der")
	if err != nil {
		return err
	}
	if ca.cert, err = x509.ParseCertificate(der); err != nil {
		return err
	}
	if der, err = os.ReadFile("bare-ca.key"); err != nil {
		return err
	}
	if ca.key, err = x509.ParseECPrivateKey(der); err != nil {
		return err
	}
	ctx := context.Background()
	var mu sync.Mutex
	var held []any
	g := errgroup.Group{}
	g.SetLimit(32)
	for i := range n {
		g.Go(func() error {
			st, conn, err := bareClient(ctx, ca, f[0], i)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			held = append(held, st, conn)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	fmt.Println("ready", len(held)/2)
	<-ctx.Done()
	select {}
}

func bareClient(ctx context.Context, ca *bareCA, addr string, i int) (agentpb.AgentService_ConnectClient, *grpc.ClientConn, error) {
	cert, err := ca.leaf(int64(10 + i))
	if err != nil {
		return nil, nil, err
	}
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithReadBufferSize(1<<10), grpc.WithWriteBufferSize(4<<10),
		grpc.WithInitialWindowSize(64<<10), grpc.WithInitialConnWindowSize(128<<10), grpc.WithIdleTimeout(0),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+i%8))}}
			return d.DialContext(ctx, "tcp", addr)
		}),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert},
			InsecureSkipVerify: true})))
	if err != nil {
		return nil, nil, err
	}
	st, err := agentpb.NewAgentServiceClient(conn).Connect(ctx)
	if err == nil {
		err = st.Send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Hello{Hello: &agentpb.Hello{Protocol: 1}}})
	}
	if err == nil {
		_, err = st.Recv()
	}
	if err != nil {
		return nil, nil, fmt.Errorf("stream %d: %w", i, err)
	}
	return st, conn, nil
}
