package agentd

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	mrand "math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/certmesh/certmesh/agent/internal/durable"
	"github.com/certmesh/certmesh/agent/internal/identity"
	"github.com/certmesh/certmesh/agent/internal/journal"
	"github.com/certmesh/certmesh/agent/internal/keystore"
	"github.com/certmesh/certmesh/agent/internal/state"
	"github.com/certmesh/certmesh/agent/internal/stream"
	"github.com/certmesh/certmesh/agent/internal/work"
	"github.com/certmesh/certmesh/connectors/target"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Protocol versions spoken; see the history in agent.proto.
const (
	protocolMax = 1
	protocolMin = 1
)

// defaultVerify is how long a deployment is verified while no setting says otherwise.
const defaultVerify = 5 * time.Second

// maxWatch bounds the interval at which targets are looked at; a longer one is meant as never, but it is not said so.
const maxWatch = 30 * 24 * time.Hour

// healInterval is how often a journal that could not be written is probed.
const healInterval = 5 * time.Second

// agent is one Run.
type agent struct {
	cfg    Config
	life   life
	bootID string
	facts  *agentpb.Facts
	// locks and files are given back at the end, last first.
	locks []io.Closer

	// refused counts conversations in a row that servers ended for this identity.
	refused int
	// renewed is when an identity was last received; it keeps a skewed clock from renewing without end.
	renewed time.Time

	keys   keystore.Store
	engine *work.Engine
	// ids and keeper are set by join, after the targets were repaired.
	ids    *identity.Manager
	keeper *state.Keeper
	nodes  nodes

	verify, watchEvery atomic.Int64 // time.Duration
	mu                 sync.Mutex
	heal               clockwork.Timer
	closed             bool
}

// Run runs an agent until ctx ends, which is a clean stop and returns nil. Other errors are final: bad configuration or
// a data directory in use, a refused enrolment, an identity that is lost, or a server's permanent Goodbye. Everything
// that may pass, such as servers that cannot be reached, is retried for ever.
func Run(ctx context.Context, cfg Config) error {
	return with(ctx, cfg, func(ctx context.Context, a *agent) error {
		// The identity is read later, so that not even a damaged one keeps a host from being repaired.
		if err := a.engine.Recover(ctx); err != nil && ctx.Err() == nil {
			return err
		}
		if err := a.join(ctx, true); err != nil || ctx.Err() != nil {
			return err
		}
		return a.serve(ctx)
	})
}

// Enroll only joins the mesh: it does nothing if there is an identity that is or can be made good. Servers are tried
// until ctx ends; then the error says why the last one failed.
func Enroll(ctx context.Context, cfg Config) error {
	return with(ctx, cfg, func(ctx context.Context, a *agent) error { return a.join(ctx, false) })
}

// with opens an agent, runs f, and stops everything in mirror image.
func with(ctx context.Context, cfg Config, f func(context.Context, *agent) error) error {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return err
	}
	ctx, kill := context.WithCancelCause(ctx)
	defer kill(nil)
	a := &agent{cfg: cfg, life: life{cut: cfg.Cut}}
	if err := a.open(ctx); err != nil {
		a.close()
		return a.outcome(err)
	}
	a.life.onDeath(func(err error) {
		a.engine.Kill()
		kill(err)
	})
	err = f(ctx, a)
	a.close()
	return a.outcome(err)
}

// outcome prefers the death of the agent over what followed from it.
func (a *agent) outcome(err error) error {
	if dead := a.life.dead(); dead != nil {
		return dead
	}
	return err
}

func (a *agent) open(ctx context.Context) error {
	var boot [16]byte
	if _, err := rand.Read(boot[:]); err != nil {
		return fault.Wrap(fault.Internal, err, "no randomness")
	}
	a.bootID = hex.EncodeToString(boot[:])
	if a.facts = a.cfg.Facts; a.facts == nil {
		a.facts = hostFacts(a.cfg.Version)
	}
	a.verify.Store(int64(defaultVerify))
	var jrn journal.Journal
	var placed durable.Store
	if m := a.cfg.Memory; m != nil {
		if !m.busy.CompareAndSwap(false, true) {
			return fault.New(fault.Conflict, "another agent uses this memory")
		}
		a.locks = append(a.locks, release{m})
		jrn, a.keys, placed = m.journal, m.keys, m.placed
	} else {
		for _, dir := range []string{a.cfg.DataDir, a.cfg.KeyDir} {
			if err := durable.PrivateDir(dir); err != nil {
				return err
			}
			l, err := durable.Lock(ctx, filepath.Join(dir, lockFile))
			if err != nil {
				return err
			}
			a.locks = append(a.locks, l)
		}
		j, err := journal.Open(a.path("journal"), a.cfg.Log)
		if err != nil {
			return err
		}
		k, err := keystore.Open(a.cfg.KeyDir)
		if err != nil {
			return err
		}
		a.locks = append(a.locks, j)
		d, err := durable.OpenLog(a.path("placed"), a.cfg.Log)
		if err != nil {
			return err
		}
		a.locks = append(a.locks, d)
		jrn, a.keys, placed = j, k, d
	}
	a.keys = a.life.keys(a.keys)
	a.engine = work.New(ctx, work.Config{
		Log: a.cfg.Log, Now: a.cfg.Clock.Now, Journal: a.life.journal(jrn), Keys: a.keys, Kinds: a.life.kinds(a.cfg.Kinds),
		Env: target.Env{Log: a.cfg.Log, Now: a.cfg.Clock.Now, Roots: a.cfg.TargetRoots, Commands: commands(a.cfg.AllowCommands),
			BackupRetention: a.cfg.BackupRetention},
		KeyLimit: a.cfg.KeyLimit, DeployLimit: a.cfg.DeployLimit, VerifyLimit: a.cfg.VerifyLimit, MaxDeploys: int64(a.cfg.DeployLimit),
		Placed: a.life.files(placed, "placed"), Targets: a.targets, Clock: a.cfg.Clock,
		WatchInterval: func() time.Duration { return time.Duration(a.watchEvery.Load()) },
		VerifyTimeout: func() time.Duration { return time.Duration(a.verify.Load()) },
		Probe:         a.cfg.Probe, Sickened: a.healLater,
	})
	return nil
}

