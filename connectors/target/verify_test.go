package target_test

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/connectors/target/targettest"
	"github.com/certmesh/certmesh/protocol/fault"
)

func now() time.Time { return time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC) }

func pair(t *testing.T, m target.Material) *tls.Certificate {
	t.Helper()
	doc, err := m.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	c, err := tls.X509KeyPair(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.Chain[0].Raw}), doc)
	if err != nil {
		t.Fatal(err)
	}
	return &c
}

// serve answers each connection by answer until the test ends.
func serve(t *testing.T, answer func(n int64, c net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var n atomic.Int64
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(20 * time.Second))
				answer(n.Add(1), c)
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return l.Addr().String()
}

func handshake(c net.Conn, cfg *tls.Config) {
	tc := tls.Server(c, cfg)
	if tc.Handshake() == nil {
		_, _ = tc.Read(make([]byte, 1))
	}
}

func TestProbeTLS(t *testing.T) {
	t.Parallel()
	ca := targettest.NewCA(t)
	old, fresh := ca.Material(t), ca.Material(t)
	oldPair, freshPair := pair(t, old), pair(t, fresh)
	names := make(chan string, 100)
	// A reload that shows after some answers, some of them broken.
	addr := serve(t, func(n int64, c net.Conn) {
		cert := oldPair
		switch {
		case n == 2:
			return
		case n == 3:
			_, _ = c.Write([]byte("this is no TLS\n"))
			return
		case n > 5:
			cert = freshPair
		}
		handshake(c, &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			names <- h.ServerName
			return cert, nil
		}})
	})
	p, err := target.ProbeTLS(t.Context(), addr, "site.example.test", fresh.Leaf(), target.ProbeOptions{Now: now})
	if err != nil || p.Leaf != fresh.Leaf() || p.Address != addr || !p.At.Equal(now()) {
		t.Fatalf("%+v, %v", p, err)
	}
	if got := <-names; got != "site.example.test" {
		t.Errorf("SNI %q", got)
	}
	// What is served instead is said, and soon enough.
	_, err = target.ProbeTLS(t.Context(), addr, "", old.Leaf(), target.ProbeOptions{Timeout: 300 * time.Millisecond, Now: now})
	for _, says := range []string{addr, fresh.Leaf().String(), old.Leaf().String(), "site.example.test", "2070-01-01"} {
		if !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), says) {
			t.Errorf("%q is missing: %v", says, err)
		}
	}
}

func TestProbeTLSUnreachable(t *testing.T) {
	t.Parallel()
	m := targettest.NewCA(t).Material(t)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = closed.Close()
	hold := make(chan struct{})
	servers := map[string]string{
		"nobody":  closed.Addr().String(),
		"silence": serve(t, func(_ int64, c net.Conn) { <-hold }),
		"garbage": serve(t, func(_ int64, c net.Conn) { _, _ = c.Write([]byte("220 mail\r\n")); <-hold }),
		"no name": "no-such-host.invalid:443",
	}
	// Registered last, so that it comes first: serve waits for its answers.
	t.Cleanup(func() { close(hold) })
	for name, addr := range servers {
		_, err := target.ProbeTLS(t.Context(), addr, "", m.Leaf(), target.ProbeOptions{Timeout: 200 * time.Millisecond, Now: now})
		if !fault.Is(err, fault.Retryable) || !strings.Contains(err.Error(), addr) || !strings.Contains(err.Error(), "no TLS handshake") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, addr := range []string{"", "x", "127.0.0.1", ":443", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:https", "a b\n:443", "[::1:443", strings.Repeat("x", 400) + ":1"} {
		_, err := target.ProbeTLS(t.Context(), addr, "", m.Leaf(), target.ProbeOptions{Now: now})
		if !fault.Is(err, fault.Invalid) {
			t.Errorf("%q: %v", addr, err)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("stopped"))
	if _, err := target.ProbeTLS(ctx, closed.Addr().String(), "", m.Leaf(), target.ProbeOptions{Now: now}); !fault.Is(err, fault.Retryable) {
		t.Error(err)
	}
}

// TestProbed: a Verifier is added, and nothing else is lost or gained.
func TestProbed(t *testing.T) {
	t.Parallel()
	ca := targettest.NewCA(t)
	m := ca.Material(t)
	cert := pair(t, m)
	addr := serve(t, func(_ int64, c net.Conn) {
		handshake(c, &tls.Config{Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS12})
	})
	env := target.Env{Now: now}
	for _, tg := range []target.Target{plain{}, repairer{}, activator{}, both{}} {
		_, repairs := tg.(target.Repairer)
		_, activates := tg.(target.Activator)
		if got := (target.VerifySettings{}).Probed(env, tg); got != tg {
			t.Errorf("%T is changed without an address", tg)
		}
		got := target.VerifySettings{VerifyAddress: addr}.Probed(env, tg)
		v, verifies := got.(target.Verifier)
		if _, ok := got.(target.Repairer); ok != repairs {
			t.Errorf("%T: repairs %v", tg, ok)
		}
		if _, ok := got.(target.Activator); ok != activates {
			t.Errorf("%T: activates %v", tg, ok)
		}
		if !verifies {
			t.Fatalf("%T does not verify", tg)
		}
		if p, err := v.Verify(t.Context(), m); err != nil || p.Leaf != m.Leaf() {
			t.Errorf("%T: %v, %v", tg, p, err)
		}
	}
}

type plain struct{ target.Target }
type repairer struct {
	plain
	target.Repairer
}
type activator struct {
	plain
	target.Activator
}
type both struct {
	plain
	target.Repairer
	target.Activator
}
