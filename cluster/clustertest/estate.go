package clustertest

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime/pprof"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/cluster"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
)

// TrustDomain is that of an Estate's nodes.
const TrustDomain = "cluster.test"

// Patience is how long this package waits for anything.
const Patience = 30 * time.Second

// Estate is a network with nodes on it. Each is a host of its own by its id; Raft is at <id>:8445, the mesh at <id>:8444.
type Estate struct {
	*Network
	Authority *Authority

	t    testing.TB
	dir  string
	mu   sync.Mutex
	mesh map[string]*cluster.Node
}

// NewEstate returns an estate without nodes. Nodes that still run when the test ends are stopped.
func NewEstate(t testing.TB) *Estate {
	t.Helper()
	return &Estate{Network: NewNetwork(), Authority: NewAuthority(t, TrustDomain), t: t, dir: t.TempDir(), mesh: map[string]*cluster.Node{}}
}

// Config returns the configuration of a node as its command line would always be: join is every id given, itself included.
func (e *Estate) Config(id string, expect int, join ...string) cluster.Config {
	// Good for longer than any test's clock goes on.
	certificate := e.Authority.Identity(e.t, "node", id, 1000*time.Hour)
	cfg := cluster.Config{
		ID: id, ClusterID: "clu_test", Self: &clusterpb.Member{RaftAddress: id + ":8445", MeshAddress: id + ":8444", Program: "test"},
		Dir: filepath.Join(e.dir, id, "raft"), Dial: e.Dialer(id), Peers: peers{e, id},
		Certificate: func() *tls.Certificate { return certificate }, Roots: e.Authority.Roots, TrustDomain: TrustDomain,
		BootstrapExpect: expect, Log: slog.New(slog.NewTextHandler(e.t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo})).With("node", id),
		Timing: Timing(),
	}
	for _, j := range join {
		cfg.Join = append(cfg.Join, j+":8444")
	}
	return cfg
}

// Timing is that of a cluster in a hurry, on a machine with much else to do.
func Timing() cluster.Timing {
	return cluster.Timing{
		Heartbeat: 250 * time.Millisecond, IO: time.Second, Stable: 100 * time.Millisecond, Reconcile: 50 * time.Millisecond,
		Contact: time.Second, Patience: 500 * time.Millisecond, RetryMin: 20 * time.Millisecond, RetryMax: 200 * time.Millisecond,
		GiveAway: 2 * time.Second, Barrier: 5 * time.Second,
	}
}

// Start starts a node; its listener is made if the configuration has none.
func (e *Estate) Start(cfg cluster.Config) *cluster.Node {
	e.t.Helper()
	n, err := e.TryStart(cfg)
	if err != nil {
		e.t.Fatalf("start node %s: %v", cfg.ID, err)
	}
	return n
}

// TryStart is Start for a node that may not start.
func (e *Estate) TryStart(cfg cluster.Config) (*cluster.Node, error) {
	e.t.Helper()
	if cfg.Listener == nil {
		l, err := e.Listen(cfg.ID, cfg.Self.GetRaftAddress())
		if err != nil {
			return nil, err
		}
		cfg.Listener = l
	}
	address := cfg.Self.GetMeshAddress()
	n, err := cluster.Start(e.t.Context(), cfg)
	if err != nil {
		_ = cfg.Listener.Close() // The node does not run.
		return nil, err
	}
	e.mu.Lock()
	e.mesh[address] = n
	e.mu.Unlock()
	e.t.Cleanup(func() { e.Stop(n) })
	return n, nil
}

// Stop stops a node; others do not find it any more.
func (e *Estate) Stop(n *cluster.Node) {
	e.t.Helper()
	e.mu.Lock()
	for address, at := range e.mesh {
		if at == n {
			delete(e.mesh, address)
		}
	}
	e.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.t.Context()), Patience)
	defer cancel()
	if err := n.Stop(ctx); err != nil {
		// Who holds it up?
		_ = pprof.Lookup("goroutine").WriteTo(e.t.Output(), 2) // A help, no more.
		e.t.Errorf("stop node %s: %v", n.ID(), err)
	}
}

// Leader waits until one of the nodes leads and the others agree, and returns it.
func (e *Estate) Leader(nodes ...*cluster.Node) *cluster.Node {
	e.t.Helper()
	var leader *cluster.Node
	e.Wait("one leader", func() bool {
		leader = nil
		for _, n := range nodes {
			if n.IsLeader() {
				leader = n
			}
		}
		if leader == nil {
			return false
		}
		for _, n := range nodes {
			if id, _ := n.Leader(); id != leader.ID() {
				return false
			}
		}
		return true
	})
	return leader
}

// Wait waits for a condition.
func (e *Estate) Wait(what string, holds func() bool) {
	e.t.Helper()
	deadline := time.NewTimer(Patience)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-tick.C:
		case <-deadline.C:
			e.t.Fatalf("waited in vain for: %s", what)
		}
	}
}

// Voters returns how many members vote, as a node sees it.
func Voters(n *cluster.Node) int {
	voters := 0
	for _, m := range n.Members() {
		if m.GetSuffrage() == clusterpb.Member_SUFFRAGE_VOTER {
			voters++
		}
	}
	return voters
}

// peers is a cluster.Dialer without a wire.
type peers struct {
	e    *Estate
	host string
}

func (p peers) at(ctx context.Context, address string) (*cluster.Node, error) {
	p.e.mu.Lock()
	n := p.e.mesh[address]
	p.e.mu.Unlock()
	if n == nil {
		return nil, fmt.Errorf("dial %s: connection refused", address)
	}
	if p.e.isCut(p.host, n.ID()) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return n, nil
}

// Peers implements cluster.Dialer.
func (p peers) Peers(ctx context.Context, address string, req *clusterpb.PeersRequest) (*clusterpb.PeersResponse, error) {
	n, err := p.at(ctx, address)
	if err != nil {
		return nil, err
	}
	return n.Peers(ctx, req)
}

// Join implements cluster.Dialer.
func (p peers) Join(ctx context.Context, address string, req *clusterpb.JoinRequest) error {
	n, err := p.at(ctx, address)
	if err != nil {
		return err
	}
	return n.Join(ctx, p.host, req)
}
