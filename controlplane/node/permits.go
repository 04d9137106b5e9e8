package node

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/certmesh/certmesh/cluster/permit"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// newPermits makes this node's holder of permits toward external issuers. Who leads the cluster grants them.
func (n *Node) newPermits(metrics prometheus.Registerer) (*permit.Permits, error) {
	p, err := permit.New(context.Background(), permit.Config{Leaser: leaser{n}, Instance: n.member.node.Instance, Lease: n.cfg.Jobs.PermitLease, Clock: n.clk, Log: n.log}) //nolint:forbidigo // permits end by Close
	if err != nil {
		return nil, err
	}
	return p, metrics.Register(p)
}

// newGranter makes what grants permits while this node leads.
func (n *Node) newGranter() (*permit.Leader, error) {
	return permit.NewLeader(permit.LeaderConfig{Log: n.raft, Lease: n.cfg.Jobs.PermitLease, Clock: n.clk, Logger: n.log,
		Limits: func(string) permit.Limits { return permit.Limits{InFlight: n.cfg.Jobs.RenewalConcurrency} }})
}

// leaser asks who leads.
type leaser struct{ n *Node }

// Lease implements permit.Leaser.
func (l leaser) Lease(ctx context.Context, r *clusterpb.LeaseRequest) (*clusterpb.LeaseResponse, error) {
	switch leader, _ := l.n.raft.Leader(); leader {
	case "":
		return nil, fault.New(fault.Retryable, "nobody leads the cluster, so nobody grants permits toward issuer %s", r.GetIssuerId())
	case l.n.cfg.Node.ID:
		return l.n.granter.Lease(ctx, leader, r)
	default:
		return l.n.links.AskLease(ctx, leader, r)
	}
}
