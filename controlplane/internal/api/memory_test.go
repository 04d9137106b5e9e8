package api

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

// memory is a store in memory that keeps the promises the services rely on, and no others.
type memory struct {
	mu         sync.Mutex
	keys       []domain.APIKey
	certs      map[string]domain.Certificate
	requests   map[string]string // request id → certificate
	leaves     map[string][]domain.Leaf
	placements map[string][]domain.Placement
	versions   map[string][]domain.Version
	jobs       map[string]domain.Job
	agents     map[string]domain.Agent
	rejections map[string][]domain.StateRejection
	tokens     map[string]domain.JoinToken
	roots      [][]byte
	issuers    map[string]domain.Issuer
	cas        map[string]domain.CA
	sealed     []domain.SealedKey
	profiles   map[string]domain.Profile
	targets    map[string]domain.Target
	audits     []domain.AuditEvent
	counts     domain.Counts

	// What the lists were asked for last.
	certFilter  domain.CertificateFilter
	jobFilter   domain.JobFilter
	agentState  domain.AgentState
	targetAgent string
	resource    string

	// page is given what the next list is asked for; nil: nobody cares.
	page *domain.PageRequest

	// before runs first in every method, by its name: it may return an error or panic.
	before func(method string) error
}

func newMemory() *memory {
	return &memory{
		certs: map[string]domain.Certificate{}, requests: map[string]string{}, leaves: map[string][]domain.Leaf{},
		placements: map[string][]domain.Placement{}, versions: map[string][]domain.Version{}, jobs: map[string]domain.Job{},
		agents: map[string]domain.Agent{}, rejections: map[string][]domain.StateRejection{}, tokens: map[string]domain.JoinToken{},
		issuers: map[string]domain.Issuer{}, cas: map[string]domain.CA{}, profiles: map[string]domain.Profile{},
		targets: map[string]domain.Target{},
	}
}

func (m *memory) enter(method string) (func(), error) {
	m.mu.Lock()
	before := m.before
	m.mu.Unlock()
	if before != nil {
		if err := before(method); err != nil {
			return func() {}, err
		}
	}
	m.mu.Lock()
	return m.mu.Unlock, nil
}

// setBefore changes the hook while calls run.
func (m *memory) setBefore(f func(method string) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.before = f
}

// lookup finds by id or name.
func lookup[T any](noun string, all map[string]T, key string, name func(T) string) (T, error) {
	if v, ok := all[key]; ok {
		return v, nil
	}
	for _, v := range all {
		if name(v) == key {
			return v, nil
		}
	}
	var none T
	return none, fault.New(fault.NotFound, "no %s %q", noun, key)
}

func certName(c domain.Certificate) string { return c.Name }
func agentName(a domain.Agent) string      { return a.Name }
func issuerName(i domain.Issuer) string    { return i.Name }
func profileName(p domain.Profile) string  { return p.Name }
func targetName(t domain.Target) string    { return t.Name }

// paged is a page of all that pass, by key.
func paged[T any](m *memory, all map[string]T, p domain.PageRequest, pass func(T) bool) ([]T, string, error) {
	if m.page != nil {
		*m.page, m.page = p, nil
	}
	size := cmp.Or(p.Size, 50)
	if size < 0 || size > domain.MaxPageSize {
		return nil, "", fault.InvalidField("page.size", "is too great")
	}
	var out []T
	last := ""
	for _, k := range slices.Sorted(maps.Keys(all)) {
		if k <= p.After || !pass(all[k]) {
			continue
		}
		if len(out) == size {
			return out, last, nil
		}
		out, last = append(out, all[k]), k
	}
	return out, "", nil
}

func every[T any](T) bool { return true }

func (m *memory) note(op domain.Op, action, resource string) {
	m.audits = append(m.audits, domain.AuditEvent{ID: id.New(id.Audit), At: op.At, Actor: op.Actor, Action: action, Resource: resource,
		Outcome: "ok", RequestID: op.RequestID, RemoteAddr: op.RemoteAddr})
}

func (m *memory) APIKeyByHash(_ context.Context, hash []byte) (domain.APIKey, error) {
	leave, err := m.enter("APIKeyByHash")
	defer leave()
	if err != nil {
		return domain.APIKey{}, err
	}
	for _, k := range m.keys {
		if string(k.Hash) == string(hash) {
			return k, nil
		}
	}
	return domain.APIKey{}, fault.New(fault.NotFound, "no such key")
}

