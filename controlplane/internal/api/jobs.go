package api

import (
	"context"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

func (a jobs) ListJobs(ctx context.Context, r *operatorpb.ListJobsRequest) (*operatorpb.ListJobsResponse, error) {
	all, next, err := a.Store.Jobs(ctx, jobFilter(r), pageOf(r.GetPage()))
	if err != nil {
		return nil, err
	}
	return &operatorpb.ListJobsResponse{Jobs: each(all, jobPB), NextCursor: next}, nil
}

func jobFilter(r *operatorpb.ListJobsRequest) domain.JobFilter {
	return domain.JobFilter{State: domain.JobState(r.GetState()), CertificateID: r.GetCertificateId(), AgentID: r.GetAgentId(), Open: r.GetOpen()}
}

func (a jobs) GetJob(ctx context.Context, r *operatorpb.GetJobRequest) (*operatorpb.GetJobResponse, error) {
	j, err := a.Store.Job(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	return &operatorpb.GetJobResponse{Job: jobPB(j)}, nil
}

func (a jobs) CancelJob(ctx context.Context, r *operatorpb.CancelJobRequest) (*operatorpb.CancelJobResponse, error) {
	j, err := a.Store.CancelJob(ctx, r.GetId(), a.op(ctx))
	if err != nil {
		return nil, err
	}
	a.changed([]domain.Job{j})
	a.Hub.Publish(hub.Notice{Kind: hub.Certificates, ID: j.CertificateID})
	return &operatorpb.CancelJobResponse{Job: jobPB(j)}, nil
}

func (a jobs) ApproveJob(ctx context.Context, r *operatorpb.ApproveJobRequest) (*operatorpb.ApproveJobResponse, error) {
	j, err := a.Store.ApproveJob(ctx, r.GetId(), r.GetReason(), a.op(ctx))
	if err != nil {
		return nil, err
	}
	a.changed([]domain.Job{j})
	a.Hub.Publish(hub.Notice{Kind: hub.Certificates, ID: j.CertificateID})
	return &operatorpb.ApproveJobResponse{Job: jobPB(j)}, nil
}

func (a jobs) RejectJob(ctx context.Context, r *operatorpb.RejectJobRequest) (*operatorpb.RejectJobResponse, error) {
	j, err := a.Store.RejectJob(ctx, r.GetId(), r.GetReason(), a.op(ctx))
	if err != nil {
		return nil, err
	}
	a.changed([]domain.Job{j})
	a.Hub.Publish(hub.Notice{Kind: hub.Certificates, ID: j.CertificateID})
	return &operatorpb.RejectJobResponse{Job: jobPB(j)}, nil
}
