package link

import (
	"context"
	"crypto/x509"
	"sync"

	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"

	"github.com/certmesh/certmesh/cluster/internal/identity"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// inbound is a stream that another node keeps open to this one.
type inbound struct {
	instance string
	end      context.CancelCauseFunc
}

// caller is the node whose certificate the connection carries.
func (m *Mesh) caller(ctx context.Context) (string, error) {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return "", fault.New(fault.Internal, "a call without a peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return "", fault.New(fault.Unauthorized, "a node's client certificate is needed")
	}
	id, err := identity.Verify(info.State, m.cfg.Roots(), x509.ExtKeyUsageClientAuth, m.cfg.TrustDomain)
	if err != nil {
		return "", err
	}
	if id == m.cfg.NodeID {
		return "", fault.New(fault.Conflict, "this node is called %s as well: give each node an id of its own (node.id)", id)
	}
	return id, nil
}

// Link implements the node service.
func (m *Mesh) Link(stream clusterpb.NodeService_LinkServer) error {
	id, err := m.caller(stream.Context())
	if err != nil {
		return statusOf(err)
	}
	return statusOf(m.serve(id, stream))
}

func (m *Mesh) serve(id string, stream clusterpb.NodeService_LinkServer) error {
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	w := m.watch(cancel)
	defer w.stop()
	// Recv does not end with ctx: this handler returns instead, which ends it.
	received := make(chan *clusterpb.LinkRequest)
	receive := func() (*clusterpb.LinkRequest, error) {
		select {
		case r := <-received:
			return r, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	go func() {
		for {
			r, err := stream.Recv()
			if err != nil {
				cancel(fault.Wrap(fault.Retryable, err, "the link broke"))
				return
			}
			w.heard()
			select {
			case received <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	first, err := receive()
	if err != nil {
		return err
	}
	h := first.GetHello()
	if err := m.check(id, h); err != nil {
		return err
	}
	if err := stream.Send(&clusterpb.LinkResponse{Message: &clusterpb.LinkResponse_Hello{Hello: m.hello()}}); err != nil {
		return fault.Wrap(fault.Retryable, err, "answer Hello")
	}
	leave := m.enter(id, h.Instance, cancel)
	defer leave()

	var beating sync.WaitGroup
	defer beating.Wait()
	defer cancel(nil)
	beating.Go(func() { m.beat(ctx, stream, w) })
	m.cfg.Handler.Resync(id)
	for {
		r, err := receive()
		if err != nil {
			return err
		}
		m.handle(id, r)
	}
}

// enter makes the stream the one of its node; the one before it ends. A second instance under the same id is told apart.
func (m *Mesh) enter(id, instance string, end context.CancelCauseFunc) (leave func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if before, ok := m.heard[id]; ok {
		if before.instance != instance {
			m.cfg.Log.Warn("a node called again under another instance: it was restarted, or two processes have one id (node.id)", "node", id)
		}
		before.end(fault.New(fault.Conflict, "node %s has opened a newer link", id))
	}
	entry := &inbound{instance, end}
	m.heard[id] = entry
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.heard[id] == entry {
			delete(m.heard, id)
		}
	}
}

func (m *Mesh) beat(ctx context.Context, stream clusterpb.NodeService_LinkServer, w *watch) {
	t := m.cfg.Clock.NewTicker(beatInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.ctx.Done():
			w.cancel(fault.New(fault.Retryable, "this node is stopping"))
			return
		case <-t.Chan():
		}
		w.sending()
		if err := stream.Send(&clusterpb.LinkResponse{Message: &clusterpb.LinkResponse_Beat{Beat: &clusterpb.LinkBeat{UnixUs: m.cfg.Clock.Now().UnixMicro()}}}); err != nil {
			w.cancel(fault.Wrap(fault.Retryable, err, "the link broke"))
			return
		}
		w.sent()
	}
}

func (m *Mesh) handle(id string, r *clusterpb.LinkRequest) {
	m.metrics.received.WithLabelValues(kindOf(r)).Inc()
	h := m.cfg.Handler
	switch x := r.Message.(type) {
	case *clusterpb.LinkRequest_Beat:
		m.clock(id, x.Beat.UnixUs)
	case *clusterpb.LinkRequest_Wake:
		h.Wake(x.Wake.AgentIds)
	case *clusterpb.LinkRequest_Changed:
		h.Changed(x.Changed.Resources, x.Changed.More)
	case *clusterpb.LinkRequest_Disconnect:
		h.Disconnect(x.Disconnect.AgentId, x.Disconnect.Reason)
	case *clusterpb.LinkRequest_PushState:
		h.PushState(x.PushState.AgentId)
	case *clusterpb.LinkRequest_Trigger:
		h.Trigger(x.Trigger.Duty)
	default:
		// A newer node may say more than this one understands.
	}
}

func (m *Mesh) answering(ctx context.Context) (Members, string, error) {
	id, err := m.caller(ctx)
	if err != nil {
		return nil, "", err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.members == nil {
		return nil, "", fault.New(fault.Retryable, "node %s is starting; come back a little later", m.cfg.NodeID)
	}
	return m.members, id, nil
}

// Peers implements the node service.
func (m *Mesh) Peers(ctx context.Context, r *clusterpb.PeersRequest) (*clusterpb.PeersResponse, error) {
	x, _, err := m.answering(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	resp, err := x.Peers(ctx, r)
	return resp, statusOf(err)
}

// Join implements the node service.
func (m *Mesh) Join(ctx context.Context, r *clusterpb.JoinRequest) (*clusterpb.JoinResponse, error) {
	x, id, err := m.answering(ctx)
	if err == nil {
		err = x.Join(ctx, id, r)
	}
	if err != nil {
		return nil, statusOf(err)
	}
	return &clusterpb.JoinResponse{}, nil
}

// Remove implements the node service.
func (m *Mesh) Remove(ctx context.Context, r *clusterpb.RemoveRequest) (*clusterpb.RemoveResponse, error) {
	x, _, err := m.answering(ctx)
	if err == nil {
		err = x.Remove(ctx, r.NodeId)
	}
	if err != nil {
		return nil, statusOf(err)
	}
	return &clusterpb.RemoveResponse{}, nil
}

// Lease implements the node service.
func (m *Mesh) Lease(ctx context.Context, r *clusterpb.LeaseRequest) (*clusterpb.LeaseResponse, error) {
	x, id, err := m.answering(ctx)
	if err != nil {
		return nil, statusOf(err)
	}
	resp, err := x.Lease(ctx, id, r)
	return resp, statusOf(err)
}
