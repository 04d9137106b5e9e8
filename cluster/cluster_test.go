package cluster_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/certmesh/certmesh/cluster"
	"github.com/certmesh/certmesh/cluster/clustertest"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var three = []string{"n1", "n2", "n3"}

// reigns notes who established when, and what was revoked.
type reigns struct {
	mu       sync.Mutex
	contexts map[string][]context.Context
	revoked  map[string]int
	began    chan string
}

func newReigns() *reigns {
	return &reigns{contexts: map[string][]context.Context{}, revoked: map[string]int{}, began: make(chan string, 64)}
}

func (r *reigns) watch(cfg cluster.Config) cluster.Config {
	id := cfg.ID
	cfg.Leading = func(ctx context.Context, _ cluster.Term) error {
		r.mu.Lock()
		r.contexts[id] = append(r.contexts[id], ctx)
		r.mu.Unlock()
		select {
		case r.began <- id:
		default:
		}
		return nil
	}
	cfg.Revoke = func(cluster.Term) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.revoked[id]++
	}
	return cfg
}

func (r *reigns) last(id string) context.Context {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.contexts[id][len(r.contexts[id])-1]
}

// begin starts nodes with the same command line and waits until all are voters.
func begin(e *clustertest.Estate, r *reigns, ids ...string) []*cluster.Node {
	var nodes []*cluster.Node
	for _, id := range ids {
		cfg := e.Config(id, len(ids), ids...)
		if r != nil {
			cfg = r.watch(cfg)
		}
		nodes = append(nodes, e.Start(cfg))
	}
	settled(e, nodes...)
	return nodes
}

// settled waits until every node has the whole registry and all vote.
func settled(e *clustertest.Estate, nodes ...*cluster.Node) {
	e.Wait("every node knows every member", func() bool {
		for _, n := range nodes {
			known := 0
			for _, m := range n.Members() {
				if m.GetRaftAddress() != "" && m.GetSuffrage() == clusterpb.Member_SUFFRAGE_VOTER {
					known++
				}
			}
			if known != len(nodes) {
				return false
			}
		}
		return true
	})
}

func without(nodes []*cluster.Node, gone *cluster.Node) []*cluster.Node {
	var left []*cluster.Node
	for _, n := range nodes {
		if n != gone {
			left = append(left, n)
		}
	}
	return left
}

func configurationChanged() *clusterpb.Command {
	return &clusterpb.Command{Body: &clusterpb.Command_Configuration{Configuration: &clusterpb.ConfigurationChanged{}}}
}

func TestOneNodeBeginsAlone(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	cfg := e.Config("n1", 1)
	// It waits for nobody, so not for this either.
	cfg.Timing.Heartbeat = clustertest.Patience
	n := e.Start(cfg)
	e.Leader(n)
	if err := n.Propose(t.Context(), configurationChanged()); err != nil {
		t.Fatal(err)
	}
	e.Wait("the revision", func() bool { return n.ConfigurationRevision() == 1 })
	settled(e, n)
}

func TestThreeNodesElectAndFailOver(t *testing.T) {
	t.Parallel()
	e, r := clustertest.NewEstate(t), newReigns()
	nodes := begin(e, r, three...)
	leader := e.Leader(nodes...)
	if err := leader.Propose(t.Context(), configurationChanged()); err != nil {
		t.Fatal(err)
	}
	e.Stop(leader)
	left := without(nodes, leader)
	next := e.Leader(left...)
	if err := next.Propose(t.Context(), configurationChanged()); err != nil {
		t.Fatal(err)
	}
	for _, n := range left {
		e.Wait("the revision", func() bool { return n.ConfigurationRevision() == 2 })
	}
	again := e.Start(e.Config(leader.ID(), 3, three...))
	e.Wait("the one that came back has caught up", func() bool { return again.ConfigurationRevision() == 2 })
	if got := clustertest.Voters(again); got != 3 {
		t.Errorf("%d voters after a restart, want 3", got)
	}
}

func TestPartitionEndsTheOldLeadersTerm(t *testing.T) {
	t.Parallel()
	e, r := clustertest.NewEstate(t), newReigns()
	nodes := begin(e, r, three...)
	leader := e.Leader(nodes...)
	e.Wait("it has established", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return len(r.contexts[leader.ID()]) > 0 })
	e.Isolate(leader.ID(), three...)
	term := r.last(leader.ID())
	select {
	case <-term.Done():
	case <-time.After(clustertest.Patience):
		t.Fatal("the context of the cut leader's term did not end")
	}
	next := e.Leader(without(nodes, leader)...)
	if next == leader {
		t.Fatal("the cut leader leads")
	}
	e.Wait("the old one has revoked", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.revoked[leader.ID()] > 0 })
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := leader.Propose(ctx, configurationChanged()); err == nil {
		t.Error("the cut leader decided something")
	}
	e.Heal()
	e.Leader(nodes...)
}