func orderText(c domain.Certificate, targets []string) string {
	return fmt.Sprint(c.Name, c.Names, c.IssuerID, c.ProfileID, c.Owner, c.Policy, c.CreatedBy, targets)
}

func (m *memory) CreateCertificate(_ context.Context, n domain.NewCertificate) (domain.Certificate, []domain.Job, error) {
	leave, err := m.enter("CreateCertificate")
	defer leave()
	if err != nil {
		return domain.Certificate{}, nil, err
	}
	c := n.Certificate
	if was, ok := m.requests[n.RequestID]; ok && n.RequestID != "" {
		var targets []string
		for _, p := range m.placements[was] {
			targets = append(targets, p.TargetID)
		}
		if orderText(m.certs[was], targets) != orderText(c, n.TargetIDs) {
			return domain.Certificate{}, nil, fault.New(fault.Conflict, "ordered with this request id, and differently")
		}
		return m.certs[was], m.jobsOf(was), nil
	}
	if _, err := lookup("", m.certs, c.Name, certName); err == nil {
		return domain.Certificate{}, nil, fault.New(fault.Conflict, "certificate name %q is taken", c.Name)
	}
	for _, t := range n.TargetIDs {
		if !m.targets[t].Enabled {
			return domain.Certificate{}, nil, fault.InvalidField("target_ids", "target %q is disabled", m.targets[t].Name)
		}
	}
	for cert, all := range m.placements {
		c := m.certs[cert]
		for _, p := range all {
			if c.Status != domain.CertificateRevoked && c.Status != domain.CertificateArchived && slices.Contains(n.TargetIDs, p.TargetID) {
				return domain.Certificate{}, nil, fault.New(fault.Conflict, "target %q holds certificate %q, and a target holds one; renew that certificate, or place this one at another target",
					m.targets[p.TargetID].Name, c.Name)
			}
		}
	}
	c.Status, c.Revision, c.UpdatedAt = domain.CertificatePending, 1, c.CreatedAt
	m.certs[c.ID] = c
	if n.RequestID != "" {
		m.requests[n.RequestID] = c.ID
	}
	for _, t := range n.TargetIDs {
		agent := m.targets[t].AgentID
		m.placements[c.ID] = append(m.placements[c.ID], domain.Placement{CertificateID: c.ID, TargetID: t, AgentID: agent, State: domain.PlacementPending})
		if !slices.ContainsFunc(m.leaves[c.ID], func(l domain.Leaf) bool { return l.AgentID == agent }) {
			m.leaves[c.ID] = append(m.leaves[c.ID], domain.Leaf{CertificateID: c.ID, AgentID: agent, Generation: 1})
			m.addJob(domain.JobIssuance, c.ID, agent, "ordered", n.Op)
		}
	}
	m.note(n.Op, "certificate.created", "certificate/"+c.ID)
	return c, m.jobsOf(c.ID), nil
}

func (m *memory) addJob(kind domain.JobKind, cert, agent, reason string, op domain.Op) {
	j := domain.Job{ID: id.New(id.Job), Kind: kind, State: kind.InitialState(), CertificateID: cert, AgentID: agent, Generation: 1,
		MaxTries: domain.DefaultMaxTries, Reason: reason, RequestID: op.RequestID, CreatedAt: op.At, UpdatedAt: op.At}
	m.jobs[j.ID] = j
}

func (m *memory) jobsOf(cert string) []domain.Job {
	var out []domain.Job
	for _, k := range slices.Sorted(maps.Keys(m.jobs)) {
		if m.jobs[k].CertificateID == cert {
			out = append(out, m.jobs[k])
		}
	}
	return out
}

func (m *memory) RenewCertificate(_ context.Context, key, reason string, op domain.Op) ([]domain.Job, error) {
	leave, err := m.enter("RenewCertificate")
	defer leave()
	if err != nil {
		return nil, err
	}
	c, err := lookup("certificate", m.certs, key, certName)
	if err != nil {
		return nil, err
	}
	if c.Status == domain.CertificateRevoked {
		return nil, fault.New(fault.Conflict, "certificate %q is Revoked", c.Name)
	}
	var out []domain.Job
	for _, l := range m.leaves[c.ID] {
		open := func() *domain.Job {
			for _, j := range m.jobsOf(c.ID) {
				if j.AgentID == l.AgentID && j.State.Open() {
					return &j
				}
			}
			return nil
		}
		if open() == nil {
			m.addJob(domain.JobRenewal, c.ID, l.AgentID, reason, op)
		}
		out = append(out, *open())
	}
	m.note(op, "certificate.renewal_ordered", "certificate/"+c.ID)
	return out, nil
}

