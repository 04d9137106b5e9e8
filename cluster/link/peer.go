package link

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/certmesh/certmesh/cluster/internal/identity"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Pauses between two attempts to reach a node: drawn from [0, pause), which doubles from the first to the last.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 3 * time.Second
)

// peer is this node's stream to one other.
type peer struct {
	m           *Mesh
	id, address string
	conn        *grpc.ClientConn
	out         *outbox
	up          atomic.Bool
	ctx         context.Context
	stop        context.CancelFunc
}

func (m *Mesh) newPeer(id, address string) (*peer, error) {
	conn, err := m.dial(address, id)
	if err != nil {
		return nil, err
	}
	p := &peer{m: m, id: id, address: address, conn: conn, out: newOutbox()}
	p.ctx, p.stop = context.WithCancel(m.ctx)
	return p, nil
}

// dial prepares a connection; want is the node that must answer, empty: any node.
func (m *Mesh) dial(address, want string) (*grpc.ClientConn, error) {
	tlsConfig := identity.Client(m.cfg.Certificate, m.cfg.Roots, m.cfg.TrustDomain, want, "h2")
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(credentials.NewTLS(tlsConfig)),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: 3 * time.Second,
			Backoff: backoff.Config{BaseDelay: firstPause, Multiplier: 1.6, Jitter: 0.5, MaxDelay: lastPause}}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: time.Minute, Timeout: 10 * time.Second}),
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(), grpc.WithIdleTimeout(0),
		grpc.WithUserAgent("certmeshd/"+m.cfg.Program))
	if err != nil {
		return nil, fault.Wrap(fault.Invalid, err, "%q is not host:port", address)
	}
	return conn, nil
}

// run keeps the stream open until the peer is stopped.
func (p *peer) run() {
	defer func() { _ = p.conn.Close() }() // nobody uses it any more
	pause := firstPause
	last := ""
	for {
		began := p.m.cfg.Clock.Now()
		err := p.once()
		if p.ctx.Err() != nil {
			return
		}
		p.m.metrics.breaks.WithLabelValues(p.id).Inc()
		// A node that is away is looked for again and again: it is told once.
		if text := err.Error(); text != last {
			last = text
			p.m.cfg.Log.Warn("no link to another node; it will be tried again", "node", p.id, "address", p.address, "error", err)
		}
		if p.m.cfg.Clock.Since(began) > silence {
			pause, last = firstPause, ""
		}
		t := p.m.cfg.Clock.NewTimer(time.Duration(rand.Float64() * float64(pause))) //nolint:gosec // spreads attempts, guards nothing
		select {
		case <-p.ctx.Done():
			t.Stop()
			return
		case <-t.Chan():
		}
		pause = min(2*pause, lastPause)
	}
}

// once is the life of one stream; it returns why it ended.
func (p *peer) once() error {
	ctx, cancel := context.WithCancelCause(p.ctx)
	defer cancel(nil)
	stream, err := clusterpb.NewNodeServiceClient(p.conn).Link(ctx, grpc.WaitForReady(false))
	if err != nil {
		return faultOf(err)
	}
	w := p.m.watch(cancel)
	defer w.stop()
	// What waited for the former stream is of no use: the other end looks for itself.
	p.out.clear()
	if err := stream.Send(&clusterpb.LinkRequest{Message: &clusterpb.LinkRequest_Hello{Hello: p.m.hello()}}); err != nil {
		return p.why(ctx, stream, err)
	}
	first, err := stream.Recv()
	if err != nil {
		return causeOr(ctx, faultOf(err))
	}
	if err := p.m.check(p.id, first.GetHello()); err != nil {
		return err
	}
	w.heard()
	p.up.Store(true)
	defer p.up.Store(false)
	p.m.cfg.Log.Info("link is up", "node", p.id, "address", p.address, "version", first.GetHello().GetProgram())

	var receiving sync.WaitGroup
	receiving.Go(func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				cancel(faultOf(err))
				return
			}
			w.heard()
			if b := m.GetBeat(); b != nil {
				p.m.clock(p.id, b.UnixUs)
			}
		}
	})
	err = p.send(ctx, stream, w)
	cancel(err)
	receiving.Wait()
	return causeOr(ctx, err)
}

// send empties the outbox and beats.
func (p *peer) send(ctx context.Context, stream clusterpb.NodeService_LinkClient, w *watch) error {
	beats := p.m.cfg.Clock.NewTicker(beatInterval)
	defer beats.Stop()
	for {
		var batch []*clusterpb.LinkRequest
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-beats.Chan():
			batch = []*clusterpb.LinkRequest{{Message: &clusterpb.LinkRequest_Beat{Beat: &clusterpb.LinkBeat{UnixUs: p.m.cfg.Clock.Now().UnixMicro()}}}}
		case <-p.out.ready:
			var lost bool
			if batch, lost = p.out.take(); lost {
				return fault.New(fault.Exhausted, "more had to be told than is kept; the other node looks for itself")
			}
		}
		for _, m := range batch {
			w.sending()
			if err := stream.Send(m); err != nil {
				return p.why(ctx, stream, err)
			}
			w.sent()
			p.m.metrics.sent.WithLabelValues(kindOf(m)).Inc()
		}
	}
}

// why asks the stream for the reason that Send only knows as EOF.
func (p *peer) why(ctx context.Context, stream clusterpb.NodeService_LinkClient, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if _, rerr := stream.Recv(); rerr != nil {
		err = rerr
	}
	return faultOf(err)
}

func causeOr(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// watch ends a stream whose other end is silent, or does not take what is sent.
type watch struct {
	m         *Mesh
	last      atomic.Int64 // when the other end was heard
	sendSince atomic.Int64 // since when a Send stands; 0: none does
	cancel    context.CancelCauseFunc
	quit      chan struct{}
	gone      chan struct{}
}

func (m *Mesh) watch(cancel context.CancelCauseFunc) *watch {
	w := &watch{m: m, cancel: cancel, quit: make(chan struct{}), gone: make(chan struct{})}
	w.heard()
	go w.run()
	return w
}

func (w *watch) heard()   { w.last.Store(w.m.cfg.Clock.Now().UnixNano()) }
func (w *watch) sending() { w.sendSince.Store(w.m.cfg.Clock.Now().UnixNano()) }
func (w *watch) sent()    { w.sendSince.Store(0) }

func (w *watch) stop() {
	close(w.quit)
	<-w.gone
}

func (w *watch) run() {
	defer close(w.gone)
	t := w.m.cfg.Clock.NewTicker(beatInterval)
	defer t.Stop()
	for {
		select {
		case <-w.quit:
			return
		case <-t.Chan():
		}
		now := w.m.cfg.Clock.Now().UnixNano()
		if now-w.last.Load() > int64(silence) {
			w.cancel(fault.New(fault.Retryable, "the other node was silent for %s", silence))
			return
		}
		if since := w.sendSince.Load(); since > 0 && now-since > int64(silence) {
			w.cancel(fault.New(fault.Retryable, "the other node took nothing for %s", silence))
			return
		}
	}
}
