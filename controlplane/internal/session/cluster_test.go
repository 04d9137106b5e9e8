package session

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// pair is two nodes over one store, with a link between them that can be cut: what is said meanwhile is lost.
type pair struct {
	a, b *plane
	cut  atomic.Bool
}

func newPair(t *testing.T) *pair {
	t.Helper()
	mesh := newMesh(t, time.Now())
	store := newFakeStore([][]byte{mesh.Root().Raw})
	x := &pair{}
	var planes [2]*plane
	for i, node := range []string{"node-a", "node-b"} {
		other := func() *Server {
			if x.cut.Load() {
				return nil
			}
			return planes[1-i].srv
		}
		planes[i] = newPlaneOver(t, mesh, store, func(c *Config) {
			c.NodeID = node
			c.RemoteWake = func(to string, agentIDs []string) {
				if s := other(); s != nil && (to == "" || to == s.cfg.NodeID) {
					s.WakeHeld(agentIDs)
				}
			}
			c.RemoteDisconnect = func(agentID, reason string) {
				if s := other(); s != nil {
					s.DisconnectHeld(agentID, reason)
				}
			}
			c.RemotePushState = func(agentID string) {
				if s := other(); s != nil {
					s.PushStateHeld(agentID)
				}
			}
		})
	}
	x.a, x.b = planes[0], planes[1]
	return x
}

// at is the host, connecting to another node.
func (h *host) at(p *plane) *host {
	other := *h
	other.p = p
	return &other
}

// TestRemoteWake: an agent that another node holds is woken there; one that nobody holds is not. Many are asked about at
// once.
func TestRemoteWake(t *testing.T) {
	t.Parallel()
	woken := make(chan string, 64)
	var alone atomic.Bool
	p := newPlane(t, func(c *Config) {
		c.Alone = alone.Load
		c.RemoteWake = func(node string, agentIDs []string) {
			for _, id := range agentIDs {
				woken <- node + " " + id
			}
		}
	})
	p.store.mu.Lock()
	for i := range 20 {
		id := fmt.Sprint("agt_far", i)
		p.store.sessions[id] = domain.Session{AgentID: id, Epoch: 3, Holder: fmt.Sprint("node-", 2+i%2)}
	}
	p.store.sessions["agt_gone"] = domain.Session{AgentID: "agt_gone", Epoch: 3}
	p.store.mu.Unlock()
	first, release := make(chan struct{}), make(chan struct{})
	p.store.onCall(func(method string) error {
		if method == "SessionHolders" && p.store.count(method) == 1 {
			close(first)
			<-release
		}
		return nil
	})
	p.srv.Wake("agt_gone")
	<-first
	p.srv.Wake("agt_unknown")
	for i := range 20 {
		p.srv.Wake(fmt.Sprint("agt_far", i))
		p.srv.Wake(fmt.Sprint("agt_far", i))
	}
	close(release)
	seen := map[string]bool{}
	for range 20 {
		seen[<-woken] = true
	}
	if !seen["node-2 agt_far0"] || !seen["node-3 agt_far1"] || len(seen) != 20 {
		t.Fatalf("woken: %v", seen)
	}
	eventually(t, "all holders were read", func() bool {
		p.srv.holders.mu.Lock()
		defer p.srv.holders.mu.Unlock()
		return !p.srv.holders.running
	})
	if n := p.store.count("SessionHolders"); n != 2 || len(woken) != 0 {
		t.Errorf("%d questions, %d woken too", n, len(woken))
	}
	// Who cannot find out tells everybody.
	p.store.onCall(func(method string) error {
		if method == "SessionHolders" {
			return fault.New(fault.Retryable, "the database is away")
		}
		return nil
	})
	p.srv.Wake("agt_far7")
	if got := <-woken; got != " agt_far7" {
		t.Fatalf("woken: %q", got)
	}
	// Who is alone asks nobody.
	alone.Store(true)
	asked := p.store.count("SessionHolders")
	p.srv.Wake("agt_far7")
	if p.store.count("SessionHolders") != asked || len(woken) != 0 {
		t.Error("asked although there is nobody")
	}
}

