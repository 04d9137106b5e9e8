package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/jonboulle/clockwork"
	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/cluster/internal/fsm"
	clusterlog "github.com/certmesh/certmesh/cluster/internal/log"
	clusternet "github.com/certmesh/certmesh/cluster/internal/net"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	// A snapshot of this state is a few kilobytes: little log is kept, and a node that comes back soon needs no snapshot.
	trailingLogs      = 1024
	snapshotThreshold = 1024
	snapshotInterval  = time.Minute
	// How often the write of a term is tried again on a full disk.
	diskRetry = 250 * time.Millisecond
	// What is known only by asking is asked for so often even if nothing hints at a change.
	lookInterval = 2 * time.Second
)

// Node is this process's part of the cluster.
type Node struct {
	cfg     Config
	log     *slog.Logger
	clk     clockwork.Clock
	started time.Time

	raft    *raft.Raft
	layer   *clusternet.Layer
	trans   *transport
	files   *clusterlog.Files
	store   *clusterlog.Store
	machine *machine
	book    *book
	disk    *disk
	metrics *collector

	ctx    context.Context //nolint:containedctx // The node's life; Stop ends it.
	cancel context.CancelFunc
	wg     sync.WaitGroup
	stop   sync.Once
	done   chan struct{}
	failed chan error

	// membership serializes changes of the membership on the leader.
	membership chan struct{}
	poked      chan struct{}

	mu   sync.Mutex
	self *clusterpb.Member
	// term is set while this node leads and has seen everything before.
	term *Term
	subs map[chan struct{}]struct{}
	// view are the nodes without a cluster that this one sees, itself included.
	view map[string]*sighting
	// belonged: while this process ran, a leader had this node among its members.
	belonged bool
	trouble  string
	// since when, and what of it is in the log.
	troubleSince time.Time
	troubleTold  string
	// stumbles counts failures to establish leadership in a row.
	stumbles int
}

// Start opens the Raft directory and begins to take part; it does not wait for a leader. An error of class Rejected says
// what an operator has to do. The node runs until Stop, whatever becomes of ctx.
func Start(ctx context.Context, cfg Config) (_ *Node, err error) {
	if err := cfg.prepare(); err != nil {
		return nil, err
	}
	n := &Node{
		cfg: cfg, log: cfg.Log, clk: cfg.Clock, started: cfg.Clock.Now(), self: cfg.Self,
		done: make(chan struct{}), failed: make(chan error, 1), membership: make(chan struct{}, 1), poked: make(chan struct{}, 1),
		subs: map[chan struct{}]struct{}{}, view: map[string]*sighting{},
	}
	hlog := bridge(cfg.Log, cfg.Clock)
	if n.files, err = clusterlog.Open(cfg.Dir, hlog); err != nil {
		return nil, err
	}
	n.ctx, n.cancel = context.WithCancel(context.WithoutCancel(ctx))
	n.disk = newDisk(n.log, n.poke)
	n.machine = &machine{log: n.log, state: &clusterpb.Snapshot{}, tooOld: n.fail, changed: n.changed}
	n.book = newBook(n.machine.current, n.files)
	var backend clusterlog.Backend = n.files.Bolt
	if cfg.backend != nil {
		backend = cfg.backend(backend)
	}
	n.store = clusterlog.NewStore(backend, diskRetry, n.disk.note)
	n.files.Logs, n.files.Newest = nil, nil
	n.layer = clusternet.NewLayer(context.WithoutCancel(ctx), cfg.ID, &clusternet.Identity{
		TrustDomain: cfg.TrustDomain, Certificate: cfg.Certificate, Roots: cfg.Roots, Now: n.now, Admit: cfg.Admit,
	}, cfg.Listener, cfg.Dial, n.book.where, n.log)
	n.trans = newTransport(raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{Stream: n.layer, MaxPool: 3, Timeout: cfg.Timing.IO, Logger: hlog}), n.clk)
	if n.raft, err = raft.NewRaft(n.raftConfig(hlog), n.machine, n.store, n.store, n.files.Snapshots, n.trans); err != nil {
		n.cancel()
		return nil, errors.Join(fault.Wrap(fault.Rejected, err, "Raft does not start from the files in %s: if this persists, run \"certmeshd cluster recover\" "+
			"on this node and start it again", cfg.Dir), n.trans.Close(), n.files.Close())
	}
	if cfg.BootstrapExpect == 1 && len(cfg.Join) == 0 && !n.hasState() {
		if err := n.bootstrap([]string{cfg.ID}); err != nil {
			return nil, errors.Join(fmt.Errorf("begin a cluster: %w", err), n.Stop(ctx))
		}
	}
	n.metrics = newCollector(n)
	if cfg.Metrics != nil {
		if err := cfg.Metrics.Register(n.metrics); err != nil {
			return nil, errors.Join(fmt.Errorf("register the cluster's metrics: %w", err), n.Stop(ctx))
		}
	}
	n.wg.Go(n.leadership)
	n.wg.Go(n.belong)
	n.wg.Go(n.watch)
	n.wg.Go(n.watchdog)
	return n, nil
}

