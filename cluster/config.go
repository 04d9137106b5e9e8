package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/prometheus/client_golang/prometheus"

	clusterlog "github.com/certmesh/certmesh/cluster/internal/log"
	clusternet "github.com/certmesh/certmesh/cluster/internal/net"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Version is the highest version of the cluster that this program speaks; cluster.proto has the history.
const Version int32 = 1

// Dialer asks other nodes over the mesh listener. An address is what Config.Join or the registry says. Errors keep their
// class.
type Dialer interface {
	Peers(ctx context.Context, meshAddress string, req *clusterpb.PeersRequest) (*clusterpb.PeersResponse, error)
	Join(ctx context.Context, meshAddress string, req *clusterpb.JoinRequest) error
}

// Term is a time in which this node leads.
type Term struct {
	// Number is Raft's.
	Number uint64
	// Since is when this node learned that it leads, which is never before it did; it carries the monotonic clock. Who has to
	// wait out what an earlier leader granted counts from here.
	Since time.Time
}

// Config is what a node is started with.
type Config struct {
	// ID is this node's, as in its certificate.
	ID string
	// ClusterID is that of the cluster whose store this node uses.
	ClusterID string
	// Self is what the registry is to say of this node; id and version are filled in.
	Self *clusterpb.Member
	// Dir belongs to Raft alone. It is created with mode 0700.
	Dir string

	// Listener is where other nodes' Raft is heard, already bound. The node closes it.
	Listener net.Listener
	// Dial connects to a raft_address; nil: TCP.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Certificate and Roots are asked at every handshake. Only nodes of TrustDomain (spiffe://<trust domain>/node/<id>) are
	// let in, and a dialled node must show the id that it was dialled for.
	Certificate func() *tls.Certificate
	Roots       func() *x509.CertPool
	TrustDomain string
	// Admit judges a node that has proven its id and connects; nil: all may.
	Admit func(id string) error

	// Join are mesh addresses of nodes; this node's own among them does no harm.
	Join []string
	// BootstrapExpect is the number of nodes that begin a cluster where there is none: 1, 3, 5…; 0: this node never does.
	BootstrapExpect int
	Peers           Dialer

	// Leading establishes what only the leader does, after everything that was decided before is applied here. What it begins
	// must end with ctx. It may return when that runs, or stay until ctx ends; the next term's is not called before it has
	// returned. An error before ctx ends gives leadership away; a node that cannot do that either tries again a few times, and
	// then fails. A database that is away is no reason for an error. nil: nothing is to be done.
	Leading func(ctx context.Context, term Term) error
	// Revoke is Leading's mirror image, called after its ctx has ended and it has returned, also when it returned an error.
	Revoke func(term Term)

	Clock   clockwork.Clock
	Log     *slog.Logger
	Metrics prometheus.Registerer
	Timing  Timing

	// backend wraps the log, for tests whose disk fails.
	backend func(clusterlog.Backend) clusterlog.Backend
}

// Timing holds what takes how long; zero values become the defaults.
type Timing struct {
	// Heartbeat without which a node wants an election; also the time after which a leader that reaches no majority gives up.
	// In the default of 400 ms at least five beats are missed; the new leader is there some 0.1 s later.
	Heartbeat time.Duration
	// IO bounds each exchange between two nodes. Default 1 s.
	IO time.Duration
	// Stable is how long a node must be well before it gets a vote. Default 10 s.
	Stable time.Duration
	// Reconcile is how often the leader looks at votes and at dead members. Default 2 s.
	Reconcile time.Duration
	// Contact is for how long the leader takes a silent member to be well. Default 2 s.
	Contact time.Duration
	// ReapAfter is how long a member must be silent, to one leader and while a majority is well, before it is taken out.
	// Default 24 h.
	ReapAfter time.Duration
	// EvenAfter is how long the number of voters may be even before a warning says so, again and again. Default 10 min.
	EvenAfter time.Duration
	// Skew is how far another node's clock may be off. Default 1 min.
	Skew time.Duration
	// Patience is how long a node that could begin a cluster waits for nodes of Join that do not answer. Default 5 s.
	Patience time.Duration
	// RetryMin and RetryMax bound the pauses between attempts to join, each drawn between zero and the present one.
	// Defaults 250 ms and 5 s.
	RetryMin, RetryMax time.Duration
	// GiveAway bounds the handing over of leadership, which may hang (hashicorp/raft#696). Default 5 s.
	GiveAway time.Duration
	// Barrier bounds the wait for what was decided before. Default 10 s.
	Barrier time.Duration
}