func (m *memory) DeployCertificate(_ context.Context, key, reason string, op domain.Op) ([]domain.Job, error) {
	leave, err := m.enter("DeployCertificate")
	defer leave()
	if err != nil {
		return nil, err
	}
	c, err := lookup("certificate", m.certs, key, certName)
	if err != nil {
		return nil, err
	}
	if c.Status == domain.CertificateRevoked {
		return nil, fault.New(fault.Conflict, "certificate %q is Revoked", c.Name)
	}
	for _, p := range m.placements[c.ID] {
		if !slices.ContainsFunc(m.jobsOf(c.ID), func(j domain.Job) bool { return j.TargetID == p.TargetID && j.State.Open() }) {
			j := domain.Job{ID: id.New(id.Job), Kind: domain.JobDeployment, State: domain.JobPending, CertificateID: c.ID, AgentID: p.AgentID, TargetID: p.TargetID,
				Generation: 1, Reason: reason, RequestID: op.RequestID, CreatedAt: op.At, UpdatedAt: op.At}
			m.jobs[j.ID] = j
		}
	}
	m.note(op, "certificate.deployment_ordered", "certificate/"+c.ID)
	return slices.DeleteFunc(m.jobsOf(c.ID), func(j domain.Job) bool { return j.Kind != domain.JobDeployment || !j.State.Open() }), nil
}

func (m *memory) VerifyCertificate(_ context.Context, key, reason string, op domain.Op) ([]domain.Job, error) {
	leave, err := m.enter("VerifyCertificate")
	defer leave()
	if err != nil {
		return nil, err
	}
	c, err := lookup("certificate", m.certs, key, certName)
	if err != nil {
		return nil, err
	}
	var out []domain.Job
	for _, p := range m.placements[c.ID] {
		j := domain.Job{ID: id.New(id.Job), Kind: domain.JobValidation, State: domain.JobPending, CertificateID: c.ID, AgentID: p.AgentID, TargetID: p.TargetID,
			Generation: 1, Reason: reason, RequestID: op.RequestID, CreatedAt: op.At, UpdatedAt: op.At}
		m.jobs[j.ID] = j
		m.note(op, "job.created", "job/"+j.ID)
		out = append(out, j)
	}
	return out, nil
}

func (m *memory) RevokeCertificate(_ context.Context, key string, reason domain.RevocationReason, op domain.Op) (domain.Certificate, []string, error) {
	leave, err := m.enter("RevokeCertificate")
	defer leave()
	if err != nil {
		return domain.Certificate{}, nil, err
	}
	c, err := lookup("certificate", m.certs, key, certName)
	if err != nil {
		return c, nil, err
	}
	c.Status = domain.CertificateRevoked
	m.certs[c.ID] = c
	var serials []string
	for i, v := range m.versions[c.ID] {
		m.versions[c.ID][i].RevokedAt, m.versions[c.ID][i].RevocationReason = op.At, reason
		serials = append(serials, v.Serial)
	}
	for _, j := range m.jobsOf(c.ID) {
		m.cancel(j, op)
	}
	m.note(op, "certificate.revoked", "certificate/"+c.ID)
	return c, serials, nil
}

func (m *memory) cancel(j domain.Job, op domain.Op) domain.Job {
	if j.State.Open() {
		j.State, j.FinishedAt = domain.JobCancelled, op.At
		m.jobs[j.ID] = j
	}
	return j
}

func (m *memory) CertificateView(_ context.Context, key string) (domain.CertificateView, error) {
	leave, err := m.enter("CertificateView")
	defer leave()
	if err != nil {
		return domain.CertificateView{}, err
	}
	c, err := lookup("certificate", m.certs, key, certName)
	v := domain.CertificateView{Certificate: c, Leaves: slices.Clone(m.leaves[c.ID]), Placements: slices.Clone(m.placements[c.ID]), TargetNames: map[string]string{}}
	for _, p := range v.Placements {
		v.TargetNames[p.TargetID] = m.targets[p.TargetID].Name
	}
	return v, err
}

