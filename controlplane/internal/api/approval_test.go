package api

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// TestDecisionsWakeTheAgent like a new job, and four eyes are the store's sentence.
func TestDecisionsWakeTheAgent(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	r.store.certs[otherCert] = domain.Certificate{ID: otherCert, Name: "mail", CreatedBy: "operator:ann"}
	ann := r.with(t, "Bearer "+r.addKey(t, "ann", authz.Admin, time.Time{}, false))
	_, err := r.jobs().ApproveJob(ann, &operatorpb.ApproveJobRequest{Id: waitingJob})
	wantCode(t, err, codes.PermissionDenied, "operator:ann ordered it")
	wantList(t, "woken", r.sessions.take(&r.sessions.woken), nil)
	got, err := r.jobs().ApproveJob(r.as(t, authz.Approver), &operatorpb.ApproveJobRequest{Id: waitingJob})
	if err != nil || got.GetJob().GetState() != string(domain.JobAwaitingCSR) {
		t.Fatal(got, err)
	}
	wantList(t, "woken", r.sessions.take(&r.sessions.woken), []string{mailAgent})
	_, err = r.jobs().RejectJob(r.as(t, authz.Approver), &operatorpb.RejectJobRequest{Id: waitingJob, Reason: "late"})
	wantCode(t, err, codes.Aborted)
}

// TestWhySaysWhatWaitsForApproval, for the leaf as for the placement.
func TestWhySaysWhatWaitsForApproval(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	j := r.store.jobs[waitingJob]
	j.CertificateID, j.AgentID = certID, webAgent
	r.store.jobs[waitingJob] = j
	got, err := r.certificates().ExplainCertificate(r.as(t, authz.Viewer), &operatorpb.ExplainCertificateRequest{Id: certID})
	if err != nil || !strings.Contains(got.GetLeaves()[0].GetReason(), "waits for approval of "+waitingJob) {
		t.Fatal(got, err)
	}
}

func TestVerifyWakesTheAgents(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	got, err := r.certificates().VerifyCertificate(r.as(t, authz.Operator), &operatorpb.VerifyCertificateRequest{Id: "www"})
	if err != nil || len(got.GetJobs()) != 1 || got.GetJobs()[0].GetKind() != "Validation" || got.GetJobs()[0].GetReason() != "requested by operator:operator" {
		t.Fatal(got, err)
	}
	wantList(t, "woken", r.sessions.take(&r.sessions.woken), []string{webAgent})
}

func TestDeployWakesTheAgents(t *testing.T) {
	t.Parallel()
	r := newRig(t).estate(t)
	delete(r.store.jobs, jobID)
	got, err := r.certificates().DeployCertificate(r.as(t, authz.Operator), &operatorpb.DeployCertificateRequest{Id: "www"})
	if err != nil || len(got.GetJobs()) != 1 || got.GetJobs()[0].GetReason() != "requested by operator:operator" {
		t.Fatal(got, err)
	}
	wantList(t, "woken", r.sessions.take(&r.sessions.woken), []string{webAgent})
}
