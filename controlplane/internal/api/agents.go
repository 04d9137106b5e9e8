package api

import (
	"context"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

func (a agents) ListAgents(ctx context.Context, r *operatorpb.ListAgentsRequest) (*operatorpb.ListAgentsResponse, error) {
	all, next, err := a.Store.Agents(ctx, domain.AgentState(r.GetState()), pageOf(r.GetPage()))
	if err != nil {
		return nil, err
	}
	return &operatorpb.ListAgentsResponse{Agents: each(all, agentPB), NextCursor: next}, nil
}

func (a agents) GetAgent(ctx context.Context, r *operatorpb.GetAgentRequest) (*operatorpb.GetAgentResponse, error) {
	agent, err := a.Store.Agent(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	rejected, err := a.Store.Rejections(ctx, agent.ID)
	if err != nil {
		return nil, err
	}
	out := agentPB(agent)
	out.Credits = a.Sessions.Credits(agent.ID)
	out.RejectedStates = each(rejected, rejectionText)
	return &operatorpb.GetAgentResponse{Agent: out}, nil
}

func (a agents) RetireAgent(ctx context.Context, r *operatorpb.RetireAgentRequest) (*operatorpb.RetireAgentResponse, error) {
	// Read before the write that cancels them, as in RevokeCertificate.
	open, err := a.openJobs(ctx, domain.JobFilter{AgentID: r.GetId()})
	if err != nil {
		return nil, err
	}
	agent, err := a.Store.RetireAgent(ctx, r.GetId(), r.GetReason(), a.op(ctx))
	if err != nil {
		return nil, err
	}
	reason := "the agent was retired"
	if agent.Reason != "" {
		reason += ": " + agent.Reason
	}
	a.Sessions.Disconnect(agent.ID, reason)
	a.Hub.Publish(hub.Notice{Kind: hub.Agents, ID: agent.ID})
	for _, j := range open {
		a.Hub.Publish(hub.Notice{Kind: hub.Jobs, ID: j.ID}, hub.Notice{Kind: hub.Certificates, ID: j.CertificateID})
	}
	return &operatorpb.RetireAgentResponse{Agent: agentPB(agent)}, nil
}

func (a agents) ReleaseAgent(ctx context.Context, r *operatorpb.ReleaseAgentRequest) (*operatorpb.ReleaseAgentResponse, error) {
	agent, err := a.Store.ReleaseAgent(ctx, r.GetId(), a.op(ctx))
	if err != nil {
		return nil, err
	}
	a.Hub.Publish(hub.Notice{Kind: hub.Agents, ID: agent.ID})
	return &operatorpb.ReleaseAgentResponse{Agent: agentPB(agent)}, nil
}

func (a agents) CreateJoinToken(ctx context.Context, r *operatorpb.CreateJoinTokenRequest) (*operatorpb.CreateJoinTokenResponse, error) {
	root, err := a.meshRoot(ctx)
	if err != nil {
		return nil, err
	}
	ttl := defaultTokenTTL
	if r.GetTtl() != nil {
		ttl = r.GetTtl().AsDuration()
	}
	secret, op := authz.NewSecret(), a.op(ctx)
	t := domain.JoinToken{
		ID: newID(id.Token), Hash: authz.HashSecret(secret), Labels: r.GetLabels(), MaxUses: max(int(r.GetMaxUses()), 1),
		ExpiresAt: domain.Micro(op.At.Add(ttl)), CreatedBy: op.Actor, CreatedAt: op.At,
	}
	if err := a.Store.CreateJoinToken(ctx, t, op); err != nil {
		return nil, err
	}
	return &operatorpb.CreateJoinTokenResponse{
		Id: t.ID, Token: authz.JoinTokenString(t.ID, secret, domain.HashHex(root)), ExpiresAt: stamp(t.ExpiresAt),
	}, nil
}

func (a agents) ListJoinTokens(ctx context.Context, r *operatorpb.ListJoinTokensRequest) (*operatorpb.ListJoinTokensResponse, error) {
	all, next, err := a.Store.JoinTokens(ctx, pageOf(r.GetPage()))
	if err != nil {
		return nil, err
	}
	return &operatorpb.ListJoinTokensResponse{Tokens: each(all, tokenPB), NextCursor: next}, nil
}

func (a agents) RevokeJoinToken(ctx context.Context, r *operatorpb.RevokeJoinTokenRequest) (*operatorpb.RevokeJoinTokenResponse, error) {
	t, err := a.Store.RevokeJoinToken(ctx, r.GetId(), a.op(ctx))
	if err != nil {
		return nil, err
	}
	return &operatorpb.RevokeJoinTokenResponse{Token: tokenPB(t)}, nil
}

// meshRoot is the root, in DER, by which a new host is to recognise the server.
func (a *API) meshRoot(ctx context.Context) ([]byte, error) {
	_, roots, err := a.Store.TrustBundle(ctx)
	if err != nil && !fault.Is(err, fault.NotFound) {
		return nil, err
	}
	if len(roots) == 0 {
		return nil, fault.New(fault.Retryable, "the CA of agents and nodes is not made yet; try again when the node is ready")
	}
	return roots[0], nil
}
