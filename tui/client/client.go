package client

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// maxAnswer is above a page of 1000 versions with their chains.
const maxAnswer = 32 << 20

// serviceConfig has gRPC itself repeat reads while the server is away, e.g. during its restart. Calls that change
// something are not repeated: whether they were carried out is not known.
const serviceConfig = `{"methodConfig": [{
  "name": [
    {"service": "certmesh.operator.v1.CertificatesService", "method": "ListCertificates"},
    {"service": "certmesh.operator.v1.CertificatesService", "method": "GetCertificate"},
    {"service": "certmesh.operator.v1.CertificatesService", "method": "ListVersions"},
    {"service": "certmesh.operator.v1.CertificatesService", "method": "ExplainCertificate"},
    {"service": "certmesh.operator.v1.AgentsService", "method": "ListAgents"},
    {"service": "certmesh.operator.v1.AgentsService", "method": "ListJoinTokens"},
    {"service": "certmesh.operator.v1.AgentsService", "method": "GetAgent"},
    {"service": "certmesh.operator.v1.JobsService", "method": "ListJobs"},
    {"service": "certmesh.operator.v1.JobsService", "method": "GetJob"},
    {"service": "certmesh.operator.v1.IssuersService", "method": "ListIssuers"},
    {"service": "certmesh.operator.v1.IssuersService", "method": "GetIssuer"},
    {"service": "certmesh.operator.v1.IssuersService", "method": "ListProfiles"},
    {"service": "certmesh.operator.v1.TargetsService", "method": "ListTargets"},
    {"service": "certmesh.operator.v1.TargetsService", "method": "GetTarget"},
    {"service": "certmesh.operator.v1.SystemService", "method": "GetStatus"},
    {"service": "certmesh.operator.v1.SystemService", "method": "ListAuditEvents"}
  ],
  "retryPolicy": {
    "maxAttempts": 4, "initialBackoff": "0.2s", "maxBackoff": "2s", "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"]
  }
}]}`

// Config says which server to talk to and how.
type Config struct {
	// Server is host:port as Address returns it.
	Server string
	Key    Key
	// CA is the PEM that the server's chain must end in.
	CA string
	// Timeout bounds every call; Watch has no end.
	Timeout time.Duration
	// Version of the tool, for the server's log.
	Version string
	Now     func() time.Time
}

// Client is a connection to a control plane. Every error of its calls is an *Error. It is safe for concurrent use.
type Client struct {
	Certificates operatorpb.CertificatesServiceClient
	Agents       operatorpb.AgentsServiceClient
	Jobs         operatorpb.JobsServiceClient
	Issuers      operatorpb.IssuersServiceClient
	Targets      operatorpb.TargetsServiceClient
	System       operatorpb.SystemServiceClient

	conn    *grpc.ClientConn
	address string
	timeout time.Duration

	mu      sync.Mutex
	trouble error // what the last attempt to connect failed of; nil once one succeeds
}

// New prepares a connection; it is made by the first call. Close it.
func New(cfg Config) (*Client, error) {
	if err := cfg.Key.Check(); err != nil {
		return nil, err
	}
	roots, err := ParseCA([]byte(cfg.CA))
	if err != nil {
		return nil, err
	}
	c := &Client{address: cfg.Server, timeout: cfg.Timeout}
	host, _, err := net.SplitHostPort(cfg.Server)
	if err != nil {
		return nil, err
	}
	inner := credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: host,
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection does it, with reasons that a person can act on
		VerifyConnection: func(cs tls.ConnectionState) error {
			return verify(cfg.Server, cs.PeerCertificates, roots, cfg.Now())
		},
	})
	c.conn, err = grpc.NewClient("passthrough:///"+cfg.Server,
		grpc.WithTransportCredentials(noted{inner, c}),
		grpc.WithPerRPCCredentials(bearer(cfg.Key)),
		grpc.WithContextDialer(c.dial),
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithUserAgent("certmesh/"+cfg.Version),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithUnaryInterceptor(c.call),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 20 * time.Second}),
		// A restart takes a second or two; the reads above are still being repeated then.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second},
			MinConnectTimeout: 10 * time.Second,
		}),
	)
	if err != nil {
		return nil, err
	}
	c.Certificates = operatorpb.NewCertificatesServiceClient(c.conn)
	c.Agents = operatorpb.NewAgentsServiceClient(c.conn)
	c.Jobs = operatorpb.NewJobsServiceClient(c.conn)
	c.Issuers = operatorpb.NewIssuersServiceClient(c.conn)
	c.Targets = operatorpb.NewTargetsServiceClient(c.conn)
	c.System = operatorpb.NewSystemServiceClient(c.conn)
	return c, nil
}

// Close ends the connection and every call on it.
func (c *Client) Close() error { return c.conn.Close() }

// call bounds a call and words its error.
func (c *Client) call(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	return c.describe(invoke(ctx, method, req, reply, cc, opts...))
}

func (c *Client) dial(ctx context.Context, address string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		c.note(err)
	}
	return conn, err
}

func (c *Client) note(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// A dial that is given up because the tool ends says nothing about the server.
	if !errors.Is(err, context.Canceled) {
		c.trouble = err
	}
}

func (c *Client) lastTrouble() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.trouble
}

// noted remembers how the last handshake ended, since gRPC passes on no more than its text.
type noted struct {
	credentials.TransportCredentials
	c *Client
}

func (n noted) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	out, info, err := n.TransportCredentials.ClientHandshake(ctx, authority, conn)
	n.c.note(err)
	return out, info, err
}

func (n noted) Clone() credentials.TransportCredentials {
	return noted{n.TransportCredentials.Clone(), n.c}
}

// bearer sends the API key with every call, over TLS only.
type bearer Key

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

func (bearer) RequireTransportSecurity() bool { return true }
func (bearer) String() string                 { return Key("").String() }
