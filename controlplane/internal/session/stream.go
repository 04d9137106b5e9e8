package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/controlplane/internal/dispatch"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// stream is one Connect.
type stream struct {
	s     *Server
	wire  grpc.BidiStreamingServer[agentpb.ConnectRequest, agentpb.ConnectResponse]
	who   caller
	begun time.Time
	// done is closed when the stream has ended, with result as its status.
	done chan struct{}
	once sync.Once
	// taken: the server has it. Written by add, before anybody can end the stream.
	taken  bool
	result error

	// epoch of the open session, 0 before; guarded by s.mu.
	epoch domain.Epoch

	// What the ticker looks at, in Unix microseconds; 0: nothing. seen is the last message, written the beat that is in
	// the store.
	seen, written, waitUntil, sendSince, partBy atomic.Int64

	mu    sync.Mutex
	state State
	work  dispatch.State
	// greeting is the Welcome that awaits its verdicts.
	greeting *agentpb.Welcome
	out      outbox
	// tasks are the answers that are awaited; room is signalled when they become fewer.
	tasks    int
	room     sync.Cond
	draining bool
	// move waits for the tasks to be done.
	move *agentpb.Move
	// owing is since when another node has said that there is work and this one could not read it; zero: it could.
	owing time.Time
}

// outbox is what is still to be sent: a FIFO for work, where nothing is merged, and a box where the latest state wins.
type outbox struct {
	queue   []*agentpb.ConnectResponse
	box     []*agentpb.State
	greeted bool
	sending bool
	ending  *End
	parting bool // Goodbye was taken
}

// maxQueue bounds the FIFO far above what credits and the journal's limit allow; beyond it the agent does not read.
const maxQueue = 4 * dispatch.MaxCredit

// next takes the next message; fin says that nothing follows.
func (o *outbox) next() (m *agentpb.ConnectResponse, fin bool) {
	switch {
	case len(o.box) > 0 && o.greeted && (o.ending == nil || !o.ending.Now):
		m = &agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_State{State: o.box[0]}}
		o.box[0] = nil
		if o.box = o.box[1:]; len(o.box) == 0 {
			o.box = nil
		}
	case len(o.queue) > 0:
		m = o.queue[0]
		o.queue[0] = nil
		if o.queue = o.queue[1:]; len(o.queue) == 0 {
			o.queue = nil
		}
		o.greeted = true // the first is the Welcome
	case o.ending != nil && !o.ending.Silent && !o.parting:
		o.parting = true
		e := o.ending
		m = &agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Goodbye{Goodbye: &agentpb.Goodbye{Reason: e.Reason,
			Permanent: e.Permanent, ReconnectAfterMs: e.After.Milliseconds(), Message: e.Message}}}
	default:
		return nil, o.ending != nil
	}
	return m, false
}

// Connect implements the agent service. It waits for the end of the stream and does nothing else before, so that its
// goroutine keeps the small stack it began with.
func (s *Server) Connect(wire grpc.BidiStreamingServer[agentpb.ConnectRequest, agentpb.ConnectResponse]) error {
	st := &stream{s: s, wire: wire, done: make(chan struct{})}
	go st.run()
	<-st.done
	if st.taken {
		st.close()
	}
	return st.result
}

// run takes the stream on and reads it.
func (st *stream) run() {
	if err := st.begin(); err != nil {
		st.once.Do(func() {
			st.result = err
			close(st.done)
		})
		return
	}
	st.read()
}

// begin finds out who the agent is.
//
//go:noinline
func (st *stream) begin() error {
	return contain(st.s.cfg.Log, "take on an agent's stream", func() (err error) {
		if st.who, err = st.s.caller(st.wire.Context()); err != nil {
			return err
		}
		st.begun = st.s.cfg.Clock.Now()
		st.state = NewState(st.who.agentID, st.s.identityGap())
		st.room.L = &st.mu
		return st.s.add(st)
	})
}

