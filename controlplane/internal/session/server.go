package session

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/controlplane/internal/issue"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Store is what agents' streams need of the store; its methods say what each outcome means.
type Store interface {
	Sessions
	Jobs
	Joining
	States
	Trail
	Recovery
}

// Sessions keeps who holds which stream.
type Sessions interface {
	OpenSessions(ctx context.Context, items []domain.SessionOpen) []domain.SessionOpened
	CloseSession(ctx context.Context, agentID string, epoch domain.Epoch, at time.Time) error
	SessionHolders(ctx context.Context, agentIDs []string) (map[string]domain.Session, error)
	Standings(ctx context.Context, held []domain.HeldStream) ([]domain.Standing, error)
	FlushSeen(ctx context.Context, seen []domain.Seen) error
	QuarantineAgent(ctx context.Context, agentID, reason string, op domain.Op) error
}

// Jobs keeps work.
type Jobs interface {
	OpenWork(ctx context.Context, queries []domain.WorkQuery) ([]domain.OpenWork, error)
	AgentsWithOpenJobs(ctx context.Context, node string, limit int) ([]string, error)
	Settlements(ctx context.Context, agentID string, refs []domain.JobRef) ([]domain.Settlement, error)
	Dispatch(ctx context.Context, items []domain.Dispatch) []error
	Accept(ctx context.Context, items []domain.Acceptance) []error
	FailJobs(ctx context.Context, items []domain.Failure) []domain.FailureOutcome
	CompleteDeployments(ctx context.Context, items []domain.DeployResult) []domain.DeployOutcome
	RecordObservation(ctx context.Context, o domain.Observation) (changed bool, err error)
}

// Joining keeps hosts and their identities.
type Joining interface {
	Enroll(ctx context.Context, e domain.Enrollment) (domain.Agent, error)
	Agent(ctx context.Context, idOrName string) (domain.Agent, error)
	Identity(ctx context.Context, serial string) (domain.Identity, error)
	RecordIdentity(ctx context.Context, i domain.Identity, op domain.Op) error
}

// States keeps what agents are to have.
type States interface {
	TrustBundle(ctx context.Context) (version int64, roots [][]byte, err error)
	TargetsOfAgent(ctx context.Context, agentID string) ([]domain.Target, error)
	TargetsOfAgents(ctx context.Context, agentIDs []string) (map[string][]domain.Target, error)
	Rejections(ctx context.Context, agentID string) ([]domain.StateRejection, error)
	AcknowledgeTrust(ctx context.Context, acks []domain.TrustAck) error
	RecordRejection(ctx context.Context, r domain.StateRejection) error
	ClearRejection(ctx context.Context, agentID, kind, name string) error
}

// Trail keeps what was issued and what happened.
type Trail interface {
	Versions(ctx context.Context, certificateID string, p domain.PageRequest) ([]domain.Version, string, error)
	Audit(ctx context.Context, events []domain.AuditEvent) error
}

// Issuer checks a CSR, signs and records.
type Issuer interface {
	// Issue returns a recorded certificate. Conflict: the attempt is stale. Invalid, Rejected: the CSR is wrong for good.
	Issue(ctx context.Context, r issue.Request) (issue.Outcome, error)
}

