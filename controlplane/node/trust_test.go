package node

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	"github.com/certmesh/certmesh/controlplane/internal/session"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
)

// shake has client connect to server as nodes do, each judged by the other alone.
func shake(t *testing.T, client, server *trust) error {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }() // it has served its one connection
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			s := tls.Server(c, session.TLS(server.certificate, server.pool))
			if err = s.SetDeadline(time.Now().Add(10 * time.Second)); err == nil {
				err = s.HandshakeContext(t.Context())
			}
			_ = c.Close() // the handshake is the answer
		}
		served <- err
	}()
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second}, Config: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: client.pool(),
		NextProtos: []string{"h2"}, ServerName: "node.test",
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return client.certificate(), nil }}}
	c, err := d.DialContext(t.Context(), "tcp", l.Addr().String())
	if err == nil {
		_ = c.Close() // the server's judgement of the client comes from served
	}
	return errors.Join(err, <-served)
}

// Nodes that have not noticed the last step of a rollover, or one more, and nodes that have, know one another, until the
// former root is dropped under a node that slept through the activation too.
func TestNodesAtDifferentSteps(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, e storetest.Engine) {
		ctx := t.Context()
		s := e.Open(t)
		ring, err := secret.NewKeyring(make([]byte, secret.KeySize))
		if err != nil {
			t.Fatal(err)
		}
		open := func(id string) *trust {
			t.Helper()
			tr, err := openTrust(ctx, trustConfig{Store: s, Ring: ring, Clock: clockwork.NewRealClock(), Log: quiet(), NodeID: id,
				TrustDomain: "mesh.test", Names: []string{"node.test"}, TTL: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			return tr
		}
		steps := []func(r *rollover) error{
			func(r *rollover) error { return r.start(ctx) },
			func(r *rollover) error { return r.activate(ctx, 0) },
			func(r *rollover) error { return r.finish(ctx, 0) },
		}
		// at[i] is a node that has noticed the first i steps and none after them.
		at := []*trust{open("n0")}
		console := &rollover{store: s, ring: func() (*secret.Keyring, error) { return ring, nil }, now: time.Now}
		for i, step := range steps {
			if err := step(console); err != nil {
				t.Fatal(err)
			}
			running := open("n" + string(rune('1'+i)))
			told, calls := running.revision.Load(), 0
			if err := running.follow(ctx, &told, func(context.Context) error { calls++; return nil }); err != nil || calls != 0 {
				t.Errorf("step %d: a node that starts after it tells it %d times, %v", i+1, calls, err)
			}
			at = append(at, running)
		}
		const activated, finished = 2, 3
		for i, a := range at {
			for j, b := range at {
				err := shake(t, a, b)
				// Only who knows the next root, or is vouched for, gets on with one that has dropped the former.
				apart := i == finished && j < activated || j == finished && i < activated
				if (err == nil) == apart {
					t.Errorf("a node after %d steps connects to one after %d: %v", i, j, err)
				}
			}
		}
		// The one that slept through it all wakes up, tells once, and is one of them.
		told, calls := at[0].revision.Load(), 0
		for range 2 {
			if err := at[0].follow(ctx, &told, func(context.Context) error { calls++; return nil }); err != nil {
				t.Fatal(err)
			}
		}
		if err := shake(t, at[0], at[finished]); err != nil || calls != 1 || at[0].mesh().Generation() != 2 {
			t.Errorf("awake again: %v; told %d times", err, calls)
		}
		if n := len(at[0].certificate().Certificate); n != 2 {
			t.Errorf("it shows %d certificates", n)
		}
	})
}

// What could not be told is told at the next look.
func TestStepIsToldAgain(t *testing.T) {
	t.Parallel()
	n := startDev(t, t.TempDir(), nil)
	ctx := t.Context()
	told := n.trust.revision.Load()
	p, err := StartRollover(ctx, n.opts.Configuration)
	if err != nil {
		t.Fatal(err)
	}
	refused := errors.New("refused")
	if err := n.trust.follow(ctx, &told, func(context.Context) error { return refused }); !errors.Is(err, refused) || told == p.Mesh.Revision {
		t.Errorf("told %d, %v", told, err)
	}
	if err := n.trust.follow(ctx, &told, func(context.Context) error { return nil }); err != nil || told != p.Mesh.Revision {
		t.Errorf("told %d, %v; want %d", told, err, p.Mesh.Revision)
	}
	if p.Rollover.Phase != domain.RolloverStarted || n.trust.mesh().Generation() != 1 {
		t.Errorf("phase %s, generation %d", p.Rollover.Phase, n.trust.mesh().Generation())
	}
}
