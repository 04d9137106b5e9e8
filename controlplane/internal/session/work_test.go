package session

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// TestIssueAndDeploy is the main job over one stream: key work, CSR, issue, deployment, and what may be retired.
func TestIssueAndDeploy(t *testing.T) {
	t.Parallel()
	var changed atomic.Int64
	p := newPlane(t, func(c *Config) { c.Changed = func() { changed.Add(1) } })
	h := p.host("web1")
	p.store.targets["tgt_1"] = domain.Target{ID: "tgt_1", Name: "site", AgentID: h.id, Kind: "file", Settings: []byte(`{"path":"/x"}`), Enabled: true, Revision: 1}
	p.store.placements["cert_1"] = []string{"tgt_1"}
	watch := p.hub.Subscribe(nil, "")
	defer watch.Close()
	k := h.online(credits(2, 2))
	j := p.store.order(domain.JobIssuance, h.id, "cert_1", "")
	p.srv.Wake(h.id)

	a := k.assignment()
	if a.GetId() != j.ID || a.GetAttempt() != 1 || a.GetKey().GetKeyAlgorithm() != "ECDSA-P256" || a.GetKey().GetDnsNames()[0] != "www.example.com" {
		t.Fatalf("assigned %v", a)
	}
	k.send(accepted(a.GetId(), 1))
	k.send(csrFor(a.GetId(), 1, newCSR(t, newKey(t))))
	if s := k.settled(); s.GetOutcome() != agentpb.Settled_OUTCOME_OK || s.GetGeneration() != 1 || s.GetCertificateId() != "cert_1" {
		t.Fatalf("settled %v", s)
	}
	d := k.assignment()
	w := d.GetDeploy()
	if w.GetTarget().GetId() != "tgt_1" || w.GetGeneration() != 1 || len(w.GetChain()) != 1 || string(w.GetTarget().GetSettings()) != `{"path":"/x"}` {
		t.Fatalf("assigned %v", d)
	}
	k.send(accepted(d.GetId(), 1))
	k.send(deployed(d.GetId(), 1, w.GetChain()[0]))
	if s := k.settled(); s.GetOutcome() != agentpb.Settled_OUTCOME_OK || s.GetRetireBelow() != 1 {
		t.Fatalf("settled %v", s)
	}
	for _, id := range []string{j.ID, d.GetId()} {
		if got := p.store.job(id); got.State != domain.JobCompleted {
			t.Errorf("job %s is %s", id, got.State)
		}
	}
	if changed.Load() != 2 {
		t.Errorf("duties were nudged %d times", changed.Load())
	}
	eventually(t, "watchers are told", func() bool {
		seen, _ := watch.Take()
		for _, n := range seen {
			if n.Kind == hub.Certificates && n.ID == "cert_1" {
				return true
			}
		}
		return false
	})
}

// TestFailuresAreRetried: a failed deployment is tried again with a higher attempt; one that cannot succeed is not.
func TestFailuresAreRetried(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	j := p.store.order(domain.JobDeployment, h.id, "cert_1", "tgt_1")
	k := h.online(credits(0, 5))
	a := k.assignment()
	k.send(accepted(j.ID, a.GetAttempt()))
	k.send(failedWith(j.ID, a.GetAttempt(), fault.Retryable, "reload\x1b[31m failed\u202e"))
	s := k.settled()
	if s.GetOutcome() != agentpb.Settled_OUTCOME_FAILED || s.GetFailure().GetClass() != string(fault.Retryable) {
		t.Fatalf("settled %v", s)
	}
	if got := p.store.job(j.ID); got.Error != "reload[31m failed" || got.Tries != 1 {
		t.Fatalf("recorded as %q after %d tries", got.Error, got.Tries)
	}
	b := k.assignment()
	if b.GetId() != j.ID || b.GetAttempt() <= a.GetAttempt() {
		t.Fatalf("after attempt %d came %v", a.GetAttempt(), b)
	}
	// The late answer of the first attempt changes nothing.
	k.send(deployed(j.ID, a.GetAttempt(), b.GetDeploy().GetChain()[0]))
	if s := k.settled(); s.GetOutcome() != agentpb.Settled_OUTCOME_IGNORED || s.GetAttempt() != a.GetAttempt() {
		t.Fatalf("settled %v", s)
	}
	k.send(failedWith(j.ID, b.GetAttempt(), fault.Rejected, "the path is outside the roots"))
	if s := k.settled(); s.GetOutcome() != agentpb.Settled_OUTCOME_FAILED {
		t.Fatalf("settled %v", s)
	}
	if got := p.store.job(j.ID); got.State != domain.JobFailed {
		t.Fatalf("the job is %s", got.State)
	}
}

