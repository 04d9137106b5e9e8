package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/cluster/internal/fsm"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// ErrNotLeader is in the tree of errors that say that another node leads, or none. Their class is Rejected
// (FAILED_PRECONDITION); Peers says who leads.
var ErrNotLeader = errors.New("this node does not lead")

// maxCommand bounds an entry of the log.
const maxCommand = 64 << 10

func (n *Node) notLeader() error {
	leader := "no node leads at present"
	if id, _ := n.Leader(); id != "" && id != n.cfg.ID {
		leader = fmt.Sprintf("node %s leads", id)
	}
	return fault.Wrap(fault.Rejected, ErrNotLeader, "%s", leader)
}

// check refuses nodes that this one cannot work with.
func (n *Node) check(clusterID string, version int32, unixUs int64) error {
	if clusterID != n.cfg.ClusterID {
		return fault.New(fault.Rejected, "node %s belongs to the cluster %s and the caller to %q: they use different databases", n.cfg.ID, n.cfg.ClusterID, clusterID)
	}
	if err := neighbours("node "+n.cfg.ID, n.member().GetVersion(), version); err != nil {
		return err
	}
	theirs, ours := time.UnixMicro(unixUs).UTC(), n.now().UTC()
	if d := ours.Sub(theirs).Abs(); d > n.cfg.Timing.Skew {
		return fault.New(fault.Rejected, "the caller's clock says %s and that of node %s %s: set them right, they may differ by %s at most",
			theirs.Format(time.RFC3339), n.cfg.ID, ours.Format(time.RFC3339), n.cfg.Timing.Skew)
	}
	return nil
}

// neighbours refuses versions that are two apart.
func neighbours(who string, ours, theirs int32) error {
	if theirs < ours-1 || theirs > ours+1 {
		return fault.New(fault.Rejected, "%s speaks version %d of the cluster and the caller version %d: only neighbours work together, upgrade one version at a time",
			who, ours, theirs)
	}
	return nil
}

// Peers answers another node how this one stands.
func (n *Node) Peers(_ context.Context, req *clusterpb.PeersRequest) (*clusterpb.PeersResponse, error) {
	if err := n.check(req.GetClusterId(), req.GetVersion(), req.GetUnixUs()); err != nil {
		return nil, err
	}
	resp := &clusterpb.PeersResponse{
		Self: n.member(), HasState: n.hasState(), Members: n.Members(), UnixUs: n.now().UnixMicro(),
		BootstrapExpect: int32(n.cfg.BootstrapExpect), //nolint:gosec // At most 7.
	}
	resp.LeaderId, _ = n.Leader()
	if !resp.GetHasState() {
		resp.Members = n.sightings()
	}
	return resp, nil
}