// Config is what New needs; every field is required unless it says otherwise.
type Config struct {
	NodeID, TrustDomain string
	Store               Store
	// Mesh is the CA that signs identities.
	Mesh func() *ca.Authority
	// Reload reads the mesh CA again, after which Mesh returns the one that signs now; nil: it never changes.
	Reload func(ctx context.Context) error
	Issue  Issuer
	Hub    *hub.Hub
	Clock  clockwork.Clock
	Log    *slog.Logger
	// Metrics may be nil.
	Metrics prometheus.Registerer
	NewID   func(prefix string) string
	// IdentityTTL is the validity of agents' identities; the others are settings of agents (VerifyInterval 0: never).
	IdentityTTL, VerifyTimeout, VerifyInterval, BeatInterval time.Duration
	// Handshakes is how many Hellos and enrolments are worked on at the same time. More Hellos wait (helloWait, helloQueue);
	// more enrolments are asked to come back.
	Handshakes int
	// MaxBeat is what BeatInterval may stretch to as agents become more; below BeatInterval: it does not stretch.
	MaxBeat time.Duration
	// Nodes are the mesh addresses of the other nodes that take agents, Reachable those of them that agents are moved to by
	// Stop, because they live; nil on a single node.
	Nodes, Reachable func() []string
	// Alone reports that there is no other node now that could hold an agent, so that nobody's holder need be read; nil:
	// there may be. It is called for each Wake.
	Alone func() bool
	// RemoteWake tells another node that agents it holds have work; an empty node stands for all others, because it is not
	// known which holds them. RemoteDisconnect and RemotePushState pass Disconnect and PushState on to all others. None of
	// the three may block; all are nil on a single node. What others tell this node goes to WakeHeld, DisconnectHeld and
	// PushStateHeld.
	RemoteWake       func(node string, agentIDs []string)
	RemoteDisconnect func(agentID, reason string)
	RemotePushState  func(agentID string)
	// Changed is called after a leaf or placement may have changed, so that duties may look again; may be nil.
	Changed func()

	// helloWait and helloQueue are seams for tests; 0: the constants of that name.
	helloWait  time.Duration
	helloQueue int64
}

// The numbers of the stream's I/O.
const (
	maxMessage = 64 << 10
	// tick is how exact the retries and ends that a stream waits for are. Streams that wait for nothing are looked at every
	// sweepTicks: what is due by silence alone takes many seconds anyway.
	tick       = 250 * time.Millisecond
	sweepTicks = 4
	// helloTimeout bounds a stream that says nothing, writeTimeout a Send that the agent does not take, partTimeout the
	// rest of a stream whose end was decided.
	helloTimeout = 15 * time.Second
	writeTimeout = 30 * time.Second
	partTimeout  = 2 * time.Second
	// storeTimeout bounds one use of the store, issueTimeout one issue.
	storeTimeout = 30 * time.Second
	issueTimeout = 60 * time.Second
	// flushInterval is how often beats are written.
	flushInterval = 10 * time.Second
	// storeWorkers and issueWorkers bound what runs at once for all streams. The store commits up to a hundred callers
	// together, so fewer would leave its batches short; the issuer bounds its own use of the CPU. Who waits for either
	// waits here, where lanes take turns, and not in the store's queue.
	storeWorkers = 256
	issueWorkers = 256
	// maxTasks is how many answers one stream may await before its messages are no longer read.
	maxTasks = 512
)

// Server is the agents' side of the mesh listener. New makes it, Start and Stop bracket its life.
type Server struct {
	agentpb.UnimplementedAgentServiceServer

	cfg     Config
	metrics *metrics
	gate    *semaphore.Weighted
	store   *pool
	issuing *pool
	loads   *loader
	holders *asker
	guard   *guard
	waiting atomic.Int64 // Hellos at the gate
	bundle  bundle
	acks    acks
	issued  identities
	held    reported

	// Looks at all agents held; see Resync.
	sweeping, checking, pushing *pass

	// settings is the same for all agents.
	settings Resource

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu       sync.RWMutex
	started  bool
	stopping bool
	draining bool // no further agents are taken
	// all are the streams, agents the ones of each agent that have said Hello: usually one, two while one takes over.
	all    map[*stream]struct{}
	agents map[string][]*stream
	boots  map[string]boots
	parted []domain.Seen
	// leaving are the streams that were removed and whose last use of the store has not been begun; emptied is closed when
	// there is no stream, and none leaving.
	leaving int
	emptied chan struct{} // nil: nobody waits

	// soon are the streams that wait for a time; see prompt.
	soonMu sync.Mutex
	soon   map[*stream]struct{}
}

