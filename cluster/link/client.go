package link

import (
	"context"

	"google.golang.org/grpc"

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// AskPeers asks the node at address how it stands.
func (m *Mesh) AskPeers(ctx context.Context, address string, r *clusterpb.PeersRequest) (*clusterpb.PeersResponse, error) {
	return call(ctx, m, address, "", func(ctx context.Context, c clusterpb.NodeServiceClient) (*clusterpb.PeersResponse, error) {
		return c.Peers(ctx, r)
	})
}

// AskJoin asks the leader at address to take this node in.
func (m *Mesh) AskJoin(ctx context.Context, address string, r *clusterpb.JoinRequest) error {
	_, err := call(ctx, m, address, "", func(ctx context.Context, c clusterpb.NodeServiceClient) (*clusterpb.JoinResponse, error) {
		return c.Join(ctx, r)
	})
	return err
}

// AskRemove asks the leader, a node with a link, to take a member out.
func (m *Mesh) AskRemove(ctx context.Context, leaderID, nodeID string) error {
	_, err := linked(ctx, m, leaderID, func(ctx context.Context, c clusterpb.NodeServiceClient) (*clusterpb.RemoveResponse, error) {
		return c.Remove(ctx, &clusterpb.RemoveRequest{NodeId: nodeID})
	})
	return err
}

// AskLease asks the leader, a node with a link, for permits.
func (m *Mesh) AskLease(ctx context.Context, leaderID string, r *clusterpb.LeaseRequest) (*clusterpb.LeaseResponse, error) {
	return linked(ctx, m, leaderID, func(ctx context.Context, c clusterpb.NodeServiceClient) (*clusterpb.LeaseResponse, error) {
		return c.Lease(ctx, r)
	})
}

// call dials for one call.
func call[R any](ctx context.Context, m *Mesh, address, want string, f func(context.Context, clusterpb.NodeServiceClient) (R, error)) (R, error) {
	var none R
	conn, err := m.dial(address, want)
	if err != nil {
		return none, err
	}
	defer conn.Close()
	return within(ctx, conn, f)
}

// linked uses the connection of the link.
func linked[R any](ctx context.Context, m *Mesh, nodeID string, f func(context.Context, clusterpb.NodeServiceClient) (R, error)) (R, error) {
	p := m.peer(nodeID)
	if p == nil {
		var none R
		return none, fault.New(fault.Retryable, "there is no link to node %q", nodeID)
	}
	return within(ctx, p.conn, f)
}

func within[R any](ctx context.Context, conn *grpc.ClientConn, f func(context.Context, clusterpb.NodeServiceClient) (R, error)) (R, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	r, err := f(ctx, clusterpb.NewNodeServiceClient(conn))
	return r, faultOf(err)
}