// close is the mirror image of admit.
func (st *stream) close() {
	s := st.s
	st.locked(func() {
		st.workStep(dispatch.Closed{})
		st.out = outbox{ending: &End{Silent: true}}
		st.room.Broadcast()
	})
	if epoch := s.remove(st); epoch > 0 {
		st.closeSession(epoch)
	}
	s.left()
}

// closeSession records that nobody holds the agent's stream any more, unless somebody took it over.
func (st *stream) closeSession(epoch domain.Epoch) {
	s := st.s
	s.store.do(ownWork, func() {
		ctx, cancel := context.WithTimeout(s.ctx, storeTimeout)
		defer cancel()
		err := contain(s.cfg.Log, "close a session", func() error {
			return s.cfg.Store.CloseSession(ctx, st.who.agentID, epoch, s.now())
		})
		switch {
		case fault.Is(err, fault.Conflict):
			// Another stream has taken over, perhaps on another node. What this one was told, and could not do any more, it
			// must not keep to itself.
			s.Wake(st.who.agentID)
		case err != nil:
			// The agent's next Hello or its silence settles it.
			s.cfg.Log.Warn("session not closed in the store", "agent_id", st.who.agentID, "epoch", epoch, "err", err)
		}
		s.cfg.Hub.Publish(hub.Notice{Kind: hub.Agents, ID: st.who.agentID})
	})
}

// read takes the agent's messages until the stream ends. Its goroutine waits here nearly always, so that its frames are
// kept small: what is deep happens in functions of their own, or beside it.
func (st *stream) read() {
	err := contain(st.s.cfg.Log, "read an agent's stream", func() error {
		for {
			m, err := st.wire.Recv()
			if !st.received(m, err) {
				return nil
			}
		}
	})
	if err != nil {
		st.cut(endError(err))
	}
}

// received handles what Recv has returned; false: it was the last.
//
//go:noinline
func (st *stream) received(m *agentpb.ConnectRequest, err error) bool {
	if errors.Is(err, io.EOF) {
		st.proto(HungUp{})
		return false
	}
	if err != nil {
		st.proto(HungUp{Err: receiveError(err)})
		return false
	}
	now := st.s.cfg.Clock.Now()
	st.seen.Store(now.UnixMicro())
	st.s.metrics.received.WithLabelValues(messageName(m)).Inc()
	if admit := st.take(m, now); admit != nil {
		admitted := make(chan struct{})
		go func() {
			defer close(admitted)
			st.admitting(admit.Hello)
		}()
		// Nothing is read meanwhile: what an agent says too early waits.
		select {
		case <-admitted:
		case <-st.done:
		}
	}
	select {
	case <-st.done:
		return false
	default:
		return true
	}
}

// admitting admits on a stack of its own: the reader's would stay as large as the store's needs made it.
func (st *stream) admitting(h Hello) {
	err := contain(st.s.cfg.Log, "admit an agent", func() error {
		st.admit(h)
		return nil
	})
	if err != nil {
		st.cut(endError(err))
	}
}

// receiveError explains what gRPC says of a message that is too large or does not parse; a broken connection stays as it is.
func receiveError(err error) error {
	switch st := status.Convert(err); st.Code() {
	case codes.ResourceExhausted:
		return fault.Wrap(fault.Exhausted, err, "a message is larger than the limit of %d bytes; long lists go over Report", maxMessage)
	case codes.Internal, codes.InvalidArgument:
		return fault.Wrap(fault.Invalid, err, "a message cannot be decoded")
	default:
		return fault.Wrap(fault.Retryable, err, "the connection broke")
	}
}

// take handles one message, after waiting for the stream's tasks if there are too many: gRPC's window then slows the
// agent down. It returns the Hello that is to be admitted.
func (st *stream) take(m *agentpb.ConnectRequest, now time.Time) (admit *Admit) {
	st.locked(func() {
		for st.tasks >= maxTasks && st.state.Phase() != Closing {
			st.room.Wait()
		}
		admit = st.protoStep(Received{Message: m, At: now})
	})
	return admit
}

