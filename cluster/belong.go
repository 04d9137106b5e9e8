package cluster

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/cluster/internal/fsm"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	// A node without a cluster that was not heard of for so long is not counted any more.
	sightingLasts = 30 * time.Second
	// More addresses than that are not asked in one round.
	maxAsked = 2 * maxMembers
)

// sighting is what a node without a cluster has said of itself.
type sighting struct {
	member *clusterpb.Member
	at     time.Time
}

// belong keeps this node a member, and the registry right about it.
func (n *Node) belong() {
	pause := n.cfg.Timing.RetryMin
	for {
		settled := n.settle()
		var wait time.Duration
		if settled {
			pause = n.cfg.Timing.RetryMin
			wait = lookInterval
		} else {
			// Full jitter: nodes that start together do not ask together.
			wait = rand.N(pause) //nolint:gosec // Not a secret.
			pause = min(2*pause, n.cfg.Timing.RetryMax)
		}
		timer := time.NewTimer(wait)
		select {
		case <-n.ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		case <-n.poked:
			timer.Stop()
			// Raft hints often; between two attempts that fail there is at least this.
			if !settled && !sleep(n.ctx, min(wait, n.cfg.Timing.RetryMin)) {
				return
			}
		}
	}
}

// settle takes one step towards being a member with a right entry in the registry; true: nothing is left to be done.
func (n *Node) settle() bool {
	ctx, cancel := context.WithTimeout(n.ctx, 2*n.cfg.Timing.Barrier)
	defer cancel()
	self := n.member()
	if n.IsLeader() {
		if err := n.register(ctx, self); err != nil {
			n.setTrouble("the registry does not say where this node is: " + err.Error())
			return false
		}
		n.arrived()
		return true
	}
	leader, address := n.Leader()
	if leader == n.cfg.ID {
		// It waits for its barrier, or cannot establish and says so.
		return false
	}
	if leader != "" && n.inConfiguration(n.cfg.ID) {
		if same(fsm.Member(n.machine.current(), n.cfg.ID), self) {
			n.arrived()
			return true
		}
		// A member whose entry is wrong, or whose log has not caught up yet.
		if address != "" {
			return n.ask(ctx, leader, address)
		}
	}
	return n.search(ctx)
}

// arrived notes that this node is a member as it should be.
func (n *Node) arrived() {
	n.mu.Lock()
	n.belonged = true
	n.mu.Unlock()
	n.setTrouble("")
}

// ask asks the leader to let this node in, or to correct its entry.
func (n *Node) ask(ctx context.Context, leader, address string) bool {
	err := n.cfg.Peers.Join(ctx, address, &clusterpb.JoinRequest{ClusterId: n.cfg.ClusterID, Member: n.member(), UnixUs: n.now().UnixMicro()})
	if err != nil {
		if n.ctx.Err() == nil {
			n.setTrouble(fmt.Sprintf("node %s does not let this node join: %v", leader, err))
		}
		return false
	}
	// The entry comes with the log.
	return false
}

// answer is what an address said.
type answer struct {
	address string
	resp    *clusterpb.PeersResponse
	err     error
}

// search asks every node it knows where the leader is, and where they are; it begins a cluster if there is none.
func (n *Node) search(ctx context.Context) bool {
	answers := n.askAll(ctx)
	if ctx.Err() != nil {
		return false
	}
	leader, address := "", ""
	var members []*clusterpb.Member
	for _, a := range answers {
		if a.err != nil {
			continue
		}
		n.book.learn(a.resp.GetSelf())
		if id := a.resp.GetLeaderId(); id != "" && id != n.cfg.ID && (leader == "" || id == a.resp.GetSelf().GetId()) {
			leader, members = id, a.resp.GetMembers()
			address = addressIn(a.resp, id)
		}
	}
	switch {
	case leader != "" && n.wasRemoved(members):
		n.fail(fault.New(fault.Rejected, "node %s was removed from the cluster: to let it in again, give it a new token and an empty data directory", n.cfg.ID))
		return true
	case leader != "" && address != "":
		return n.ask(ctx, leader, address)
	case n.hasState():
		n.setTrouble("no node leads: " + sentence(answers, "a majority of the voters must run and reach each other"))
		return false
	}
	return n.beginTogether(answers)
}

// addressIn returns the mesh address of a node that an answer names.
func addressIn(resp *clusterpb.PeersResponse, id string) string {
	if resp.GetSelf().GetId() == id {
		return resp.GetSelf().GetMeshAddress()
	}
	for _, m := range resp.GetMembers() {
		if m.GetId() == id {
			return m.GetMeshAddress()
		}
	}
	return ""
}

// wasRemoved reports whether this node was a member while it ran, and a leader says that it is none.
func (n *Node) wasRemoved(members []*clusterpb.Member) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.belonged && !slices.ContainsFunc(members, func(m *clusterpb.Member) bool { return m.GetId() == n.cfg.ID })
}

