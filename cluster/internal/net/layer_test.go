package net_test

import (
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/goleak"

	"github.com/certmesh/certmesh/cluster/clustertest"
	clusternet "github.com/certmesh/certmesh/cluster/internal/net"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const domain = "net.test"

type host struct {
	*clusternet.Layer
	places      *atomic.Pointer[map[string][]string]
	certificate *atomic.Pointer[tls.Certificate]
}

// open opens the layer of a node at <id>:1.
func open(t *testing.T, w *clustertest.Network, a *clustertest.Authority, id string, admit func(string) error) host {
	t.Helper()
	l, err := w.Listen(id, id+":1")
	if err != nil {
		t.Fatal(err)
	}
	h := host{places: &atomic.Pointer[map[string][]string]{}, certificate: &atomic.Pointer[tls.Certificate]{}}
	h.places.Store(&map[string][]string{"n1": {"n1:1"}, "n2": {"n2:1"}})
	h.certificate.Store(a.Node(t, id))
	h.Layer = clusternet.NewLayer(t.Context(), id, &clusternet.Identity{
		TrustDomain: domain, Certificate: h.certificate.Load, Roots: a.Roots, Now: time.Now, Admit: admit,
	}, l, w.Dialer(id), func(id string) []string { return (*h.places.Load())[id] }, slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

// echo answers every connection with what it says.
func echo(t *testing.T, h host) {
	t.Helper()
	go func() {
		for {
			c, err := h.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c) }() // Ends with the connection.
		}
	}()
}

// speak reports whether a connection carries anything.
func speak(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(clustertest.Patience)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

func dial(t *testing.T, h host, id string) (net.Conn, error) {
	t.Helper()
	return h.Dial(raft.ServerAddress(id), 2*time.Second)
}

func TestDial(t *testing.T) {
	t.Parallel()
	w, a := clustertest.NewNetwork(), clustertest.NewAuthority(t, domain)
	n1, n2 := open(t, w, a, "n1", nil), open(t, w, a, "n2", nil)
	echo(t, n2)
	if n1.Addr().String() != "n1" {
		t.Errorf("%s", n1.Addr())
	}
	c, err := dial(t, n1, "n2")
	if err != nil {
		t.Fatal(err)
	}
	if err := speak(c); err != nil {
		t.Fatal(err)
	}
	if n1.Place("n2") != "n2:1" {
		t.Errorf("n2 was reached at %q", n1.Place("n2"))
	}
	if _, err := dial(t, n1, "n9"); err == nil || !strings.Contains(err.Error(), "nobody has said yet where node n9 is") {
		t.Errorf("%v", err)
	}
	// It has moved, and what was said of it is in part old.
	n1.places.Store(&map[string][]string{"n2": {"gone:1", "n2:1"}})
	if c, err = dial(t, n1, "n2"); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := c.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a second Close: %v", err)
	}
}

// TestSomeoneElseAnswers: an address that now belongs to another node is not that node.
func TestSomeoneElseAnswers(t *testing.T) {
	t.Parallel()
	w, a := clustertest.NewNetwork(), clustertest.NewAuthority(t, domain)
	n1, n2 := open(t, w, a, "n1", nil), open(t, w, a, "n2", nil)
	echo(t, n2)
	n1.places.Store(&map[string][]string{"n3": {"n2:1"}})
	if _, err := dial(t, n1, "n3"); err == nil || !strings.Contains(err.Error(), "node n2 answers where node n3 is expected") {
		t.Errorf("%v", err)
	}
}

func TestAdmit(t *testing.T) {
	t.Parallel()
	w, a := clustertest.NewNetwork(), clustertest.NewAuthority(t, domain)
	n1 := open(t, w, a, "n1", nil)
	n2 := open(t, w, a, "n2", func(id string) error { return errors.New(id + " was removed") })
	echo(t, n2)
	c, err := dial(t, n1, "n2")
	if err == nil {
		err = speak(c)
	}
	if err == nil {
		t.Error("a node that may not enter does")
	}
}

// TestExpiry: a connection does not outlive the identity behind it.
func TestExpiry(t *testing.T) {
	t.Parallel()
	w, a := clustertest.NewNetwork(), clustertest.NewAuthority(t, domain)
	n1, n2 := open(t, w, a, "n1", nil), open(t, w, a, "n2", nil)
	echo(t, n2)
	n1.certificate.Store(a.Identity(t, "node", "n1", 2*time.Second))
	c, err := dial(t, n1, "n2")
	if err != nil {
		t.Fatal(err)
	}
	if err := speak(c); err != nil {
		t.Fatal(err)
	}
	if err := c.SetDeadline(time.Now().Add(clustertest.Patience)); err != nil {
		t.Fatal(err)
	}
	var ne net.Error
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.As(err, &ne) && ne.Timeout() {
		t.Errorf("%v", err)
	}
	n1.certificate.Store(nil)
	if _, err := dial(t, n1, "n2"); err == nil {
		t.Error("a node without an identity is let in")
	}
}

func TestValidID(t *testing.T) {
	t.Parallel()
	for id, ok := range map[string]bool{
		"n1": true, "Node_2.example-3": true, "": false, ".n": false, "a/b": false, "a b": false, strings.Repeat("x", 129): false, "ü": false,
	} {
		if clusternet.ValidID(id) != ok {
			t.Errorf("%q: %v", id, !ok)
		}
	}
}