func (t Timing) withDefaults() Timing {
	for _, d := range []struct {
		value *time.Duration
		is    time.Duration
	}{
		{&t.Heartbeat, 400 * time.Millisecond},
		{&t.IO, time.Second},
		{&t.Stable, 10 * time.Second},
		{&t.Reconcile, 2 * time.Second},
		{&t.Contact, 2 * time.Second},
		{&t.ReapAfter, 24 * time.Hour},
		{&t.EvenAfter, 10 * time.Minute},
		{&t.Skew, time.Minute},
		{&t.Patience, 5 * time.Second},
		{&t.RetryMin, 250 * time.Millisecond},
		{&t.RetryMax, 5 * time.Second},
		{&t.GiveAway, 5 * time.Second},
		{&t.Barrier, 10 * time.Second},
	} {
		if *d.value == 0 {
			*d.value = d.is
		}
	}
	return t
}

// maxMembers bounds the registry; a cluster has a handful of nodes.
const maxMembers = 32

// CheckExpect judges a number of nodes that begin a cluster.
func CheckExpect(n int) error {
	switch {
	case n == 2:
		return fault.InvalidField("cluster.bootstrap_expect", "two nodes are worse than one: if either dies, neither can lead; use 1 or 3")
	case n < 0 || n > 7 || n > 0 && n%2 == 0:
		return fault.InvalidField("cluster.bootstrap_expect", "%d is not 1, 3, 5 or 7: an even number of voters survives no more failures than one less", n)
	}
	return nil
}

// CheckAddress judges an address under which other nodes are to reach one.
func CheckAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil || host == "" || port == "" || port == "0" || len(address) > 261 {
		return fmt.Errorf("%q is not host:port", address)
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		return fmt.Errorf("%q reaches nobody: name the host as the other nodes know it", address)
	}
	return nil
}

func checkMember(m *clusterpb.Member) error {
	if !clusternet.ValidID(m.GetId()) {
		return fault.InvalidField("member.id", "%q is not an id: letters, digits, '.', '_' and '-', at most 128", m.GetId())
	}
	if err := CheckAddress(m.GetRaftAddress()); err != nil {
		return fault.InvalidField("member.raft_address", "%v", err)
	}
	if err := CheckAddress(m.GetMeshAddress()); err != nil {
		return fault.InvalidField("member.mesh_address", "%v", err)
	}
	if len(m.GetProgram()) > 64 {
		return fault.InvalidField("member.program", "is longer than 64 bytes")
	}
	return nil
}

// prepare checks a configuration and fills in what is absent.
func (c *Config) prepare() error {
	if c.ClusterID == "" || c.Dir == "" || c.Listener == nil || c.Certificate == nil || c.Roots == nil || c.TrustDomain == "" || c.Peers == nil {
		return fault.New(fault.Internal, "the cluster's configuration is not complete")
	}
	if err := CheckExpect(c.BootstrapExpect); err != nil {
		return err
	}
	if c.BootstrapExpect == 0 && len(c.Join) == 0 {
		return fault.InvalidField("cluster.join", "name a node of the cluster, or set cluster.bootstrap_expect")
	}
	self := &clusterpb.Member{
		Id: c.ID, RaftAddress: c.Self.GetRaftAddress(), MeshAddress: c.Self.GetMeshAddress(), Program: c.Self.GetProgram(),
		Draining: c.Self.GetDraining(), Version: c.Self.GetVersion(),
	}
	if self.GetVersion() == 0 {
		self.Version = Version
	}
	if err := checkMember(self); err != nil {
		return err
	}
	c.Self = self
	c.Dir = filepath.Clean(c.Dir)
	c.Timing = c.Timing.withDefaults()
	if c.Clock == nil {
		c.Clock = clockwork.NewRealClock()
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Dial == nil {
		dialer := &net.Dialer{}
		c.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp", address)
		}
	}
	return nil
}