// Join makes the caller a member, without a vote at first, or takes in what has changed of one. callerID is the id that the
// caller has proven. Repeating it is harmless.
func (n *Node) Join(ctx context.Context, callerID string, req *clusterpb.JoinRequest) error {
	m := req.GetMember()
	if err := checkMember(m); err != nil {
		return err
	}
	if m.GetId() != callerID {
		return fault.New(fault.Forbidden, "node %s cannot join as %q", callerID, m.GetId())
	}
	if err := n.check(req.GetClusterId(), m.GetVersion(), req.GetUnixUs()); err != nil {
		return err
	}
	if !n.IsLeader() {
		return n.notLeader()
	}
	unlock, err := n.lockMembership(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := n.admissible(m); err != nil {
		return err
	}
	// First the address, then the membership: Raft dials at once.
	if err := n.register(ctx, m); err != nil {
		return err
	}
	if n.inConfiguration(m.GetId()) {
		return nil
	}
	n.trans.greet(m.GetId())
	if err := n.change(ctx, n.raft.AddNonvoter(raft.ServerID(m.GetId()), raft.ServerAddress(m.GetId()), 0, n.cfg.Timing.Barrier)); err != nil {
		return err
	}
	n.log.Info("a node has joined the cluster", "node", m.GetId(), "raft_address", m.GetRaftAddress(), "program", m.GetProgram())
	return nil
}

// admissible judges a node that wants to be a member, or is one and has changed.
func (n *Node) admissible(m *clusterpb.Member) error {
	state := n.machine.current()
	known := fsm.Member(state, m.GetId())
	// Where it is reached says more than the registry: all may have moved while there was no leader.
	elsewhere := known != nil && n.layer.Place(m.GetId()) != m.GetRaftAddress() && n.trans.answered(m.GetId(), n.cfg.Timing.Contact)
	if m.GetId() == n.cfg.ID || elsewhere {
		if known == nil {
			known = n.member()
		}
		return fault.New(fault.Conflict, "a node with the id %s runs at %s: every node needs an id of its own; if it has just moved here, this passes in seconds",
			m.GetId(), known.GetRaftAddress())
	}
	for _, other := range state.GetMembers() {
		if other.GetId() == m.GetId() {
			continue
		}
		if err := neighbours("node "+other.GetId(), other.GetVersion(), m.GetVersion()); err != nil {
			return err
		}
		if other.GetRaftAddress() == m.GetRaftAddress() && n.trans.answered(other.GetId(), n.cfg.Timing.Contact) {
			return fault.New(fault.Conflict, "node %s already has the address %s", other.GetId(), m.GetRaftAddress())
		}
	}
	if known == nil && len(state.GetMembers()) >= maxMembers {
		return fault.New(fault.Exhausted, "the cluster has %d members, more are not meant to be: remove some first", len(state.GetMembers()))
	}
	return nil
}

// Remove takes a member out for good; its process learns it and fails. Of two voters that are left the one that does not lead
// loses its vote, because two are worse than one. Class Rejected where too few would be left that are well. The leader gives leadership away instead and returns ErrNotLeader: the caller asks the next one.
func (n *Node) Remove(ctx context.Context, id string) error {
	if !n.IsLeader() {
		return n.notLeader()
	}
	unlock, err := n.lockMembership(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if !n.inConfiguration(id) {
		if fsm.Member(n.machine.current(), id) == nil {
			return fault.New(fault.NotFound, "node %q is not a member", id)
		}
		return n.Propose(ctx, forget(id))
	}
	if err := n.dispensable(id); err != nil {
		return err
	}
	if id == n.cfg.ID {
		if err := n.TransferLeadership(ctx); err != nil {
			return err
		}
		return n.notLeader()
	}
	if err := n.takeOut(ctx, id); err != nil {
		return err
	}
	if err := n.unpair(ctx); err != nil {
		return err
	}
	n.log.Info("a node was removed from the cluster", "node", id)
	return nil
}

// dispensable refuses what would leave too few voters.
func (n *Node) dispensable(id string) error {
	left, well, voter := 0, 0, false
	for _, m := range n.Members() {
		votes := m.GetSuffrage() == clusterpb.Member_SUFFRAGE_VOTER
		switch {
		case m.GetId() == id:
			voter = votes
		case votes:
			left++
			if m.GetHealthy() {
				well++
			}
		}
	}
	switch {
	case !voter:
		return nil
	case left == 0:
		return fault.New(fault.Rejected, "node %s is the only one that votes", id)
	case well < left/2+1:
		return fault.New(fault.Rejected, "without node %s only %d of %d voters would be well, and none could lead", id, well, left)
	}
	return nil
}

// unpair takes the vote of the one that does not lead, where two voters are left and nobody waits for a vote: a third node
// makes both voters.
func (n *Node) unpair(ctx context.Context) error {
	var other string
	voters := 0
	for _, m := range n.Members() {
		switch {
		case m.GetSuffrage() == clusterpb.Member_SUFFRAGE_VOTER:
			voters++
			if m.GetId() != n.cfg.ID {
				other = m.GetId()
			}
		case m.GetHealthy():
			return nil // it is promoted soon
		}
	}
	if voters != 2 {
		return nil
	}
	return n.change(ctx, n.raft.DemoteVoter(raft.ServerID(other), 0, n.cfg.Timing.Barrier))
}

// takeOut removes a member from Raft, then from the registry.
func (n *Node) takeOut(ctx context.Context, id string) error {
	if err := n.change(ctx, n.raft.RemoveServer(raft.ServerID(id), 0, n.cfg.Timing.Barrier)); err != nil {
		return err
	}
	return n.Propose(ctx, forget(id))
}

func forget(id string) *clusterpb.Command {
	return &clusterpb.Command{Body: &clusterpb.Command_Forget{Forget: &clusterpb.ForgetMember{NodeId: id}}}
}

// register puts m into the registry unless it says that already.
func (n *Node) register(ctx context.Context, m *clusterpb.Member) error {
	if same(fsm.Member(n.machine.current(), m.GetId()), m) {
		return nil
	}
	return n.Propose(ctx, &clusterpb.Command{Body: &clusterpb.Command_Register{Register: &clusterpb.RegisterMember{Member: &clusterpb.Member{
		Id: m.GetId(), RaftAddress: m.GetRaftAddress(), MeshAddress: m.GetMeshAddress(), Version: m.GetVersion(), Program: m.GetProgram(),
		Draining: m.GetDraining(),
	}}}})
}

// same reports whether a node's entry in the registry says what the node says.
func same(entry, m *clusterpb.Member) bool {
	return entry != nil && entry.GetRaftAddress() == m.GetRaftAddress() && entry.GetMeshAddress() == m.GetMeshAddress() &&
		entry.GetVersion() == m.GetVersion() && entry.GetProgram() == m.GetProgram() && entry.GetDraining() == m.GetDraining()
}

func (n *Node) lockMembership(ctx context.Context) (unlock func(), err error) {
	select {
	case n.membership <- struct{}{}:
		return func() { <-n.membership }, nil
	case <-ctx.Done():
		return nil, fault.Wrap(fault.Retryable, ctx.Err(), "the membership is being changed already")
	}
}

// Propose decides a command: with nil, every node applies it, and this one has. Class Rejected with ErrNotLeader on every
// other node; Unsupported while a member does not know the command; Invalid if it makes no sense; Conflict when it came
// too late (a lease's id is not the highest). Retryable says nothing of whether it was decided.
func (n *Node) Propose(ctx context.Context, c *clusterpb.Command) error {
	if err := knownTo(n.machine.current().GetMembers(), since(c)); err != nil {
		return err
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(c)
	if err != nil {
		return fmt.Errorf("encode a command: %w", err)
	}
	if len(data) > maxCommand {
		return fault.New(fault.Exhausted, "a command of %d bytes is more than the Raft log takes", len(data))
	}
	// What makes no sense does not get into the log.
	if _, err := fsm.Apply(n.machine.current(), data); errors.Is(err, fsm.ErrMalformed) {
		return fault.Wrap(fault.Invalid, err, "the command cannot be applied")
	}
	if n.raft.State() != raft.Leader {
		return n.notLeader()
	}
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Timing.Barrier)
	defer cancel()
	f := n.raft.Apply(data, n.cfg.Timing.Barrier)
	if err := n.change(ctx, f); err != nil {
		return err
	}
	err, _ = f.Response().(error)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fsm.ErrStale):
		return fault.Wrap(fault.Conflict, err, "the command came too late")
	default:
		return fault.Wrap(fault.Unsupported, err, "this program is too old for the cluster")
	}
}

// change waits for Raft to decide.
func (n *Node) change(ctx context.Context, f raft.Future) error {
	err := await(ctx, f)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, raft.ErrNotLeader):
		return n.notLeader()
	default:
		return fault.Wrap(fault.Retryable, err, "the cluster could not decide")
	}
}

// since returns the version that brought a command. A new body gets a line here.
func since(c *clusterpb.Command) int32 {
	switch c.GetBody().(type) {
	case *clusterpb.Command_Register, *clusterpb.Command_Forget, *clusterpb.Command_Plan, *clusterpb.Command_Configuration,
		*clusterpb.Command_Grant, *clusterpb.Command_End, *clusterpb.Command_Pause:
		return 1
	default:
		return Version + 1
	}
}

// knownTo refuses a command that came with a version which a member does not have.
func knownTo(members []*clusterpb.Member, since int32) error {
	if since > Version {
		return fault.New(fault.Unsupported, "this program does not know the command")
	}
	for _, m := range members {
		if m.GetVersion() < since {
			return fault.New(fault.Unsupported, "node %s speaks version %d of the cluster, and this needs version %d on every node: upgrade it first",
				m.GetId(), m.GetVersion(), since)
		}
	}
	return nil
}