// askAll asks every node that is known, at the same time. Answers of this node itself are left out.
func (n *Node) askAll(ctx context.Context) []answer {
	ctx, cancel := context.WithTimeout(ctx, 2*n.cfg.Timing.IO)
	defer cancel()
	addresses := slices.Concat(n.cfg.Join, n.book.mesh())
	slices.Sort(addresses)
	addresses = slices.DeleteFunc(slices.Compact(addresses), func(a string) bool { return a == n.member().GetMeshAddress() })
	addresses = addresses[:min(len(addresses), maxAsked)]
	answers := make([]answer, len(addresses))
	var wg sync.WaitGroup
	for i, address := range addresses {
		wg.Go(func() {
			resp, err := n.cfg.Peers.Peers(ctx, address, &clusterpb.PeersRequest{
				ClusterId: n.cfg.ClusterID, Version: n.member().GetVersion(), UnixUs: n.now().UnixMicro(),
			})
			if err == nil {
				err = checkMember(resp.GetSelf())
			}
			answers[i] = answer{address, resp, err}
		})
	}
	wg.Wait()
	return slices.DeleteFunc(answers, func(a answer) bool { return a.err == nil && a.resp.GetSelf().GetId() == n.cfg.ID })
}

// beginTogether begins a cluster if that is this node's to do: enough nodes without one see exactly each other, and of them
// this one has the lowest id.
func (n *Node) beginTogether(answers []answer) bool {
	expect := n.cfg.BootstrapExpect
	reached := true
	for _, a := range answers {
		switch {
		case a.err != nil:
			reached = reached && !slices.Contains(n.cfg.Join, a.address)
		case a.resp.GetHasState():
			n.setTrouble(fmt.Sprintf("node %s belongs to a cluster, but no node leads it: start the others; if their Raft files are lost, run "+
				"\"certmeshd cluster recover\" on all", a.resp.GetSelf().GetId()))
			return false
		}
	}
	view := n.sight(answers)
	switch {
	case expect == 0:
		n.setTrouble(sentence(answers, "no node of cluster.join belongs to a cluster yet"))
		return false
	case len(view) < expect:
		n.setTrouble(sentence(answers, fmt.Sprintf("%d of the %d nodes that begin the cluster are there", len(view), expect)))
		return false
	case !reached && n.now().Sub(n.started) < n.cfg.Timing.Patience:
		return false
	}
	agreed := map[string]bool{n.cfg.ID: true}
	for _, a := range answers {
		if a.err != nil {
			continue
		}
		if int(a.resp.GetBootstrapExpect()) != expect {
			n.setTrouble(fmt.Sprintf("node %s expects %d nodes to begin the cluster and this one %d: cluster.bootstrap_expect must be the same on all",
				a.resp.GetSelf().GetId(), a.resp.GetBootstrapExpect(), expect))
			return false
		}
		agreed[a.resp.GetSelf().GetId()] = slices.Equal(idsOf(a.resp.GetMembers()), view)
	}
	for _, id := range view {
		if !agreed[id] {
			// It has not seen all yet, or is gone.
			return false
		}
	}
	// Whom it begins with then follows; the others wait for it.
	if view[0] != n.cfg.ID {
		n.setTrouble(fmt.Sprintf("node %s is to begin the cluster", view[0]))
		return false
	}
	if err := n.bootstrap(view[:expect]); err != nil {
		n.setTrouble("the cluster could not be begun: " + err.Error())
		return false
	}
	return false
}

// sight notes which nodes without a cluster there are and returns their ids in order, this node's among them.
func (n *Node) sight(answers []answer) []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := n.now()
	n.view[n.cfg.ID] = &sighting{n.self, now}
	for _, a := range answers {
		if a.err == nil && len(n.view) < maxMembers {
			n.view[a.resp.GetSelf().GetId()] = &sighting{a.resp.GetSelf(), now}
		}
	}
	var ids []string
	for id, s := range n.view {
		if now.Sub(s.at) > sightingLasts {
			delete(n.view, id)
			continue
		}
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// sightings returns the nodes without a cluster that this one has seen, in order.
func (n *Node) sightings() []*clusterpb.Member {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []*clusterpb.Member
	for _, s := range n.view {
		all = append(all, s.member)
	}
	slices.SortFunc(all, func(a, b *clusterpb.Member) int { return cmp.Compare(a.GetId(), b.GetId()) })
	return all
}

func idsOf(members []*clusterpb.Member) []string {
	var ids []string
	for _, m := range members {
		ids = append(ids, m.GetId())
	}
	return ids
}

// sentence returns what is wrong, with the first error that another node, or the way to it, gave.
func sentence(answers []answer, what string) string {
	for _, a := range answers {
		if a.err != nil {
			return fmt.Sprintf("%s; %s: %v", what, a.address, a.err)
		}
	}
	return what
}

// SetDraining marks this node as one that gives away what it has, or takes the mark back, and waits until the registry says
// so. The mark ends with the process.
func (n *Node) SetDraining(ctx context.Context, draining bool) error {
	changes, cancel := n.Changes()
	defer cancel()
	n.mu.Lock()
	n.self = proto.CloneOf(n.self)
	n.self.Draining = draining
	n.mu.Unlock()
	n.poke()
	for {
		if same(fsm.Member(n.machine.current(), n.cfg.ID), n.member()) {
			return nil
		}
		select {
		case <-changes:
		case <-ctx.Done():
			return fault.Wrap(fault.Retryable, ctx.Err(), "the cluster could not be told that this node drains")
		}
	}
}
