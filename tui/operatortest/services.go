package operatortest

import (
	"context"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// answer copies what is answered while the lock is held.
func answer[T proto.Message](s *Server, f func() (T, error)) (T, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var none T
	r, err := f()
	if err != nil {
		return none, err
	}
	c, ok := proto.Clone(r).(T)
	if !ok {
		return none, nil
	}
	return c, nil
}

type certificates struct {
	operatorpb.UnimplementedCertificatesServiceServer
	*Server
}

func (s certificates) ListCertificates(_ context.Context, r *operatorpb.ListCertificatesRequest) (*operatorpb.ListCertificatesResponse, error) {
	return answer(s.Server, func() (*operatorpb.ListCertificatesResponse, error) {
		var match []*operatorpb.Certificate
		for _, c := range s.data.Certificates {
			if strings.HasPrefix(c.GetName(), r.GetNamePrefix()) && (r.GetStatus() == "" || r.GetStatus() == c.GetStatus()) {
				c = proto.CloneOf(c)
				c.Leaves, c.Placements = nil, nil
				match = append(match, c)
			}
		}
		list, next, err := part(match, r.GetPage())
		return &operatorpb.ListCertificatesResponse{Certificates: list, NextCursor: next}, err
	})
}

func (s certificates) GetCertificate(_ context.Context, r *operatorpb.GetCertificateRequest) (*operatorpb.GetCertificateResponse, error) {
	return answer(s.Server, func() (*operatorpb.GetCertificateResponse, error) {
		c, err := found(s.data.Certificates, r.GetId(), "certificate")
		out := &operatorpb.GetCertificateResponse{Certificate: proto.CloneOf(c)}
		if len(s.steps) > 0 && len(s.watchers) > 0 {
			step := s.steps[0]
			s.steps = s.steps[1:]
			s.change(step)
		}
		return out, err
	})
}

func (s certificates) CreateCertificate(_ context.Context, r *operatorpb.CreateCertificateRequest) (*operatorpb.CreateCertificateResponse, error) {
	return answer(s.Server, func() (*operatorpb.CreateCertificateResponse, error) {
		c := &operatorpb.Certificate{
			Id: id("cert", 9), Name: r.GetName(), Names: r.GetNames(), IssuerId: id("iss", 1), ProfileId: id("prof", 1), Owner: r.GetOwner(), Policy: r.GetPolicy(),
			Status: "Pending", CreatedAt: timestamppb.New(Now), UpdatedAt: timestamppb.New(Now), Revision: 1, PlacementsTotal: 1,
			Leaves:     []*operatorpb.Leaf{{AgentId: id("agt", 1), OrderedGeneration: 1}},
			Placements: []*operatorpb.Placement{{TargetId: id("tgt", 1), TargetName: "web-1-nginx", AgentId: id("agt", 1), State: "Pending"}},
		}
		s.data.Certificates = append(s.data.Certificates, c)
		j := &operatorpb.Job{
			Id: id("job", 9), Kind: "Issuance", State: "AwaitingCSR", CertificateId: c.GetId(), AgentId: id("agt", 1), Generation: 1, Attempt: 1, MaxTries: 3,
			CreatedAt: timestamppb.New(Now), UpdatedAt: timestamppb.New(Now), RunAt: timestamppb.New(Now), Reason: "ordered", RequestId: r.GetRequestId(),
		}
		s.data.Jobs = append(s.data.Jobs, j)
		return &operatorpb.CreateCertificateResponse{Certificate: c, Jobs: []*operatorpb.Job{j}}, nil
	})
}

func (s certificates) RenewCertificate(_ context.Context, r *operatorpb.RenewCertificateRequest) (*operatorpb.RenewCertificateResponse, error) {
	return answer(s.Server, func() (*operatorpb.RenewCertificateResponse, error) {
		c, err := found(s.data.Certificates, r.GetId(), "certificate")
		if err != nil {
			return nil, err
		}
		c.Status = "RenewalInProgress"
		out := &operatorpb.RenewCertificateResponse{}
		for _, l := range c.GetLeaves() {
			l.OrderedGeneration = l.GetGeneration() + 1
			j := &operatorpb.Job{
				Id: id("job", 20+len(s.data.Jobs)), Kind: "Renewal", State: "AwaitingCSR", CertificateId: c.GetId(), AgentId: l.GetAgentId(), Generation: l.GetOrderedGeneration(), Attempt: 1,
				MaxTries: 3, CreatedAt: timestamppb.New(Now), UpdatedAt: timestamppb.New(Now), RunAt: timestamppb.New(Now), Reason: "on request",
			}
			s.data.Jobs = append(s.data.Jobs, j)
			out.Jobs = append(out.Jobs, j)
		}
		return out, nil
	})
}

func (s certificates) DeployCertificate(_ context.Context, r *operatorpb.DeployCertificateRequest) (*operatorpb.DeployCertificateResponse, error) {
	return answer(s.Server, func() (*operatorpb.DeployCertificateResponse, error) {
		c, err := found(s.data.Certificates, r.GetId(), "certificate")
		if err != nil {
			return nil, err
		}
		out := &operatorpb.DeployCertificateResponse{}
		for _, p := range c.GetPlacements() {
			j := &operatorpb.Job{
				Id: id("job", 20+len(s.data.Jobs)), Kind: "Deployment", State: "Pending", CertificateId: c.GetId(), AgentId: p.GetAgentId(), TargetId: p.GetTargetId(),
				Generation: 1, MaxTries: 3, CreatedAt: timestamppb.New(Now), UpdatedAt: timestamppb.New(Now), RunAt: timestamppb.New(Now), Reason: "on request",
			}
			s.data.Jobs = append(s.data.Jobs, j)
			out.Jobs = append(out.Jobs, j)
		}
		return out, nil
	})
}

func (s certificates) VerifyCertificate(_ context.Context, r *operatorpb.VerifyCertificateRequest) (*operatorpb.VerifyCertificateResponse, error) {
	return answer(s.Server, func() (*operatorpb.VerifyCertificateResponse, error) {
		c, err := found(s.data.Certificates, r.GetId(), "certificate")
		if err != nil {
			return nil, err
		}
		out := &operatorpb.VerifyCertificateResponse{}
		for _, p := range c.GetPlacements() {
			j := &operatorpb.Job{
				Id: id("job", 20+len(s.data.Jobs)), Kind: "Validation", State: "Pending", CertificateId: c.GetId(), AgentId: p.GetAgentId(), TargetId: p.GetTargetId(),
				Generation: 1, MaxTries: 3, CreatedAt: timestamppb.New(Now), UpdatedAt: timestamppb.New(Now), RunAt: timestamppb.New(Now), Reason: "on request",
			}
			s.data.Jobs = append(s.data.Jobs, j)
			out.Jobs = append(out.Jobs, j)
		}
		return out, nil
	})
}

func (s certificates) RevokeCertificate(_ context.Context, r *operatorpb.RevokeCertificateRequest) (*operatorpb.RevokeCertificateResponse, error) {
	return answer(s.Server, func() (*operatorpb.RevokeCertificateResponse, error) {
		c, err := found(s.data.Certificates, r.GetId(), "certificate")
		if err != nil {
			return nil, err
		}
		c.Status = "Revoked"
		return &operatorpb.RevokeCertificateResponse{Certificate: c, Serials: []string{"4f2a", "1b3c"}}, nil
	})
}

func (s certificates) ListVersions(_ context.Context, r *operatorpb.ListVersionsRequest) (*operatorpb.ListVersionsResponse, error) {
	return answer(s.Server, func() (*operatorpb.ListVersionsResponse, error) {
		list, next, err := part(s.data.Versions, r.GetPage())
		return &operatorpb.ListVersionsResponse{Versions: list, NextCursor: next}, err
	})
}

func (s certificates) ExplainCertificate(_ context.Context, r *operatorpb.ExplainCertificateRequest) (*operatorpb.ExplainCertificateResponse, error) {
	return answer(s.Server, func() (*operatorpb.ExplainCertificateResponse, error) {
		c, err := found(s.data.Certificates, r.GetId(), "certificate")
		if err != nil {
			return nil, err
		}
		out := &operatorpb.ExplainCertificateResponse{Certificate: c}
		for i, l := range c.GetLeaves() {
			out.Leaves = append(out.Leaves, &operatorpb.LeafExplanation{
				AgentId: l.GetAgentId(), Due: i > 0, Reason: []string{"less than 2/3 of its lifetime has passed", "2/3 of its lifetime has passed"}[min(i, 1)], DueAt: l.GetDueAt(),
			})
		}
		for _, p := range c.GetPlacements() {
			e := &operatorpb.PlacementExplanation{TargetId: p.GetTargetId(), TargetName: p.GetTargetName(), Current: p.GetCurrent()}
			if !p.GetCurrent() {
				e.WaitsFor = "agent web-2 is offline since 09:00; the deployment starts when it is back"
			}
			out.Placements = append(out.Placements, e)
		}
		return out, nil
	})
}

type agents struct {
	operatorpb.UnimplementedAgentsServiceServer
	*Server
}

func (s agents) ListAgents(_ context.Context, r *operatorpb.ListAgentsRequest) (*operatorpb.ListAgentsResponse, error) {
	return answer(s.Server, func() (*operatorpb.ListAgentsResponse, error) {
		list, next, err := part(s.data.Agents, r.GetPage())
		return &operatorpb.ListAgentsResponse{Agents: list, NextCursor: next}, err
	})
}

func (s agents) GetAgent(_ context.Context, r *operatorpb.GetAgentRequest) (*operatorpb.GetAgentResponse, error) {
	return answer(s.Server, func() (*operatorpb.GetAgentResponse, error) {
		a, err := found(s.data.Agents, r.GetId(), "agent")
		return &operatorpb.GetAgentResponse{Agent: a}, err
	})
}

func (s agents) RetireAgent(_ context.Context, r *operatorpb.RetireAgentRequest) (*operatorpb.RetireAgentResponse, error) {
	return answer(s.Server, func() (*operatorpb.RetireAgentResponse, error) {
		a, err := found(s.data.Agents, r.GetId(), "agent")
		if err != nil {
			return nil, err
		}
		a.State, a.Reason = "Retired", r.GetReason()
		return &operatorpb.RetireAgentResponse{Agent: a}, nil
	})
}

func (s agents) ReleaseAgent(_ context.Context, r *operatorpb.ReleaseAgentRequest) (*operatorpb.ReleaseAgentResponse, error) {
	return answer(s.Server, func() (*operatorpb.ReleaseAgentResponse, error) {
		a, err := found(s.data.Agents, r.GetId(), "agent")
		if err != nil {
			return nil, err
		}
		a.State, a.Reason = "Offline", ""
		return &operatorpb.ReleaseAgentResponse{Agent: a}, nil
	})
}

func (s agents) CreateJoinToken(context.Context, *operatorpb.CreateJoinTokenRequest) (*operatorpb.CreateJoinTokenResponse, error) {
	return &operatorpb.CreateJoinTokenResponse{Id: id("jt", 1), Token: "cmjt1.jt_1.secret.fingerprint", ExpiresAt: timestamppb.New(Now.Add(hour))}, nil
}

func (s agents) ListJoinTokens(_ context.Context, r *operatorpb.ListJoinTokensRequest) (*operatorpb.ListJoinTokensResponse, error) {
	return answer(s.Server, func() (*operatorpb.ListJoinTokensResponse, error) {
		list, next, err := part(s.data.Tokens, r.GetPage())
		return &operatorpb.ListJoinTokensResponse{Tokens: list, NextCursor: next}, err
	})
}

// unnamed gives what has no name the one that found wants.
type unnamed struct{ *operatorpb.JoinToken }

func (unnamed) GetName() string { return "" }

func (s agents) RevokeJoinToken(_ context.Context, r *operatorpb.RevokeJoinTokenRequest) (*operatorpb.RevokeJoinTokenResponse, error) {
	return answer(s.Server, func() (*operatorpb.RevokeJoinTokenResponse, error) {
		var list []unnamed
		for _, t := range s.data.Tokens {
			list = append(list, unnamed{t})
		}
		t, err := found(list, r.GetId(), "join token")
		if err != nil {
			return nil, err
		}
		t.RevokedAt = timestamppb.New(Now)
		return &operatorpb.RevokeJoinTokenResponse{Token: t.JoinToken}, nil
	})
}

type jobs struct {
	operatorpb.UnimplementedJobsServiceServer
	*Server
}

func (s jobs) ListJobs(_ context.Context, r *operatorpb.ListJobsRequest) (*operatorpb.ListJobsResponse, error) {
	return answer(s.Server, func() (*operatorpb.ListJobsResponse, error) {
		var match []*operatorpb.Job
		for _, j := range s.data.Jobs {
			open := j.GetFinishedAt() == nil
			if (open || !r.GetOpen()) && (r.GetCertificateId() == "" || r.GetCertificateId() == j.GetCertificateId()) {
				match = append(match, j)
			}
		}
		list, next, err := part(match, r.GetPage())
		return &operatorpb.ListJobsResponse{Jobs: list, NextCursor: next}, err
	})
}

// named gives jobs the name that found wants.
type named struct{ *operatorpb.Job }

func (named) GetName() string { return "" }

func (s jobs) find(ref string) (*operatorpb.Job, error) {
	list := make([]named, 0, len(s.data.Jobs))
	for _, j := range s.data.Jobs {
		list = append(list, named{j})
	}
	j, err := found(list, ref, "job")
	return j.Job, err
}

func (s jobs) GetJob(_ context.Context, r *operatorpb.GetJobRequest) (*operatorpb.GetJobResponse, error) {
	return answer(s.Server, func() (*operatorpb.GetJobResponse, error) {
		j, err := s.find(r.GetId())
		return &operatorpb.GetJobResponse{Job: j}, err
	})
}

func (s jobs) CancelJob(_ context.Context, r *operatorpb.CancelJobRequest) (*operatorpb.CancelJobResponse, error) {
	return answer(s.Server, func() (*operatorpb.CancelJobResponse, error) {
		j, err := s.find(r.GetId())
		if err != nil {
			return nil, err
		}
		j.State, j.FinishedAt = "Cancelled", timestamppb.New(Now)
		return &operatorpb.CancelJobResponse{Job: j}, nil
	})
}

func (s jobs) ApproveJob(_ context.Context, r *operatorpb.ApproveJobRequest) (*operatorpb.ApproveJobResponse, error) {
	return answer(s.Server, func() (*operatorpb.ApproveJobResponse, error) {
		j, err := s.find(r.GetId())
		if err != nil {
			return nil, err
		}
		j.State = "AwaitingCSR"
		return &operatorpb.ApproveJobResponse{Job: j}, nil
	})
}

func (s jobs) RejectJob(_ context.Context, r *operatorpb.RejectJobRequest) (*operatorpb.RejectJobResponse, error) {
	return answer(s.Server, func() (*operatorpb.RejectJobResponse, error) {
		j, err := s.find(r.GetId())
		if err != nil {
			return nil, err
		}
		j.State, j.Error, j.FinishedAt = "Cancelled", "rejected: "+r.GetReason(), timestamppb.New(Now)
		return &operatorpb.RejectJobResponse{Job: j}, nil
	})
}

type issuers struct {
	operatorpb.UnimplementedIssuersServiceServer
	*Server
}

func (s issuers) ListIssuers(_ context.Context, r *operatorpb.ListIssuersRequest) (*operatorpb.ListIssuersResponse, error) {
	return answer(s.Server, func() (*operatorpb.ListIssuersResponse, error) {
		list, next, err := part(s.data.Issuers, r.GetPage())
		return &operatorpb.ListIssuersResponse{Issuers: list, NextCursor: next}, err
	})
}

func (s issuers) GetIssuer(_ context.Context, r *operatorpb.GetIssuerRequest) (*operatorpb.GetIssuerResponse, error) {
	return answer(s.Server, func() (*operatorpb.GetIssuerResponse, error) {
		i, err := found(s.data.Issuers, r.GetId(), "issuer")
		return &operatorpb.GetIssuerResponse{Issuer: i}, err
	})
}

func (s issuers) CreateIssuer(_ context.Context, r *operatorpb.CreateIssuerRequest) (*operatorpb.CreateIssuerResponse, error) {
	return &operatorpb.CreateIssuerResponse{Issuer: &operatorpb.Issuer{
		Id: id("iss", 9), Name: r.GetName(), Kind: r.GetKind(), PublicUrl: "http://pki.test:8080", CreatedAt: timestamppb.New(Now),
		NotAfter: timestamppb.New(Now.AddDate(10, 0, 0)),
	}}, nil
}

func (s issuers) ListProfiles(_ context.Context, r *operatorpb.ListProfilesRequest) (*operatorpb.ListProfilesResponse, error) {
	return answer(s.Server, func() (*operatorpb.ListProfilesResponse, error) {
		list, next, err := part(s.data.Profiles, r.GetPage())
		return &operatorpb.ListProfilesResponse{Profiles: list, NextCursor: next}, err
	})
}

type targets struct {
	operatorpb.UnimplementedTargetsServiceServer
	*Server
}

func (s targets) ListTargets(_ context.Context, r *operatorpb.ListTargetsRequest) (*operatorpb.ListTargetsResponse, error) {
	return answer(s.Server, func() (*operatorpb.ListTargetsResponse, error) {
		list, next, err := part(s.data.Targets, r.GetPage())
		return &operatorpb.ListTargetsResponse{Targets: list, NextCursor: next}, err
	})
}

func (s targets) GetTarget(_ context.Context, r *operatorpb.GetTargetRequest) (*operatorpb.GetTargetResponse, error) {
	return answer(s.Server, func() (*operatorpb.GetTargetResponse, error) {
		t, err := found(s.data.Targets, r.GetId(), "target")
		return &operatorpb.GetTargetResponse{Target: t}, err
	})
}

func (s targets) CreateTarget(_ context.Context, r *operatorpb.CreateTargetRequest) (*operatorpb.CreateTargetResponse, error) {
	return &operatorpb.CreateTargetResponse{Target: &operatorpb.Target{
		Id: id("tgt", 9), Name: r.GetName(), AgentId: id("agt", 1), Kind: r.GetKind(), SettingsJson: r.GetSettingsJson(), VerifyAddress: r.GetVerifyAddress(),
		ServerName: r.GetServerName(), Enabled: true, CreatedAt: timestamppb.New(Now), Revision: 1,
	}}, nil
}

type system struct {
	operatorpb.UnimplementedSystemServiceServer
	*Server
}

func (s system) GetStatus(context.Context, *operatorpb.GetStatusRequest) (*operatorpb.GetStatusResponse, error) {
	return answer(s.Server, func() (*operatorpb.GetStatusResponse, error) { return s.data.Status, nil })
}

func (s system) ListAuditEvents(_ context.Context, r *operatorpb.ListAuditEventsRequest) (*operatorpb.ListAuditEventsResponse, error) {
	return answer(s.Server, func() (*operatorpb.ListAuditEventsResponse, error) {
		list, next, err := part(s.data.Events, r.GetPage())
		return &operatorpb.ListAuditEventsResponse{Events: list, NextCursor: next}, err
	})
}

func (s system) Watch(r *operatorpb.WatchRequest, stream grpc.ServerStreamingServer[operatorpb.WatchResponse]) error {
	s.record("Watch", r)
	ch := make(chan *operatorpb.WatchResponse, 1)
	ch <- &operatorpb.WatchResponse{}
	s.mu.Lock()
	s.watchers[ch] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers, ch)
	}()
	for {
		select {
		case <-stream.Context().Done():
			return nil
		case m := <-ch:
			if err := stream.Send(m); err != nil {
				return err
			}
		}
	}
}
