package api

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/durationpb"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// goodRequests holds a request for every method that succeeds against an estate. A new method without one fails the tests.
var goodRequests = map[string]proto.Message{
	operatorpb.CertificatesService_ListCertificates_FullMethodName:   &operatorpb.ListCertificatesRequest{},
	operatorpb.CertificatesService_GetCertificate_FullMethodName:     &operatorpb.GetCertificateRequest{Id: "www"},
	operatorpb.CertificatesService_CreateCertificate_FullMethodName:  order("new"),
	operatorpb.CertificatesService_RenewCertificate_FullMethodName:   &operatorpb.RenewCertificateRequest{Id: "www"},
	operatorpb.CertificatesService_VerifyCertificate_FullMethodName:  &operatorpb.VerifyCertificateRequest{Id: "www"},
	operatorpb.CertificatesService_DeployCertificate_FullMethodName:  &operatorpb.DeployCertificateRequest{Id: "www"},
	operatorpb.CertificatesService_RevokeCertificate_FullMethodName:  &operatorpb.RevokeCertificateRequest{Id: "www", Reason: "superseded"},
	operatorpb.CertificatesService_ListVersions_FullMethodName:       &operatorpb.ListVersionsRequest{CertificateId: "www"},
	operatorpb.CertificatesService_ExplainCertificate_FullMethodName: &operatorpb.ExplainCertificateRequest{Id: "www"},
	operatorpb.AgentsService_ListAgents_FullMethodName:               &operatorpb.ListAgentsRequest{},
	operatorpb.AgentsService_GetAgent_FullMethodName:                 &operatorpb.GetAgentRequest{Id: "web1"},
	operatorpb.AgentsService_RetireAgent_FullMethodName:              &operatorpb.RetireAgentRequest{Id: "web1", Reason: "scrapped"},
	operatorpb.AgentsService_ReleaseAgent_FullMethodName:             &operatorpb.ReleaseAgentRequest{Id: "mail1"},
	operatorpb.AgentsService_CreateJoinToken_FullMethodName:          &operatorpb.CreateJoinTokenRequest{Ttl: durationpb.New(time.Hour)},
	operatorpb.AgentsService_ListJoinTokens_FullMethodName:           &operatorpb.ListJoinTokensRequest{},
	operatorpb.AgentsService_RevokeJoinToken_FullMethodName:          &operatorpb.RevokeJoinTokenRequest{Id: tokenID},
	operatorpb.JobsService_ListJobs_FullMethodName:                   &operatorpb.ListJobsRequest{},
	operatorpb.JobsService_GetJob_FullMethodName:                     &operatorpb.GetJobRequest{Id: jobID},
	operatorpb.JobsService_CancelJob_FullMethodName:                  &operatorpb.CancelJobRequest{Id: jobID},
	operatorpb.JobsService_ApproveJob_FullMethodName:                 &operatorpb.ApproveJobRequest{Id: waitingJob},
	operatorpb.JobsService_RejectJob_FullMethodName:                  &operatorpb.RejectJobRequest{Id: waitingJob, Reason: "no"},
	operatorpb.IssuersService_ListIssuers_FullMethodName:             &operatorpb.ListIssuersRequest{},
	operatorpb.IssuersService_GetIssuer_FullMethodName:               &operatorpb.GetIssuerRequest{Id: "internal"},
	operatorpb.IssuersService_CreateIssuer_FullMethodName:            &operatorpb.CreateIssuerRequest{Name: "second", Kind: "local"},
	operatorpb.IssuersService_ListProfiles_FullMethodName:            &operatorpb.ListProfilesRequest{},
	operatorpb.TargetsService_ListTargets_FullMethodName:             &operatorpb.ListTargetsRequest{},
	operatorpb.TargetsService_GetTarget_FullMethodName:               &operatorpb.GetTargetRequest{Id: "site"},
	operatorpb.TargetsService_CreateTarget_FullMethodName:            &operatorpb.CreateTargetRequest{Name: "new", Agent: "web1", Kind: "file"},
	operatorpb.SystemService_GetStatus_FullMethodName:                &operatorpb.GetStatusRequest{},
	operatorpb.SystemService_ListAuditEvents_FullMethodName:          &operatorpb.ListAuditEventsRequest{},
	operatorpb.SystemService_Watch_FullMethodName:                    &operatorpb.WatchRequest{},
}

// method is one RPC of the descriptors.
type method struct {
	name string // full method name
	protoreflect.MethodDescriptor
}

func allMethods() []method {
	var out []method
	services := operatorpb.File_operator_v1_operator_proto.Services()
	for i := range services.Len() {
		s := services.Get(i)
		for j := range s.Methods().Len() {
			m := s.Methods().Get(j)
			out = append(out, method{"/" + string(s.FullName()) + "/" + string(m.Name()), m})
		}
	}
	return out
}

// eachMethod runs f for every method with its good request.
func eachMethod(t *testing.T, f func(t *testing.T, m method, good proto.Message)) {
	t.Helper()
	for _, m := range allMethods() {
		t.Run(string(m.Parent().Name())+"."+string(m.Name()), func(t *testing.T) {
			t.Parallel()
			good, ok := goodRequests[m.name]
			if !ok {
				t.Fatalf("%s has no row in goodRequests", m.name)
			}
			f(t, m, proto.Clone(good))
		})
	}
}

// call makes the call and returns its answer, of a stream the first message. A stream is left at once.
func (m method) call(ctx context.Context, t testing.TB, conn *grpc.ClientConn, req proto.Message) (proto.Message, error) {
	t.Helper()
	answer := m.newAnswer(t)
	if !m.IsStreamingServer() {
		return answer, conn.Invoke(ctx, m.name, req, answer)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, m.name)
	if err != nil {
		return nil, err
	}
	// A server that refuses at once makes this fail with EOF; the reason comes with the receive.
	if err := s.SendMsg(req); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	_ = s.CloseSend()
	return answer, s.RecvMsg(answer)
}

func (m method) newAnswer(t testing.TB) proto.Message {
	t.Helper()
	typ, err := protoregistry.GlobalTypes.FindMessageByName(m.Output().FullName())
	if err != nil {
		t.Fatal(err)
	}
	return typ.New().Interface()
}
