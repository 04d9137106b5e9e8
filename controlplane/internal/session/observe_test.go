package session

import (
	"bytes"
	"crypto/sha256"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/certmesh/certmesh/controlplane/internal/dispatch"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func observed(certificateID, targetID, problem string) *agentpb.ConnectRequest {
	o := &agentpb.Observed{TargetId: targetID, CertificateId: certificateID, Generation: 1}
	if problem != "" {
		o.Problem = &agentpb.Failure{Class: string(fault.Conflict), Message: problem}
	}
	return &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Observed{Observed: o}}
}

// place puts a certificate at a target of the agent.
func (f *fakeStore) place(agentID, certificateID, targetID string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.targets[targetID] = domain.Target{ID: targetID, AgentID: agentID, Kind: "file"}
	f.placements[certificateID] = append(f.placements[certificateID], targetID)
}

func (f *fakeStore) observations() []domain.Observation {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]domain.Observation(nil), f.observed...)
}

func TestObserved(t *testing.T) {
	t.Parallel()
	changed := make(chan struct{}, 8)
	p := newPlane(t, func(c *Config) { c.Changed = func() { changed <- struct{}{} } })
	victim, thief := p.host("victim"), p.host("thief")
	p.store.place(victim.id, "cert_1", "tgt_1")
	k := victim.online()
	k.send(observed("cert_1", "tgt_1", "it holds\nanother \x1b[31mcertificate"+strings.Repeat("x", 4096)))
	<-changed
	got := p.store.observations()[0]
	if got.AgentID != victim.id || got.Generation != 1 || !strings.HasPrefix(got.Problem, "it holds another [31mcertificate") || len(got.Problem) > 1<<10 || got.At.IsZero() {
		t.Fatalf("%+v", got)
	}

	thief.online().send(observed("cert_1", "tgt_1", "gotcha"))
	eventually(t, "it is in the trail", func() bool { return len(p.store.audited("agent.foreign_observation")) == 1 })
	if e := p.store.audited("agent.foreign_observation")[0]; e.Actor != "agent:"+thief.id || e.Resource != "certificate/cert_1" {
		t.Errorf("audited %+v", e)
	}
	if n := len(p.store.observations()); n != 1 {
		t.Errorf("%d observations were recorded", n)
	}
}

func TestObservedNonsense(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	for name, change := range map[string]func(*agentpb.Observed){
		"no target":         func(o *agentpb.Observed) { o.TargetId = "" },
		"long certificate":  func(o *agentpb.Observed) { o.CertificateId = strings.Repeat("c", maxID+1) },
		"control character": func(o *agentpb.Observed) { o.TargetId = "tgt\x1b" },
		"no fingerprint":    func(o *agentpb.Observed) { o.InstalledFingerprint = []byte("short") },
		"long fingerprint":  func(o *agentpb.Observed) { o.ServedFingerprint = bytes.Repeat([]byte{1}, sha256.Size+1) },
		"no generation":     func(o *agentpb.Observed) { o.Generation = 0 },
	} {
		h := p.host(strings.ReplaceAll(name, " ", "-"))
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := h.online()
			m := observed("cert_1", "tgt_1", "x")
			change(m.GetObserved())
			k.send(m)
			if st := k.end(); st.Code() != codes.InvalidArgument {
				t.Errorf("ended with %v", st)
			}
		})
	}
}

// TestObservationsAreBounded: as many in a row as an agent keeps targets, then one a second.
func TestObservationsAreBounded(t *testing.T) {
	t.Parallel()
	s := NewState("agt_1", time.Second)
	at := time.Unix(1000, 0)
	s, _ = Step(s, Received{Message: hello(), At: at})
	s, _ = Step(s, Admitted{Work: dispatch.Opened{AgentID: "agt_1", Epoch: 1}})
	recorded := func(n int) int {
		all := 0
		for range n {
			var out []Effect
			if s, out = Step(s, Received{Message: observed("cert_1", "tgt_1", "x"), At: at}); len(out) == 1 {
				all++
			}
		}
		return all
	}
	if n := recorded(10 * observeBurst); n != observeBurst {
		t.Errorf("%d of a burst were recorded", n)
	}
	at = at.Add(3 * time.Second)
	if n := recorded(100); n != 3 {
		t.Errorf("%d after three seconds", n)
	}
}

func TestVerificationOnDemand(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	j := p.store.order(domain.JobValidation, h.id, "cert_1", "tgt_1")
	k := h.online(credits(2, 2))
	k.send(grants(agentpb.WorkClass_WORK_CLASS_VERIFY, 1))
	a := k.assignment()
	leaf := []byte("leaf of " + versionKey("cert_1", h.id, 1))
	want := sha256.Sum256(leaf)
	if a.GetId() != j.ID || a.GetClass() != agentpb.WorkClass_WORK_CLASS_VERIFY || !bytes.Equal(a.GetVerify().GetFingerprint(), want[:]) ||
		a.GetVerify().GetCertificateId() != "cert_1" || a.GetVerify().GetGeneration() != 1 || a.GetVerify().GetTarget() == nil {
		t.Fatalf("%v", a)
	}
	k.send(accepted(j.ID, a.GetAttempt()))
	k.send(deployed(j.ID, a.GetAttempt(), leaf))
	if s := k.settled(); s.GetOutcome() != agentpb.Settled_OUTCOME_OK || s.GetGeneration() != 0 {
		t.Fatalf("%v", s)
	}
}
