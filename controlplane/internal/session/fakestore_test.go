package session

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/issue"
	"github.com/certmesh/certmesh/protocol/fault"
)

// fakeStore keeps the promises of the store in memory: the epochs of sessions, the judgement by (job, attempt, state), and
// what is audited with each change. It is also the Issuer, which checks no more of a CSR than that it parses.
type fakeStore struct {
	mu         sync.Mutex
	tokens     map[string]domain.JoinToken
	enrolled   map[string]string // token/spki → agent
	agents     map[string]domain.Agent
	identities map[string]domain.Identity
	sessions   map[string]domain.Session
	jobs       map[string]domain.Job
	versions   map[string]domain.Version // certificate/agent/generation
	targets    map[string]domain.Target
	placements map[string][]string // certificate → targets
	rejections map[string]domain.StateRejection
	trail      []domain.AuditEvent
	seen       map[string]time.Time
	observed   []domain.Observation
	applied    map[domain.JobRef]int
	bundle     int64
	acks       []domain.TrustAck
	generation int64 // of the mesh CA that signs; 0: any
	roots      [][]byte
	serial     int
	calls      map[string]int
	issuing    int
	mostIssues int
	recovered  time.Time
	cas        []domain.CA
	adopted    []domain.FoundLeaf

	// before is asked before every call; an error takes the place of the answer.
	before func(method string) error
}

func newFakeStore(roots [][]byte) *fakeStore {
	return &fakeStore{tokens: map[string]domain.JoinToken{}, enrolled: map[string]string{}, agents: map[string]domain.Agent{},
		identities: map[string]domain.Identity{}, sessions: map[string]domain.Session{}, jobs: map[string]domain.Job{},
		versions: map[string]domain.Version{}, targets: map[string]domain.Target{}, placements: map[string][]string{},
		rejections: map[string]domain.StateRejection{}, seen: map[string]time.Time{}, applied: map[domain.JobRef]int{}, bundle: 1, roots: roots,
		calls: map[string]int{}}
}

// enter counts a call and asks the test; it returns with the store locked unless there is an error.
func (f *fakeStore) enter(method string) error {
	f.mu.Lock()
	f.calls[method]++
	before := f.before
	f.mu.Unlock()
	if before != nil {
		if err := before(method); err != nil {
			return err
		}
	}
	f.mu.Lock()
	return nil
}

func (f *fakeStore) onCall(before func(method string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.before = before
}

func (f *fakeStore) count(method string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[method]
}

func (f *fakeStore) job(id string) domain.Job {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.jobs[id]
}

func (f *fakeStore) agent(id string) domain.Agent {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.agents[id]
}

func (f *fakeStore) session(id string) domain.Session {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sessions[id]
}

func (f *fakeStore) audited(action string) []domain.AuditEvent {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(f.trail), func(e domain.AuditEvent) bool { return e.Action != action })
}

func (f *fakeStore) applications(ref domain.JobRef) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.applied[ref]
}

func (f *fakeStore) auditLocked(actor, action, resource string) {
	f.trail = append(f.trail, domain.AuditEvent{Actor: actor, Action: action, Resource: resource, Outcome: "ok"})
}

// order makes a job; a deployment gets a version to deploy.
func (f *fakeStore) order(kind domain.JobKind, agentID, certificateID, targetID string) domain.Job {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.orderLocked(kind, agentID, certificateID, targetID, 1)
}

func (f *fakeStore) orderLocked(kind domain.JobKind, agentID, certificateID, targetID string, generation int64) domain.Job {
	f.serial++
	now := domain.Micro(time.Now())
	j := domain.Job{ID: fmt.Sprintf("job_%06d", f.serial), Kind: kind, State: kind.InitialState(), AgentID: agentID, CertificateID: certificateID,
		TargetID: targetID, Generation: generation, MaxTries: domain.DefaultMaxTries, RunAt: now.Add(-time.Second), CreatedAt: now}
	f.jobs[j.ID] = j
	key := versionKey(certificateID, agentID, generation)
	if _, ok := f.versions[key]; (kind == domain.JobDeployment || kind == domain.JobValidation) && !ok {
		f.versions[key] = fakeVersion(certificateID, agentID, generation)
	}
	return j
}

func versionKey(certificateID, agentID string, generation int64) string {
	return fmt.Sprintf("%s/%s/%d", certificateID, agentID, generation)
}

