package cluster_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/certmesh/certmesh/cluster"
	"github.com/certmesh/certmesh/cluster/clustertest"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestFiveNodesLoseTwo(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	nodes := begin(e, nil, "n1", "n2", "n3", "n4", "n5")
	for range 2 {
		leader := e.Leader(nodes...)
		e.Stop(leader)
		nodes = without(nodes, leader)
	}
	if err := e.Leader(nodes...).Propose(t.Context(), configurationChanged()); err != nil {
		t.Fatal(err)
	}
}

// TestGrowth: the number of voters is never even for longer than a promotion takes.
func TestGrowth(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	one := e.Start(e.Config("n1", 1))
	e.Leader(one)
	two := e.Start(e.Config("n2", 1, three...))
	e.Wait("the second follows", func() bool { return len(one.Members()) == 2 && one.Members()[1].GetHealthy() })
	// It has been stable for long when the third comes, and still has no vote.
	e.Wait("the second has the registry", func() bool { return len(two.Members()) == 2 && two.Members()[1].GetRaftAddress() != "" })
	if v := clustertest.Voters(one); v != 1 {
		t.Fatalf("%d voters of two nodes, want 1", v)
	}
	three := e.Start(e.Config("n3", 1, three...))
	settled(e, one, two, three)
	e.Stop(one)
	e.Leader(two, three)
}

// TestStrangersStartTogether: more nodes than expected, in any order, make one cluster.
func TestStrangersStartTogether(t *testing.T) {
	t.Parallel()
	ids := []string{"n1", "n2", "n3", "n4", "n5"}
	e := clustertest.NewEstate(t)
	var nodes []*cluster.Node
	for _, id := range []string{"n5", "n3", "n1", "n4", "n2"} {
		nodes = append(nodes, e.Start(e.Config(id, 3, ids...)))
	}
	settled(e, nodes...)
	e.Leader(nodes...)
}

// TestOneOfThreeWaits: too few nodes begin nothing, and say why.
func TestOneOfThreeWaits(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	n1 := e.Start(e.Config("n1", 3, three...))
	n2 := e.Start(e.Config("n2", 3, three...))
	e.Wait("a sentence", func() bool { return strings.Contains(n1.Trouble(), "2 of the 3 nodes") })
	resp, err := n1.Peers(t.Context(), &clusterpb.PeersRequest{ClusterId: "clu_test", Version: cluster.Version, UnixUs: time.Now().UnixMicro()})
	if err != nil || resp.GetHasState() || resp.GetBootstrapExpect() != 3 || resp.GetSelf().GetId() != "n1" {
		t.Errorf("%v, %v", resp, err)
	}
	settled(e, n1, n2, e.Start(e.Config("n3", 3, three...)))
	e.Wait("no trouble", func() bool { return n1.Trouble() == "" })
}

func TestExpectationsDiffer(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	e.Start(e.Config("n2", 3, "n1", "n2"))
	n1 := e.Start(e.Config("n1", 1, "n1", "n2"))
	e.Wait("a sentence", func() bool { return strings.Contains(n1.Trouble(), "cluster.bootstrap_expect must be the same") })
}

func TestTwoVotersAreRefused(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	if _, err := e.TryStart(e.Config("n1", 2, "n1", "n2")); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "two nodes are worse than one") {
		t.Errorf("%v", err)
	}
}

func TestRestartWithANewAddress(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	nodes := begin(e, nil, three...)
	leader := e.Leader(nodes...)
	moving := without(nodes, leader)[0]
	e.Stop(moving)
	e.Wait("its silence is noticed", func() bool { return !healthy(leader, moving.ID()) })
	cfg := e.Config(moving.ID(), 3, three...)
	cfg.Self.RaftAddress, cfg.Self.MeshAddress = "elsewhere:8445", "elsewhere:8444"
	e.Start(cfg)
	e.Wait("it is found where it is", func() bool {
		for _, m := range leader.Members() {
			if m.GetId() == moving.ID() {
				return m.GetRaftAddress() == "elsewhere:8445" && m.GetHealthy()
			}
		}
		return false
	})
}

func healthy(leader *cluster.Node, id string) bool {
	for _, m := range leader.Members() {
		if m.GetId() == id {
			return m.GetHealthy()
		}
	}
	return false
}

