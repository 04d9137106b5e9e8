package work

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/jonboulle/clockwork"
	"golang.org/x/sync/semaphore"

	"github.com/certmesh/certmesh/agent/internal/durable"
	"github.com/certmesh/certmesh/agent/internal/journal"
	"github.com/certmesh/certmesh/agent/internal/keystore"
	"github.com/certmesh/certmesh/connectors/target"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Sink takes messages for the server without waiting.
type Sink interface {
	Post(m *agentpb.ConnectRequest)
}

// Config of an Engine.
type Config struct {
	Log     *slog.Logger
	Now     func() time.Time
	Journal journal.Journal
	Keys    keystore.Store
	// Kinds are the target connectors that this agent links.
	Kinds []target.Kind
	// Env is what connectors may touch.
	Env target.Env
	// KeyLimit, DeployLimit and VerifyLimit are the credits of each class.
	KeyLimit, DeployLimit, VerifyLimit int
	// MaxDeploys is how many deployments run at once.
	MaxDeploys int64
	// VerifyTimeout is the setting in force.
	VerifyTimeout func() time.Duration
	// Sickened is told that the journal could not be written; Heal should be called until Sick says no. It must not
	// block or call the engine.
	Sickened func()
	// Probe makes a TLS handshake and says which leaf was served.
	Probe func(ctx context.Context, address, serverName string) (target.Proof, error)
	// Placed keeps what was deployed where; nil: it is forgotten with the process.
	Placed durable.Store
	// Targets are those that the server has placed on this agent; nil: it is not known.
	Targets func() []*agentpb.TargetSpec
	// Clock and WatchInterval are Watch's: how often targets are looked at, 0 never.
	Clock         clockwork.Clock
	WatchInterval func() time.Duration
}

// maxKeys bounds parallel key making, in which an RSA key counts rsaCost: RSA-4096 takes seconds of a core, and the host
// has other work. Elliptic keys mostly wait for the disk.
const (
	maxKeys = 8
	rsaCost = 4
)

// maxWrites is how many installations write at once: enough for their fsyncs to share the disk's flushes, few enough
// for the threads that wait in them.
const maxWrites = 32

// actGrace is how long after the process was asked to stop an installation may still be finished or undone; what takes
// longer is settled by Recover at the next start.
const actGrace = 5 * time.Second

// errStopping ends workers when the process stops: no outcome is recorded, the next life goes on.
var errStopping = errors.New("the agent is stopping")

// errCancelled ends a worker by Cancel or Settled.
var errCancelled = fault.New(fault.Rejected, "it was cancelled")

// Engine carries assignments out.
type Engine struct {
	cfg     Config
	domains domains
	targets keyed
	keySem  *semaphore.Weighted
	depSem  *semaphore.Weighted
	writes  *semaphore.Weighted
	shelf   *shelf
	claims  *claims
	// watchChanged holds a token when Watch is to look at its settings again.
	watchChanged chan struct{}

	begin     context.Context
	stopBegin context.CancelCauseFunc
	act       context.Context
	stopAct   context.CancelCauseFunc
	wg        sync.WaitGroup

	mu       sync.Mutex
	model    *model
	sink     Sink
	stops    map[string]context.CancelCauseFunc
	stopping bool
}

// New returns an Engine; Recover must be called before anything else, Stop at the end. ctx carries values only.
func New(ctx context.Context, cfg Config) *Engine {
	e := &Engine{cfg: cfg, keySem: semaphore.NewWeighted(maxKeys), depSem: semaphore.NewWeighted(cfg.MaxDeploys),
		writes: semaphore.NewWeighted(maxWrites), claims: newClaims(cfg.Kinds, cfg.Now),
		stops: map[string]context.CancelCauseFunc{}, shelf: newShelf(cfg.Placed, cfg.Log), watchChanged: make(chan struct{}, 1),
		model: newModel(map[agentpb.WorkClass]int{
			agentpb.WorkClass_WORK_CLASS_KEY:    cfg.KeyLimit,
			agentpb.WorkClass_WORK_CLASS_DEPLOY: cfg.DeployLimit,
			agentpb.WorkClass_WORK_CLASS_VERIFY: cfg.VerifyLimit,
		})}
	base := context.WithoutCancel(ctx)
	e.begin, e.stopBegin = context.WithCancelCause(base)
	e.act, e.stopAct = context.WithCancelCause(base)
	return e
}

