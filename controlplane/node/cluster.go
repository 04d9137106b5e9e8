package node

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/certmesh/certmesh/cluster"
	"github.com/certmesh/certmesh/cluster/link"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/controlplane/internal/session"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// meshAddress and raftAddress are where other nodes find this one.
func (n *Node) meshAddress() string {
	return n.advertised(n.cfg.Cluster.MeshAddress, n.addresses.Mesh)
}

func (n *Node) raftAddress() string {
	return n.advertised(n.cfg.Cluster.RaftAddress, n.addresses.Raft)
}

func (n *Node) advertised(configured, listens string) string {
	if configured != "" {
		return configured
	}
	host, port, err := net.SplitHostPort(listens)
	if ip := net.ParseIP(host); err != nil || ip == nil || ip.IsUnspecified() {
		host = n.cfg.Node.Names[0]
	}
	return net.JoinHostPort(host, port)
}

// newLinks makes this node's end of the links; they begin when the registry names other nodes.
func (n *Node) newLinks(metrics prometheus.Registerer) (*link.Mesh, error) {
	return link.New(link.Config{NodeID: n.cfg.Node.ID, ClusterID: n.member.clusterID, Program: n.opts.Version, Instance: n.member.node.Instance,
		TrustDomain: n.cfg.Mesh.TrustDomain, Certificate: n.trust.certificate, Roots: n.trust.pool, Handler: &told{n},
		Clock: n.clk, Log: n.log, Metrics: metrics})
}

// joinCluster starts Raft. It returns while the node is still looking for the others: nothing but leadership waits for that.
func (n *Node) joinCluster(ctx context.Context, l net.Listener, metrics prometheus.Registerer) error {
	var err error
	n.raft, err = cluster.Start(ctx, cluster.Config{
		ID: n.cfg.Node.ID, ClusterID: n.member.clusterID,
		Self: &clusterpb.Member{RaftAddress: n.raftAddress(), MeshAddress: n.meshAddress(), Program: n.opts.Version},
		Dir:  raftDir(n.cfg.Node.DataDir), Listener: l, Certificate: n.trust.certificate, Roots: n.trust.pool, TrustDomain: n.cfg.Mesh.TrustDomain,
		Join: n.cfg.Cluster.Join, BootstrapExpect: n.cfg.Cluster.BootstrapExpect, Peers: dialer{n.links},
		Leading: n.lead, Revoke: n.revoke, Clock: n.clk, Log: n.log, Metrics: metrics,
		Timing: cluster.Timing{ReapAfter: n.cfg.Cluster.ReapAfter, Skew: n.cfg.Cluster.MaxClockSkew},
	})
	if err != nil {
		return fmt.Errorf("start Raft: %w", err)
	}
	if n.granter, err = n.newGranter(); err != nil {
		return err
	}
	close(n.joined)
	n.links.Serve(members{n})
	return nil
}

func raftDir(dataDir string) string { return filepath.Join(dataDir, "raft") }

// RecoverRaft sets the Raft directory of a node that does not run aside and returns where it is now; empty: there was none.
func RecoverRaft(c *Configuration) (string, error) {
	dir := c.loaded.Config.Node.DataDir
	lock, err := lockDir(dir)
	if err != nil {
		return "", err
	}
	defer func() { _ = lock.Close() }() // the lock goes with the process anyway
	aside, err := cluster.Recover(raftDir(dir))
	if fault.Is(err, fault.NotFound) {
		return "", nil
	}
	return aside, err
}