// locked runs f with st.mu held. A panic in it ends this stream, whose state is not to be trusted any more, and no other.
func (st *stream) locked(f func()) {
	err := contain(st.s.cfg.Log, "handle an agent's stream", func() error {
		st.mu.Lock()
		defer st.mu.Unlock()
		f()
		return nil
	})
	if err != nil {
		st.cut(endError(err))
	}
}

// proto takes an event of the protocol.
func (st *stream) proto(e Event) { st.locked(func() { st.protoStep(e) }) }

// event takes an event of work that answers nothing.
func (st *stream) event(e dispatch.Event) { st.locked(func() { st.workStep(e) }) }

// answer takes the answer to an effect of work. When the stream has ended meanwhile the agent is woken instead, because
// its next stream may have loaded before this was committed.
func (st *stream) answer(e dispatch.Event) {
	closed := false
	st.locked(func() {
		st.tasks--
		st.room.Signal()
		st.workStep(e)
		st.unread(e)
		switch {
		case st.tasks > 0:
		case st.draining:
			st.protoStep(Ending{endShutdown()})
		case st.move != nil:
			st.sendMove()
		}
		closed = !st.work.Open()
	})
	if _, loaded := e.(dispatch.Loaded); closed && !loaded {
		st.s.Wake(st.who.agentID)
	}
}

// end ends the stream from this side.
func (st *stream) end(e End) { st.proto(Ending{e}) }

// drain stops dispatching and says Goodbye once everything that is under way has been answered.
func (st *stream) drain() {
	st.locked(func() {
		st.workStep(dispatch.Closed{})
		st.draining = true
		if st.tasks == 0 {
			st.protoStep(Ending{endShutdown()})
		}
	})
}

// moveTo asks the agent to connect to another node, once everything that is under way has been answered; until then and
// until the agent goes no further work is given to it. An agent that has not said Hello, or whose session is being
// recorded, is sent there by a Goodbye.
func (st *stream) moveTo(m *agentpb.Move) {
	st.locked(func() {
		switch st.state.Phase() {
		case AwaitHello, Opening:
			st.protoStep(Ending{endDraining()})
		case Open:
			st.workStep(dispatch.Resting{})
			if st.move = m; st.tasks == 0 {
				st.sendMove()
			}
		case Closing:
		}
	})
}

func (st *stream) sendMove() {
	st.s.metrics.moved.Inc()
	st.put(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Move{Move: st.move}})
	st.move = nil
}

// cut ends the stream without another word.
func (st *stream) cut(e End) {
	st.mu.Lock()
	st.state.phase = Closing
	st.room.Broadcast()
	st.mu.Unlock()
	st.finish(e)
}

// finish makes the handler return, which ends a blocked Send and Recv as well.
func (st *stream) finish(e End) {
	st.once.Do(func() {
		if e.Code != codes.OK {
			st.result = status.Error(e.Code, e.Message)
		}
		close(st.done)
	})
}