// Recover loads the journal and settles what a crash left at targets, before anything else happens: every open receipt
// is repaired, and what was staged but not installed is undone. What was installed stays; the assignment goes on with
// verification once the server says so. A target that cannot be repaired now is left to the assignment's own run.
func (e *Engine) Recover(ctx context.Context) error {
	entries, err := e.cfg.Journal.All()
	if err != nil {
		return err
	}
	for _, en := range entries {
		if len(en.Receipt) > 0 && en.Assignment.GetDeploy() != nil {
			if err := e.recover(ctx, en); err != nil {
				e.cfg.Log.Error("target not repaired after a crash; its assignment will try again",
					"job_id", en.Assignment.GetId(), "target_id", clean(en.Assignment.GetDeploy().GetTarget().GetId(), maxIDLength, false), "err", err)
			}
		}
		e.mu.Lock()
		e.step(evRestored{en})
		e.mu.Unlock()
	}
	if err := e.shelf.load(); err != nil {
		return err
	}
	return ctx.Err()
}

func (e *Engine) recover(ctx context.Context, en *journal.Entry) error {
	w := en.Assignment.GetDeploy()
	t, err := e.open(ctx, w.GetTarget())
	if err != nil {
		return err
	}
	if r, ok := t.(target.Repairer); ok {
		if err := r.Repair(ctx, target.Receipt(en.Receipt)); err != nil {
			return err
		}
	}
	cur, err := t.Current(ctx)
	if err != nil {
		return err
	}
	if cur.Leaf == wantedLeaf(w) {
		return nil
	}
	if err := t.Undo(ctx, target.Receipt(en.Receipt)); err != nil {
		return err
	}
	en.Receipt = nil
	return journal.Store(e.cfg.Journal, en)
}

func (e *Engine) open(ctx context.Context, spec *agentpb.TargetSpec) (target.Target, error) {
	k, err := kindOf(spec, e.cfg.Kinds)
	if err != nil {
		return nil, err
	}
	env := e.cfg.Env
	env.Log = e.cfg.Log.With("target_id", clean(spec.GetId(), maxIDLength, false), "kind", k.Name)
	return k.Open(ctx, env, spec.GetSettings())
}

// CheckTarget says whether a target could be worked on with this agent's own configuration, beside the others that it has.
func (e *Engine) CheckTarget(ctx context.Context, spec *agentpb.TargetSpec, others []*agentpb.TargetSpec) error {
	if id := spec.GetId(); id == "" || len(id) > maxIDLength {
		return fault.InvalidField("id", "has %d bytes; 1 to %d are expected", len(id), maxIDLength)
	}
	if _, err := e.open(ctx, spec); err != nil {
		return err
	}
	return e.claims.shared(spec, others)
}

// Kill lets Stop end everything at once, as if the process had been killed; what it interrupts is settled by Recover.
func (e *Engine) Kill() { e.stopAct(errStopping) }

// Stop ends all workers and waits for them: at once what has not begun to install, the rest within actGrace.
func (e *Engine) Stop() {
	e.mu.Lock()
	e.stopping = true
	e.sink = nil
	e.mu.Unlock()
	e.stopBegin(errStopping)
	t := time.AfterFunc(actGrace, func() { e.stopAct(errStopping) })
	e.wg.Wait()
	t.Stop()
	e.stopAct(errStopping)
}

// Greet returns what Hello says of work: what is open, and the absolute credits.
func (e *Engine) Greet() ([]*agentpb.OpenAssignment, []*agentpb.Credit) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.step(evGreeted{})
	var credits []*agentpb.Credit
	for _, c := range e.model.classes() {
		if n := e.model.unspent[c]; n > 0 {
			credits = append(credits, &agentpb.Credit{Class: c, Amount: int32(min(n, math.MaxInt32))})
		}
	}
	return e.model.open(), credits
}

// Attach sends to sink from now on, and first what the verdicts and the journal call for.
func (e *Engine) Attach(sink Sink, verdicts []*agentpb.Verdict) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sink = sink
	e.step(evAttached{verdicts})
	e.tellLocked()
}

// Detach ends sending; work goes on.
func (e *Engine) Detach() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sink = nil
	e.step(evDetached{})
}

// Assign takes an assignment from the stream.
func (e *Engine) Assign(a *agentpb.Assignment) {
	ev := evAssigned{a: a}
	if err := check(a, e.cfg.Kinds); err != nil {
		ev.refusal = FailureOf(err)
		e.cfg.Log.Warn("assignment refused", "job_id", clean(a.GetId(), maxIDLength, false), "attempt", a.GetAttempt(), "err", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.step(ev)
}

// Settle takes a Settled from the stream.
func (e *Engine) Settle(s *agentpb.Settled) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.step(evSettled{s})
}

// Cancel takes a Cancel from the stream.
func (e *Engine) Cancel(c *agentpb.Cancel) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.step(evCancel{c})
}

// Sick says whether the journal could not be written; Heal probes it, and credit is given again when it can.
func (e *Engine) Sick() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.model.sick
}

