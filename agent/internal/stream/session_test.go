package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func beatMsg(n int64) *agentpb.ConnectRequest {
	return &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Beat{Beat: &agentpb.Beat{SentUnixUs: n}}}
}

func acceptedMsg(id string) *agentpb.ConnectRequest {
	return &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Accepted{Accepted: &agentpb.Accepted{Id: id}}}
}

// TestOutbox: states merge, work does not, order is kept, and after close nothing gets in.
func TestOutbox(t *testing.T) {
	t.Parallel()
	o := newOutbox()
	o.Post(acceptedMsg("1"))
	o.Latest("beat", beatMsg(1))
	o.Post(acceptedMsg("2"))
	o.Latest("beat", beatMsg(2))
	o.close(acceptedMsg("last"))
	o.close(acceptedMsg("never"))
	o.Post(acceptedMsg("late"))
	o.Latest("beat", beatMsg(3))
	var got []string
	for {
		m, done, full := o.next()
		if done {
			break
		}
		if full {
			t.Fatal("full")
		}
		if b := m.GetBeat(); b != nil {
			got = append(got, fmt.Sprint("beat", b.GetSentUnixUs()))
		} else {
			got = append(got, m.GetAccepted().GetId())
		}
	}
	if s := strings.Join(got, " "); s != "beat2 1 2 last" {
		t.Errorf("sent %s", s)
	}
}

// TestOutboxIsBounded: neither a queue nor a box that nobody empties grows without end, and both say so.
func TestOutboxIsBounded(t *testing.T) {
	t.Parallel()
	o := newOutbox()
	for i := range maxQueue {
		o.Post(acceptedMsg(fmt.Sprint(i)))
	}
	if _, _, full := o.next(); full {
		t.Error("full too early")
	}
	o.Post(acceptedMsg("x"))
	o.Post(acceptedMsg("y"))
	if _, _, full := o.next(); !full || len(o.queue) > maxQueue {
		t.Errorf("a queue of %d is not full", len(o.queue))
	}
	o = newOutbox()
	for i := range 2 * maxBox {
		o.Latest(fmt.Sprint(i), beatMsg(int64(i)))
	}
	if _, _, full := o.next(); !full || len(o.box) > maxBox {
		t.Errorf("a box of %d is not full", len(o.box))
	}
}

func TestOutboxRace(t *testing.T) {
	t.Parallel()
	o := newOutbox()
	const n = 500
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range n {
				o.Post(acceptedMsg(fmt.Sprint(g, i)))
				o.Latest("beat", beatMsg(int64(i)))
			}
		})
	}
	go func() {
		wg.Wait()
		o.close(nil)
	}()
	work := 0
	for {
		m, done, full := o.next()
		if full {
			t.Fatal("full")
		}
		if done {
			break
		}
		if m.GetAccepted() != nil {
			work++
		}
		if m == nil {
			<-o.wake
		}
	}
	if work != 4*n {
		t.Errorf("%d of %d messages came through", work, 4*n)
	}
}

// conn is a stream whose other side is the test.
type conn struct {
	agentpb.AgentServiceClient
	ctx  context.Context
	sent chan *agentpb.ConnectRequest
	recv chan *agentpb.ConnectResponse
	shut chan struct{}
	once sync.Once
}

func newConn() *conn {
	return &conn{sent: make(chan *agentpb.ConnectRequest), recv: make(chan *agentpb.ConnectResponse), shut: make(chan struct{})}
}

func (c *conn) Connect(ctx context.Context, _ ...grpc.CallOption) (agentpb.AgentService_ConnectClient, error) {
	c.ctx = ctx
	return c, nil
}

func (c *conn) Send(m *agentpb.ConnectRequest) error {
	select {
	case c.sent <- m:
		return nil
	case <-c.ctx.Done():
		return io.EOF
	}
}

func (c *conn) Recv() (*agentpb.ConnectResponse, error) {
	select {
	case m, ok := <-c.recv:
		if !ok {
			return nil, io.EOF
		}
		return m, nil
	case <-c.ctx.Done():
		return nil, status.FromContextError(c.ctx.Err()).Err()
	}
}

func (c *conn) CloseSend() error {
	c.once.Do(func() { close(c.shut) })
	return nil
}
func (c *conn) Header() (metadata.MD, error) { return nil, nil }
func (c *conn) Trailer() metadata.MD         { return nil }
func (c *conn) Context() context.Context     { return c.ctx }
func (c *conn) SendMsg(any) error            { return errors.New("not used") }
func (c *conn) RecvMsg(any) error            { return errors.New("not used") }

type handler struct {
	mu     sync.Mutex
	out    *Outbox
	got    int
	closed int
	ready  chan struct{}
}

func (h *handler) Hello() *agentpb.Hello { return &agentpb.Hello{Protocol: 1} }
func (h *handler) Welcomed(_ *agentpb.Welcome, out *Outbox) error {
	h.out = out
	close(h.ready)
	return nil
}
func (h *handler) Received(*agentpb.ConnectResponse) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.got++
}
func (h *handler) Closed() { h.closed++ }

type bench struct {
	c   *conn
	clk *clockwork.FakeClock
	h   *handler
	s   *Session
	end chan End
}