// protoStep runs the protocol's step and its effects; st.mu is held. Nothing in it waits.
func (st *stream) protoStep(e Event) (admit *Admit) {
	var effects []Effect
	st.state, effects = Step(st.state, e)
	for _, f := range effects {
		switch f := f.(type) {
		case Admit:
			admit = &f
		case Greet:
			st.greeting = &agentpb.Welcome{Protocol: protocolMax, BeatIntervalMs: st.s.beat().Milliseconds(), Nodes: st.s.others(),
				Resend: f.Resend, ReportLeaves: f.ReportLeaves}
		case Work:
			if !st.draining {
				st.workStep(f.Event)
			}
		case SendState:
			st.putState(f)
		case RecordRefusal:
			st.s.background("record a refused state", func(ctx context.Context) error { return st.s.cfg.Store.RecordRejection(ctx, f.Refusal) })
			st.s.cfg.Log.Warn("agent refuses a state", "agent_id", st.who.agentID, "kind", f.Refusal.Kind, "name", f.Refusal.Name,
				"version", f.Refusal.Version, "reason", f.Refusal.Reason)
		case ClearRefusal:
			st.s.background("clear a refused state", func(ctx context.Context) error {
				err := st.s.cfg.Store.ClearRejection(ctx, st.who.agentID, f.Kind, f.Name)
				if err == nil && f.Kind == kindTarget && st.s.cfg.Changed != nil {
					st.s.cfg.Changed() // placements at the target may be due now
				}
				return err
			})
		case Acknowledge:
			st.s.acks.note(domain.TrustAck{AgentID: st.who.agentID, Version: f.Version, At: st.s.now()})
		case Observe:
			st.observed(f.Observation)
		case RenewIdentity:
			st.renew(f.CSR)
		case SendIdentity:
			st.put(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_IdentityIssued{IdentityIssued: &agentpb.IdentityIssued{
				Chain: f.Chain, Failure: failurePB(f.Failure)}}})
		case Finish:
			st.part(f.End)
		}
	}
	return admit
}

// part stops dispatching and lets the sender say the rest.
func (st *stream) part(e End) {
	st.workStep(dispatch.Closed{})
	if e.Now {
		st.out.queue, st.out.box = nil, nil
	}
	st.out.ending = &e
	st.partBy.Store(st.s.cfg.Clock.Now().Add(partTimeout).UnixMicro())
	st.s.expect(st)
	st.room.Broadcast()
	st.flushOut()
}

func (st *stream) put(m *agentpb.ConnectResponse) {
	if st.out.ending != nil {
		return
	}
	if len(st.out.queue) >= maxQueue {
		st.protoStep(Ending{End{Code: codes.ResourceExhausted, Message: "the agent does not read what it is sent", Silent: true, Now: true}})
		return
	}
	st.out.queue = append(st.out.queue, m)
	st.flushOut()
}

// putState puts a state in place of an unsent one of the same name.
func (st *stream) putState(f SendState) {
	if st.out.ending != nil {
		return
	}
	m := &agentpb.State{Version: f.Version, Body: &agentpb.State_Removed{Removed: &agentpb.Removed{}}}
	if f.Body != nil {
		m.Body = f.Body.GetBody()
	}
	same := func(o *agentpb.State) bool {
		return o.GetVersion().GetKind() == f.Version.GetKind() && o.GetVersion().GetName() == f.Version.GetName()
	}
	if i := slices.IndexFunc(st.out.box, same); i >= 0 {
		st.out.box[i] = m
		return
	}
	st.out.box = append(st.out.box, m)
	st.flushOut()
}

// flushOut starts the sender unless it runs; st.mu is held.
func (st *stream) flushOut() {
	if !st.out.sending {
		st.out.sending = true
		go st.send()
	}
}

// send is the stream's only sender while it runs.
func (st *stream) send() {
	err := contain(st.s.cfg.Log, "send to an agent", func() error {
		for {
			st.mu.Lock()
			m, fin := st.out.next()
			if m == nil {
				st.out.sending = false
				end := st.out.ending
				st.mu.Unlock()
				if fin {
					st.finish(*end)
				}
				return nil
			}
			st.mu.Unlock()
			st.sendSince.Store(st.s.cfg.Clock.Now().UnixMicro())
			err := st.wire.Send(m)
			st.sendSince.Store(0)
			if err != nil {
				return fault.Wrap(fault.Retryable, err, "the connection broke")
			}
			st.s.metrics.sent.WithLabelValues(answerName(m)).Inc()
		}
	})
	if err != nil {
		st.cut(endError(err))
	}
}