func (n *Node) raftConfig(log hclog.Logger) *raft.Config {
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(n.cfg.ID)
	c.HeartbeatTimeout, c.LeaderLeaseTimeout = n.cfg.Timing.Heartbeat, n.cfg.Timing.Heartbeat
	// A little above the heartbeat's, which the watchdog moves.
	c.ElectionTimeout = n.cfg.Timing.Heartbeat + time.Microsecond
	c.CommitTimeout = min(c.CommitTimeout, n.cfg.Timing.Heartbeat/4)
	c.TrailingLogs, c.SnapshotThreshold, c.SnapshotInterval = trailingLogs, snapshotThreshold, snapshotInterval
	// Whoever is taken out learns it from the leader and says so itself.
	c.ShutdownOnRemove = false
	c.NoLegacyTelemetry = true
	c.Logger = log
	return c
}

// Stop ends the node's part: leadership first, with Revoke, then Raft. It is no departure; the others wait for it to come
// back. It returns when all is closed, or with ctx's error when that takes longer.
func (n *Node) Stop(ctx context.Context) error {
	var err error
	n.stop.Do(func() {
		go func() {
			defer close(n.done)
			n.cancel()
			n.wg.Wait()
			n.store.Release()
			if n.cfg.Metrics != nil {
				n.cfg.Metrics.Unregister(n.metrics)
			}
			// The transport goes with it.
			if e := n.raft.Shutdown().Error(); e != nil {
				n.log.Warn("Raft did not stop cleanly", "error", e)
			}
			if e := n.trans.Close(); e != nil {
				n.log.Warn("the Raft listener did not close cleanly", "error", e)
			}
			if e := n.files.Close(); e != nil {
				n.log.Warn("the Raft log did not close cleanly", "error", e)
			}
		}()
	})
	select {
	case <-n.done:
	case <-ctx.Done():
		err = fmt.Errorf("stop the cluster's node: %w", ctx.Err())
	}
	return err
}

// Failed delivers at most one error, after which the node takes no useful part any more and should be stopped: the program
// is too old for what the others decided, the node was taken out of the cluster, or leadership can be neither
// established nor given away.
func (n *Node) Failed() <-chan error { return n.failed }

func (n *Node) fail(err error) {
	n.setTrouble(err.Error())
	select {
	case n.failed <- err:
	default:
	}
}

// ID returns this node's id.
func (n *Node) ID() string { return n.cfg.ID }

// IsLeader reports whether this node leads and has seen everything that was decided before. It is an opinion: what must not
// be done twice checks a fence of the database.
func (n *Node) IsLeader() bool { return n.leading() != nil }

func (n *Node) leading() *Term {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.term
}

func (n *Node) setTerm(t *Term) {
	n.mu.Lock()
	n.term = t
	n.mu.Unlock()
	n.changed()
}

// Leader returns who leads, as far as this node knows, and where it is; both are empty without a leader, the address also
// while it is not known.
func (n *Node) Leader() (id, meshAddress string) {
	id = n.leaderID()
	if id == n.cfg.ID {
		return id, n.member().GetMeshAddress()
	}
	return id, n.book.meshOf(id)
}

// Members returns the members, by id: what the registry says, their votes, and on the leader how they are.
func (n *Node) Members() []*clusterpb.Member {
	term, state := n.leading(), n.machine.current()
	var all []*clusterpb.Member
	for _, s := range n.servers() {
		m := &clusterpb.Member{Id: string(s.ID)}
		if known := fsm.Member(state, m.GetId()); known != nil {
			m = proto.CloneOf(known)
		}
		m.Suffrage = clusterpb.Member_SUFFRAGE_NONVOTER
		if s.Suffrage == raft.Voter {
			m.Suffrage = clusterpb.Member_SUFFRAGE_VOTER
		}
		m.Healthy = term != nil && (m.GetId() == n.cfg.ID || n.trans.answered(m.GetId(), n.cfg.Timing.Contact))
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b *clusterpb.Member) int { return cmp.Compare(a.GetId(), b.GetId()) })
	return all
}

// Plan returns which node is to hold which shard.
func (n *Node) Plan() []string { return slices.Clone(n.machine.current().GetShardNodeIds()) }

