package storetest_test

import (
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
)

var reapLimits = domain.ReapLimits{AwaitingCSR: time.Hour, Running: time.Hour}

func (w *world) reap(f domain.Fence) []domain.Job {
	w.t.Helper()
	list, err := w.S.ReapJobs(w.t.Context(), f, reapLimits, w.Now(), 10)
	w.must(err)
	return list
}

// online lets time pass in which the agent beats; the last beat alone is in the rows.
func (w *world) online(agentID string, d time.Duration) {
	w.t.Helper()
	w.Pass(d)
	w.Beat(w.t, agentID)
}

// TestReaperCountsOnlineTimeOfAFlappingAgent: reconnecting does not start the job's clock again, whether the server
// noticed the end of each stream or not, and whether the job was sent again or not.
func TestReaperCountsOnlineTimeOfAFlappingAgent(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ closes, resends bool }{
		"closed": {true, false}, "taken over": {false, false}, "closed and sent again": {true, true}, "taken over and sent again": {false, true},
	} {
		t.Run(name, func(t *testing.T) {
			storetest.Each(t, func(t *testing.T, e storetest.Engine) {
				w := &world{World: storetest.NewWorld(t, e), t: t}
				ctx := t.Context()
				a := w.Agent(t, "web1")
				_, jobs := w.Order(t, "a.test", domain.Policy{}, w.Target(t, a.ID, "one").ID)
				f := w.Duty(t, "reap")
				w.Pass(30 * 24 * time.Hour)
				session := w.Open(t, a.ID, "n1")
				w.must(w.S.Dispatch(ctx, []domain.Dispatch{{JobID: jobs[0].ID, AgentID: a.ID, Epoch: session.Epoch, At: w.Now()}})[0])
				attempt := int64(1)
				for online := time.Duration(0); online < time.Hour; online += 5 * time.Minute {
					if list := w.reap(f); len(list) != 0 {
						t.Fatalf("after %s online: %+v", online, list)
					}
					w.online(a.ID, 5*time.Minute)
					if c.closes {
						w.must(w.S.CloseSession(ctx, a.ID, session.Epoch, w.Now()))
						w.Pass(7 * time.Minute)
					}
					session = w.Open(t, a.ID, "n1")
					if c.resends {
						w.must(w.S.Dispatch(ctx, []domain.Dispatch{{JobID: jobs[0].ID, AgentID: a.ID, Attempt: attempt, Epoch: session.Epoch, At: w.Now()}})[0])
						attempt++
					}
				}
				w.online(a.ID, time.Second)
				if list := w.reap(f); len(list) != 1 || list[0].ID != jobs[0].ID {
					t.Fatalf("%+v", list)
				}
			})
		})
	}
}

// TestReaperSparesAHostThatWasOff: for a week, whose stream was closed, whose node died, or whose node was down with it.
func TestReaperSparesAHostThatWasOff(t *testing.T) {
	t.Parallel()
	for name, leave := range map[string]func(w *world, agentID string, epoch domain.Epoch){
		"closed": func(w *world, agentID string, epoch domain.Epoch) {
			w.must(w.S.CloseSession(w.t.Context(), agentID, epoch, w.Now()))
		},
		"its node died": func(*world, string, domain.Epoch) {},
		"silent and swept": func(w *world, _ string, _ domain.Epoch) {
			now := w.Pass(10 * time.Minute)
			_, err := w.S.SweepAgents(w.t.Context(), w.Duty(w.t, "health"), now.Add(-2*time.Minute), now.Add(-5*time.Minute), now)
			w.must(err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			eachWorld(t, func(t *testing.T, w *world) {
				a := w.Agent(t, "web1")
				_, jobs := w.Order(t, "a.test", domain.Policy{}, w.Target(t, a.ID, "one").ID)
				f := w.Duty(t, "reap")
				session := w.Open(t, a.ID, "n1")
				w.Dispatch(t, jobs[0], session.Epoch)
				w.online(a.ID, 40*time.Minute)
				leave(w, a.ID, session.Epoch)
				w.Pass(7 * 24 * time.Hour)
				if list := w.reap(f); len(list) != 0 {
					t.Fatalf("while it is off: %+v", list)
				}
				w.Open(t, a.ID, "n2")
				if list := w.reap(f); len(list) != 0 {
					t.Fatalf("at its return: %+v", list)
				}
				w.online(a.ID, 15*time.Minute)
				if list := w.reap(f); len(list) != 0 {
					t.Fatalf("55 minutes online: %+v", list)
				}
				w.online(a.ID, 6*time.Minute)
				if list := w.reap(f); len(list) != 1 {
					t.Fatalf("61 minutes online: %+v", list)
				}
			})
		})
	}
}

// TestJobMadeWhileItsAgentWasOffBeginsAtItsReturn.
func TestJobMadeWhileItsAgentWasOffBeginsAtItsReturn(t *testing.T) {
	t.Parallel()
	eachWorld(t, func(t *testing.T, w *world) {
		a := w.Agent(t, "web1")
		f := w.Duty(t, "reap")
		w.must(w.S.CloseSession(t.Context(), a.ID, w.Open(t, a.ID, "n1").Epoch, w.Now()))
		w.Pass(24 * time.Hour)
		w.Order(t, "a.test", domain.Policy{}, w.Target(t, a.ID, "one").ID)
		w.Pass(2 * time.Hour)
		w.Open(t, a.ID, "n1")
		w.online(a.ID, 59*time.Minute)
		if list := w.reap(f); len(list) != 0 {
			t.Fatalf("%+v", list)
		}
		w.online(a.ID, 2*time.Minute)
		if list := w.reap(f); len(list) != 1 {
			t.Fatalf("%+v", list)
		}
	})
}