// TestWrongFingerprintFailsTheJob: an agent that installed something else is not believed.
func TestWrongFingerprintFailsTheJob(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	j := p.store.order(domain.JobDeployment, h.id, "cert_1", "tgt_1")
	k := h.online(credits(0, 1))
	k.send(deployed(j.ID, k.assignment().GetAttempt(), []byte("another leaf")))
	if s := k.settled(); s.GetOutcome() != agentpb.Settled_OUTCOME_FAILED || s.GetFailure().GetClass() != string(fault.Invalid) {
		t.Fatalf("settled %v", s)
	}
}

// TestBadCSR: it fails the job with the reason, and nothing is issued.
func TestBadCSR(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	j := p.store.order(domain.JobRenewal, h.id, "cert_1", "")
	k := h.online(credits(1, 0))
	a := k.assignment()
	csr := newCSR(t, newKey(t))
	csr[len(csr)-1] ^= 1 // the signature
	k.send(csrFor(j.ID, a.GetAttempt(), csr))
	if s := k.settled(); s.GetOutcome() != agentpb.Settled_OUTCOME_FAILED || s.GetFailure().GetClass() != string(fault.Invalid) {
		t.Fatalf("settled %v", s)
	}
	if got := p.store.job(j.ID); got.State != domain.JobFailed || len(p.store.versions) != 0 {
		t.Fatalf("the job is %s, %d versions", got.State, len(p.store.versions))
	}
}

// TestReplayedResult: sent again, it is answered with what was recorded and applied once.
func TestReplayedResult(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	j := p.store.order(domain.JobDeployment, h.id, "cert_1", "tgt_1")
	k := h.online(credits(0, 1))
	a := k.assignment()
	for range 3 {
		k.send(deployed(j.ID, a.GetAttempt(), a.GetDeploy().GetChain()[0]))
	}
	if s := k.settled(); s.GetOutcome() != agentpb.Settled_OUTCOME_OK {
		t.Fatalf("settled %v", s)
	}
	k.send(deployed(j.ID, a.GetAttempt(), a.GetDeploy().GetChain()[0]))
	if s := k.settled(); s.GetOutcome() != agentpb.Settled_OUTCOME_OK {
		t.Fatalf("replayed: settled %v", s)
	}
	if n := p.store.applications(domain.JobRef{JobID: j.ID, Attempt: a.GetAttempt()}); n != 1 {
		t.Fatalf("applied %d times", n)
	}
}

// TestLesson16AnotherAgentsIDs sends each message with the ids of another agent's work: it is ignored, put into the trail, and
// nothing of the other is changed or told.
func TestLesson16AnotherAgentsIDs(t *testing.T) {
	t.Parallel()
	for name, say := range map[string]func(id string, attempt int64) *agentpb.ConnectRequest{
		"Accepted": accepted,
		"Csr":      func(id string, n int64) *agentpb.ConnectRequest { return csrFor(id, n, newCSR(t, newKey(t))) },
		"Result":   func(id string, n int64) *agentpb.ConnectRequest { return deployed(id, n, []byte("leaf")) },
		"Failure":  func(id string, n int64) *agentpb.ConnectRequest { return failedWith(id, n, fault.Internal, "gotcha") },
		"Rejected": func(id string, n int64) *agentpb.ConnectRequest {
			return &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Rejected{Rejected: &agentpb.Rejected{AssignmentId: id, Attempt: n,
				Failure: &agentpb.Failure{Class: string(fault.Rejected), Message: "no"}}}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPlane(t)
			victim, thief := p.host("victim"), p.host("thief")
			kinds := map[string]domain.JobKind{"Csr": domain.JobRenewal}
			kind := domain.JobDeployment
			if k, ok := kinds[name]; ok {
				kind = k
			}
			j := p.store.order(kind, victim.id, "cert_1", "tgt_1")
			v := victim.online(credits(1, 1))
			a := v.assignment()
			before := p.store.job(j.ID)
			k := thief.online(credits(1, 1))
			k.send(say(j.ID, a.GetAttempt()))
			s := k.settled()
			if s.GetOutcome() != agentpb.Settled_OUTCOME_IGNORED || s.GetCertificateId() != "" || s.GetGeneration() != 0 {
				t.Errorf("settled %v", s)
			}
			eventually(t, "it is in the trail", func() bool { return len(p.store.audited("agent.foreign_assignment")) == 1 })
			if e := p.store.audited("agent.foreign_assignment")[0]; e.Actor != "agent:"+thief.id || e.Resource != "job/"+j.ID {
				t.Errorf("audited %+v", e)
			}
			if got := p.store.job(j.ID); got != before {
				t.Errorf("the other's job changed: %+v", got)
			}
		})
	}
	t.Run("Hello", func(t *testing.T) {
		t.Parallel()
		p := newPlane(t)
		victim, thief := p.host("victim"), p.host("thief")
		j := p.store.order(domain.JobDeployment, victim.id, "cert_1", "tgt_1")
		victim.online(credits(1, 1)).assignment()
		k := thief.connect(holds(&agentpb.OpenAssignment{Id: j.ID, Attempt: 1, Phase: agentpb.Phase_PHASE_RESULT}))
		w := k.welcome()
		if v := w.GetVerdicts()[0]; v.GetDecision() != agentpb.Verdict_DECISION_FORGET || v.GetSettled().GetOutcome() != agentpb.Settled_OUTCOME_IGNORED {
			t.Errorf("verdict %v", v)
		}
		eventually(t, "it is in the trail", func() bool { return len(p.store.audited("agent.foreign_assignment")) == 1 })
	})
	t.Run("Hello's agent id", func(t *testing.T) {
		t.Parallel()
		p := newPlane(t)
		victim, thief := p.host("victim"), p.host("thief")
		k := thief.connect(func(h *agentpb.Hello) { h.AgentId = victim.id })
		if st := k.end(); st.Code() != codes.PermissionDenied {
			t.Errorf("ended with %v", st)
		}
		if p.store.session(thief.id).Epoch != 0 || p.store.session(victim.id).Epoch != 0 {
			t.Error("a session was opened")
		}
	})
}