func fakeVersion(certificateID, agentID string, generation int64) domain.Version {
	der := []byte("leaf of " + versionKey(certificateID, agentID, generation))
	return domain.Version{CertificateID: certificateID, AgentID: agentID, Generation: generation, DER: der, Fingerprint: domain.HashHex(der)}
}

func (f *fakeStore) cancel(jobID string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	j := f.jobs[jobID]
	j.State, j.FinishedAt = domain.JobCancelled, time.Now()
	f.jobs[jobID] = j
}

func (f *fakeStore) setAgent(id string, change func(*domain.Agent)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a := f.agents[id]
	change(&a)
	f.agents[id] = a
}

func (f *fakeStore) judgeLocked(jobID, agentID string, attempt int64) error {
	j, ok := f.jobs[jobID]
	switch {
	case !ok || j.AgentID != agentID:
		return fault.New(fault.NotFound, "there is no job %s of this agent", jobID)
	case !j.State.Open() || j.Attempt != attempt || attempt < 1:
		return fault.New(fault.Conflict, "job %s is at attempt %d and %s", jobID, j.Attempt, j.State)
	}
	return nil
}

func all[T any](n int, err error, broken func(error) T) []T {
	out := make([]T, n)
	for i := range out {
		out[i] = broken(err)
	}
	return out
}

func itself(err error) error { return err }

func (f *fakeStore) OpenSessions(_ context.Context, items []domain.SessionOpen) []domain.SessionOpened {
	if err := f.enter("OpenSessions"); err != nil {
		return all(len(items), err, func(err error) domain.SessionOpened { return domain.SessionOpened{Err: err} })
	}
	defer f.mu.Unlock()
	out := make([]domain.SessionOpened, len(items))
	for i, h := range items {
		a, ok := f.agents[h.AgentID]
		id, known := f.identities[h.IdentitySerial]
		switch {
		case !ok:
			out[i].Err = fault.New(fault.Forbidden, "there is no agent %s", h.AgentID)
		case a.State == domain.AgentRetired || a.State == domain.AgentQuarantined:
			out[i].Err = fault.New(fault.Forbidden, "agent %s may not connect", h.AgentID)
		case !known || id.AgentID != h.AgentID:
			out[i].Err = fault.New(fault.Unauthorized, "identity %s was not issued to agent %s", h.IdentitySerial, h.AgentID)
		case !id.RevokedAt.IsZero():
			out[i].Err = fault.New(fault.Unauthorized, "identity %s is revoked", h.IdentitySerial)
		default:
			out[i].Previous = f.sessions[h.AgentID]
			out[i].Epoch = out[i].Previous.Epoch + 1
			f.sessions[h.AgentID] = domain.Session{AgentID: h.AgentID, Epoch: out[i].Epoch, Holder: h.Node, BootID: h.BootID}
			a.State, a.Facts, a.Labels, a.Capabilities, a.LastSeen = domain.AgentOnline, h.Facts, h.Labels, h.Capabilities, h.At
			f.agents[h.AgentID], out[i].Agent = a, a
		}
	}
	return out
}

func (f *fakeStore) CloseSession(_ context.Context, agentID string, epoch domain.Epoch, _ time.Time) error {
	if err := f.enter("CloseSession"); err != nil {
		return err
	}
	defer f.mu.Unlock()
	x := f.sessions[agentID]
	if x.Epoch != epoch {
		return fault.New(fault.Conflict, "the session is another's")
	}
	x.Holder = ""
	f.sessions[agentID] = x
	if a := f.agents[agentID]; a.State == domain.AgentOnline {
		a.State = domain.AgentOffline
		f.agents[agentID] = a
	}
	return nil
}

func (f *fakeStore) SessionHolders(_ context.Context, ids []string) (map[string]domain.Session, error) {
	if err := f.enter("SessionHolders"); err != nil {
		return nil, err
	}
	defer f.mu.Unlock()
	out := map[string]domain.Session{}
	for _, id := range ids {
		if s, ok := f.sessions[id]; ok {
			out[id] = s
		}
	}
	return out, nil
}

