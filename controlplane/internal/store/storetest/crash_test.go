package storetest

import (
	"errors"
	"fmt"
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/store"
)

// drive takes an order to its end from whatever is stored, as a node does that has just started.
func drive(w *World, s *store.Store, t *testing.T, a domain.Agent, n domain.NewCertificate) error {
	ctx := t.Context()
	if _, _, err := s.CreateCertificate(ctx, n); err != nil {
		return err
	}
	session := s.OpenSessions(ctx, []domain.SessionOpen{w.Hello(a.ID, "n1")})[0]
	if session.Err != nil {
		return session.Err
	}
	for {
		work, err := openWork(ctx, s, a.ID)
		if err != nil || len(work) == 0 {
			return err
		}
		for _, x := range work {
			if err := step(w, s, t, x, session.Epoch); err != nil {
				return err
			}
		}
	}
}

func step(w *World, s *store.Store, t *testing.T, x domain.Work, epoch domain.Epoch) error {
	ctx, j := t.Context(), x.Job
	if err := s.Dispatch(ctx, []domain.Dispatch{{JobID: j.ID, AgentID: j.AgentID, Attempt: j.Attempt, Epoch: epoch, At: w.Now()}})[0]; err != nil {
		return err
	}
	if err := s.Accept(ctx, []domain.Acceptance{{JobID: j.ID, AgentID: j.AgentID, Attempt: j.Attempt + 1, At: w.Now()}})[0]; err != nil {
		return err
	}
	if j.Kind == domain.JobDeployment {
		return s.CompleteDeployments(ctx, []domain.DeployResult{w.Deployed(x, j.Attempt+1)})[0].Err
	}
	// The host keeps its key over a crash of the server.
	it := s.RecordIntents(ctx, []domain.Intent{w.Intent(j, j.Attempt+1, "key of "+j.CertificateID)})[0]
	if it.Err != nil {
		return it.Err
	}
	issued := w.Signed(it.Intent)
	issued.Attempt = j.Attempt + 1
	return s.RecordIssued(ctx, []domain.Issued{issued})[0].Err
}

// A process is cut at every single event of an issuance, from the order to the proof that it is served; the next process
// takes it to its end, with one certificate signed.
func TestLesson5CutAnywhere(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		a := w.Agent(t, "web1")
		at := 0
		for done := false; !done; {
			at++
			one, two := w.Target(t, a.ID, fmt.Sprintf("one%d", at)), w.Target(t, a.ID, fmt.Sprintf("two%d", at))
			n := w.order(fmt.Sprintf("c%d.test", at), one.ID, two.ID)
			n.RequestID = id.New(id.Request)
			cut := &Cutter{}
			s := e.OpenAt(t, w.DSN, func(c *store.Config) { c.Faults = cut })
			cut.Arm(at)
			err := drive(w, s, t, a, n)
			done = !cut.Dead()
			if err != nil && (done || !errors.Is(err, store.ErrCut)) {
				t.Fatalf("cut at %d: %v", at, err)
			}
			must(t, s.Close())
			must(t, drive(w, w.S, t, a, n))
			v := w.View(t, n.Certificate.ID)
			if v.Certificate.Status != domain.CertificateActive || v.Leaves[0].Current != 1 || v.Leaves[0].Generation != 1 {
				t.Fatalf("cut at %d: %+v", at, v)
			}
			for _, p := range v.Placements {
				if p.State != domain.PlacementServed || p.InstalledGeneration != 1 {
					t.Fatalf("cut at %d: %+v", at, p)
				}
			}
		}
		w.Check(t)
		if n := w.count(t, "SELECT COUNT(*) FROM version"); n != at {
			t.Fatalf("%d versions of %d certificates", n, at)
		}
		if at < 40 {
			t.Fatalf("the flow has only %d events", at)
		}
		t.Logf("cut at each of %d events", at-1)
	})
}