// New returns a Server. Errors: Internal when a part of the configuration is missing or a metric is registered already.
func New(c Config) (*Server, error) {
	switch {
	case c.NodeID == "", c.TrustDomain == "", c.Store == nil, c.Mesh == nil, c.Issue == nil, c.Hub == nil, c.Clock == nil,
		c.Log == nil, c.NewID == nil:
		return nil, fault.New(fault.Internal, "session: a part of Config is missing")
	}
	if c.IdentityTTL <= 0 {
		c.IdentityTTL = ca.DefaultIdentityTTL
	}
	if c.BeatInterval <= 0 {
		c.BeatInterval = 30 * time.Second
	}
	c.Handshakes = max(c.Handshakes, 1)
	if c.helloWait == 0 {
		c.helloWait = helloWait
	}
	if c.helloQueue == 0 {
		c.helloQueue = helloQueue
	}
	s := &Server{cfg: c, gate: semaphore.NewWeighted(int64(c.Handshakes)), guard: newGuard(c.Clock),
		all: map[*stream]struct{}{}, agents: map[string][]*stream{}, boots: map[string]boots{},
		soon: map[*stream]struct{}{}}
	s.ctx, s.cancel = context.WithCancel(context.Background()) //nolint:forbidigo // the server's own life, which Stop ends
	s.store, s.issuing = newPool(storeWorkers), newPool(issueWorkers)
	s.loads = newLoader(s)
	s.holders = &asker{s: s}
	s.sweeping = &pass{s: s, what: "wake the agents that have open work", f: s.sweepWork}
	s.checking = &pass{s: s, what: "look whether agents may still be connected", f: s.recheck}
	s.pushing = &pass{s: s, what: "send all agents their desired state", f: s.pushAll}
	// The beat interval is Welcome's: it hangs on how many agents there are, and settings that changed with that would be
	// sent, and written by each agent, at every return.
	body := &agentpb.Settings{VerifyTimeoutMs: c.VerifyTimeout.Milliseconds(),
		VerifyIntervalMs: c.VerifyInterval.Milliseconds()}
	var err error
	if s.settings, err = resource(kindSettings, "", 0, body, &agentpb.State{Body: &agentpb.State_Settings{Settings: body}}); err != nil {
		return nil, err
	}
	s.metrics = newMetrics(s)
	if c.Metrics != nil {
		for _, m := range s.metrics.all() {
			if err := c.Metrics.Register(m); err != nil {
				return nil, fault.Wrap(fault.Internal, err, "session: register metrics")
			}
		}
	}
	return s, nil
}

// Register adds the service to a server that was made with Options.
func (s *Server) Register(r grpc.ServiceRegistrar) { agentpb.RegisterAgentServiceServer(r, s) }

// Start begins to look after deadlines and beats.
func (s *Server) Start() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.started || s.stopping {
		return
	}
	s.started = true
	ticks := s.cfg.Clock.NewTicker(tick)
	s.wg.Go(func() {
		defer ticks.Stop()
		flushed := s.cfg.Clock.Now()
		swept, checked := flushed, flushed
		for {
			select {
			case <-s.ctx.Done():
				return
			case <-ticks.Chan():
			}
			now := s.cfg.Clock.Now()
			if now.Sub(swept) >= sweepTicks*tick {
				swept = now
				s.sweep(now)
				s.store.do(ownWork, func() { s.writeAcks(s.ctx) })
			} else {
				s.prompt(now)
			}
			if now.Sub(flushed) >= flushInterval {
				flushed = now
				s.flush(s.ctx)
				s.forget(now)
			}
			if now.Sub(checked) >= recheckInterval && !s.alone() {
				checked = now
				s.checking.request()
			}
		}
	})
}

func (s *Server) now() time.Time { return domain.Micro(s.cfg.Clock.Now()) }

func (s *Server) listLocked() []*stream {
	list := make([]*stream, 0, len(s.all))
	for st := range s.all {
		list = append(list, st)
	}
	return list
}

// of returns the streams of an agent that have said Hello.
func (s *Server) of(agentID string) []*stream {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Clone(s.agents[agentID])
}