func (f *fakeStore) Standings(_ context.Context, held []domain.HeldStream) ([]domain.Standing, error) {
	if err := f.enter("Standings"); err != nil {
		return nil, err
	}
	defer f.mu.Unlock()
	out := make([]domain.Standing, len(held))
	for i, h := range held {
		a, id := f.agents[h.AgentID], f.identities[h.IdentitySerial]
		out[i] = domain.Standing{Session: f.sessions[h.AgentID], State: a.State, Reason: a.Reason,
			Revoked: id.AgentID == h.AgentID && !id.RevokedAt.IsZero()}
	}
	return out, nil
}

func (f *fakeStore) AgentsWithOpenJobs(_ context.Context, node string, limit int) ([]string, error) {
	if err := f.enter("AgentsWithOpenJobs"); err != nil {
		return nil, err
	}
	defer f.mu.Unlock()
	found := map[string]bool{}
	for _, j := range f.jobs {
		if j.State.Open() && f.sessions[j.AgentID].Holder == node && len(found) < limit {
			found[j.AgentID] = true
		}
	}
	return slices.Sorted(maps.Keys(found)), nil
}

func (f *fakeStore) FlushSeen(_ context.Context, seen []domain.Seen) error {
	if err := f.enter("FlushSeen"); err != nil {
		return err
	}
	defer f.mu.Unlock()
	for _, s := range seen {
		f.seen[s.AgentID] = s.At
	}
	return nil
}

func (f *fakeStore) QuarantineAgent(_ context.Context, agentID, reason string, op domain.Op) error {
	if err := f.enter("QuarantineAgent"); err != nil {
		return err
	}
	defer f.mu.Unlock()
	a := f.agents[agentID]
	a.State, a.Reason = domain.AgentQuarantined, reason
	f.agents[agentID] = a
	f.auditLocked(op.Actor, "agent.quarantined", "agent/"+agentID)
	return nil
}

func (f *fakeStore) workLocked(j domain.Job) domain.Work {
	w := domain.Work{Job: j}
	if j.TargetID != "" {
		w.Version, w.Target = f.versions[versionKey(j.CertificateID, j.AgentID, j.Generation)], f.targets[j.TargetID]
		return w
	}
	w.Names, w.KeyAlgorithm = domain.Names{CommonName: "www.example.com", DNS: []string{"www.example.com"}}, domain.ECDSAP256
	return w
}

func (f *fakeStore) OpenWork(_ context.Context, queries []domain.WorkQuery) ([]domain.OpenWork, error) {
	if err := f.enter("OpenWork"); err != nil {
		return nil, err
	}
	defer f.mu.Unlock()
	out := make([]domain.OpenWork, len(queries))
	for _, id := range slices.Sorted(maps.Keys(f.jobs)) {
		for i, q := range queries {
			if j := f.jobs[id]; j.State.Open() && q.AgentID == j.AgentID {
				out[i].Work = append(out[i].Work, f.workLocked(j))
			}
		}
	}
	return out, nil
}

func (f *fakeStore) Settlements(_ context.Context, agentID string, refs []domain.JobRef) ([]domain.Settlement, error) {
	if err := f.enter("Settlements"); err != nil {
		return nil, err
	}
	defer f.mu.Unlock()
	out := make([]domain.Settlement, len(refs))
	for i, r := range refs {
		out[i] = f.settlementLocked(agentID, r)
	}
	return out, nil
}

func (f *fakeStore) settlementLocked(agentID string, r domain.JobRef) domain.Settlement {
	s := domain.Settlement{JobID: r.JobID, Attempt: r.Attempt}
	j, ok := f.jobs[r.JobID]
	if !ok || j.AgentID != agentID {
		return s
	}
	s.State, s.Kind, s.CertificateID, s.Generation, s.ErrorClass, s.Error = j.State, j.Kind, j.CertificateID, j.Generation, j.ErrorClass, j.Error
	s.Open = f.judgeLocked(r.JobID, agentID, r.Attempt) == nil
	if s.State == domain.JobCompleted && j.TargetID != "" {
		s.RetireBelow = j.Generation
	}
	return s
}