// lockFile keeps two agents from one directory.
const lockFile = "lock"

type release struct{ m *Memory }

func (r release) Close() error {
	r.m.busy.Store(false)
	return nil
}

func (a *agent) path(name string) string { return filepath.Join(a.cfg.DataDir, name) }

func commands(vectors [][]string) []target.Command {
	var out []target.Command
	for _, v := range vectors {
		out = append(out, target.Command(v))
	}
	return out
}

func (a *agent) close() {
	a.mu.Lock()
	a.closed = true
	if a.heal != nil {
		a.heal.Stop()
	}
	a.mu.Unlock()
	if a.engine != nil {
		a.engine.Stop()
	}
	for _, l := range slices.Backward(a.locks) {
		if err := l.Close(); err != nil {
			a.cfg.Log.Warn("lock not given back", "err", err)
		}
	}
}

// healLater probes the journal until it can be written again; the engine calls it when it could not.
func (a *agent) healLater() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return
	}
	a.heal = a.cfg.Clock.AfterFunc(healInterval, func() {
		a.engine.Heal()
		if a.engine.Sick() {
			a.healLater()
		}
	})
}

// join reads the identity and the states, and enrols if there is no identity that is or can be made good.
func (a *agent) join(ctx context.Context, patient bool) error {
	var ids, states durable.Store
	if m := a.cfg.Memory; m != nil {
		ids, states = m.identity, m.states
	} else {
		i, err := durable.OpenDir(a.path("identity"))
		if err != nil {
			return err
		}
		s, err := durable.OpenDir(a.path("state"))
		if err != nil {
			return err
		}
		ids, states = i, s
	}
	a.recallNodes(a.life.files(states, "state"))
	var err error
	if a.ids, err = identity.Open(a.life.files(ids, "identity"), a.cfg.Clock.Now, a.cfg.Log); err != nil {
		return err
	}
	switch a.ids.Current().StandingAt(a.cfg.Clock.Now()) {
	case identity.Good, identity.Lapsed:
	default:
		if err := a.enrol(ctx, patient); err != nil {
			return err
		}
	}
	a.keeper, err = state.Open(state.Config{Files: a.life.files(states, "state"), Log: a.cfg.Log,
		TrustBundle: a.ids.ApplyBundle,
		Target: func(t *agentpb.TargetSpec, others []*agentpb.TargetSpec) error {
			return a.engine.CheckTarget(ctx, t, others)
		},
		Settings: a.settings,
	})
	if err != nil {
		return err
	}
	a.settings(a.keeper.Settings())
	return nil
}

func (a *agent) settings(s *agentpb.Settings) {
	d := defaultVerify
	if ms := s.GetVerifyTimeoutMs(); ms > 0 {
		// The engine caps it; a duration must not overflow before that.
		d = time.Duration(min(ms, int64(time.Hour/time.Millisecond))) * time.Millisecond
	}
	a.verify.Store(int64(d))
	a.watchEvery.Store(int64(time.Duration(min(s.GetVerifyIntervalMs(), int64(maxWatch/time.Millisecond))) * time.Millisecond))
	a.engine.Rewatch()
}

// targets are those that the control plane has placed here, as far as they are in force.
func (a *agent) targets() []*agentpb.TargetSpec { return a.keeper.Targets() }

// serve holds one conversation after another, and looks after what is deployed meanwhile, whether there is one or not.
func (a *agent) serve(ctx context.Context) error {
	watching, stop := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() { a.engine.Watch(watching) })
	defer watch.Wait()
	defer stop()
	route, addr := stream.Route{Seeds: a.cfg.Servers, Known: a.nodes.known}.Start(mrand.Float64)
	for {
		end, err := a.turn(ctx, addr)
		if err != nil || ctx.Err() != nil {
			return err
		}
		var delay time.Duration
		from := addr
		route, addr, delay = route.Next(a.cfg.Backoff, a.cfg.Clock.Now(), bounded(end), mrand.Float64)
		log := a.cfg.Log.With("server", from, "next", addr, "delay", delay.Round(time.Millisecond).String())
		switch g := end.Goodbye; {
		case g != nil:
			log.Info("the server said goodbye", "reason", g.GetReason().String(), "message", clip(g.GetMessage()))
		case end.Left:
			log.Info("stream left to connect again")
		case end.Err != nil:
			log.Warn("connection ended", "err", clip(end.Err.Error()))
		default:
			log.Info("the server ended the stream")
		}
		if !a.wait(ctx, delay) {
			return nil
		}
	}
}