// ConfigurationRevision returns how often the configuration in the database was announced as changed.
func (n *Node) ConfigurationRevision() uint64 { return n.machine.current().GetConfigurationRevision() }

// Leases returns the leases of permits, by issuer and node. They are not to be changed.
func (n *Node) Leases() []*clusterpb.PermitLease { return n.machine.current().GetLeases() }

// LastLeaseID returns the id of the newest lease ever granted; the next must be higher.
func (n *Node) LastLeaseID() uint64 { return n.machine.current().GetLastLeaseId() }

// Pauses returns what issuers asked for, by issuer. They are not to be changed.
func (n *Node) Pauses() []*clusterpb.PauseIssuer { return n.machine.current().GetPauses() }

// Trouble says in a sentence why this node does not take part as it should; empty: it does.
func (n *Node) Trouble() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.trouble == "" {
		if err := n.disk.err(); err != nil {
			return "the Raft log cannot be written: " + err.Error()
		}
	}
	return n.trouble
}

// setTrouble notes what keeps this node from taking part. It is logged once it has lasted, and again when it has changed:
// an election is none.
func (n *Node) setTrouble(sentence string) {
	n.mu.Lock()
	now := n.now()
	if n.trouble == "" {
		n.troubleSince = now
	}
	n.trouble = sentence
	tell := n.troubleTold != sentence && (sentence == "" || now.Sub(n.troubleSince) >= lookInterval)
	if tell {
		n.troubleTold = sentence
	}
	n.mu.Unlock()
	switch {
	case !tell:
	case sentence == "":
		n.log.Info("this node takes part in the cluster again")
	default:
		n.log.Warn("this node does not take part in the cluster as it should", "reason", sentence)
	}
}

// Changes returns a channel that delivers when something may have changed: members, plan, leases, revision, the leader.
// Several changes may be one delivery. The function ends it.
func (n *Node) Changes() (<-chan struct{}, func()) {
	ch := make(chan struct{}, 1)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.subs[ch] = struct{}{}
	return ch, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.subs, ch)
	}
}

func (n *Node) changed() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for ch := range n.subs {
		poke(ch)
	}
	poke(n.poked)
}

// poke hints to the membership's loop that it should look.
func (n *Node) poke() { poke(n.poked) }

func poke(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// watch tells about changes of the leader. Raft's observers may drop, so the time is a second hint.
func (n *Node) watch() {
	seen := make(chan raft.Observation, 16)
	o := raft.NewObserver(seen, false, func(o *raft.Observation) bool {
		_, leader := o.Data.(raft.LeaderObservation)
		return leader
	})
	n.raft.RegisterObserver(o)
	defer n.raft.DeregisterObserver(o)
	before := ""
	for {
		if id, _ := n.Leader(); id != before {
			n.log.Info("the cluster's leader has changed", "leader", id, "before", before)
			if id != "" {
				n.metrics.changes.Inc()
			}
			before = id
			n.changed()
		}
		select {
		case <-n.ctx.Done():
			return
		case <-seen:
		case <-time.After(lookInterval / 4):
		}
	}
}

func (n *Node) now() time.Time { return n.clk.Now() }

// member returns what the registry is to say of this node.
func (n *Node) member() *clusterpb.Member {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.self
}

func (n *Node) servers() []raft.Server { return n.raft.GetConfiguration().Configuration().Servers }

func (n *Node) hasState() bool { return len(n.servers()) > 0 }

// voters returns who votes.
func (n *Node) voters() []string {
	var ids []string
	for _, s := range n.servers() {
		if s.Suffrage == raft.Voter {
			ids = append(ids, string(s.ID))
		}
	}
	return ids
}

func (n *Node) inConfiguration(id string) bool {
	return slices.ContainsFunc(n.servers(), func(s raft.Server) bool { return string(s.ID) == id })
}

// bootstrap begins a cluster of the given voters.
func (n *Node) bootstrap(ids []string) error {
	var c raft.Configuration
	for _, id := range ids {
		c.Servers = append(c.Servers, raft.Server{Suffrage: raft.Voter, ID: raft.ServerID(id), Address: raft.ServerAddress(id)})
	}
	n.log.Info("no node belongs to a cluster yet: this one begins it", "voters", ids)
	return n.raft.BootstrapCluster(c).Error()
}

// await waits for a future, at most until ctx ends. The future is then left to itself: Raft answers it when it stops, at
// the latest.
func await(ctx context.Context, f raft.Future) error {
	ch := make(chan error, 1)
	go func() { ch <- f.Error() }()
	select {
	case err := <-ch:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// sleep waits; false: the node stops, or ctx has ended.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