func (f *fakeStore) Dispatch(_ context.Context, items []domain.Dispatch) []error {
	if err := f.enter("Dispatch"); err != nil {
		return all(len(items), err, itself)
	}
	defer f.mu.Unlock()
	out := make([]error, len(items))
	for i, d := range items {
		j, ok := f.jobs[d.JobID]
		s := f.sessions[d.AgentID]
		switch {
		case s.Epoch != d.Epoch || s.Holder == "":
			out[i] = fault.New(fault.Conflict, "the session of agent %s is no longer at epoch %d", d.AgentID, d.Epoch)
		case !ok || j.AgentID != d.AgentID:
			out[i] = fault.New(fault.NotFound, "there is no job %s of this agent", d.JobID)
		case !j.State.Open() || j.Attempt != d.Attempt:
			out[i] = fault.New(fault.Conflict, "job %s is at attempt %d and %s", j.ID, j.Attempt, j.State)
		default:
			j.Attempt++
			j.State, j.AcceptedAt = j.Kind.InitialState(), time.Time{}
			f.jobs[j.ID] = j
		}
	}
	return out
}

func (f *fakeStore) Accept(_ context.Context, items []domain.Acceptance) []error {
	if err := f.enter("Accept"); err != nil {
		return all(len(items), err, itself)
	}
	defer f.mu.Unlock()
	out := make([]error, len(items))
	for i, a := range items {
		if out[i] = f.judgeLocked(a.JobID, a.AgentID, a.Attempt); out[i] != nil {
			continue
		}
		j := f.jobs[a.JobID]
		if j.AcceptedAt.IsZero() {
			j.AcceptedAt = a.At
			j.Tries++
			if j.TargetID != "" {
				j.State = domain.JobRunning
			}
		}
		f.jobs[j.ID] = j
	}
	return out
}

func (f *fakeStore) FailJobs(_ context.Context, items []domain.Failure) []domain.FailureOutcome {
	if err := f.enter("FailJobs"); err != nil {
		return all(len(items), err, func(err error) domain.FailureOutcome { return domain.FailureOutcome{Err: err} })
	}
	defer f.mu.Unlock()
	out := make([]domain.FailureOutcome, len(items))
	for i, x := range items {
		if out[i].Err = f.judgeLocked(x.JobID, x.AgentID, x.Attempt); out[i].Err != nil {
			continue
		}
		f.applied[domain.JobRef{JobID: x.JobID, Attempt: x.Attempt}]++
		j := domain.AfterFailure(f.jobs[x.JobID], x, fault.MayRetry(&fault.Error{Class: fault.Class(x.Class)}))
		if j.State.Open() {
			j.Attempt++
			j.RunAt = x.At // tests do not wait
		}
		f.jobs[j.ID], out[i].Job = j, j
	}
	return out
}

func (f *fakeStore) CompleteDeployments(_ context.Context, items []domain.DeployResult) []domain.DeployOutcome {
	if err := f.enter("CompleteDeployments"); err != nil {
		return all(len(items), err, func(err error) domain.DeployOutcome { return domain.DeployOutcome{Err: err} })
	}
	defer f.mu.Unlock()
	out := make([]domain.DeployOutcome, len(items))
	for i, r := range items {
		ref := domain.JobRef{JobID: r.JobID, Attempt: r.Attempt}
		if out[i].Err = f.judgeLocked(r.JobID, r.AgentID, r.Attempt); out[i].Err != nil {
			out[i].Settlement = f.settlementLocked(r.AgentID, ref)
			continue
		}
		j := f.jobs[r.JobID]
		v := f.versions[versionKey(j.CertificateID, j.AgentID, j.Generation)]
		if r.InstalledFingerprint != v.Fingerprint || r.ServedFingerprint != "" && r.ServedFingerprint != v.Fingerprint {
			out[i].Err = fault.InvalidField("installed_fingerprint", "is not the certificate that job %s installs", j.ID)
			continue
		}
		f.applied[ref]++
		j.State, j.FinishedAt = domain.JobCompleted, r.At
		f.jobs[j.ID] = j
		out[i].Settlement = f.settlementLocked(r.AgentID, ref)
		f.auditLocked("agent:"+r.AgentID, "certificate.deployed", "certificate/"+j.CertificateID)
	}
	return out
}

func (f *fakeStore) RecordObservation(_ context.Context, o domain.Observation) (bool, error) {
	if err := f.enter("RecordObservation"); err != nil {
		return false, err
	}
	defer f.mu.Unlock()
	if f.targets[o.TargetID].AgentID != o.AgentID || !slices.Contains(f.placements[o.CertificateID], o.TargetID) {
		return false, fault.New(fault.NotFound, "there is no such placement of this agent")
	}
	f.observed = append(f.observed, o)
	return true, nil
}

