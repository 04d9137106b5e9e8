package link

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/certmesh/certmesh/cluster/clustertest"
	"github.com/certmesh/certmesh/cluster/internal/identity"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// notes records what a node was told, each as one line.
type notes struct {
	mu    sync.Mutex
	lines []string
	told  chan struct{}
}

func (n *notes) add(format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lines = append(n.lines, fmt.Sprintf(format, args...))
	select {
	case n.told <- struct{}{}:
	default:
	}
}

func (n *notes) Wake(ids []string) {
	slices.Sort(ids)
	n.add("wake %s", strings.Join(ids, ","))
}
func (n *notes) Changed(r []*clusterpb.Resource, more bool) { n.add("changed %d %t", len(r), more) }
func (n *notes) Disconnect(id, reason string)               { n.add("disconnect %s %s", id, reason) }
func (n *notes) PushState(id string)                        { n.add("push %s", id) }
func (n *notes) Trigger(duty string)                        { n.add("trigger %s", duty) }
func (n *notes) Resync(id string)                           { n.add("resync %s", id) }

// wait waits until a line was noted, count times.
func (n *notes) wait(t *testing.T, line string, count int) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		n.mu.Lock()
		have := 0
		for _, l := range n.lines {
			if l == line {
				have++
			}
		}
		lines := strings.Join(n.lines, "\n")
		n.mu.Unlock()
		if have >= count {
			return
		}
		select {
		case <-n.told:
		case <-deadline:
			t.Fatalf("%q was not told %d times; told:\n%s", line, count, lines)
		}
	}
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline, look := time.After(20*time.Second), time.NewTicker(5*time.Millisecond)
	defer look.Stop()
	for !holds() {
		select {
		case <-look.C:
		case <-deadline:
			t.Fatal("not in time: " + what)
		}
	}
}

type testNode struct {
	*Mesh
	*notes
	address string
}

type options struct {
	cluster, instance, domain string
	certificate               *tls.Certificate
	clock                     clockwork.Clock
}

func start(t *testing.T, a *clustertest.Authority, id string, o options) *testNode {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return startOn(t, a, id, l, o)
}

func startOn(t *testing.T, a *clustertest.Authority, id string, l net.Listener, o options) *testNode {
	t.Helper()
	cert := o.certificate
	if cert == nil {
		cert = a.Node(t, id)
	}
	if o.clock == nil {
		o.clock = clockwork.NewRealClock()
	}
	if o.cluster == "" {
		o.cluster = "c1"
	}
	if o.domain == "" {
		o.domain = "test"
	}
	certificate, roots := func() *tls.Certificate { return cert }, a.Roots
	n := &testNode{notes: &notes{told: make(chan struct{}, 1)}, address: l.Addr().String()}
	m, err := New(Config{NodeID: id, ClusterID: o.cluster, Program: "test", Instance: id + o.instance, TrustDomain: o.domain, Certificate: certificate,
		Roots: roots, Handler: n.notes, Clock: o.clock, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	n.Mesh = m
	// As on the real listener, a client certificate is optional for TLS.
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ClientAuth: tls.RequestClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return certificate(), nil }})))
	m.Register(s)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = s.Serve(l) // ends by Stop
	}()
	t.Cleanup(func() {
		m.Stop()
		s.Stop()
		<-served
	})
	return n
}

func meet(nodes ...*testNode) {
	all := map[string]string{}
	for _, n := range nodes {
		all[n.cfg.NodeID] = n.address
	}
	for _, n := range nodes {
		n.Update(all)
	}
}

func TestNodesTellEachOther(t *testing.T) {
	t.Parallel()
	ca := clustertest.NewAuthority(t, "test")
	a, b, c := start(t, ca, "a", options{}), start(t, ca, "b", options{}), start(t, ca, "c", options{})
	meet(a, b, c)
	for _, n := range []*testNode{a, b, c} {
		for _, o := range []*testNode{a, b, c} {
			if n != o {
				n.wait(t, "resync "+o.cfg.NodeID, 1)
			}
		}
	}
	// A link is up at its own end a moment after the other end knows.
	eventually(t, "links are up", func() bool { return a.Up()["b"] && a.Up()["c"] && b.Up()["a"] })
	a.Mesh.Wake("b", []string{"agt_2", "agt_1"})
	b.wait(t, "wake agt_1,agt_2", 1)
	a.WakeAll([]string{"agt_3"})
	b.wait(t, "wake agt_3", 1)
	c.wait(t, "wake agt_3", 1)
	b.Mesh.Disconnect("agt_1", "revoked")
	a.wait(t, "disconnect agt_1 revoked", 1)
	c.wait(t, "disconnect agt_1 revoked", 1)
	c.Mesh.Changed([]*clusterpb.Resource{{Kind: "jobs", Id: "job_1"}, {Kind: "jobs", Id: "job_1"}, {Kind: "jobs", Id: "job_2"}}, false)
	a.wait(t, "changed 2 false", 1)
	c.Mesh.PushState("")
	b.wait(t, "push ", 1)
	b.Mesh.Trigger("renewal_check")
	a.wait(t, "trigger renewal_check", 1)
	c.wait(t, "trigger renewal_check", 1)
	a.Mesh.Wake("nobody", []string{"agt_1"}) // a node that is not known any more is no error
}