// TestReconnectMidWork: verdicts continue, redo and forget; resumed work is outside the credits.
func TestReconnectMidWork(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	goes := p.store.order(domain.JobDeployment, h.id, "cert_1", "tgt_1")
	said := p.store.order(domain.JobDeployment, h.id, "cert_2", "tgt_1")
	gone := p.store.order(domain.JobRenewal, h.id, "cert_3", "")
	k := h.online(credits(3, 3))
	for range 3 {
		a := k.assignment()
		k.send(accepted(a.GetId(), a.GetAttempt()))
	}
	for _, j := range []domain.Job{goes, said, gone} {
		eventually(t, "accepted", func() bool { return !p.store.job(j.ID).AcceptedAt.IsZero() })
	}
	k.cancel()
	k.end()
	p.store.cancel(gone.ID)
	fresh := p.store.order(domain.JobDeployment, h.id, "cert_4", "tgt_1")

	k = h.connect(credits(0, 0), holds(&agentpb.OpenAssignment{Id: goes.ID, Attempt: 1, Phase: agentpb.Phase_PHASE_ACCEPTED},
		&agentpb.OpenAssignment{Id: said.ID, Attempt: 1, Phase: agentpb.Phase_PHASE_RESULT},
		&agentpb.OpenAssignment{Id: gone.ID, Attempt: 1, Phase: agentpb.Phase_PHASE_CSR}))
	w := k.welcome()
	if w.GetEpoch() != 2 || w.GetProtocol() != 1 || w.GetBeatIntervalMs() != 30000 {
		t.Fatalf("welcome %v", w)
	}
	got := map[string]*agentpb.Verdict{}
	for _, v := range w.GetVerdicts() {
		got[v.GetId()] = v
	}
	for id, want := range map[string]agentpb.Verdict_Decision{goes.ID: agentpb.Verdict_DECISION_CONTINUE,
		said.ID: agentpb.Verdict_DECISION_REDO_REPORT, gone.ID: agentpb.Verdict_DECISION_FORGET} {
		if got[id].GetDecision() != want {
			t.Errorf("the verdict on %s is %v, want %s", id, got[id], want)
		}
	}
	leaf := func(c string) []byte { return fakeVersion(c, h.id, 1).DER }
	k.send(deployed(said.ID, 1, leaf("cert_2")))
	if s := k.settled(); s.GetId() != said.ID || s.GetOutcome() != agentpb.Settled_OUTCOME_OK {
		t.Fatalf("settled %v", s)
	}
	k.send(deployed(goes.ID, 1, leaf("cert_1")))
	if s := k.settled(); s.GetId() != goes.ID || s.GetOutcome() != agentpb.Settled_OUTCOME_OK {
		t.Fatalf("settled %v", s)
	}
	if got := p.store.job(fresh.ID); got.Attempt != 0 {
		t.Fatal("a job was dispatched without a credit")
	}
	k.send(grants(agentpb.WorkClass_WORK_CLASS_DEPLOY, 1))
	if a := k.assignment(); a.GetId() != fresh.ID {
		t.Fatalf("assigned %v", a)
	}
}