// Issue implements Issuer as the pipeline and the store do together.
func (f *fakeStore) Issue(_ context.Context, r issue.Request) (issue.Outcome, error) {
	f.mu.Lock()
	f.issuing++
	f.mostIssues = max(f.mostIssues, f.issuing)
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.issuing--
		f.mu.Unlock()
	}()
	if err := f.enter("Issue"); err != nil {
		return issue.Outcome{}, err
	}
	defer f.mu.Unlock()
	j := r.Work.Job
	if err := f.judgeLocked(j.ID, j.AgentID, j.Attempt); err != nil {
		return issue.Outcome{}, err
	}
	csr, err := x509.ParseCertificateRequest(r.CSR)
	if err != nil || csr.CheckSignature() != nil {
		return issue.Outcome{}, fault.InvalidField("csr", "is not a PKCS#10 request with a good signature")
	}
	f.applied[domain.JobRef{JobID: j.ID, Attempt: j.Attempt}]++
	stored := f.jobs[j.ID]
	stored.State, stored.FinishedAt = domain.JobCompleted, time.Now()
	f.jobs[j.ID] = stored
	v := fakeVersion(j.CertificateID, j.AgentID, j.Generation)
	f.versions[versionKey(j.CertificateID, j.AgentID, j.Generation)] = v
	out := issue.Outcome{Version: v, Generation: j.Generation}
	for _, t := range f.placements[j.CertificateID] {
		if f.targets[t].AgentID == j.AgentID {
			out.Deployments = append(out.Deployments, f.workLocked(f.orderLocked(domain.JobDeployment, j.AgentID, j.CertificateID, t, j.Generation)))
		}
	}
	return out, nil
}

func (f *fakeStore) Enroll(_ context.Context, e domain.Enrollment) (domain.Agent, error) {
	if err := f.enter("Enroll"); err != nil {
		return domain.Agent{}, err
	}
	defer f.mu.Unlock()
	k, ok := f.tokens[e.TokenID]
	switch {
	case !ok || !bytes.Equal(k.Hash, e.TokenHash):
		return domain.Agent{}, fault.New(fault.Unauthorized, "the join token is not known here")
	case !e.Op.At.Before(k.ExpiresAt):
		return domain.Agent{}, fault.New(fault.Unauthorized, "the join token has expired")
	}
	key := e.TokenID + "/" + e.SPKI
	if id, again := f.enrolled[key]; again {
		return f.agents[id], nil
	}
	if k.Uses >= k.MaxUses {
		return domain.Agent{}, fault.New(fault.Unauthorized, "the join token is used up")
	}
	k.Uses++
	f.tokens[e.TokenID] = k
	a := domain.Agent{ID: e.AgentID, Name: e.Name, State: domain.AgentOffline, Facts: e.Facts, CreatedAt: e.Op.At}
	f.agents[a.ID], f.enrolled[key] = a, a.ID
	f.auditLocked(e.Op.Actor, "agent.enrolled", "agent/"+a.ID)
	return a, nil
}

func (f *fakeStore) Agent(_ context.Context, id string) (domain.Agent, error) {
	if err := f.enter("Agent"); err != nil {
		return domain.Agent{}, err
	}
	defer f.mu.Unlock()
	if a, ok := f.agents[id]; ok {
		return a, nil
	}
	return domain.Agent{}, fault.New(fault.NotFound, "no agent is called %q", id)
}

func (f *fakeStore) Identity(_ context.Context, serial string) (domain.Identity, error) {
	if err := f.enter("Identity"); err != nil {
		return domain.Identity{}, err
	}
	defer f.mu.Unlock()
	if i, ok := f.identities[serial]; ok {
		return i, nil
	}
	return domain.Identity{}, fault.New(fault.NotFound, "no identity has the serial %q", serial)
}

func (f *fakeStore) RecordIdentity(_ context.Context, i domain.Identity, op domain.Op) error {
	if err := f.enter("RecordIdentity"); err != nil {
		return err
	}
	defer f.mu.Unlock()
	if f.agents[i.AgentID].State == domain.AgentRetired {
		return fault.New(fault.Forbidden, "agent %q is retired; it gets no identity", i.AgentID)
	}
	if f.generation > 0 && i.Generation != f.generation {
		return fault.New(fault.Conflict, "the mesh CA of generation %d does not sign any more", i.Generation)
	}
	f.identities[i.Serial] = i
	f.auditLocked(op.Actor, "identity.issued", "agent/"+i.AgentID)
	return nil
}