// due reports whether ticked has something to do; it takes no lock.
func (st *stream) due(now time.Time) bool {
	us := now.UnixMicro()
	past := func(a *atomic.Int64, d time.Duration) bool {
		v := a.Load()
		return v != 0 && us >= v+d.Microseconds()
	}
	return past(&st.waitUntil, 0) || past(&st.partBy, 0) || past(&st.sendSince, writeTimeout) ||
		st.seen.Load() == 0 && now.Sub(st.begun) >= helloTimeout || now.After(st.who.notAfter)
}

// ticked does what is due.
func (st *stream) ticked(now time.Time) {
	us := now.UnixMicro()
	if v := st.sendSince.Load(); v != 0 && us >= v+writeTimeout.Microseconds() {
		st.s.metrics.timeouts.Inc()
		st.cut(End{Code: codes.ResourceExhausted, Message: fmt.Sprintf("the agent took no message for %s", writeTimeout)})
		return
	}
	if v := st.partBy.Load(); v != 0 {
		if us >= v {
			st.mu.Lock()
			end := *st.out.ending
			st.mu.Unlock()
			st.finish(end)
		}
		return
	}
	if st.seen.Load() == 0 && now.Sub(st.begun) >= helloTimeout {
		st.end(violation("no Hello came within %s", helloTimeout))
		return
	}
	if now.After(st.who.notAfter) {
		st.end(End{Code: codes.Unauthenticated, Message: "the identity of this stream has expired; renew it and connect again", After: time.Second})
		return
	}
	if v := st.waitUntil.Load(); v != 0 && us >= v {
		st.waitUntil.CompareAndSwap(v, 0)
		st.event(dispatch.Ticked{At: domain.Micro(now)})
	}
}

// unwritten returns the beat that is not in the store yet, once.
func (st *stream) unwritten() (domain.Seen, bool) {
	seen := st.seen.Load()
	if seen == 0 || st.written.Swap(seen) == seen {
		return domain.Seen{}, false
	}
	return domain.Seen{AgentID: st.who.agentID, At: time.UnixMicro(seen).UTC()}, true
}

func (st *stream) credits() (map[string]int32, bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.work.Open() {
		return nil, false
	}
	out := map[string]int32{}
	for c, n := range st.work.Credits() {
		out[dispatch.Class(c).String()] = int32(n) //nolint:gosec // at most dispatch.MaxCredit
	}
	return out, true
}

func (st *stream) epochNow() domain.Epoch {
	st.s.mu.RLock()
	defer st.s.mu.RUnlock()
	return st.epoch
}

// contain turns a panic into an Internal error; the process serves on.
func contain(log *slog.Logger, what string, f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			log.Error("panic", "in", what, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = fault.New(fault.Internal, "panic: %s", what)
		}
	}()
	return f()
}

// background runs a use of the store whose failure is only logged.
func (s *Server) background(what string, f func(ctx context.Context) error) {
	s.store.do(ownWork, func() {
		ctx, cancel := context.WithTimeout(s.ctx, storeTimeout)
		defer cancel()
		if err := contain(s.cfg.Log, what, func() error { return f(ctx) }); err != nil {
			s.cfg.Log.Error("not done: "+what, "err", err)
		}
	})
}

func messageName(m *agentpb.ConnectRequest) string {
	return oneofName(m.ProtoReflect().WhichOneof(m.ProtoReflect().Descriptor().Oneofs().Get(0)))
}

func answerName(m *agentpb.ConnectResponse) string {
	return oneofName(m.ProtoReflect().WhichOneof(m.ProtoReflect().Descriptor().Oneofs().Get(0)))
}

func oneofName(f interface{ TextName() string }) string {
	if f == nil {
		return "unknown"
	}
	return f.TextName()
}

// fits reports whether m may be sent as a control message.
func fits(m proto.Message) bool { return proto.Size(m) <= maxMessage }