// Wake makes the holder of the agent's stream look at its open jobs; call it after the commit. A stream held here is
// woken at once, but it may have been superseded: in a cluster the holder is read and woken, too.
func (s *Server) Wake(agentID string) {
	s.WakeLocal([]string{agentID})
	if !s.alone() {
		s.holders.add(agentID)
	}
}

// Holds reports whether this node holds an open stream of the agent.
func (s *Server) Holds(agentID string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.ContainsFunc(s.agents[agentID], func(st *stream) bool { return st.epoch > 0 })
}

// Disconnect ends the agent's streams at once, wherever they are held, and tells it not to come back with this identity.
func (s *Server) Disconnect(agentID, reason string) {
	s.DisconnectHeld(agentID, reason)
	if s.cfg.RemoteDisconnect != nil {
		s.cfg.RemoteDisconnect(agentID, reason)
	}
}

// PushState has the agent's desired state read, and what is new of it sent, by the node that holds it; an empty id stands
// for every agent.
func (s *Server) PushState(agentID string) {
	s.PushStateHeld(agentID)
	if s.cfg.RemotePushState != nil {
		s.cfg.RemotePushState(agentID)
	}
}

// Credits are the agent's grants that are not used up, by class; nil if its stream is not held here.
func (s *Server) Credits(agentID string) map[string]int32 {
	for _, st := range s.of(agentID) {
		if c, ok := st.credits(); ok {
			return c
		}
	}
	return nil
}

// Count is how many agents' sessions are open on this node.
func (s *Server) Count() int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var n int64
	for _, list := range s.agents {
		if slices.ContainsFunc(list, func(st *stream) bool { return st.epoch > 0 }) {
			n++
		}
	}
	return n
}

// add takes a new stream on.
func (s *Server) add(st *stream) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return fault.New(fault.Retryable, "this node is stopping; connect to another")
	}
	st.taken = true
	s.all[st] = struct{}{}
	return nil
}

// openingMost is how many Hellos of one agent are worked on at the same time: one, and one that follows a connection
// that broke. The store takes those of one agent one after the other, so more would only keep others out of the gate.
const openingMost = 2

// register makes the stream one that is woken, before its session is committed. False: too many of the agent's are
// under way.
func (s *Server) register(st *stream) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	id, opening := st.who.agentID, 0
	for _, o := range s.agents[id] {
		if o.epoch == 0 {
			opening++
		}
	}
	if opening >= openingMost {
		return false
	}
	s.agents[id] = append(s.agents[id], st)
	return true
}

// opened notes the committed epoch and returns the streams of the agent that it supersedes. newest is false when one of
// them is newer still; gone says that the stream has ended meanwhile, without having known its epoch.
func (s *Server) opened(st *stream, epoch domain.Epoch) (older []*stream, newest, gone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, alive := s.all[st]; !alive {
		return nil, false, true
	}
	st.epoch = epoch
	newest = true
	for _, o := range s.agents[st.who.agentID] {
		switch {
		case o == st || o.epoch == 0:
		case o.epoch < epoch:
			older = append(older, o)
		default:
			newest = false
		}
	}
	return older, newest, false
}

// remove forgets a stream that has ended and returns the epoch under which it was open, 0 if it was not. left must follow.
func (s *Server) remove(st *stream) domain.Epoch {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, st)
	s.soonMu.Lock()
	delete(s.soon, st)
	s.soonMu.Unlock()
	s.leaving++
	id := st.who.agentID
	left := slices.DeleteFunc(s.agents[id], func(o *stream) bool { return o == st })
	if len(left) == 0 {
		delete(s.agents, id)
	} else {
		s.agents[id] = left
	}
	if seen, ok := st.unwritten(); ok {
		s.parted = append(s.parted, seen)
	}
	return st.epoch
}

// left follows remove, once the close of the session waits for the store: Stop waits for the store after this.
func (s *Server) left() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leaving--; len(s.all)+s.leaving == 0 && s.emptied != nil {
		close(s.emptied)
		s.emptied = nil
	}
}