func (f *fakeStore) TrustBundle(context.Context) (int64, [][]byte, error) {
	if err := f.enter("TrustBundle"); err != nil {
		return 0, nil, err
	}
	defer f.mu.Unlock()
	return f.bundle, f.roots, nil
}

func (f *fakeStore) TargetsOfAgent(_ context.Context, agentID string) ([]domain.Target, error) {
	if err := f.enter("TargetsOfAgent"); err != nil {
		return nil, err
	}
	defer f.mu.Unlock()
	var out []domain.Target
	for _, id := range slices.Sorted(maps.Keys(f.targets)) {
		if t := f.targets[id]; t.AgentID == agentID {
			out = append(out, t)
		}
	}
	return out, nil
}

func (f *fakeStore) TargetsOfAgents(ctx context.Context, agentIDs []string) (map[string][]domain.Target, error) {
	out := map[string][]domain.Target{}
	for _, id := range agentIDs {
		all, err := f.TargetsOfAgent(ctx, id)
		if err != nil {
			return nil, err
		}
		out[id] = all
	}
	return out, nil
}

func (f *fakeStore) Rejections(_ context.Context, agentID string) ([]domain.StateRejection, error) {
	if err := f.enter("Rejections"); err != nil {
		return nil, err
	}
	defer f.mu.Unlock()
	var out []domain.StateRejection
	for _, r := range f.rejections {
		if r.AgentID == agentID {
			out = append(out, r)
		}
	}
	return out, nil
}

func (f *fakeStore) AcknowledgeTrust(_ context.Context, acks []domain.TrustAck) error {
	if err := f.enter("AcknowledgeTrust"); err != nil {
		return err
	}
	defer f.mu.Unlock()
	f.acks = append(f.acks, acks...)
	return nil
}

func (f *fakeStore) acknowledged() []domain.TrustAck {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.acks)
}

func (f *fakeStore) trust(version int64, roots ...[]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.bundle, f.roots = version, roots
}

func (f *fakeStore) RecordRejection(_ context.Context, r domain.StateRejection) error {
	if err := f.enter("RecordRejection"); err != nil {
		return err
	}
	defer f.mu.Unlock()
	f.rejections[r.AgentID+"/"+r.Kind+"/"+r.Name] = r
	return nil
}

func (f *fakeStore) ClearRejection(_ context.Context, agentID, kind, name string) error {
	if err := f.enter("ClearRejection"); err != nil {
		return err
	}
	defer f.mu.Unlock()
	delete(f.rejections, agentID+"/"+kind+"/"+name)
	return nil
}

func (f *fakeStore) refusals() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.rejections)
}

func (f *fakeStore) Versions(_ context.Context, certificateID string, p domain.PageRequest) ([]domain.Version, string, error) {
	if err := f.enter("Versions"); err != nil {
		return nil, "", err
	}
	defer f.mu.Unlock()
	var list []domain.Version
	for _, v := range f.versions {
		if v.CertificateID == certificateID {
			list = append(list, v)
		}
	}
	if len(list) == 0 {
		return nil, "", fault.New(fault.NotFound, "no certificate is called %q", certificateID)
	}
	slices.SortFunc(list, func(a, b domain.Version) int {
		return cmp.Or(-cmp.Compare(a.AgentID, b.AgentID), -cmp.Compare(a.Generation, b.Generation))
	})
	from := 0
	if p.After != "" {
		n, err := strconv.Atoi(p.After)
		if err != nil {
			return nil, "", fault.New(fault.Invalid, "the cursor is damaged")
		}
		from = n
	}
	if to := from + p.Size; to < len(list) {
		return list[from:to], strconv.Itoa(to), nil
	}
	return list[from:], "", nil
}

func (f *fakeStore) Audit(_ context.Context, events []domain.AuditEvent) error {
	if err := f.enter("Audit"); err != nil {
		return err
	}
	defer f.mu.Unlock()
	f.trail = append(f.trail, events...)
	return nil
}