// TestWorkReachesTheAgentThroughAnotherNode: jobs, disconnects and states made at one node, the stream at the other.
func TestWorkReachesTheAgentThroughAnotherNode(t *testing.T) {
	t.Parallel()
	x := newPair(t)
	h := x.a.host("web1").at(x.b)
	k := h.online(credits(4, 4))
	x.a.store.order(domain.JobDeployment, h.id, "cert_1", "tgt_1")
	x.a.srv.Wake(h.id)
	k.assignment()
	if n := testutil.ToFloat64(x.a.srv.metrics.wakesSent); n != 1 {
		t.Errorf("%v wakes sent", n)
	}
	if n := testutil.ToFloat64(x.b.srv.metrics.wakesReceived); n != 1 {
		t.Errorf("%v wakes received", n)
	}
	for range 2 {
		k.state() // trust bundle and settings
	}
	x.a.store.mu.Lock()
	x.a.store.targets["tgt_9"] = domain.Target{ID: "tgt_9", AgentID: h.id, Kind: "file", Revision: 1, Settings: []byte("{}")}
	x.a.store.mu.Unlock()
	x.a.srv.PushState(h.id)
	if v := k.state().GetVersion(); v.GetName() != "tgt_9" {
		t.Errorf("state %v", v)
	}
	clone := x.a.host("clone").at(x.b)
	c := clone.online()
	x.a.srv.Disconnect(clone.id, quarantined+because("two machines use it"))
	if g := c.goodbye(); g.GetReason() != agentpb.Goodbye_REASON_QUARANTINED || g.GetPermanent() {
		t.Errorf("%v", g)
	}
	x.a.srv.Disconnect(h.id, "the agent was retired: gone")
	if g := k.goodbye(); g.GetReason() != agentpb.Goodbye_REASON_RETIRED || !g.GetPermanent() {
		t.Errorf("%v", g)
	}
}

// TestStaleStreamSwallowsNoWake: the agent has moved, its former stream is still there and has no credit, so that nothing
// would show that it is stale.
func TestStaleStreamSwallowsNoWake(t *testing.T) {
	t.Parallel()
	x := newPair(t)
	h := x.a.host("web1")
	stale := h.online(credits(0, 0))
	k := h.at(x.b).online(credits(4, 4))
	x.a.store.order(domain.JobDeployment, h.id, "cert_1", "tgt_1")
	x.a.srv.Wake(h.id)
	k.assignment()
	if g := stale.goodbye(); g.GetReason() != agentpb.Goodbye_REASON_SUPERSEDED {
		t.Errorf("%v", g)
	}
}

// TestStaleStreamThatDispatches: what it was told before the agent moved goes to the node that holds the agent now.
func TestStaleStreamThatDispatches(t *testing.T) {
	t.Parallel()
	x := newPair(t)
	h := x.a.host("web1")
	stale := h.online(credits(1, 1))
	k := h.at(x.b).online(credits(4, 4))
	x.a.store.order(domain.JobDeployment, h.id, "cert_1", "tgt_1")
	x.a.srv.WakeLocal([]string{h.id}) // the holder was this node when it was read
	k.assignment()
	if g := stale.goodbye(); g.GetReason() != agentpb.Goodbye_REASON_SUPERSEDED {
		t.Errorf("%v", g)
	}
}