// sweep looks at the deadlines of all streams.
func (s *Server) sweep(now time.Time) {
	s.mu.RLock()
	var due []*stream
	for st := range s.all {
		if st.due(now) {
			due = append(due, st)
		}
	}
	s.mu.RUnlock()
	for _, st := range due {
		st.ticked(now)
	}
}

// expect has a stream looked at on the next ticks, because it waits for a time; st.mu may be held.
func (s *Server) expect(st *stream) {
	s.soonMu.Lock()
	defer s.soonMu.Unlock()
	s.soon[st] = struct{}{}
}

// prompt looks at the deadlines of the streams that wait for a time.
func (s *Server) prompt(now time.Time) {
	var due []*stream
	s.soonMu.Lock()
	for st := range s.soon {
		if st.waitUntil.Load() == 0 && st.partBy.Load() == 0 {
			delete(s.soon, st)
		} else if st.due(now) {
			due = append(due, st)
		}
	}
	s.soonMu.Unlock()
	for _, st := range due {
		st.ticked(now)
	}
}

// flush writes the beats since the last one.
func (s *Server) flush(ctx context.Context) {
	s.writeAcks(ctx)
	s.mu.Lock()
	seen := s.parted
	s.parted = nil
	for _, list := range s.agents {
		for _, st := range list {
			if b, ok := st.unwritten(); ok && st.epoch > 0 {
				seen = append(seen, b)
			}
		}
	}
	s.mu.Unlock()
	if len(seen) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	if err := s.cfg.Store.FlushSeen(ctx, seen); err != nil {
		// The next beats say the same.
		s.cfg.Log.Warn("beats not written", "agents", len(seen), "err", err)
	}
}

// forget drops what is remembered of agents for a while only.
func (s *Server) forget(now time.Time) {
	s.mu.Lock()
	for id, b := range s.boots {
		if b.stale(now) {
			delete(s.boots, id)
		}
	}
	s.mu.Unlock()
	s.issued.forget(now)
}

// booted notes the boot of a Hello and the one before it, of which another node may know more, and says whether the
// identity is used by two machines.
func (s *Server) booted(agentID, previous, boot string, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.boots[agentID]
	if previous != "" && (len(b) == 0 || b[len(b)-1].id != previous) {
		b, _ = b.hello(previous, now)
	}
	b, cloned := b.hello(boot, now)
	if cloned {
		delete(s.boots, agentID)
	} else {
		s.boots[agentID] = b
	}
	return cloned
}

// jitter spreads d over half of itself and more.
func jitter(d time.Duration) time.Duration {
	return d/2 + time.Duration(rand.Float64()*float64(d)) //nolint:gosec // spreads arrivals, guards nothing
}

// resource makes a state of its body.
func resource(kind, name string, revision int64, body proto.Message, state *agentpb.State) (Resource, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(body)
	if err != nil {
		return Resource{}, fault.Wrap(fault.Internal, err, "encode the state %s %s", kind, name)
	}
	return Resource{Kind: kind, Name: name, Revision: revision, Hash: hashOf(b), Body: state}, nil
}

// TLS is the configuration of the mesh listener. Certificate and roots are asked for at every handshake. A client
// certificate is optional, because Enroll and Reidentify come without; one that is shown must be of the mesh CA.
func TLS(cert func() *tls.Certificate, roots func() *x509.CertPool) *tls.Config {
	base := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"h2"},
		ClientAuth:             tls.VerifyClientCertIfGiven,
		CurvePreferences:       []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256},
		SessionTicketsDisabled: true, // each connection shows its identity anew
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if c := cert(); c != nil {
				return c, nil
			}
			return nil, fault.New(fault.Internal, "this node has no identity yet")
		},
	}
	outer := base.Clone()
	var mu sync.Mutex
	var made *tls.Config
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		pool := roots()
		if pool == nil {
			// A nil pool would mean the system's roots.
			pool = x509.NewCertPool()
		}
		mu.Lock()
		defer mu.Unlock()
		if made == nil || made.ClientCAs != pool {
			made = base.Clone()
			made.ClientCAs = pool
		}
		return made, nil
	}
	return outer
}