// Heal probes a journal that could not be written.
func (e *Engine) Heal() {
	if !e.Sick() {
		return
	}
	err := e.cfg.Journal.Probe()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.step(evProbed{err == nil})
}

// Idle says whether nothing is open.
func (e *Engine) Idle() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.model.items) == 0
}

// step runs the model and its effects under e.mu. Effects wait neither for the network nor for workers nor for the journal.
func (e *Engine) step(ev any) {
	well := !e.model.sick
	defer func() {
		if well && e.model.sick && e.cfg.Sickened != nil {
			e.cfg.Sickened()
		}
	}()
	for _, eff := range e.model.step(ev) {
		switch v := eff.(type) {
		case doStore:
			e.storeLocked(v.entry)
		case doSend:
			if e.sink != nil {
				e.sink.Post(v.m)
			}
		case doStart:
			e.startLocked(v.entry)
		case doStop:
			if stop := e.stops[v.id]; stop != nil {
				stop(errCancelled)
			}
		case doSettle:
			e.settleLocked(v.entry, v.s)
		}
	}
}

// storeLocked has an entry stored; the model is told when that is done.
func (e *Engine) storeLocked(entry *journal.Entry) {
	e.wg.Add(1)
	e.cfg.Journal.Put(entry, func(err error) {
		defer e.wg.Done()
		st := evStored{entry: entry}
		if err != nil {
			e.cfg.Log.Error("journal cannot be written", "job_id", entry.Assignment.GetId(), "err", err)
			st.failure = FailureOf(err)
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		e.step(st)
	})
}

func (e *Engine) startLocked(entry *journal.Entry) {
	if e.stopping {
		return
	}
	id := entry.Assignment.GetId()
	begin, stop := context.WithCancelCause(e.begin)
	e.stops[id] = stop
	e.wg.Go(func() {
		ev := e.work(begin, entry)
		e.mu.Lock()
		defer e.mu.Unlock()
		stop(nil)
		delete(e.stops, id)
		e.step(ev)
	})
}

// work runs an entry; a panic in a connector costs that assignment, not the agent.
func (e *Engine) work(begin context.Context, entry *journal.Entry) (ev evFinished) {
	a := entry.Assignment
	log := e.cfg.Log.With("job_id", a.GetId(), "attempt", a.GetAttempt(), "request_id", clean(a.GetRequestId(), maxIDLength, false))
	ev = evFinished{id: a.GetId(), attempt: a.GetAttempt()}
	fail := func(err error) {
		if e.act.Err() != nil || errors.Is(context.Cause(e.begin), errStopping) && (errors.Is(err, errStopping) || errors.Is(err, context.Canceled)) {
			return
		}
		if errors.Is(context.Cause(begin), errCancelled) && (errors.Is(err, errCancelled) || errors.Is(err, context.Canceled)) {
			err = errCancelled
		}
		log.Warn("assignment failed", "err", err)
		ev.result = &agentpb.Result{Id: ev.id, Attempt: ev.attempt, Outcome: &agentpb.Result_Failure{Failure: FailureOf(err)}}
	}
	defer func() {
		if p := recover(); p != nil {
			log.Error("assignment panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			fail(fault.New(fault.Internal, "the agent met a defect of its own; its log has the details"))
		}
	}()
	if d := a.GetDeadlineUnixMs(); d > 0 && e.cfg.Now().UnixMilli() > d && len(entry.Receipt) == 0 {
		fail(fault.New(fault.Retryable, "the assignment's deadline passed before it was begun"))
		return ev
	}
	if v := a.GetVerify(); v != nil {
		// The credits bound how many; a look costs little.
		done, err := e.verifyNow(begin, v)
		if err != nil {
			fail(err)
			return ev
		}
		ev.result = &agentpb.Result{Id: ev.id, Attempt: ev.attempt, Outcome: &agentpb.Result_Deployed{Deployed: done}}
		return ev
	}
	sem, cost := e.depSem, int64(1)
	if k := a.GetKey(); k != nil {
		sem = e.keySem
		if strings.HasPrefix(strings.ToLower(k.GetKeyAlgorithm()), "rsa") {
			cost = rsaCost
		}
	}
	if err := sem.Acquire(begin, cost); err != nil {
		fail(fault.Wrap(fault.Retryable, context.Cause(begin), "it was stopped before it began"))
		return ev
	}
	defer sem.Release(cost)
	if k := a.GetKey(); k != nil {
		csr, spki, err := e.makeKey(k)
		if err != nil {
			fail(err)
			return ev
		}
		ev.csr, ev.spki = csr, spki
		log.Info("key ready", "certificate_id", k.GetCertificateId(), "generation", k.GetGeneration(), "algorithm", k.GetKeyAlgorithm())
		return ev
	}
	done, err := e.deploy(begin, e.act, entry)
	if err != nil {
		fail(err)
		return ev
	}
	ev.result = &agentpb.Result{Id: ev.id, Attempt: ev.attempt, Outcome: &agentpb.Result_Deployed{Deployed: done}}
	log.Info("deployed", "certificate_id", a.GetDeploy().GetCertificateId(), "generation", a.GetDeploy().GetGeneration(),
		"target_id", clean(a.GetDeploy().GetTarget().GetId(), maxIDLength, false), "probed", len(done.GetServedFingerprint()) > 0)
	return ev
}

func (e *Engine) makeKey(k *agentpb.KeyWork) (csr, spki []byte, err error) {
	key, err := e.cfg.Keys.Ensure(k.GetCertificateId(), k.GetGeneration(), k.GetKeyAlgorithm())
	if err != nil {
		return nil, nil, err
	}
	if csr, err = newCSR(k, key.Signer); err != nil {
		return nil, nil, err
	}
	return csr, key.SPKI[:], nil
}

// journalReceipt stores the receipt of a running installation; nothing may be committed unless it returns nil.
func (e *Engine) journalReceipt(id string, attempt int64, r target.Receipt) error {
	stored := make(chan error, 1)
	e.mu.Lock()
	en := e.model.staged(id, attempt, []byte(r))
	if en != nil {
		// Begun with the lock held: what a later step stores comes after it.
		e.cfg.Journal.Put(en, func(err error) { stored <- err })
	}
	e.mu.Unlock()
	if en == nil {
		return fault.New(fault.Conflict, "the assignment is no longer open")
	}
	return <-stored
}

func (e *Engine) progress(id string, attempt int64, what string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.sink != nil {
		e.sink.Post(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Progress{
			Progress: &agentpb.Progress{Id: id, Attempt: attempt, Step: what}}})
	}
}

// settleLocked does what Settled says about keys, then forgets the entry. If the keys cannot be changed now the entry
// stays, so that the next Hello lists it and the server says it again.
func (e *Engine) settleLocked(entry *journal.Entry, s *agentpb.Settled) {
	id := entry.Assignment.GetId()
	if len(entry.Receipt) > 0 && entry.Result == nil && entry.Assignment.GetDeploy() != nil {
		e.abandonLocked(entry)
		return
	}
	if s != nil {
		if err := e.settleKeys(entry, s); err != nil {
			e.cfg.Log.Error("keys not settled; the server will be asked again", "job_id", id, "err", err)
			e.model.step(evRestored{entry})
			return
		}
	}
	e.cfg.Journal.Drop(id)
}

// settleKeys relabels and retires. It trusts the server no further than the assignment reaches: only that certificate,
// and never the generation just made or deployed.
func (e *Engine) settleKeys(entry *journal.Entry, s *agentpb.Settled) error {
	id, generation := entry.Assignment.GetKey().GetCertificateId(), entry.Assignment.GetKey().GetGeneration()
	if d := entry.Assignment.GetDeploy(); d != nil {
		id, generation = d.GetCertificateId(), d.GetGeneration()
	}
	if v := entry.Assignment.GetVerify(); v != nil {
		id, generation = v.GetCertificateId(), v.GetGeneration()
	}
	if other := s.GetCertificateId(); other != "" && other != id {
		e.cfg.Log.Error("settlement names another certificate and is only acknowledged", "job_id", s.GetId(), "certificate_id", id)
		return nil
	}
	if g := s.GetGeneration(); g > 0 && len(entry.SPKI) == len(keystore.SPKI{}) {
		if err := e.cfg.Keys.Relabel(id, keystore.SPKI(entry.SPKI), g); err != nil {
			return err
		}
		generation = g
	}
	below := min(s.GetRetireBelow(), generation)
	if below <= 0 {
		return nil
	}
	n, err := e.cfg.Keys.Retire(id, below)
	if err == nil && n > 0 {
		e.cfg.Log.Info("old keys retired", "certificate_id", id, "below_generation", below, "keys", n)
	}
	return err
}

// abandonLocked settles the open receipt of a forgotten assignment in the background, then drops its entry.
func (e *Engine) abandonLocked(entry *journal.Entry) {
	if e.stopping {
		return
	}
	e.wg.Go(func() {
		a := entry.Assignment
		d := &deployment{e: e, id: a.GetId(), attempt: a.GetAttempt(), work: a.GetDeploy(), receipt: target.Receipt(entry.Receipt)}
		if err := d.abandon(e.begin, e.act); err != nil {
			e.cfg.Log.Error("a forgotten installation could not be settled; the next start tries again", "job_id", a.GetId(), "err", err)
			return
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.model.items[a.GetId()] != nil {
			// Assigned again meanwhile: the entry on disk is the new one's.
			return
		}
		e.cfg.Journal.Drop(a.GetId())
	})
}
