// Package link connects the nodes of a cluster beside Raft: each node keeps one stream open to each other node and says on
// it what cannot wait for a look into the database. It carries hints alone: what is lost while a link is down is made good
// by Resync when it is up again, and by the slow sweeps. Nothing waits for a link, and a node that is slow or dead costs a
// bounded amount of memory.
package link

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Version is the cluster version that this program speaks; see cluster.proto.
const Version = 1

// The numbers of a link.
const (
	// beatInterval is how often both ends show that they live, silence what ends a link.
	beatInterval = time.Second
	silence      = 5 * time.Second
	// skew is how far the clocks of two nodes may be apart before it is an alarm.
	skew = 30 * time.Second
	// callTimeout bounds a call to another node whose caller sets no closer bound.
	callTimeout = 10 * time.Second
)

// Handler does what other nodes ask. Its methods must not wait for the network or the store.
type Handler interface {
	// Wake: agents held here have work. Others than those held here may be among them.
	Wake(agentIDs []string)
	// Changed: resources are not what they were; more: some are not named.
	Changed(resources []*clusterpb.Resource, more bool)
	// Disconnect: the agent may stay connected no longer.
	Disconnect(agentID, reason string)
	// PushState: the agent's desired state has changed; empty: every agent's.
	PushState(agentID string)
	// Trigger asks for a duty, if it is run here.
	Trigger(duty string)
	// Resync: a link was made anew, and what the other node had to say meanwhile is lost.
	Resync(nodeID string)
}

// Members answers for the cluster. callerID is proven by the caller's certificate.
type Members interface {
	Peers(ctx context.Context, r *clusterpb.PeersRequest) (*clusterpb.PeersResponse, error)
	Join(ctx context.Context, callerID string, r *clusterpb.JoinRequest) error
	Remove(ctx context.Context, nodeID string) error
	Lease(ctx context.Context, callerID string, r *clusterpb.LeaseRequest) (*clusterpb.LeaseResponse, error)
}

// Config is what New needs. Every field is required unless it says otherwise.
type Config struct {
	NodeID, ClusterID string
	// Program is the program's version, for people; Instance is random per start.
	Program, Instance string
	TrustDomain       string
	Certificate       func() *tls.Certificate
	Roots             func() *x509.CertPool
	Handler           Handler
	Clock             clockwork.Clock
	Log               *slog.Logger
	// Metrics may be nil.
	Metrics prometheus.Registerer
}

// Mesh is this node's end of all links. New makes it, Stop ends it.
type Mesh struct {
	clusterpb.UnimplementedNodeServiceServer

	cfg     Config
	metrics *metrics
	ctx     context.Context
	cancel  context.CancelFunc
	done    sync.WaitGroup

	mu      sync.Mutex
	members Members
	peers   map[string]*peer
	// heard is who calls this node, with the instance that does.
	heard map[string]*inbound
}

// New returns a Mesh without peers; Update names them.
func New(c Config) (*Mesh, error) {
	switch {
	case c.NodeID == "", c.ClusterID == "", c.Instance == "", c.TrustDomain == "", c.Certificate == nil, c.Roots == nil,
		c.Handler == nil, c.Clock == nil, c.Log == nil:
		return nil, fault.New(fault.Internal, "link: a part of Config is missing")
	}
	m := &Mesh{cfg: c, peers: map[string]*peer{}, heard: map[string]*inbound{}}
	m.metrics = newMetrics(m)
	if c.Metrics != nil {
		for _, x := range m.metrics.all() {
			if err := c.Metrics.Register(x); err != nil {
				return nil, fault.Wrap(fault.Internal, err, "link: register metrics")
			}
		}
	}
	m.ctx, m.cancel = context.WithCancel(context.Background()) //nolint:forbidigo // the links' own life, which Stop ends
	return m, nil
}

// Register adds the service to the mesh listener's server.
func (m *Mesh) Register(r grpc.ServiceRegistrar) { clusterpb.RegisterNodeServiceServer(r, m) }

// Serve says who answers for the cluster. Until it is called, calls of other nodes but Link are asked to come back.
func (m *Mesh) Serve(x Members) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.members = x
}

