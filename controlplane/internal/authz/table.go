package authz

import (
	"slices"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// Role is what an API key may do.
type Role string

// The roles. Every one reads; an approver decides on what others ordered, and an operator does not.
const (
	Admin    Role = "admin"    // everything, including who may join, CAs and retiring hosts
	Operator Role = "operator" // orders, renews and revokes certificates, keeps targets, cancels jobs
	Approver Role = "approver" // approves and rejects jobs that wait for it
	Viewer   Role = "viewer"   // reads
)

// roles lists every role.
var roles = []Role{Admin, Operator, Approver, Viewer}

func (r Role) valid() bool { return slices.Contains(roles, r) }

// Permission is what a method needs.
type Permission string

// The permissions. Reading is one permission: nothing that operators may read is a secret.
const (
	Read              Permission = "read"
	WriteCertificates Permission = "certificates.write"
	WriteTargets      Permission = "targets.write"
	WriteJobs         Permission = "jobs.write"
	ApproveJobs       Permission = "jobs.approve"
	WriteAgents       Permission = "agents.write"
	WriteIssuers      Permission = "issuers.write"
)

// grants are the permissions of a role.
var grants = map[Role][]Permission{
	Viewer:   {Read},
	Operator: {Read, WriteCertificates, WriteTargets, WriteJobs},
	Approver: {Read, ApproveJobs},
	Admin:    {Read, WriteCertificates, WriteTargets, WriteJobs, ApproveJobs, WriteAgents, WriteIssuers},
}

// methods is the only place that says what a method needs.
var methods = map[string]Permission{
	operatorpb.CertificatesService_ListCertificates_FullMethodName:   Read,
	operatorpb.CertificatesService_GetCertificate_FullMethodName:     Read,
	operatorpb.CertificatesService_CreateCertificate_FullMethodName:  WriteCertificates,
	operatorpb.CertificatesService_RenewCertificate_FullMethodName:   WriteCertificates,
	operatorpb.CertificatesService_RevokeCertificate_FullMethodName:  WriteCertificates,
	operatorpb.CertificatesService_DeployCertificate_FullMethodName:  WriteCertificates,
	operatorpb.CertificatesService_VerifyCertificate_FullMethodName:  WriteCertificates,
	operatorpb.CertificatesService_ListVersions_FullMethodName:       Read,
	operatorpb.CertificatesService_ExplainCertificate_FullMethodName: Read,
	operatorpb.AgentsService_ListAgents_FullMethodName:               Read,
	operatorpb.AgentsService_GetAgent_FullMethodName:                 Read,
	operatorpb.AgentsService_RetireAgent_FullMethodName:              WriteAgents,
	operatorpb.AgentsService_ReleaseAgent_FullMethodName:             WriteAgents,
	operatorpb.AgentsService_CreateJoinToken_FullMethodName:          WriteAgents,
	operatorpb.AgentsService_ListJoinTokens_FullMethodName:           Read,
	operatorpb.AgentsService_RevokeJoinToken_FullMethodName:          WriteAgents,
	operatorpb.JobsService_ListJobs_FullMethodName:                   Read,
	operatorpb.JobsService_GetJob_FullMethodName:                     Read,
	operatorpb.JobsService_CancelJob_FullMethodName:                  WriteJobs,
	operatorpb.JobsService_ApproveJob_FullMethodName:                 ApproveJobs,
	operatorpb.JobsService_RejectJob_FullMethodName:                  ApproveJobs,
	operatorpb.IssuersService_ListIssuers_FullMethodName:             Read,
	operatorpb.IssuersService_GetIssuer_FullMethodName:               Read,
	operatorpb.IssuersService_CreateIssuer_FullMethodName:            WriteIssuers,
	operatorpb.IssuersService_ListProfiles_FullMethodName:            Read,
	operatorpb.TargetsService_ListTargets_FullMethodName:             Read,
	operatorpb.TargetsService_GetTarget_FullMethodName:               Read,
	operatorpb.TargetsService_CreateTarget_FullMethodName:            WriteTargets,
	operatorpb.SystemService_GetStatus_FullMethodName:                Read,
	operatorpb.SystemService_ListAuditEvents_FullMethodName:          Read,
	operatorpb.SystemService_Watch_FullMethodName:                    Read,
}

// PermissionOf returns what the full gRPC method name needs; ok is false for a method that has no row, which nobody
// may call.
func PermissionOf(method string) (p Permission, ok bool) {
	p, ok = methods[method]
	return p, ok
}

// May reports whether role r has permission p. Unknown roles have none.
func (r Role) May(p Permission) bool { return slices.Contains(grants[r], p) }