// TestCancelledByAnOperator: Wake makes the session take the assignment back.
func TestCancelledByAnOperator(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	j := p.store.order(domain.JobDeployment, h.id, "cert_1", "tgt_1")
	k := h.online(credits(1, 1))
	a := k.assignment()
	p.store.cancel(j.ID)
	p.srv.Wake(h.id)
	c := until(k, func(m *agentpb.ConnectResponse) (*agentpb.Cancel, bool) { return m.GetCancel(), m.GetCancel() != nil })
	if c.GetId() != j.ID || c.GetAttempt() != a.GetAttempt() {
		t.Fatalf("cancel %v", c)
	}
	k.send(failedWith(j.ID, a.GetAttempt(), fault.Rejected, "it was cancelled"))
	if s := k.settled(); s.GetOutcome() != agentpb.Settled_OUTCOME_IGNORED {
		t.Fatalf("settled %v", s)
	}
}

// TestStoreOutage: results that cannot be recorded are kept and recorded when the store is back, on the same stream.
func TestStoreOutage(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	j := p.store.order(domain.JobDeployment, h.id, "cert_1", "tgt_1")
	k := h.online(credits(1, 1))
	a := k.assignment()
	var down atomic.Bool
	down.Store(true)
	p.store.onCall(func(method string) error {
		if method == "CompleteDeployments" && down.Load() {
			return fault.New(fault.Retryable, "the database is away")
		}
		return nil
	})
	k.send(deployed(j.ID, a.GetAttempt(), a.GetDeploy().GetChain()[0]))
	eventually(t, "it was tried", func() bool { return p.store.count("CompleteDeployments") > 0 })
	down.Store(false)
	if s := k.settled(); s.GetOutcome() != agentpb.Settled_OUTCOME_OK {
		t.Fatalf("settled %v", s)
	}
}

// TestPanicInTheIssuer: it costs the try, not the process or the stream.
func TestPanicInTheIssuer(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	j := p.store.order(domain.JobRenewal, h.id, "cert_1", "")
	var once atomic.Bool
	p.store.onCall(func(method string) error {
		if method == "Issue" && once.CompareAndSwap(false, true) {
			panic("defect")
		}
		return nil
	})
	k := h.online(credits(5, 0))
	k.send(csrFor(j.ID, k.assignment().GetAttempt(), newCSR(t, newKey(t))))
	if s := k.settled(); s.GetOutcome() != agentpb.Settled_OUTCOME_FAILED || s.GetFailure().GetClass() != string(fault.Internal) {
		t.Fatalf("settled %v", s)
	}
	k.send(csrFor(j.ID, k.assignment().GetAttempt(), newCSR(t, newKey(t))))
	if s := k.settled(); s.GetOutcome() != agentpb.Settled_OUTCOME_OK {
		t.Fatalf("settled %v", s)
	}
}

// TestIssuingIsBounded: however many agents answer at once, so many are issued for at the same time, and all are served.
func TestIssuingIsBounded(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	const n = issueWorkers + 40
	gate := make(chan struct{})
	p.store.onCall(func(method string) error {
		if method == "Issue" {
			<-gate
		}
		return nil
	})
	h := p.host("proxy")
	for i := range n {
		p.store.order(domain.JobRenewal, h.id, fmt.Sprint("cert_", i), "")
	}
	k := h.online(credits(n, 0))
	csr := newCSR(t, newKey(t))
	for range n {
		a := k.assignment()
		k.send(csrFor(a.GetId(), a.GetAttempt(), csr))
	}
	eventually(t, "the bound is reached", func() bool {
		p.store.mu.Lock()
		defer p.store.mu.Unlock()
		return p.store.issuing == issueWorkers
	})
	close(gate)
	for range n {
		if s := k.settled(); s.GetOutcome() != agentpb.Settled_OUTCOME_OK {
			t.Fatalf("settled %v", s)
		}
	}
	if p.store.mostIssues > issueWorkers {
		t.Fatalf("%d at once", p.store.mostIssues)
	}
}

