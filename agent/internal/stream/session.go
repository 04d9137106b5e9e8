// Package stream holds one conversation with a control-plane node: Hello and Welcome, the outbox and its only sender,
// limits and deadlines, beats, and how a stream ends. What the messages mean is its Handler's business; when and where
// to connect next is the pure Route.
package stream

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/jonboulle/clockwork"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Handler is the agent behind a stream. Its methods are called one at a time.
type Handler interface {
	// Hello describes the agent as it is now.
	Hello() *agentpb.Hello
	// Welcomed is called once; from then on messages may be put into out, until Closed.
	Welcomed(w *agentpb.Welcome, out *Outbox) error
	// Received handles every later message but Move and Goodbye. It must not wait for the network.
	Received(m *agentpb.ConnectResponse)
	// Closed is called once after Welcomed.
	Closed()
}

// Config of a session.
type Config struct {
	Log     *slog.Logger
	Clock   clockwork.Clock
	Handler Handler
	// WelcomeTimeout bounds the wait for Welcome; servers admit handshakes at a bounded rate. 0: 60 s.
	WelcomeTimeout time.Duration
	// WriteTimeout is how long one Send may be held up by flow control. 0: 30 s.
	WriteTimeout time.Duration
}

// Session is one stream.
type Session struct {
	cfg Config
	out *Outbox

	cancel context.CancelCauseFunc

	mu      sync.Mutex
	left    bool
	move    *agentpb.Move
	timers  []clockwork.Timer
	ended   bool
	sending bool
	beat    time.Duration
	rebeat  chan struct{}
}

// New returns a session that Run starts.
func New(cfg Config) *Session {
	if cfg.WelcomeTimeout == 0 {
		cfg.WelcomeTimeout = 60 * time.Second
	}
	if cfg.WriteTimeout == 0 {
		cfg.WriteTimeout = 30 * time.Second
	}
	return &Session{cfg: cfg, out: newOutbox(), beat: defaultBeat, rebeat: make(chan struct{}, 1)}
}

const (
	defaultBeat = 30 * time.Second
	minBeat     = time.Second
	maxBeat     = 10 * time.Minute
	// partTimeout bounds a polite end: what is queued, Goodbye, and the server's end of the stream.
	partTimeout = 2 * time.Second
)

// Run holds the conversation until it ends and says how. When ctx ends, Goodbye is sent.
func (s *Session) Run(ctx context.Context, client agentpb.AgentServiceClient) End {
	// The stream outlives ctx by partTimeout at most, so that Goodbye can be said.
	sctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	s.cancel = cancel
	defer cancel(nil)
	defer func() {
		s.mu.Lock()
		s.ended = true
		s.mu.Unlock()
		s.stopTimers()
	}()
	defer context.AfterFunc(ctx, func() {
		s.part(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Goodbye{Goodbye: &agentpb.Goodbye{
			Reason: agentpb.Goodbye_REASON_SHUTDOWN, Message: "the agent is stopping"}}})
	})()

	welcome := s.cfg.Clock.AfterFunc(s.cfg.WelcomeTimeout, func() {
		cancel(fault.New(fault.Retryable, "the server sent no Welcome within %s", s.cfg.WelcomeTimeout))
	})
	defer welcome.Stop()
	st, err := client.Connect(sctx)
	if err != nil {
		return End{Err: cause(sctx, err)}
	}
	hello := &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Hello{Hello: s.cfg.Handler.Hello()}}
	// io.EOF from Send means that Recv has the reason.
	if err := s.send(st, hello); err != nil && !errors.Is(err, io.EOF) {
		return End{Err: cause(sctx, err)}
	}
	first, err := st.Recv()
	if err != nil {
		return End{Err: cause(sctx, err)}
	}
	welcome.Stop()
	if g := first.GetGoodbye(); g != nil {
		return End{Goodbye: g}
	}
	w := first.GetWelcome()
	if w == nil {
		return End{Err: fault.New(fault.Rejected, "the server began with something other than Welcome")}
	}
	end := End{Welcomed: s.cfg.Clock.Now(), Known: w.GetNodes()}
	// No SetBeat: what it signals would put the first beat, which is spread, a whole interval off, for all agents alike.
	s.keepBeat(time.Duration(w.GetBeatIntervalMs()) * time.Millisecond)
	if err := s.cfg.Handler.Welcomed(w, s.out); err != nil {
		end.Err = err
		return end
	}
	s.mu.Lock()
	s.sending = true
	s.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() { s.sendAll(sctx, st) })
	end.Goodbye, end.Err = s.receive(sctx, st)
	s.cfg.Handler.Closed()
	cancel(nil)
	wg.Wait()

	s.mu.Lock()
	defer s.mu.Unlock()
	end.Left, end.Move = s.left, s.move
	return end
}

// cause prefers why this side cancelled over the bare "canceled" that gRPC reports.
func cause(ctx context.Context, err error) error {
	if c := context.Cause(ctx); c != nil && !errors.Is(c, context.Canceled) {
		return c
	}
	return err
}

