package net

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/certmesh/certmesh/cluster/internal/identity"
	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	// Nodes are few; a stranger who opens connections and says nothing gets these and no more.
	maxHandshakes    = 64
	handshakeTimeout = 5 * time.Second
)

// Layer is the stream layer below raft.NetworkTransport. Raft's addresses are node ids here: the Raft configuration names
// nodes, and where they are may change at any time.
type Layer struct {
	id       string
	identity *Identity
	listener net.Listener
	dial     func(ctx context.Context, address string) (net.Conn, error)
	where    func(id string) []string
	log      *slog.Logger

	ctx      context.Context //nolint:containedctx // Raft's interfaces carry none; it ends with the layer.
	cancel   context.CancelFunc
	accepted chan net.Conn
	wg       sync.WaitGroup

	mu    sync.Mutex
	conns map[*conn]struct{}
	// places are where nodes were last reached.
	places map[string]string
}

// NewLayer serves listener until Close. where returns the addresses at which a node may be found, best first.
func NewLayer(ctx context.Context, id string, identity *Identity, listener net.Listener, dial func(ctx context.Context, address string) (net.Conn, error),
	where func(id string) []string, log *slog.Logger,
) *Layer {
	l := &Layer{id: id, identity: identity, listener: listener, dial: dial, where: where, log: log, accepted: make(chan net.Conn), conns: map[*conn]struct{}{}, places: map[string]string{}}
	l.ctx, l.cancel = context.WithCancel(ctx)
	l.wg.Go(l.serve)
	return l
}

func (l *Layer) serve() {
	slots := make(chan struct{}, maxHandshakes)
	for {
		raw, err := l.listener.Accept()
		if err != nil {
			if l.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			l.log.Warn("a connection to the Raft listener was lost", "error", err)
			// Too many open files, for one: not as fast as the processor can.
			select {
			case <-time.After(50 * time.Millisecond):
			case <-l.ctx.Done():
				return
			}
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			_ = raw.Close() // Whoever it was tries again.
			continue
		}
		l.wg.Go(func() {
			defer func() { <-slots }()
			l.admit(raw)
		})
	}
}

func (l *Layer) admit(raw net.Conn) {
	c, err := l.handshake(tls.Server(raw, identity.Server(l.identity.Certificate, l.identity.Roots, l.identity.TrustDomain)), handshakeTimeout)
	if err != nil {
		if l.ctx.Err() == nil {
			l.log.Warn("a connection to the Raft listener was refused", "remote", raw.RemoteAddr().String(), "error", err)
		}
		return
	}
	select {
	case l.accepted <- c:
	case <-l.ctx.Done():
		_ = c.Close() // Nobody takes it any more.
	}
}

// handshake makes a connection of t, or closes it. Who called must be another node, and one that may; whom this node has
// called, the configuration has judged.
func (l *Layer) handshake(t *tls.Conn, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(l.ctx, timeout)
	defer cancel()
	err := t.HandshakeContext(ctx)
	var id string
	if err == nil {
		id, err = identity.Node(t.ConnectionState().PeerCertificates[0], l.identity.TrustDomain)
	}
	switch {
	case err != nil:
	case id == l.id:
		err = fault.New(fault.Rejected, "another node shows the id of this one, %q: every node needs an id of its own", id)
	case l.identity.Admit != nil:
		err = l.identity.Admit(id)
	}
	if err != nil {
		_ = t.NetConn().Close() // There is nobody to tell.
		return nil, err
	}
	return l.keep(t, t.ConnectionState().PeerCertificates[0].NotAfter)
}

// keep registers a connection, to be closed with the layer, or when the identity behind it expires.
func (l *Layer) keep(t *tls.Conn, expires time.Time) (net.Conn, error) {
	c := &conn{Conn: t, layer: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		_ = t.NetConn().Close() // Too late.
		return nil, net.ErrClosed
	}
	c.expiry = time.AfterFunc(expires.Sub(l.identity.Now()), func() { _ = c.Close() })
	l.conns[c] = struct{}{}
	return c, nil
}

// Dial implements raft.StreamLayer: address is a node's id.
func (l *Layer) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	id := string(address)
	places := l.where(id)
	if len(places) == 0 {
		return nil, fmt.Errorf("nobody has said yet where node %s is", id)
	}
	// Where it was found before first: nothing that was said of it is as good.
	if at := slices.Index(places, l.Place(id)); at > 0 {
		places = slices.Insert(slices.Delete(slices.Clone(places), at, at+1), 0, places[at])
	}
	var errs []error
	for _, place := range places {
		c, err := l.dialAt(id, place, timeout/time.Duration(len(places)))
		if err == nil {
			l.mu.Lock()
			l.places[id] = place
			l.mu.Unlock()
			return c, nil
		}
		errs = append(errs, fmt.Errorf("node %s at %s: %w", id, place, err))
	}
	return nil, errors.Join(errs...)
}

// Place returns the address at which a node was last reached; empty: it never was.
func (l *Layer) Place(id string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.places[id]
}

func (l *Layer) dialAt(id, place string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(l.ctx, timeout)
	defer cancel()
	raw, err := l.dial(ctx, place)
	if err != nil {
		return nil, err
	}
	return l.handshake(tls.Client(raw, identity.Client(l.identity.Certificate, l.identity.Roots, l.identity.TrustDomain, id)), timeout)
}

// Accept implements net.Listener: connections whose other side has proven to be a node.
func (l *Layer) Accept() (net.Conn, error) {
	select {
	case c := <-l.accepted:
		return c, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close ends the listener and every connection. It waits for what runs.
func (l *Layer) Close() error {
	l.mu.Lock()
	l.cancel()
	conns := l.conns
	l.conns = map[*conn]struct{}{}
	l.mu.Unlock()
	err := l.listener.Close()
	for c := range conns {
		_ = c.Close() // Raft is gone on this side.
	}
	l.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Addr implements net.Listener with the node's id.
func (l *Layer) Addr() net.Addr { return nodeAddr(l.id) }

type nodeAddr string

func (nodeAddr) Network() string  { return "certmesh" }
func (a nodeAddr) String() string { return string(a) }

// conn is a connection of a Layer.
type conn struct {
	*tls.Conn
	layer  *Layer
	expiry *time.Timer
	once   sync.Once
}

// Close closes at once: Raft has nothing to say at the end, and a lost peer would hold up the closing alert.
func (c *conn) Close() error {
	err := net.ErrClosed
	c.once.Do(func() {
		c.layer.mu.Lock()
		c.expiry.Stop()
		delete(c.layer.conns, c)
		c.layer.mu.Unlock()
		err = c.NetConn().Close()
	})
	return err
}