// TestOneStalledAgentDelaysNobody: one agent takes its work and never reads again; ninety-nine others are served.
func TestOneStalledAgentDelaysNobody(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	stalled := p.host("stalled")
	big := make([]byte, 40<<10)
	p.store.targets["tgt_big"] = domain.Target{ID: "tgt_big", AgentID: stalled.id, Kind: "file", Settings: big, Enabled: true, Revision: 1}
	for i := range 40 {
		p.store.order(domain.JobDeployment, stalled.id, fmt.Sprint("cert_s", i), "tgt_big")
	}
	s := p.openWith(p.dial(stalled.cert), false)
	s.send(hello(credits(100, 100)))
	eventually(t, "the stalled agent's stream is blocked", func() bool {
		for _, st := range p.srv.of(stalled.id) {
			st.mu.Lock()
			blocked := st.out.sending && len(st.out.queue) > 0
			st.mu.Unlock()
			if blocked && st.sendSince.Load() != 0 && p.store.count("Dispatch") >= 40 {
				return true
			}
		}
		return false
	})
	const healthy = 99
	done := make(chan error, healthy)
	for i := range healthy {
		h := p.host(fmt.Sprintf("h%02d", i))
		j := p.store.order(domain.JobRenewal, h.id, fmt.Sprint("cert_h", i), "")
		k := h.connect(credits(1, 1))
		go func() {
			csr := newCSR(t, h.key)
			for {
				select {
				case m := <-k.in:
					if a := m.GetAssignment(); a != nil {
						k.send(csrFor(a.GetId(), a.GetAttempt(), csr))
					}
					if s := m.GetSettled(); s != nil {
						if s.GetId() != j.ID || s.GetOutcome() != agentpb.Settled_OUTCOME_OK {
							done <- fmt.Errorf("settled %v", s)
						} else {
							done <- nil
						}
						return
					}
				case <-k.done:
					done <- k.err
					return
				case <-time.After(patience):
					done <- errors.New("nothing came")
					return
				}
			}
		}()
	}
	for range healthy {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if n := p.srv.Count(); n != healthy+1 {
		t.Errorf("%d sessions are open", n)
	}
}

// TestStopFinishesWhatIsBeingIssued: Stop waits for it, the agent is told, then comes Goodbye, and the session is closed.
func TestStopFinishesWhatIsBeingIssued(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	j := p.store.order(domain.JobRenewal, h.id, "cert_1", "")
	begun, release := make(chan struct{}), make(chan struct{})
	p.store.onCall(func(method string) error {
		if method == "Issue" {
			close(begun)
			<-release
		}
		return nil
	})
	k := h.online(credits(1, 1))
	k.send(csrFor(j.ID, k.assignment().GetAttempt(), newCSR(t, newKey(t))))
	<-begun
	stopped := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		stopped <- p.srv.Stop(ctx)
	}()
	eventually(t, "it is stopping", func() bool { p.srv.mu.RLock(); defer p.srv.mu.RUnlock(); return p.srv.stopping })
	other := p.open(p.dial(p.host("late").cert))
	other.send(hello())
	if st := other.end(); st.Code() != codes.Unavailable {
		t.Errorf("a new stream ended with %v", st)
	}
	close(release)
	if s := k.settled(); s.GetOutcome() != agentpb.Settled_OUTCOME_OK {
		t.Errorf("settled %v", s)
	}
	if g := k.goodbye(); g.GetReason() != agentpb.Goodbye_REASON_SHUTDOWN || g.GetPermanent() {
		t.Errorf("goodbye %v", g)
	}
	if st := k.end(); st.Code() != codes.Unavailable {
		t.Errorf("ended with %v", st)
	}
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	if s := p.store.session(h.id); s.Holder != "" {
		t.Errorf("the session is still held: %+v", s)
	}
	p.store.mu.Lock()
	defer p.store.mu.Unlock()
	if p.store.seen[h.id].IsZero() {
		t.Error("the last beat was not written")
	}
}

// TestOversizedAssignment: it cannot be sent; the job fails with the reason and the stream lives on.
func TestOversizedAssignment(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	p.store.targets["tgt_1"] = domain.Target{ID: "tgt_1", AgentID: "agt_other", Settings: make([]byte, 70<<10)}
	j := p.store.order(domain.JobDeployment, h.id, "cert_1", "tgt_1")
	next := p.store.order(domain.JobDeployment, h.id, "cert_2", "tgt_2")
	k := h.online(credits(0, 2))
	if a := k.assignment(); a.GetId() != next.ID {
		t.Fatalf("assigned %v", a)
	}
	eventually(t, "the job failed", func() bool { return p.store.job(j.ID).State == domain.JobFailed })
	if e := p.store.job(j.ID).ErrorClass; e != string(fault.Invalid) {
		t.Errorf("it failed as %s", e)
	}
}