func (m *memory) Certificates(_ context.Context, f domain.CertificateFilter, p domain.PageRequest) ([]domain.Certificate, map[string]domain.PlacementCounts, string, error) {
	leave, err := m.enter("Certificates")
	defer leave()
	if err != nil {
		return nil, nil, "", err
	}
	m.certFilter = f
	all, next, err := paged(m, m.certs, p, func(c domain.Certificate) bool {
		return (f.Status == "" || c.Status == f.Status) && strings.HasPrefix(c.Name, f.NamePrefix) && (f.Owner == "" || c.Owner == f.Owner)
	})
	counts := map[string]domain.PlacementCounts{}
	for _, c := range all {
		counts[c.ID] = domain.PlacementCounts{Total: len(m.placements[c.ID])}
	}
	return all, counts, next, err
}

func (m *memory) Versions(_ context.Context, key string, p domain.PageRequest) ([]domain.Version, string, error) {
	leave, err := m.enter("Versions")
	defer leave()
	if err != nil {
		return nil, "", err
	}
	c, err := lookup("certificate", m.certs, key, certName)
	if err != nil {
		return nil, "", err
	}
	bySerial := map[string]domain.Version{}
	for _, v := range m.versions[c.ID] {
		bySerial[v.Serial] = v
	}
	return paged(m, bySerial, p, every[domain.Version])
}

func (m *memory) Agent(_ context.Context, key string) (domain.Agent, error) {
	leave, err := m.enter("Agent")
	defer leave()
	if err != nil {
		return domain.Agent{}, err
	}
	return lookup("agent", m.agents, key, agentName)
}

func (m *memory) Agents(_ context.Context, state domain.AgentState, p domain.PageRequest) ([]domain.Agent, string, error) {
	leave, err := m.enter("Agents")
	defer leave()
	if err != nil {
		return nil, "", err
	}
	m.agentState = state
	return paged(m, m.agents, p, func(a domain.Agent) bool { return state == "" || a.State == state })
}

func (m *memory) RetireAgent(_ context.Context, key, reason string, op domain.Op) (domain.Agent, error) {
	leave, err := m.enter("RetireAgent")
	defer leave()
	if err != nil {
		return domain.Agent{}, err
	}
	a, err := lookup("agent", m.agents, key, agentName)
	if err != nil {
		return a, err
	}
	a.State, a.Reason = domain.AgentRetired, reason
	m.agents[a.ID] = a
	for _, j := range m.jobs {
		if j.AgentID == a.ID {
			m.cancel(j, op)
		}
	}
	m.note(op, "agent.retired", "agent/"+a.ID)
	return a, nil
}

func (m *memory) ReleaseAgent(_ context.Context, key string, op domain.Op) (domain.Agent, error) {
	leave, err := m.enter("ReleaseAgent")
	defer leave()
	if err != nil {
		return domain.Agent{}, err
	}
	a, err := lookup("agent", m.agents, key, agentName)
	if err != nil {
		return a, err
	}
	if a.State != domain.AgentQuarantined {
		return a, fault.New(fault.Conflict, "agent %q is %s, not quarantined", a.Name, a.State)
	}
	a.State, a.Reason = domain.AgentOffline, ""
	m.agents[a.ID] = a
	m.note(op, "agent.released", "agent/"+a.ID)
	return a, nil
}

func (m *memory) Rejections(_ context.Context, agentID string) ([]domain.StateRejection, error) {
	leave, err := m.enter("Rejections")
	defer leave()
	return m.rejections[agentID], err
}

func (m *memory) CreateJoinToken(_ context.Context, t domain.JoinToken, op domain.Op) error {
	leave, err := m.enter("CreateJoinToken")
	defer leave()
	if err != nil {
		return err
	}
	m.tokens[t.ID] = t
	m.note(op, "token.created", "token/"+t.ID)
	return nil
}

func (m *memory) JoinTokens(_ context.Context, p domain.PageRequest) ([]domain.JoinToken, string, error) {
	leave, err := m.enter("JoinTokens")
	defer leave()
	if err != nil {
		return nil, "", err
	}
	return paged(m, m.tokens, p, every[domain.JoinToken])
}