// run starts a session; the caller answers.
func run(t *testing.T, ctx context.Context) *bench {
	b := &bench{c: newConn(), clk: clockwork.NewFakeClock(), h: &handler{ready: make(chan struct{})}, end: make(chan End, 1)}
	b.s = New(Config{Log: slog.New(slog.DiscardHandler), Clock: b.clk, Handler: b.h})
	go func() { b.end <- b.s.Run(ctx, b.c) }()
	if m := <-b.c.sent; m.GetHello() == nil {
		t.Fatalf("first came %v", m)
	}
	return b
}

func (b *bench) welcome(w *agentpb.Welcome) {
	b.c.recv <- &agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Welcome{Welcome: w}}
	<-b.h.ready
}

func (b *bench) wait(t *testing.T) End {
	t.Helper()
	select {
	case e := <-b.end:
		return e
	case <-time.After(20 * time.Second):
		t.Fatal("the session did not end")
		return End{}
	}
}

func TestNoWelcome(t *testing.T) {
	t.Parallel()
	b := run(t, t.Context())
	b.clk.Advance(61 * time.Second)
	if e := b.wait(t); !fault.Is(e.Err, fault.Retryable) || !e.Welcomed.IsZero() || !strings.Contains(e.Err.Error(), "no Welcome") {
		t.Errorf("ended as %+v", e)
	}
	if b.h.closed != 0 {
		t.Error("Closed without Welcomed")
	}
}

// TestStalledServer: a Send that blocks past the write deadline ends the stream.
func TestStalledServer(t *testing.T) {
	t.Parallel()
	b := run(t, t.Context())
	b.welcome(&agentpb.Welcome{Protocol: 1, BeatIntervalMs: 600_000})
	b.h.out.Post(acceptedMsg("1")) // nobody takes it
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	// The beat's timer and the write's.
	if err := b.clk.BlockUntilContext(ctx, 2); err != nil {
		t.Fatal(err)
	}
	b.clk.Advance(31 * time.Second)
	if e := b.wait(t); !fault.Is(e.Err, fault.Exhausted) || b.h.closed != 1 {
		t.Errorf("ended as %+v, closed %d times", e, b.h.closed)
	}
}

// TestFirstBeatIsSpread: agents that were welcomed together do not all beat one whole interval later.
func TestFirstBeatIsSpread(t *testing.T) {
	t.Parallel()
	b := run(t, t.Context())
	b.welcome(&agentpb.Welcome{Protocol: 1, BeatIntervalMs: 600_000})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := b.clk.BlockUntilContext(ctx, 1); err != nil {
		t.Fatal(err)
	}
	b.clk.Advance(10*time.Minute - time.Millisecond)
	select {
	case m := <-b.c.sent:
		if m.GetBeat() == nil {
			t.Errorf("sent %v", m)
		}
	case <-ctx.Done():
		t.Error("the first beat waits for the whole interval")
	}
	close(b.c.recv)
	b.wait(t)
}

func TestPoliteEnds(t *testing.T) {
	t.Parallel()
	t.Run("stop", func(t *testing.T) {
		t.Parallel()
		ctx, stop := context.WithCancel(t.Context())
		b := run(t, ctx)
		b.welcome(&agentpb.Welcome{Protocol: 1, Nodes: []string{"n2:1"}})
		b.h.out.Post(acceptedMsg("1"))
		stop()
		var got []string
		for len(got) < 2 {
			m := <-b.c.sent
			if m.GetBeat() == nil {
				got = append(got, fmt.Sprintf("%T", m.GetMessage()))
			}
		}
		if got[0] != "*agentpb.ConnectRequest_Accepted" || got[1] != "*agentpb.ConnectRequest_Goodbye" {
			t.Errorf("sent %v", got)
		}
		<-b.c.shut
		close(b.c.recv)
		if e := b.wait(t); e.Err != nil || e.Left || len(e.Known) != 1 {
			t.Errorf("ended as %+v", e)
		}
	})
	t.Run("move", func(t *testing.T) {
		t.Parallel()
		b := run(t, t.Context())
		b.welcome(&agentpb.Welcome{Protocol: 1})
		b.c.recv <- &agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Move{Move: &agentpb.Move{Nodes: []string{"n9:1"}}}}
		b.s.After(0, func() {})
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		for done := false; !done; {
			b.clk.Advance(time.Millisecond)
			select {
			case <-b.c.shut:
				done = true
			case <-b.c.sent: // a beat
			case <-ctx.Done():
				t.Fatal("it did not leave")
			default:
			}
		}
		close(b.c.recv)
		if e := b.wait(t); !e.Left || e.Move.GetNodes()[0] != "n9:1" {
			t.Errorf("ended as %+v", e)
		}
	})
}

// TestOversizedIsLeftOut: a message of ours over the limit is not sent, and what follows is.
func TestOversizedIsLeftOut(t *testing.T) {
	t.Parallel()
	b := run(t, t.Context())
	b.welcome(&agentpb.Welcome{Protocol: 1})
	b.h.out.Post(acceptedMsg(strings.Repeat("x", MaxMessage)))
	b.h.out.Post(acceptedMsg("ok"))
	for {
		if m := <-b.c.sent; m.GetAccepted() != nil {
			if m.GetAccepted().GetId() != "ok" {
				t.Error("an oversized message was sent")
			}
			break
		}
	}
	close(b.c.recv)
	b.wait(t)
}

func TestRefusal(t *testing.T) {
	t.Parallel()
	for code, want := range map[codes.Code]bool{codes.Unauthenticated: true, codes.PermissionDenied: true, codes.Unavailable: false, codes.OK: false} {
		if Refusal(status.Error(code, "x")) != want {
			t.Errorf("%v", code)
		}
	}
}