// receiver is the receiving half of the stream.
type receiver interface {
	Recv() (*agentpb.ConnectResponse, error)
}

func (s *Session) receive(ctx context.Context, st receiver) (*agentpb.Goodbye, error) {
	for {
		m, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return nil, nil
		}
		if err != nil {
			return nil, cause(ctx, err)
		}
		switch v := m.GetMessage().(type) {
		case *agentpb.ConnectResponse_Goodbye:
			return v.Goodbye, nil
		case *agentpb.ConnectResponse_Move:
			s.moved(v.Move)
		case *agentpb.ConnectResponse_Welcome:
			return nil, fault.New(fault.Rejected, "the server sent a second Welcome")
		case nil:
			// A message kind of a newer server; only what this protocol version names must be answered.
			s.cfg.Log.Debug("message of an unknown kind ignored")
		default:
			s.cfg.Handler.Received(m)
		}
	}
}

func (s *Session) moved(m *agentpb.Move) {
	window := min(max(time.Duration(m.GetWindowMs())*time.Millisecond, 0), maxAsked)
	s.mu.Lock()
	s.move = m
	s.mu.Unlock()
	s.after(time.Duration(rand.Float64()*float64(window)), s.Leave) //nolint:gosec // spreads agents, hides nothing
}

// Leave ends the stream in order, to connect again at once: what is queued is sent first.
func (s *Session) Leave() {
	s.mu.Lock()
	s.left = true
	s.mu.Unlock()
	s.part(nil)
}

// LeaveAfter is Leave after a delay; it lapses with the stream.
func (s *Session) LeaveAfter(d time.Duration) { s.after(d, s.Leave) }

// After runs f after d unless the stream has ended by then.
func (s *Session) After(d time.Duration, f func()) { s.after(d, f) }

func (s *Session) part(last *agentpb.ConnectRequest) {
	s.out.close(last)
	s.mu.Lock()
	sending := s.sending
	s.mu.Unlock()
	if !sending {
		// Before Welcome there is nothing to finish.
		s.cancel(nil)
		return
	}
	s.after(partTimeout, func() { s.cancel(nil) })
}

func (s *Session) after(d time.Duration, f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.timers = append(s.timers, s.cfg.Clock.AfterFunc(d, f))
	}
}

func (s *Session) stopTimers() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.timers {
		t.Stop()
	}
	s.timers = nil
}

// SetBeat changes the beat interval; 0 is the default, and it is kept between a second and ten minutes.
func (s *Session) SetBeat(d time.Duration) {
	s.keepBeat(d)
	select {
	case s.rebeat <- struct{}{}:
	default:
	}
}

func (s *Session) keepBeat(d time.Duration) {
	if d <= 0 {
		d = defaultBeat
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.beat = min(max(d, minBeat), maxBeat)
}

func (s *Session) interval() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.beat
}

// sender is the sending half of the stream.
type sender interface {
	Send(m *agentpb.ConnectRequest) error
}

// sendAll is the stream's only sender: grpc's Send may not be called by two goroutines, and it blocks.
func (s *Session) sendAll(ctx context.Context, st agentpb.AgentService_ConnectClient) {
	// The first beat comes somewhere in the interval, so that agents that arrived together do not beat together.
	beat := s.cfg.Clock.NewTimer(time.Duration(rand.Float64() * float64(s.interval()))) //nolint:gosec // spreads agents, hides nothing
	defer beat.Stop()
	for {
		m, done, full := s.out.next()
		switch {
		case full:
			s.cancel(fault.New(fault.Exhausted, "the server does not read: more messages are waiting than this agent keeps"))
			return
		case m != nil:
			if err := s.send(st, m); err != nil {
				if !errors.Is(err, io.EOF) {
					s.cancel(err)
				}
				return
			}
			continue
		case done:
			if err := st.CloseSend(); err != nil {
				s.cancel(err)
			}
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-s.out.wake:
		case <-s.rebeat:
			beat.Reset(s.interval())
		case <-beat.Chan():
			beat.Reset(s.interval())
			s.out.Latest("beat", &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Beat{
				Beat: &agentpb.Beat{SentUnixUs: s.cfg.Clock.Now().UnixMicro()}}})
		}
	}
}

// send sends one message under the write deadline. A message over the limit is a defect of whoever made it: it is
// logged and left out, because ending the stream for it would only repeat it.
func (s *Session) send(st sender, m *agentpb.ConnectRequest) error {
	if n := proto.Size(m); n > MaxMessage {
		s.cfg.Log.Error("message over the limit not sent", "bytes", n, "limit", MaxMessage)
		return nil
	}
	watch := s.cfg.Clock.AfterFunc(s.cfg.WriteTimeout, func() {
		s.cancel(fault.New(fault.Exhausted, "the server took no message for %s", s.cfg.WriteTimeout))
	})
	defer watch.Stop()
	return st.Send(m)
}

// Refusal says whether err is a server's deliberate answer about this agent's
// identity rather than a passing condition.
func Refusal(err error) bool {
	switch status.Code(err) {
	case codes.Unauthenticated, codes.PermissionDenied:
		return true
	default:
		return false
	}
}