// TestResyncFindsWhatTheLinkLost.
func TestResyncFindsWhatTheLinkLost(t *testing.T) {
	t.Parallel()
	x := newPair(t)
	works, gone, cloned, revoked := x.a.host("works"), x.a.host("gone"), x.a.host("cloned"), x.a.host("revoked")
	moved, idle := x.a.host("moved"), x.a.host("idle")
	talks := map[*host]*talk{}
	for _, h := range []*host{works, gone, cloned, revoked, moved, idle} {
		talks[h] = h.at(x.b).online(credits(4, 4))
		for range 2 {
			talks[h].state()
		}
	}
	x.cut.Store(true)
	store := x.a.store
	store.order(domain.JobDeployment, works.id, "cert_1", "tgt_1")
	x.a.srv.Wake(works.id)
	store.setAgent(gone.id, func(a *domain.Agent) { a.State, a.Reason = domain.AgentRetired, "sold" })
	x.a.srv.Disconnect(gone.id, "the agent was retired: sold")
	store.setAgent(cloned.id, func(a *domain.Agent) { a.State = domain.AgentQuarantined })
	store.mu.Lock()
	i := store.identities[revoked.serial]
	i.RevokedAt = time.Now()
	store.identities[revoked.serial] = i
	store.targets["tgt_1"] = domain.Target{ID: "tgt_1", AgentID: idle.id, Kind: "file", Revision: 1, Settings: []byte("{}")}
	store.mu.Unlock()
	x.a.srv.PushState(idle.id)
	moved.online()
	eventually(t, "the questions are answered", func() bool { return x.a.store.count("SessionHolders") > 0 })
	for h, k := range talks {
		if len(k.in) != 0 {
			t.Fatalf("%s heard of it: %v", h.id, <-k.in)
		}
	}
	x.cut.Store(false)
	x.b.srv.Resync()
	talks[works].assignment()
	for h, want := range map[*host]agentpb.Goodbye_Reason{gone: agentpb.Goodbye_REASON_RETIRED, cloned: agentpb.Goodbye_REASON_QUARANTINED,
		revoked: agentpb.Goodbye_REASON_REVOKED, moved: agentpb.Goodbye_REASON_SUPERSEDED} {
		if g := talks[h].goodbye(); g.GetReason() != want {
			t.Errorf("%s: %v", h.id, g)
		}
	}
	if v := talks[idle].state().GetVersion(); v.GetName() != "tgt_1" {
		t.Errorf("state %v", v)
	}
	if !x.b.srv.Holds(idle.id) || !x.b.srv.Holds(works.id) {
		t.Error("one that may stay was sent away")
	}
}

// TestRecheckEveryMinute: the same without a Resync, as a safety net.
func TestRecheckEveryMinute(t *testing.T) {
	t.Parallel()
	clk := clockwork.NewFakeClockAt(time.Now())
	p := newPlane(t, func(c *Config) { c.Clock, c.RemoteWake = clk, func(string, []string) {} })
	h := p.host("web1")
	k := h.online()
	p.store.setAgent(h.id, func(a *domain.Agent) { a.State, a.Reason = domain.AgentRetired, "sold" })
	for p.store.count("Standings") == 0 {
		clk.Advance(recheckInterval)
		select {
		case <-k.done:
		case <-time.After(time.Millisecond):
		}
	}
	if g := k.goodbye(); g.GetReason() != agentpb.Goodbye_REASON_RETIRED || !strings.Contains(g.GetMessage(), "sold") {
		t.Errorf("%v", g)
	}
}

// TestWelcomeNamesTheOtherNodes, in random order.
func TestWelcomeNamesTheOtherNodes(t *testing.T) {
	t.Parallel()
	nodes := []string{"n1:1", "n2:1", "n3:1", "n4:1", "n5:1"}
	p := newPlane(t, func(c *Config) { c.Nodes = func() []string { return nodes } })
	firsts := map[string]bool{}
	for i := range 20 {
		k := p.host(fmt.Sprint("h", i)).connect()
		got := k.welcome().GetNodes()
		firsts[got[0]] = true
		if slices.Sort(got); !slices.Equal(got, nodes) {
			t.Fatalf("nodes %v", got)
		}
	}
	if len(firsts) < 2 || nodes[0] != "n1:1" {
		t.Errorf("always %v first", firsts)
	}
}

// TestHolderReadBeforeTheCommitMisses: why the order of the two steps matters, and that a missed job is not found by
// itself. The creator reads the holder, the agent moves, the job is committed, the former holder is woken.
func TestHolderReadBeforeTheCommitMisses(t *testing.T) {
	t.Parallel()
	x := newPair(t)
	h := x.a.host("web1")
	former := h.online(credits(1, 1))
	holder := x.a.store.session(h.id).Holder
	former.leave()
	former.end()
	k := h.at(x.b).online(credits(1, 1))
	for range 2 {
		k.state()
	}
	job := x.a.store.order(domain.JobDeployment, h.id, "cert_1", "tgt_1")
	for _, p := range []*plane{x.a, x.b} {
		if p.srv.cfg.NodeID == holder {
			p.srv.WakeHeld([]string{h.id}) // nobody is there: it does nothing at all
		}
	}
	if len(k.in) != 0 || x.a.store.job(job.ID).Attempt != 0 {
		t.Fatal("it did not miss")
	}
	x.a.srv.Wake(h.id) // reads the holder now
	if a := k.assignment(); a.GetId() != job.ID {
		t.Errorf("%v", a)
	}
}