// lead is called when this node leads the cluster; what it begins ends with ctx.
func (n *Node) lead(ctx context.Context, term cluster.Term) error {
	// Raft may have found out that this node leads before joinCluster knows Raft.
	select {
	case <-n.joined:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	n.log.Info("this node leads", "term", term.Number)
	var granting sync.WaitGroup
	granting.Go(func() { n.granter.Lead(ctx) })
	// Duties that cannot be taken now are tried again for as long as this node leads: the database may be away.
	if err := n.parts.duties.Lead(ctx); err != nil && ctx.Err() == nil {
		n.log.Warn("not all duties could be taken yet", "error", err)
	}
	granting.Wait()
	return nil
}

func (n *Node) revoke(term cluster.Term) {
	n.parts.duties.Lapse()
	n.log.Info("this node leads no more", "term", term.Number)
}

// followMembers keeps links to the nodes that the registry names, until ctx ends.
func (n *Node) followMembers(ctx context.Context) {
	changes, cancel := n.raft.Changes()
	defer cancel()
	// Who is a member is Raft's configuration, of which a follower hears no word when it changes.
	again := n.clk.NewTicker(time.Second)
	defer again.Stop()
	for {
		addresses := map[string]string{}
		for _, m := range n.raft.Members() {
			addresses[m.GetId()] = m.GetMeshAddress()
		}
		n.links.Update(addresses)
		select {
		case <-ctx.Done():
			return
		case <-changes:
		case <-again.Chan():
		}
	}
}

// otherNodes are the mesh addresses where agents may go instead.
func (n *Node) otherNodes() []string { return n.addressesOf(func(string) bool { return true }) }

// size is how many nodes there are as far as this one knows, itself included.
func (n *Node) size() int {
	select {
	case <-n.joined:
		return 1 + len(n.otherNodes())
	default:
		return 1
	}
}

// livingNodes are those of them that this node has a link to.
func (n *Node) livingNodes() []string {
	up := n.links.Up()
	return n.addressesOf(func(id string) bool { return up[id] })
}

func (n *Node) addressesOf(wanted func(id string) bool) []string {
	var others []string
	for _, m := range n.raft.Members() {
		if m.GetId() != n.cfg.Node.ID && !m.GetDraining() && m.GetMeshAddress() != "" && wanted(m.GetId()) {
			others = append(others, m.GetMeshAddress())
		}
	}
	return others
}

// alone reports that no other node is known. What is not passed on to one that is about to be known, it finds itself when
// the first link is opened.
func (n *Node) alone() bool { return len(n.links.Up()) == 0 }

// remoteWake passes wakes on; an empty node stands for all others.
func (n *Node) remoteWake(nodeID string, agentIDs []string) {
	if nodeID == "" {
		n.links.WakeAll(agentIDs)
		return
	}
	n.links.Wake(nodeID, agentIDs)
}

// shareChanges tells the other nodes of what changed here, for those who watch there, until ctx ends.
func (n *Node) shareChanges(ctx context.Context, changes *hub.Hub) {
	sub := changes.SubscribeOwn()
	defer sub.Close()
	for {
		select {
		case <-ctx.Done():
			return
		case <-sub.Changed():
		}
		notices, lagged := sub.Take()
		resources := make([]*clusterpb.Resource, len(notices))
		for i, x := range notices {
			resources[i] = &clusterpb.Resource{Kind: x.Kind, Id: x.ID}
		}
		n.links.Changed(resources, lagged)
	}
}

// told does what other nodes ask over the link.
type told struct{ n *Node }

func (t *told) sessions() *session.Server { return t.n.parts.sessions }

// Wake implements link.Handler.
func (t *told) Wake(agentIDs []string) { t.sessions().WakeHeld(agentIDs) }

// Disconnect implements link.Handler.
func (t *told) Disconnect(agentID, reason string) { t.sessions().DisconnectHeld(agentID, reason) }

// PushState implements link.Handler.
func (t *told) PushState(agentID string) { t.sessions().PushStateHeld(agentID) }

// Trigger implements link.Handler.
func (t *told) Trigger(duty string) { t.n.parts.duties.TriggerHeld(duty) }

// Changed implements link.Handler.
func (t *told) Changed(resources []*clusterpb.Resource, more bool) {
	notices := make([]hub.Notice, 0, len(resources))
	for _, r := range resources {
		notices = append(notices, hub.Notice{Kind: r.GetKind(), ID: r.GetId()})
	}
	t.n.parts.changes.Relay(notices, more)
}

// Resync implements link.Handler.
func (t *told) Resync(nodeID string) {
	t.n.log.Info("another node has opened a link", "node", nodeID)
	t.sessions().Resync()
	t.n.parts.duties.TriggerAllHeld()
	t.n.parts.changes.Relay(nil, true)
}

// dialer lets Raft ask nodes it does not know yet.
type dialer struct{ links *link.Mesh }

// Peers implements cluster.Dialer.
func (d dialer) Peers(ctx context.Context, address string, r *clusterpb.PeersRequest) (*clusterpb.PeersResponse, error) {
	return d.links.AskPeers(ctx, address, r)
}

// Join implements cluster.Dialer.
func (d dialer) Join(ctx context.Context, address string, r *clusterpb.JoinRequest) error {
	return d.links.AskJoin(ctx, address, r)
}

// members answers other nodes for the cluster.
type members struct{ n *Node }

// Peers implements link.Members.
func (m members) Peers(ctx context.Context, r *clusterpb.PeersRequest) (*clusterpb.PeersResponse, error) {
	return m.n.raft.Peers(ctx, r)
}

// Join implements link.Members. Who may be a node, the store says; a certificate outlives that.
func (m members) Join(ctx context.Context, callerID string, r *clusterpb.JoinRequest) error {
	if err := m.n.admit(ctx, callerID); err != nil {
		return err
	}
	return m.n.raft.Join(ctx, callerID, r)
}

// Remove implements link.Members.
func (m members) Remove(ctx context.Context, nodeID string) error {
	return m.n.raft.Remove(ctx, nodeID)
}

// Lease implements link.Members.
func (m members) Lease(ctx context.Context, callerID string, r *clusterpb.LeaseRequest) (*clusterpb.LeaseResponse, error) {
	return m.n.granter.Lease(ctx, callerID, r)
}

// admit refuses what the store does not know as a node in service.
func (n *Node) admit(ctx context.Context, nodeID string) error {
	nodes, err := n.store.Nodes(ctx)
	if err != nil {
		return fmt.Errorf("read the nodes: %w", err)
	}
	for _, x := range nodes {
		if x.ID == nodeID && x.RemovedAt.IsZero() {
			return nil
		}
	}
	return fault.New(fault.Forbidden, "node %q is not enrolled in this cluster, or was removed from it", nodeID)
}

// leaveLeading gives leadership away before agents are sent off, so that duties go on while they move.
func (n *Node) leaveLeading(ctx context.Context) {
	if len(n.otherNodes()) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, leaveTimeout)
	defer cancel()
	// Agents that other nodes send away are not sent here any more.
	if err := n.raft.SetDraining(ctx, true); err != nil {
		n.log.Warn("the others were not told that this node stops", "error", err)
	}
	if id, _ := n.raft.Leader(); id != n.cfg.Node.ID {
		return
	}
	if err := n.raft.TransferLeadership(ctx); err != nil {
		n.log.Warn("leadership was not given away; the others notice that it is gone", "error", err)
	}
}

// leaveTimeout bounds the giving away of leadership when a node stops.
const leaveTimeout = 5 * time.Second