// Update says which nodes there are, as id → host:port of the mesh listener. Links to others end; this node is left out.
func (m *Mesh) Update(addresses map[string]string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ctx.Err() != nil {
		return
	}
	for id, p := range m.peers {
		if addresses[id] != p.address {
			p.stop()
			delete(m.peers, id)
		}
	}
	for id, address := range addresses {
		if id == m.cfg.NodeID || address == "" || m.peers[id] != nil {
			continue
		}
		p, err := m.newPeer(id, address)
		if err != nil {
			m.cfg.Log.Error("a node has an address that cannot be dialled", "node", id, "address", address, "error", err)
			continue
		}
		m.peers[id] = p
		m.done.Go(p.run)
	}
}

// Stop ends all links and waits for them. Twice is fine.
func (m *Mesh) Stop() {
	m.mu.Lock()
	m.cancel()
	clear(m.peers)
	m.mu.Unlock()
	m.done.Wait()
}

// Wake tells a node that agents it holds have work.
func (m *Mesh) Wake(nodeID string, agentIDs []string) {
	if p := m.peer(nodeID); p != nil {
		p.out.wake(agentIDs)
	}
}

// WakeAll tells every node, for agents whose holder is not known.
func (m *Mesh) WakeAll(agentIDs []string) {
	for _, p := range m.all() {
		p.out.wake(agentIDs)
	}
}

// Changed tells every node of changes.
func (m *Mesh) Changed(resources []*clusterpb.Resource, more bool) {
	for _, p := range m.all() {
		p.out.changed(resources, more)
	}
}

// Disconnect tells every node that an agent may stay connected no longer.
func (m *Mesh) Disconnect(agentID, reason string) {
	m.tell(&clusterpb.LinkRequest{Message: &clusterpb.LinkRequest_Disconnect{Disconnect: &clusterpb.Disconnect{AgentId: agentID, Reason: reason}}})
}

// PushState tells every node that an agent's desired state has changed; empty: every agent's.
func (m *Mesh) PushState(agentID string) {
	m.tell(&clusterpb.LinkRequest{Message: &clusterpb.LinkRequest_PushState{PushState: &clusterpb.PushState{AgentId: agentID}}})
}

// Trigger asks every node to run a duty soon if it leads. All are asked, because around an election the caller may not know
// who does, or be wrong about it.
func (m *Mesh) Trigger(duty string) {
	m.tell(&clusterpb.LinkRequest{Message: &clusterpb.LinkRequest_Trigger{Trigger: &clusterpb.Trigger{Duty: duty}}})
}

// Up reports which nodes this one has a link to, in both directions.
func (m *Mesh) Up() map[string]bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	up := make(map[string]bool, len(m.peers))
	for id, p := range m.peers {
		_, in := m.heard[id]
		up[id] = in && p.up.Load()
	}
	return up
}

func (m *Mesh) tell(msg *clusterpb.LinkRequest) {
	for _, p := range m.all() {
		p.out.push(msg)
	}
}

func (m *Mesh) peer(id string) *peer {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.peers[id]
}

func (m *Mesh) all() map[string]*peer {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.peers)
}

// hello is this node's.
func (m *Mesh) hello() *clusterpb.LinkHello {
	return &clusterpb.LinkHello{ClusterId: m.cfg.ClusterID, Version: Version, Program: m.cfg.Program, Instance: m.cfg.Instance,
		UnixUs: m.cfg.Clock.Now().UnixMicro()}
}

// check judges the other end's Hello.
func (m *Mesh) check(nodeID string, h *clusterpb.LinkHello) error {
	if h == nil {
		return fault.New(fault.Invalid, "the first message of a link must be Hello")
	}
	if h.ClusterId != m.cfg.ClusterID {
		return fault.New(fault.Rejected, "node %s belongs to cluster %s, this node to %s: they use different databases", nodeID, h.ClusterId, m.cfg.ClusterID)
	}
	if d := h.Version - Version; d > 1 || d < -1 {
		return fault.New(fault.Unsupported, "node %s (%s) speaks cluster version %d, this node (%s) %d: nodes work together one version apart; upgrade the older one first",
			nodeID, h.Program, h.Version, m.cfg.Program, Version)
	}
	m.clock(nodeID, h.UnixUs)
	return nil
}

// clock raises an alarm when two nodes disagree about the time.
func (m *Mesh) clock(nodeID string, unixMicro int64) {
	off := time.UnixMicro(unixMicro).Sub(m.cfg.Clock.Now())
	m.metrics.skew.WithLabelValues(nodeID).Set(off.Seconds())
	if off.Abs() > skew && m.metrics.alarm(nodeID, m.cfg.Clock.Now()) {
		m.cfg.Log.Error("the clock of another node and this node's are apart; set both by NTP", "node", nodeID, "ahead", off.Round(time.Millisecond).String())
	}
}
