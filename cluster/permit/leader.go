package permit

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/jonboulle/clockwork"

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Log is the Raft log as leases see it; *cluster.Node is one.
type Log interface {
	// Propose returns nil once the command is committed: then this node has led at some time after Propose was called. Class
	// Conflict: a lease's id is not above all that were granted.
	Propose(ctx context.Context, c *clusterpb.Command) error
	// Leases, Pauses and LastLeaseID are what all says that was committed when this node began to lead, or later.
	Leases() []*clusterpb.PermitLease
	Pauses() []*clusterpb.PauseIssuer
	LastLeaseID() uint64
}

// LeaderConfig is what a Leader needs.
type LeaderConfig struct {
	Log Log
	// Limits says what is allowed toward an issuer, at any time. A change holds fully once leases granted before have lapsed.
	Limits func(issuerID string) Limits
	// Lease is how long leases are; 0: DefaultLease. All nodes have the same: one that changes it while Raft is wiped on all
	// nodes can exceed a cap for one lease.
	Lease  time.Duration
	Clock  clockwork.Clock
	Logger *slog.Logger
}

// Leader answers requests for permits while its node leads. It is safe for concurrent use.
type Leader struct {
	cfg   LeaderConfig
	start time.Time

	// order lets requests through one at a time, in which their leases' ids get into the log.
	order chan struct{}

	mu sync.Mutex
	// reign is nil while this node does not lead.
	reign *reign
}

// reign is a time of leadership. Its Granter is guarded by the Leader's mutex.
type reign struct{ granter *Granter }

// NewLeader returns a Leader that does not lead.
func NewLeader(cfg LeaderConfig) (*Leader, error) {
	if cfg.Log == nil || cfg.Limits == nil || cfg.Clock == nil || cfg.Logger == nil {
		return nil, fault.New(fault.Internal, "a leader of permits needs a log, limits, a clock and a logger")
	}
	if cfg.Lease <= 0 {
		cfg.Lease = DefaultLease
	}
	return &Leader{cfg: cfg, start: cfg.Clock.Now(), order: make(chan struct{}, 1)}, nil
}

// Lead answers requests until ctx ends. It is called after this node began to lead and has applied what was committed
// before; ctx ends with the leadership.
func (l *Leader) Lead(ctx context.Context) {
	r := &reign{granter: l.newGranter()}
	l.mu.Lock()
	l.reign = r
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.reign == r {
			l.reign = nil
		}
	}()
	sweep := l.cfg.Clock.NewTicker(l.cfg.Lease)
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-sweep.Chan():
		}
		l.mu.Lock()
		commands := r.granter.Sweep(l.now())
		l.mu.Unlock()
		for _, c := range commands {
			l.propose(ctx, c)
		}
	}
}

func (l *Leader) newGranter() *Granter {
	return NewGranter(Term{Now: l.now(), Lease: l.cfg.Lease, Leases: l.cfg.Log.Leases(), Pauses: l.cfg.Log.Pauses(), LastID: l.cfg.Log.LastLeaseID(),
		Seed: rand.Uint64()}) //nolint:gosec // Against repetition, not against guessing.
}

func (l *Leader) now() time.Duration { return l.cfg.Clock.Since(l.start) }

// propose is for what is only worth knowing.
func (l *Leader) propose(ctx context.Context, c *clusterpb.Command) {
	limited, cancel := context.WithTimeout(ctx, l.cfg.Lease/4)
	defer cancel()
	if err := l.cfg.Log.Propose(limited, c); err != nil && ctx.Err() == nil {
		l.cfg.Logger.Warn("a note about permits did not reach the log", "error", err)
	}
}

// Lease decides a request of a node, named by its certificate. Rejected: this node does not lead. Another error says that a
// grant is not known to be committed; it is counted as if it were.
func (l *Leader) Lease(ctx context.Context, nodeID string, r *clusterpb.LeaseRequest) (*clusterpb.LeaseResponse, error) {
	switch {
	case r.GetIssuerId() == "" || len(r.GetIssuerId()) > maxName:
		return nil, fault.InvalidField("issuer_id", "must have 1 to %d bytes", maxName)
	case len(r.GetInstance()) > maxName:
		return nil, fault.InvalidField("instance", "must have at most %d bytes", maxName)
	}
	select {
	case l.order <- struct{}{}:
		defer func() { <-l.order }()
	case <-ctx.Done():
		return nil, fault.Wrap(fault.Retryable, ctx.Err(), "requests for permits wait for the log")
	}
	l.mu.Lock()
	reign := l.reign
	if reign == nil {
		l.mu.Unlock()
		return nil, fault.New(fault.Rejected, "this node does not lead; ask the one that does")
	}
	g := reign.granter
	d := g.Ask(l.now(), nodeID, r, l.cfg.Limits(r.GetIssuerId()))
	l.mu.Unlock()
	if d.Pause != nil {
		l.propose(ctx, d.Pause)
	}
	if d.Grant == nil {
		return d.Response, nil
	}
	// Committed means that this node led after it took the request: who leads next began later, and waits a whole lease.
	err := l.cfg.Log.Propose(ctx, d.Grant)
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err == nil:
		g.Committed(l.now(), d.Grant)
		return d.Response, nil
	case fault.Is(err, fault.Conflict):
		// Somebody has granted what this Granter does not know: another leader, while this node did not notice that it had lost
		// and regained leadership; or itself, in a proposal that it took for failed.
		reign.granter = l.newGranter()
	}
	return nil, fault.Wrap(fault.Retryable, err, "commit a lease of permits")
}

// maxName bounds what a request names, in bytes.
const maxName = 256