// TestEveryoneMoves: all are stopped, all come back elsewhere, and find each other by the nodes they are told of.
func TestEveryoneMoves(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	nodes := begin(e, nil, three...)
	if err := e.Leader(nodes...).Propose(t.Context(), configurationChanged()); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		e.Stop(n)
	}
	var moved []*cluster.Node
	for _, id := range three {
		cfg := e.Config(id, 3, "m-n1", "m-n2", "m-n3")
		cfg.Self.RaftAddress, cfg.Self.MeshAddress = "m-"+id+":8445", "m-"+id+":8444"
		moved = append(moved, e.Start(cfg))
	}
	leader := e.Leader(moved...)
	e.Wait("the registry is right", func() bool {
		for _, m := range leader.Members() {
			if !strings.HasPrefix(m.GetRaftAddress(), "m-") {
				return false
			}
		}
		return leader.ConfigurationRevision() == 1
	})
}

// TestEveryoneRestarts: no registry is applied before a leader is there, and no join list is needed.
func TestEveryoneRestarts(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	nodes := begin(e, nil, three...)
	for _, n := range nodes {
		e.Stop(n)
	}
	var again []*cluster.Node
	for _, id := range three {
		again = append(again, e.Start(e.Config(id, 3)))
	}
	e.Leader(again...)
}

func TestWipeAllAndStartAgain(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	nodes := begin(e, nil, three...)
	for _, n := range nodes {
		e.Stop(n)
	}
	for _, id := range three {
		dir := e.Config(id, 3).Dir
		aside, err := cluster.Recover(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(aside, "raft.db")); err != nil {
			t.Errorf("what was set aside: %v", err)
		}
	}
	nodes = begin(e, nil, three...)
	if err := e.Leader(nodes...).Propose(t.Context(), configurationChanged()); err != nil {
		t.Fatal(err)
	}
}

// TestWipeTwoOfThree: the one that is left gathers the others; no second cluster begins.
func TestWipeTwoOfThree(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	nodes := begin(e, nil, three...)
	leader := e.Leader(nodes...)
	if err := leader.Propose(t.Context(), configurationChanged()); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		e.Stop(n)
	}
	for _, n := range without(nodes, leader) {
		if _, err := cluster.Recover(e.Config(n.ID(), 3).Dir); err != nil {
			t.Fatal(err)
		}
	}
	nodes = begin(e, nil, three...)
	if now := e.Leader(nodes...); now.ConfigurationRevision() != 1 {
		t.Error("what was decided is gone")
	}
}

// TestWipeOne: a member whose files are gone is filled again by the leader.
func TestWipeOne(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	nodes := begin(e, nil, three...)
	leader := e.Leader(nodes...)
	lost := without(nodes, leader)[0]
	if _, err := cluster.Recover(e.Config(lost.ID(), 3).Dir); !fault.Is(err, fault.Rejected) {
		t.Errorf("recover beside a running node: %v, want rejected", err)
	}
	e.Stop(lost)
	if _, err := cluster.Recover(e.Config(lost.ID(), 3).Dir); err != nil {
		t.Fatal(err)
	}
	if err := leader.Propose(t.Context(), configurationChanged()); err != nil {
		t.Fatal(err)
	}
	again := e.Start(e.Config(lost.ID(), 3, three...))
	e.Wait("it has caught up", func() bool { return again.ConfigurationRevision() == 1 })
	settled(e, append(without(nodes, lost), again)...)
	if _, err := cluster.Recover(filepath.Join(t.TempDir(), "none")); !fault.Is(err, fault.NotFound) {
		t.Errorf("recover of nothing: %v, want not found", err)
	}
}

func TestRemove(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	nodes := begin(e, nil, three...)
	leader := e.Leader(nodes...)
	follower := without(nodes, leader)[0]
	if err := follower.Remove(t.Context(), leader.ID()); !errors.Is(err, cluster.ErrNotLeader) || !strings.Contains(err.Error(), leader.ID()) {
		t.Errorf("ask a follower: %v", err)
	}
	if err := leader.Remove(t.Context(), "nobody"); !fault.Is(err, fault.NotFound) {
		t.Errorf("remove nobody: %v", err)
	}
	fourth := e.Start(e.Config("n4", 3, three...))
	e.Wait("the fourth is well", func() bool { return healthy(leader, "n4") && len(fourth.Members()) == 4 })
	if err := leader.Remove(t.Context(), follower.ID()); err != nil {
		t.Fatal(err)
	}
	e.Wait("the fourth votes", func() bool { return clustertest.Voters(leader) == 3 && len(leader.Members()) == 3 })
	select {
	case err := <-follower.Failed():
		if !strings.Contains(err.Error(), "was removed from the cluster") {
			t.Errorf("%v", err)
		}
	case <-time.After(clustertest.Patience):
		t.Error("the removed node does not notice")
	}
	// Of the two that are left one has no vote any more.
	if err := leader.Remove(t.Context(), fourth.ID()); err != nil {
		t.Fatal(err)
	}
	e.Wait("one votes", func() bool { return clustertest.Voters(leader) == 1 && len(leader.Members()) == 2 })
}