func (m *memory) RevokeJoinToken(_ context.Context, key string, op domain.Op) (domain.JoinToken, error) {
	leave, err := m.enter("RevokeJoinToken")
	defer leave()
	if err != nil {
		return domain.JoinToken{}, err
	}
	t, err := lookup("join token", m.tokens, key, func(t domain.JoinToken) string { return t.ID })
	if err != nil || !t.RevokedAt.IsZero() {
		return t, err
	}
	t.RevokedAt = op.At
	m.tokens[t.ID] = t
	m.note(op, "token.revoked", "token/"+t.ID)
	return t, nil
}

func (m *memory) TrustBundle(context.Context) (int64, [][]byte, error) {
	leave, err := m.enter("TrustBundle")
	defer leave()
	if err == nil && len(m.roots) == 0 {
		err = fault.New(fault.NotFound, "the cluster has no trust bundle yet")
	}
	return 1, m.roots, err
}

func (m *memory) Jobs(_ context.Context, f domain.JobFilter, p domain.PageRequest) ([]domain.Job, string, error) {
	leave, err := m.enter("Jobs")
	defer leave()
	if err != nil {
		return nil, "", err
	}
	m.jobFilter = f
	cert, agent := f.CertificateID, f.AgentID
	if cert != "" {
		c, err := lookup("certificate", m.certs, cert, certName)
		if err != nil {
			return nil, "", err
		}
		cert = c.ID
	}
	if agent != "" {
		a, err := lookup("agent", m.agents, agent, agentName)
		if err != nil {
			return nil, "", err
		}
		agent = a.ID
	}
	return paged(m, m.jobs, p, func(j domain.Job) bool {
		return (cert == "" || j.CertificateID == cert) && (agent == "" || j.AgentID == agent) && (!f.Open || j.State.Open()) && (f.State == "" || j.State == f.State)
	})
}

func (m *memory) Job(_ context.Context, jobID string) (domain.Job, error) {
	leave, err := m.enter("Job")
	defer leave()
	if err != nil {
		return domain.Job{}, err
	}
	return lookup("job", m.jobs, jobID, func(j domain.Job) string { return j.ID })
}

func (m *memory) CancelJob(_ context.Context, jobID string, op domain.Op) (domain.Job, error) {
	leave, err := m.enter("CancelJob")
	defer leave()
	if err != nil {
		return domain.Job{}, err
	}
	j, err := lookup("job", m.jobs, jobID, func(j domain.Job) string { return j.ID })
	if err != nil {
		return j, err
	}
	if !j.State.Open() && j.State != domain.JobCancelled {
		return j, fault.New(fault.Conflict, "job %s is %s", j.ID, j.State)
	}
	m.note(op, "job.cancelled", "job/"+j.ID)
	return m.cancel(j, op), nil
}

func (m *memory) ApproveJob(_ context.Context, jobID, reason string, op domain.Op) (domain.Job, error) {
	return m.decide("ApproveJob", "job.approved", jobID, reason, op, func(j *domain.Job) { j.State = j.Kind.InitialState() })
}

func (m *memory) RejectJob(_ context.Context, jobID, reason string, op domain.Op) (domain.Job, error) {
	return m.decide("RejectJob", "job.rejected", jobID, reason, op, func(j *domain.Job) {
		j.State, j.Error, j.FinishedAt = domain.JobCancelled, reason, op.At
	})
}

func (m *memory) decide(method, action, jobID, reason string, op domain.Op, change func(*domain.Job)) (domain.Job, error) {
	leave, err := m.enter(method)
	defer leave()
	if err != nil {
		return domain.Job{}, err
	}
	j, err := lookup("job", m.jobs, jobID, func(j domain.Job) string { return j.ID })
	if err != nil {
		return j, err
	}
	if j.State != domain.JobAwaitingApproval {
		return j, fault.New(fault.Conflict, "job %s is %s", j.ID, j.State)
	}
	if m.certs[j.CertificateID].CreatedBy == op.Actor {
		return j, fault.New(fault.Forbidden, "%s ordered it", op.Actor)
	}
	change(&j)
	m.jobs[j.ID] = j
	m.note(op, action, "job/"+j.ID)
	m.audits[len(m.audits)-1].Detail = map[string]string{"reason": reason}
	return j, nil
}