// wait returns false if ctx ended first.
func (a *agent) wait(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := a.cfg.Clock.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.Chan():
		return true
	case <-ctx.Done():
		return false
	}
}

// turn makes the identity good if it has lapsed and holds one conversation with the server at addr. An error is final.
func (a *agent) turn(ctx context.Context, addr string) (stream.End, error) {
	id := a.ids.Current()
	standing := id.StandingAt(a.cfg.Clock.Now())
	switch {
	case standing == identity.Lost:
		return stream.End{}, a.lost(id)
	case standing == identity.Lapsed, a.refused > 0 && a.refused%refusalsToReidentify == 0:
		if err := a.reidentify(ctx, addr, id); err != nil {
			if standing == identity.Lapsed {
				return stream.End{Err: err}, nil
			}
			// Refused, although this clock calls it good: the attempt was worth a try, the stream may still be.
			a.cfg.Log.Warn("identity not renewed", "server", addr, "err", clip(err.Error()))
		}
	}
	end, used, alerted := a.converse(ctx, addr)
	if ctx.Err() != nil {
		return end, nil //nolint:nilerr // to be stopped is no failure
	}
	if g := end.Goodbye; g.GetPermanent() {
		return end, a.expelled(used, g)
	}
	switch {
	case !end.Welcomed.IsZero():
		a.refused = 0
	case stream.Refusal(end.Err) || alerted:
		a.refused++
		if a.ids.Refused(used) {
			a.refused = 0
			a.cfg.Log.Warn("new identity refused; the former one is used again", "serial", used.Serial)
		}
	}
	return end, nil
}

// refusalsToReidentify is after how many refusals in a row Reidentify is tried although the identity looks good: this
// host's clock may be slow.
const refusalsToReidentify = 3

func (a *agent) lost(id *identity.Identity) error {
	return fault.New(fault.Rejected, "the identity of %s expired on %s, more than %d days ago; create a token with `certmesh agents token create` and set CERTMESH_JOIN_TOKEN to join again",
		id.AgentID, id.NotAfter.UTC().Format(time.DateOnly), int(identity.Grace/(24*time.Hour)))
}

// expelled turns a permanent Goodbye into the error that ends Run.
func (a *agent) expelled(id *identity.Identity, g *agentpb.Goodbye) error {
	again := "to join again, remove the identity folder in its data directory and enrol with a new token"
	var why string
	switch g.GetReason() {
	case agentpb.Goodbye_REASON_REVOKED:
		why = "revoked the identity of " + id.AgentID + "; " + again
	case agentpb.Goodbye_REASON_RETIRED:
		why = "retired " + id.AgentID + "; " + again
	case agentpb.Goodbye_REASON_QUARANTINED:
		why = "quarantined " + id.AgentID + ", because its identity is used by two machines; enrol one of them anew"
	case agentpb.Goodbye_REASON_PROTOCOL:
		why = "speaks no protocol version of this agent; install a version that fits"
	default:
		why = "sent " + id.AgentID + " away for good"
	}
	if m := clip(g.GetMessage()); m != "" {
		why += " (it said: " + m + ")"
	}
	return fault.New(fault.Rejected, "the control plane %s", why)
}

// converse holds one conversation.
func (a *agent) converse(ctx context.Context, addr string) (end stream.End, used *identity.Identity, alerted bool) {
	tc, id := a.ids.Mutual()
	creds := stream.NewCredentials(tc, a.cfg.WrapConn)
	conn, err := stream.Dial(addr, creds, a.cfg.Dial, "certmesh-agent/"+a.cfg.Version)
	if err != nil {
		return stream.End{Err: err}, id, false
	}
	defer func() { _ = conn.Close() }() // it is given up either way
	// The dead say nothing, not even what is queued.
	defer context.AfterFunc(ctx, func() {
		if a.life.dead() != nil {
			_ = conn.Close()
		}
	})()
	client := a.life.client(agentpb.NewAgentServiceClient(conn))
	c := &conversation{a: a, id: id, client: client}
	c.ctx, c.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer c.cancel()
	c.session = stream.New(stream.Config{Log: a.cfg.Log.With("server", addr), Clock: a.cfg.Clock, Handler: c})
	end = c.session.Run(ctx, client)
	c.cancel()
	c.wg.Wait()
	if herr := creds.Err(); herr != nil && end.Welcomed.IsZero() {
		// More precise than what gRPC makes of it.
		if fe, ok := errors.AsType[*fault.Error](herr); ok {
			end.Err = fe
		}
	}
	return end, id, creds.Alerted()
}
