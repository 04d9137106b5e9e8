package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/certmesh/certmesh/protocol/fault"
)

// MaxMessage bounds a control message in bytes, both ways.
const MaxMessage = 64 << 10

// pingInterval is how often a silent connection is probed; servers allow no less than every 30 s.
const pingInterval = 60 * time.Second

// scheme leaves the address to the dialer.
const scheme = "passthrough:///"

// DialFunc opens the transport connection; nil means TCP with the environment's proxy.
type DialFunc func(ctx context.Context, addr string) (net.Conn, error)

// Dial prepares a connection to addr (host:port); nothing is sent before the first call. The buffers are small because
// an agent is idle nearly always, and a test machine runs ten thousand of them.
func Dial(addr string, creds credentials.TransportCredentials, dial DialFunc, userAgent string) (*grpc.ClientConn, error) {
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithReadBufferSize(1 << 10),
		grpc.WithWriteBufferSize(4 << 10),
		// Fixed windows: the estimator that grows them sends pings of its own.
		grpc.WithInitialWindowSize(64 << 10),
		grpc.WithInitialConnWindowSize(128 << 10),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingInterval, Timeout: 20 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage)),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithDisableHealthCheck(),
		grpc.WithIdleTimeout(0),
		grpc.WithUserAgent(userAgent),
	}
	if dial != nil {
		opts = append(opts, grpc.WithContextDialer(dial))
	}
	conn, err := grpc.NewClient(scheme+addr, opts...)
	if err != nil {
		return nil, fault.Wrap(fault.Invalid, err, "%q is not a server address (host:port)", addr)
	}
	return conn, nil
}

// Credentials are TLS credentials that remember the state of the newest connection, for what is bound to it, and why
// the newest one failed.
type Credentials struct {
	credentials.TransportCredentials

	wrap func(net.Conn) net.Conn
	seen *seen
}

type seen struct {
	mu      sync.Mutex
	state   tls.ConnectionState
	err     error
	alerted bool
}

// NewCredentials wraps cfg. wrap, if not nil, is put around every connection after its handshake: it sees plain text.
func NewCredentials(cfg *tls.Config, wrap func(net.Conn) net.Conn) *Credentials {
	return &Credentials{credentials.NewTLS(cfg), wrap, &seen{}}
}

// ClientHandshake implements credentials.TransportCredentials.
func (c *Credentials) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ClientHandshake(ctx, authority, raw)
	c.seen.mu.Lock()
	c.seen.state, c.seen.err, c.seen.alerted = tls.ConnectionState{}, err, false
	if ti, ok := info.(credentials.TLSInfo); ok && err == nil {
		c.seen.state = ti.State
	}
	c.seen.mu.Unlock()
	if err != nil {
		return conn, info, err
	}
	conn = &watched{conn, c.seen}
	if c.wrap != nil {
		conn = c.wrap(conn)
	}
	return conn, info, nil
}

// watched notes a TLS alert of the other side. With TLS 1.3 that is how a server refuses a client certificate, and it
// arrives after the client's handshake has ended.
type watched struct {
	net.Conn
	seen *seen
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	var oe *net.OpError
	if errors.As(err, &oe) && oe.Op == "remote error" {
		w.seen.mu.Lock()
		w.seen.alerted = true
		w.seen.mu.Unlock()
	}
	return n, err
}

// Clone implements credentials.TransportCredentials.
func (c *Credentials) Clone() credentials.TransportCredentials {
	return &Credentials{c.TransportCredentials.Clone(), c.wrap, c.seen}
}

// Alerted says whether the server ended the newest connection with a TLS alert.
func (c *Credentials) Alerted() bool {
	c.seen.mu.Lock()
	defer c.seen.mu.Unlock()
	return c.seen.alerted
}

// Err returns why the newest handshake failed; nil if it did not, or there was none.
func (c *Credentials) Err() error {
	c.seen.mu.Lock()
	defer c.seen.mu.Unlock()
	return c.seen.err
}

// State returns the TLS state of the newest connection.
func (c *Credentials) State() tls.ConnectionState {
	c.seen.mu.Lock()
	defer c.seen.mu.Unlock()
	return c.seen.state
}

// Ready waits until conn is connected; a failure to connect, or the end of ctx, is a Retryable error.
func Ready(ctx context.Context, conn *grpc.ClientConn) error {
	conn.Connect()
	for {
		switch s := conn.GetState(); s {
		case connectivity.Ready:
			return nil
		case connectivity.TransientFailure, connectivity.Shutdown:
			return fault.New(fault.Retryable, "no connection to %s; check its address and that a node listens there", strings.TrimPrefix(conn.Target(), scheme))
		default:
			if !conn.WaitForStateChange(ctx, s) {
				return fault.Wrap(fault.Retryable, ctx.Err(), "no connection to %s in time", strings.TrimPrefix(conn.Target(), scheme))
			}
		}
	}
}
