package clustertest

import (
	"context"
	"fmt"
	"net"
	"sync"

	"google.golang.org/grpc/test/bufconn"
)

// Network carries bytes between hosts. What is cut loses everything without a word, as a network does: writes succeed, reads
// wait, dialling waits until its context ends. Connections that have lost something break when the cut heals.
type Network struct {
	mu        sync.Mutex
	listeners map[string]*listener
	cuts      map[pair]bool
	conns     map[*conn]struct{}
}

type pair struct{ a, b string }

func between(a, b string) pair {
	if b < a {
		a, b = b, a
	}
	return pair{a, b}
}

// NewNetwork returns a network without hosts.
func NewNetwork() *Network {
	return &Network{listeners: map[string]*listener{}, cuts: map[pair]bool{}, conns: map[*conn]struct{}{}}
}

// Listen listens on an address of a host. The address is free again once the listener is closed.
func (w *Network) Listen(host, address string) (net.Listener, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.listeners[address] != nil {
		return nil, fmt.Errorf("%s is in use", address)
	}
	l := &listener{Listener: bufconn.Listen(256 << 10), network: w, host: host, address: address}
	w.listeners[address] = l
	return l, nil
}

// Dialer returns how a host dials.
func (w *Network) Dialer(host string) func(ctx context.Context, address string) (net.Conn, error) {
	return func(ctx context.Context, address string) (net.Conn, error) {
		w.mu.Lock()
		l := w.listeners[address]
		w.mu.Unlock()
		if l == nil {
			return nil, fmt.Errorf("dial %s: connection refused", address)
		}
		if w.isCut(host, l.host) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		raw, err := l.DialContext(ctx)
		if err != nil {
			return nil, err
		}
		c := &conn{Conn: raw, network: w, from: host, to: l.host}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.conns[c] = struct{}{}
		return c, nil
	}
}

// Cut cuts two hosts off from each other.
func (w *Network) Cut(a, b string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cuts[between(a, b)] = true
}

// Isolate cuts a host off from others.
func (w *Network) Isolate(host string, others ...string) {
	for _, o := range others {
		if o != host {
			w.Cut(host, o)
		}
	}
}

// Heal ends every cut.
func (w *Network) Heal() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cuts = map[pair]bool{}
	for c := range w.conns {
		if c.lost {
			_ = c.Conn.Close() // Its stream has a hole.
			delete(w.conns, c)
		}
	}
}

func (w *Network) isCut(a, b string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cuts[between(a, b)]
}

type listener struct {
	*bufconn.Listener
	network       *Network
	host, address string
}

// Close implements net.Listener.
func (l *listener) Close() error {
	l.network.mu.Lock()
	if l.network.listeners[l.address] == l {
		delete(l.network.listeners, l.address)
	}
	l.network.mu.Unlock()
	return l.Listener.Close()
}

// conn is the dialling end of a connection; what passes it in either direction may be lost.
type conn struct {
	net.Conn
	network  *Network
	from, to string
	// lost is guarded by the network's mutex.
	lost bool
}

// loses reports, and remembers, whether bytes that pass now are lost.
func (c *conn) loses() bool {
	c.network.mu.Lock()
	defer c.network.mu.Unlock()
	if c.network.cuts[between(c.from, c.to)] {
		c.lost = true
	}
	return c.lost
}

// Read implements net.Conn.
func (c *conn) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		if err != nil || !c.loses() {
			return n, err
		}
	}
}

// Write implements net.Conn.
func (c *conn) Write(b []byte) (int, error) {
	if c.loses() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.network.mu.Lock()
	delete(c.network.conns, c)
	c.network.mu.Unlock()
	return c.Conn.Close()
}