func (m *memory) CreateIssuer(_ context.Context, i domain.Issuer, ca domain.CA, keys []domain.SealedKey, op domain.Op) error {
	leave, err := m.enter("CreateIssuer")
	defer leave()
	if err != nil {
		return err
	}
	if _, err := lookup("", m.issuers, i.Name, issuerName); err == nil {
		return fault.New(fault.Conflict, "issuer name %q is taken", i.Name)
	}
	m.issuers[i.ID], m.cas[i.ID], m.sealed = i, ca, append(m.sealed, keys...)
	m.note(op, "issuer.created", "issuer/"+i.ID)
	return nil
}

func (m *memory) Issuers(_ context.Context, p domain.PageRequest) ([]domain.Issuer, string, error) {
	leave, err := m.enter("Issuers")
	defer leave()
	if err != nil {
		return nil, "", err
	}
	return paged(m, m.issuers, p, every[domain.Issuer])
}

func (m *memory) Issuer(_ context.Context, key string) (domain.Issuer, error) {
	leave, err := m.enter("Issuer")
	defer leave()
	if err != nil {
		return domain.Issuer{}, err
	}
	return lookup("issuer", m.issuers, key, issuerName)
}

func (m *memory) CA(_ context.Context, issuerID string) (domain.CA, error) {
	leave, err := m.enter("CA")
	defer leave()
	if err != nil {
		return domain.CA{}, err
	}
	return lookup("CA", m.cas, issuerID, func(domain.CA) string { return "" })
}

func (m *memory) CAs(context.Context) ([]domain.CA, error) {
	leave, err := m.enter("CAs")
	defer leave()
	return slices.Collect(maps.Values(m.cas)), err
}

func (m *memory) Profiles(_ context.Context, p domain.PageRequest) ([]domain.Profile, string, error) {
	leave, err := m.enter("Profiles")
	defer leave()
	if err != nil {
		return nil, "", err
	}
	return paged(m, m.profiles, p, every[domain.Profile])
}

func (m *memory) Profile(_ context.Context, key string) (domain.Profile, error) {
	leave, err := m.enter("Profile")
	defer leave()
	if err != nil {
		return domain.Profile{}, err
	}
	return lookup("profile", m.profiles, key, profileName)
}

func (m *memory) CreateTarget(_ context.Context, t domain.Target, op domain.Op) error {
	leave, err := m.enter("CreateTarget")
	defer leave()
	if err != nil {
		return err
	}
	if _, err := lookup("", m.targets, t.Name, targetName); err == nil {
		return fault.New(fault.Conflict, "target name %q is taken", t.Name)
	}
	m.targets[t.ID] = t
	m.note(op, "target.created", "target/"+t.ID)
	return nil
}

func (m *memory) Targets(_ context.Context, agentID string, p domain.PageRequest) ([]domain.Target, string, error) {
	leave, err := m.enter("Targets")
	defer leave()
	if err != nil {
		return nil, "", err
	}
	m.targetAgent = agentID
	return paged(m, m.targets, p, func(t domain.Target) bool { return agentID == "" || t.AgentID == agentID })
}

func (m *memory) Target(_ context.Context, key string) (domain.Target, error) {
	leave, err := m.enter("Target")
	defer leave()
	if err != nil {
		return domain.Target{}, err
	}
	return lookup("target", m.targets, key, targetName)
}

func (m *memory) Counts(context.Context) (domain.Counts, error) {
	leave, err := m.enter("Counts")
	defer leave()
	return m.counts, err
}

func (m *memory) AuditEvents(_ context.Context, resource string, p domain.PageRequest) ([]domain.AuditEvent, string, error) {
	leave, err := m.enter("AuditEvents")
	defer leave()
	if err != nil {
		return nil, "", err
	}
	m.resource = resource
	byID := map[string]domain.AuditEvent{}
	for _, e := range m.audits {
		byID[e.ID] = e
	}
	return paged(m, byID, p, func(e domain.AuditEvent) bool { return resource == "" || e.Resource == resource })
}

func (m *memory) Audit(_ context.Context, events []domain.AuditEvent) error {
	leave, err := m.enter("Audit")
	defer leave()
	if err != nil {
		return err
	}
	m.audits = append(m.audits, events...)
	return nil
}

// trail is a copy of the audit rows.
func (m *memory) trail() []domain.AuditEvent {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.audits)
}

func (m *memory) SchemaVersion(context.Context) (int64, int64, error) {
	leave, err := m.enter("SchemaVersion")
	defer leave()
	return 7, 8, err
}