func TestLinkComesBack(t *testing.T) {
	t.Parallel()
	ca := clustertest.NewAuthority(t, "test")
	a := start(t, ca, "a", options{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	ok := t.Run("first", func(t *testing.T) {
		b := startOn(t, ca, "b", l, options{instance: "1"})
		meet(a, b)
		a.wait(t, "resync b", 1)
		b.wait(t, "resync a", 1)
	})
	if !ok {
		return
	}
	a.Mesh.Wake("b", []string{"agt_lost"})
	eventually(t, "the port is free again", func() bool {
		l, err = net.Listen("tcp", address)
		return err == nil
	})
	b := startOn(t, ca, "b", l, options{instance: "2"})
	meet(a, b)
	// What was said while it was away is not repeated: the resync makes it look for itself.
	b.wait(t, "resync a", 1)
	a.wait(t, "resync b", 2)
	a.Mesh.Wake("b", []string{"agt_1"})
	b.wait(t, "wake agt_1", 1)
}

func TestWhoMayCall(t *testing.T) {
	t.Parallel()
	ca, other := clustertest.NewAuthority(t, "test"), clustertest.NewAuthority(t, "test")
	foreign := clustertest.NewAuthority(t, "elsewhere")
	a := start(t, ca, "a", options{})
	ask := func(cert *tls.Certificate) error {
		m := &Mesh{cfg: Config{NodeID: "x", TrustDomain: "test", Certificate: func() *tls.Certificate { return cert }, Roots: func() *x509.CertPool { return ca.Roots() }}}
		_, err := m.AskPeers(t.Context(), a.address, &clusterpb.PeersRequest{})
		return err
	}
	for name, c := range map[string]struct {
		cert  *tls.Certificate
		class fault.Class
		says  string
	}{
		"an agent":             {ca.Identity(t, "agent", "agt_1", time.Hour), fault.Unauthorized, "not a node's"},
		"another mesh":         {other.Node(t, "b"), fault.Unauthorized, "not good"},
		"another trust domain": {foreign.Node(t, "b"), fault.Unauthorized, ""},
		"expired":              {ca.Identity(t, "node", "b", -time.Minute), fault.Unauthorized, "not good"},
		"the same id":          {ca.Node(t, "a"), fault.Conflict, "id of its own"},
		"before it serves":     {ca.Node(t, "b"), fault.Retryable, "starting"},
	} {
		if err := ask(c.cert); !fault.Is(err, c.class) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The trust domain is judged before the chain where only it differs.
	if _, err := identity.Node(foreign.Node(t, "b").Leaf, "test"); err == nil || !strings.Contains(err.Error(), "mesh.trust_domain") {
		t.Errorf("another trust domain: %v", err)
	}
}

func TestHelloIsJudged(t *testing.T) {
	t.Parallel()
	m, err := New(Config{NodeID: "a", ClusterID: "c1", Instance: "i", TrustDomain: "test", Certificate: func() *tls.Certificate { return nil },
		Roots: x509.NewCertPool, Handler: &notes{}, Clock: clockwork.NewFakeClock(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Stop()
	for name, c := range map[string]struct {
		hello *clusterpb.LinkHello
		says  string
	}{
		"none":          {nil, "first message"},
		"other cluster": {&clusterpb.LinkHello{ClusterId: "c2", Version: Version}, "different databases"},
		"two ahead":     {&clusterpb.LinkHello{ClusterId: "c1", Version: Version + 2}, "upgrade the older one"},
		"two behind":    {&clusterpb.LinkHello{ClusterId: "c1", Version: Version - 2}, "upgrade the older one"},
		"one ahead":     {&clusterpb.LinkHello{ClusterId: "c1", Version: Version + 1}, ""},
		"one behind":    {&clusterpb.LinkHello{ClusterId: "c1", Version: Version - 1}, ""},
	} {
		err := m.check("b", c.hello)
		if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestOutboxIsBounded: a node that takes nothing costs a bounded amount, and its link is made anew.
func TestOutboxIsBounded(t *testing.T) {
	t.Parallel()
	o := newOutbox()
	for i := range maxOrders + 10 {
		o.push(&clusterpb.LinkRequest{})
		o.changed([]*clusterpb.Resource{{Kind: "jobs", Id: fmt.Sprint(i)}}, false)
	}
	messages, lost := o.take()
	if !lost || len(messages) != maxOrders+1 {
		t.Errorf("%d messages, lost %t", len(messages), lost)
	}
	if c := messages[len(messages)-1].GetChanged(); len(c.GetResources()) != maxChanged || !c.GetMore() {
		t.Errorf("%d resources, more %t", len(c.GetResources()), c.GetMore())
	}
	ids := make([]string, maxWakes+1)
	for i := range ids {
		ids[i] = fmt.Sprint("agt_", i)
	}
	o.wake(ids)
	messages, lost = o.take()
	if n := len(messages); !lost || n != (maxWakes+wakeBatch-1)/wakeBatch {
		t.Errorf("%d messages, lost %t", n, lost)
	}
	if messages, lost := o.take(); lost || len(messages) > 0 {
		t.Error("the box is not empty after all was taken")
	}
}

// TestSilentPeer: a connection that is open and says nothing ends after a while.
func TestSilentPeer(t *testing.T) {
	t.Parallel()
	clk := clockwork.NewFakeClock()
	m := &Mesh{cfg: Config{Clock: clk}}
	ctx, cancel := context.WithCancelCause(t.Context())
	w := m.watch(cancel)
	defer w.stop()
	for range 6 {
		if err := clk.BlockUntilContext(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		clk.Advance(beatInterval)
	}
	for ctx.Err() == nil {
		clk.Advance(beatInterval)
	}
	if !fault.Is(context.Cause(ctx), fault.Retryable) {
		t.Error(context.Cause(ctx))
	}
}
