package stream

import (
	"context"
	"crypto/tls"
	"net"
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

// DialFunc opens the transport connection; nil means TCP with the environment's proxy.
type DialFunc func(ctx context.Context, addr string) (net.Conn, error)

// Dial prepares a connection to addr (host:port); nothing is sent before the first call. The buffers are small because
// an agent is idle nearly always, and a test machine runs ten thousand of them.
func Dial(addr string, creds credentials.TransportCredentials, dial DialFunc, userAgent string) (*grpc.ClientConn, error) {
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithReadBufferSize(1 << 10),
		grpc.WithWriteBufferSize(4 << 10),
		grpc.WithSharedWriteBuffer(true),
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
	conn, err := grpc.NewClient("passthrough:///"+addr, opts...)
	if err != nil {
		return nil, fault.Wrap(fault.Invalid, err, "%q is not a server address (host:port)", addr)
	}
	return conn, nil
}

// Credentials are TLS credentials that remember the state of the newest connection, for what is bound to it.
type Credentials struct {
	credentials.TransportCredentials

	seen *seen
}

type seen struct {
	mu    sync.Mutex
	state tls.ConnectionState
}

// NewCredentials wraps cfg.
func NewCredentials(cfg *tls.Config) *Credentials {
	return &Credentials{credentials.NewTLS(cfg), &seen{}}
}

// ClientHandshake implements credentials.TransportCredentials.
func (c *Credentials) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if ti, ok := info.(credentials.TLSInfo); ok && err == nil {
		c.seen.mu.Lock()
		c.seen.state = ti.State
		c.seen.mu.Unlock()
	}
	return conn, info, err
}

// Clone implements credentials.TransportCredentials.
func (c *Credentials) Clone() credentials.TransportCredentials {
	return &Credentials{c.TransportCredentials.Clone(), c.seen}
}

// State returns the TLS state of the newest connection.
func (c *Credentials) State() tls.ConnectionState {
	c.seen.mu.Lock()
	defer c.seen.mu.Unlock()
	return c.seen.state
}

// Ready waits until conn is connected. The first failure to connect is returned as a Retryable error; its cause shows
// in the error of a call, so a call is what callers make next.
func Ready(ctx context.Context, conn *grpc.ClientConn) error {
	conn.Connect()
	for {
		switch s := conn.GetState(); s {
		case connectivity.Ready, connectivity.TransientFailure:
			return nil
		default:
			if !conn.WaitForStateChange(ctx, s) {
				return fault.Wrap(fault.Retryable, ctx.Err(), "no connection to %s in time", conn.Target())
			}
		}
	}
}