func TestRemoveTheLeader(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	nodes := begin(e, nil, "n1", "n2", "n3", "n4", "n5")
	gone := e.Leader(nodes...)
	e.Wait("it is removed by the one that follows it", func() bool {
		leader := e.Leader(nodes...)
		err := leader.Remove(t.Context(), gone.ID())
		switch {
		case leader == gone && err == nil:
			t.Fatal("it has removed itself")
		case leader == gone && !errors.Is(err, cluster.ErrNotLeader) && !fault.Is(err, fault.Retryable):
			t.Fatal(err)
		}
		return err == nil
	})
}

func TestTransferAndDrain(t *testing.T) {
	t.Parallel()
	e, r := clustertest.NewEstate(t), newReigns()
	nodes := begin(e, r, three...)
	leader := e.Leader(nodes...)
	others := without(nodes, leader)
	ctx, cancel := context.WithTimeout(t.Context(), clustertest.Patience)
	defer cancel()
	// One of the two drains as well: the other is to lead.
	for _, n := range []*cluster.Node{others[0], leader} {
		if err := n.SetDraining(ctx, true); err != nil {
			t.Fatal(err)
		}
	}
	e.Wait("both are marked", func() bool {
		marked := 0
		for _, m := range leader.Members() {
			if m.GetDraining() {
				marked++
			}
		}
		return marked == 2 && healthy(leader, others[0].ID()) && healthy(leader, others[1].ID())
	})
	// A busy machine may need more than one.
	e.Wait("the one that does not drain leads", func() bool {
		now := e.Leader(nodes...)
		if now == others[1] {
			return true
		}
		_ = now.TransferLeadership(ctx) // Tried again.
		return false
	})
	if err := leader.TransferLeadership(ctx); err != nil {
		t.Errorf("a follower has nothing to give: %v", err)
	}
	if err := others[0].SetDraining(ctx, false); err != nil {
		t.Error(err)
	}
}

func TestTransferAlone(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	n := e.Start(e.Config("n1", 1))
	e.Leader(n)
	if err := n.TransferLeadership(t.Context()); !fault.Is(err, fault.Retryable) {
		t.Errorf("%v", err)
	}
}

// TestEvenIsWarnedAbout: four voters that last.
func TestEvenIsWarnedAbout(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	ids := []string{"n1", "n2", "n3", "n4", "n5"}
	said := make(chan struct{}, 16)
	var nodes []*cluster.Node
	for _, id := range ids {
		cfg := e.Config(id, 5, ids...)
		cfg.Timing.EvenAfter = 100 * time.Millisecond
		cfg.Log = slog.New(listener{"the number of voters has been even for long", said})
		nodes = append(nodes, e.Start(cfg))
	}
	settled(e, nodes...)
	// One that runs may ask to join before it learns that it was removed; who may join is not for Raft to say.
	gone := without(nodes, e.Leader(nodes...))[0]
	e.Stop(gone)
	rest := without(nodes, gone)
	e.Wait("the stopped follower is removed", func() bool {
		err := e.Leader(rest...).Remove(t.Context(), gone.ID())
		return err == nil || fault.Is(err, fault.NotFound)
	})
	select {
	case <-said:
	case <-time.After(clustertest.Patience):
		t.Error("nothing is said")
	}
}

// listener is a slog.Handler that waits for one message.
type listener struct {
	begins string
	heard  chan struct{}
}

func (l listener) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelWarn }
func (l listener) WithAttrs([]slog.Attr) slog.Handler               { return l }
func (l listener) WithGroup(string) slog.Handler                    { return l }
func (l listener) Handle(_ context.Context, r slog.Record) error {
	if strings.HasPrefix(r.Message, l.begins) {
		select {
		case l.heard <- struct{}{}:
		default:
		}
	}
	return nil
}

// TestReap: a voter that is silent for a day is taken out, but not when that leaves two, and comes back by itself.
func TestReap(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	clk := clockwork.NewFakeClockAt(time.Now())
	ids := []string{"n1", "n2", "n3", "n4"}
	var nodes []*cluster.Node
	for _, id := range ids {
		cfg := e.Config(id, 3, ids...)
		cfg.Clock = clk
		nodes = append(nodes, e.Start(cfg))
	}
	leader := e.Leader(nodes...)
	e.Wait("four members", func() bool { return len(leader.Members()) == 4 && healthy(leader, "n4") })
	dead, voter := nodes[3], without(nodes[:3], leader)[0]
	e.Stop(dead)
	e.Stop(voter)
	// The clock's jump makes everyone look silent at first: only who stays so is taken out.
	clk.Advance(25 * time.Hour)
	e.Wait("it is taken out", func() bool { return len(leader.Members()) == 3 })
	cfg := e.Config(dead.ID(), 3, ids...)
	cfg.Clock = clk
	e.Start(cfg)
	e.Wait("it is back", func() bool { return healthy(leader, dead.ID()) && len(leader.Members()) == 4 })
	if !slices.ContainsFunc(leader.Members(), func(m *clusterpb.Member) bool { return m.GetId() == voter.ID() }) {
		t.Error("two voters are left")
	}
}

func TestSkew(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	n := e.Start(e.Config("n1", 1))
	e.Leader(n)
	now := time.Now()
	good := func() *clusterpb.JoinRequest {
		return &clusterpb.JoinRequest{ClusterId: "clu_test", UnixUs: now.UnixMicro(), Member: &clusterpb.Member{
			Id: "n2", RaftAddress: "n2:8445", MeshAddress: "n2:8444", Version: cluster.Version, Program: "test",
		}}
	}
	for _, c := range []struct {
		name   string
		spoil  func(r *clusterpb.JoinRequest)
		class  fault.Class
		speaks string
	}{
		{"another cluster", func(r *clusterpb.JoinRequest) { r.ClusterId = "clu_other" }, fault.Rejected, "they use different databases"},
		{"two versions on", func(r *clusterpb.JoinRequest) { r.Member.Version = cluster.Version + 2 }, fault.Rejected, "one version at a time"},
		{"ten minutes on", func(r *clusterpb.JoinRequest) { r.UnixUs = now.Add(10 * time.Minute).UnixMicro() }, fault.Rejected, now.Add(10 * time.Minute).UTC().Format(time.RFC3339)},
		{"ten minutes back", func(r *clusterpb.JoinRequest) { r.UnixUs = now.Add(-10 * time.Minute).UnixMicro() }, fault.Rejected, "set them right"},
		{"another's id", func(r *clusterpb.JoinRequest) { r.Member.Id = "n3" }, fault.Forbidden, "cannot join as"},
		{"an id that is none", func(r *clusterpb.JoinRequest) { r.Member.Id = "../n2" }, fault.Invalid, "is not an id"},
		{"an address that is none", func(r *clusterpb.JoinRequest) { r.Member.RaftAddress = "0.0.0.0:8445" }, fault.Invalid, "reaches nobody"},
		{"no member", func(r *clusterpb.JoinRequest) { r.Member = nil }, fault.Invalid, "is not an id"},
		{"a live node's address", func(r *clusterpb.JoinRequest) { r.Member.Program = strings.Repeat("x", 65) }, fault.Invalid, "64 bytes"},
	} {
		r := good()
		c.spoil(r)
		if err := n.Join(t.Context(), "n2", r); !fault.Is(err, c.class) || !strings.Contains(err.Error(), c.speaks) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if _, err := n.Peers(t.Context(), &clusterpb.PeersRequest{ClusterId: "clu_test", Version: cluster.Version + 2, UnixUs: now.UnixMicro()}); !fault.Is(err, fault.Rejected) {
		t.Errorf("Peers of a version two apart: %v", err)
	}
}

// TestTwoNodesWithOneID: the second is refused as long as the first lives.
func TestTwoNodesWithOneID(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	nodes := begin(e, nil, three...)
	leader := e.Leader(nodes...)
	for _, n := range nodes {
		err := leader.Join(t.Context(), n.ID(), &clusterpb.JoinRequest{ClusterId: "clu_test", UnixUs: time.Now().UnixMicro(), Member: &clusterpb.Member{
			Id: n.ID(), RaftAddress: "impostor:8445", MeshAddress: "impostor:8444", Version: cluster.Version,
		}})
		if !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "every node needs an id of its own") {
			t.Errorf("a second %s: %v", n.ID(), err)
		}
	}
}
