package storetest

import (
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// sessions: who may open one, and what closing does.
func sessions(t *testing.T, w *World) {
	ctx := t.Context()
	a, b, q, r, revoked := w.Agent(t, "a"), w.Agent(t, "b"), w.Agent(t, "q"), w.Agent(t, "r"), w.Agent(t, "revoked")
	must(t, w.S.QuarantineAgent(ctx, q.ID, "two machines", w.Op()))
	_, err := w.S.RetireAgent(ctx, r.ID, "gone", w.Op())
	must(t, err)
	_, err = w.S.RevokeIdentities(ctx, revoked.ID, w.Op())
	must(t, err)
	foreign := w.Hello(b.ID, "n1")
	foreign.IdentitySerial = "id-" + a.ID
	outs := w.S.OpenSessions(ctx, []domain.SessionOpen{w.Hello(a.ID, "n1"), w.Hello(q.ID, "n1"), w.Hello(r.ID, "n1"),
		w.Hello(revoked.ID, "n1"), w.Hello("agt_unknown", "n1"), foreign})
	for i, class := range []fault.Class{"", fault.Forbidden, fault.Forbidden, fault.Unauthorized, fault.Forbidden, fault.Unauthorized} {
		if fault.ClassOf(outs[i].Err) != class {
			t.Fatalf("%d: %v, want %q", i, outs[i].Err, class)
		}
	}
	if n := w.count(t, "SELECT COUNT(*) FROM agent_session"); n != 1 {
		t.Fatalf("%d sessions", n)
	}
	identity, err := w.S.Identity(ctx, "id-"+a.ID)
	must(t, err)
	if !identity.FirstUsedAt.Equal(w.Now()) {
		t.Fatalf("identity: %+v", identity)
	}
	holders, err := w.S.SessionHolders(ctx, []string{a.ID, b.ID})
	must(t, err)
	if len(holders) != 1 || holders[a.ID] != (domain.Session{AgentID: a.ID, Epoch: 1, Holder: "n1", BootID: "boot-1"}) {
		t.Fatalf("holders: %+v", holders)
	}

	w.Pass(time.Minute)
	second := w.Open(t, a.ID, "n2")
	if second.Epoch != 2 || second.Previous.BootID != "boot-1" {
		t.Fatalf("second: %+v", second)
	}
	if identity, _ := w.S.Identity(ctx, "id-"+a.ID); !identity.FirstUsedAt.Equal(Start) {
		t.Fatalf("first use moved: %+v", identity)
	}
	for range 2 {
		must(t, w.S.CloseSession(ctx, a.ID, 2, w.Now()))
	}
	stored, err := w.S.Agent(ctx, a.ID)
	must(t, err)
	if stored.State != domain.AgentOffline || !stored.OfflineSince.Equal(w.Now()) || stored.Facts.OS != "linux" {
		t.Fatalf("closed: %+v", stored)
	}
	g := w.Target(t, a.ID, "one")
	_, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
	if err := w.S.Dispatch(ctx, []domain.Dispatch{{JobID: jobs[0].ID, AgentID: a.ID, Epoch: 2, At: w.Now()}})[0]; !fault.Is(err, fault.Conflict) {
		t.Fatalf("dispatch without a session: %v", err)
	}
	w.beats(t, a)
}

func (w *World) beats(t *testing.T, a domain.Agent) {
	t.Helper()
	ctx := t.Context()
	state := func() domain.Agent {
		t.Helper()
		x, err := w.S.Agent(ctx, a.ID)
		must(t, err)
		return x
	}
	w.Open(t, a.ID, "n1")
	f := w.Duty(t, "agents")
	w.Pass(10 * time.Minute)
	sweep := func(stale, offline time.Duration) int {
		t.Helper()
		n, err := w.S.SweepAgents(ctx, f, w.Now().Add(-stale), w.Now().Add(-offline), w.Now())
		must(t, err)
		return n
	}
	if n := sweep(5*time.Minute, time.Hour); n != 1 || state().State != domain.AgentStale {
		t.Fatalf("%d %+v", n, state())
	}
	must(t, w.S.FlushSeen(ctx, []domain.Seen{{AgentID: a.ID, At: w.Now()}, {AgentID: "agt_unknown", At: w.Now()}}))
	if s := state(); s.State != domain.AgentOnline || !s.LastSeen.Equal(w.Now()) {
		t.Fatalf("%+v", s)
	}
	must(t, w.S.FlushSeen(ctx, []domain.Seen{{AgentID: a.ID, At: w.Now().Add(-time.Minute)}}))
	if s := state(); !s.LastSeen.Equal(w.Now()) {
		t.Fatalf("last seen went back: %+v", s)
	}
	w.Pass(2 * time.Hour)
	if n := sweep(5*time.Minute, time.Hour); n != 1 || state().State != domain.AgentOffline {
		t.Fatalf("%d %+v", n, state())
	}
	if n := sweep(5*time.Minute, time.Hour); n != 0 {
		t.Fatalf("swept twice: %d", n)
	}
}

// rejections: the newest is kept until it is cleared.
func rejections(t *testing.T, w *World) {
	ctx := t.Context()
	r := domain.StateRejection{AgentID: "agt_1", Kind: "placements", Name: "all", Version: 5, Reason: "no such connector", At: w.Now()}
	older := r
	older.Version, older.Reason = 4, "older"
	must(t, w.S.RecordRejection(ctx, r))
	must(t, w.S.RecordRejection(ctx, older))
	list, err := w.S.Rejections(ctx, "agt_1")
	must(t, err)
	if len(list) != 1 || list[0] != r {
		t.Fatalf("%+v", list)
	}
	for range 2 {
		must(t, w.S.ClearRejection(ctx, "agt_1", "placements", "all"))
	}
	if list, err = w.S.Rejections(ctx, "agt_1"); err != nil || len(list) != 0 {
		t.Fatalf("%+v %v", list, err)
	}
}

// acceptedAtLast: what rests after failures at a target that was refused is due once the refusal is cleared, and nothing
// else is: not at another target, not without a refusal, not what holds what is wanted, not what an operator cancelled.
func acceptedAtLast(t *testing.T, w *World) {
	ctx := t.Context()
	a := w.Agent(t, "web1")
	one, two := w.Target(t, a.ID, "one"), w.Target(t, a.ID, "two")
	epoch := w.Open(t, a.ID, "n1").Epoch
	failed, jobs := w.Order(t, "failed.test", domain.Policy{}, one.ID, two.ID)
	for _, d := range w.Issue(t, jobs[0], epoch, "spki-1") {
		w.fail(t, d.Job, w.Dispatch(t, d.Job, epoch), fault.Rejected)
	}
	three, four := w.Target(t, a.ID, "three"), w.Target(t, a.ID, "four")
	served, jobs := w.Order(t, "served.test", domain.Policy{}, three.ID)
	w.Deploy(t, w.Issue(t, jobs[0], epoch, "spki-2")[0], epoch)
	cancelled, jobs := w.Order(t, "cancelled.test", domain.Policy{}, four.ID)
	_, err := w.S.CancelJob(ctx, w.Issue(t, jobs[0], epoch, "spki-3")[0].Job.ID, w.Op())
	must(t, err)
	w.Pass(time.Minute)

	due := func() (all []domain.Placement) {
		t.Helper()
		for _, c := range []string{failed.ID, served.ID, cancelled.ID} {
			list, err := w.S.DuePlacements(ctx, domain.ShardOf(c), w.Now(), 10)
			must(t, err)
			for _, d := range list {
				if d.Placement.CertificateID == c {
					all = append(all, d.Placement)
				}
			}
		}
		return all
	}
	refuse := func(kind, name string) {
		t.Helper()
		must(t, w.S.RecordRejection(ctx, domain.StateRejection{AgentID: a.ID, Kind: kind, Name: name, Version: 1, Reason: "outside the roots", At: w.Now()}))
	}
	refuse("settings", one.ID)
	must(t, w.S.ClearRejection(ctx, a.ID, "settings", one.ID))
	must(t, w.S.ClearRejection(ctx, a.ID, "target", one.ID)) // there is none
	if got := due(); len(got) != 0 {
		t.Fatalf("due: %+v", got)
	}
	for _, g := range []domain.Target{one, three, four} {
		refuse("target", g.ID)
		must(t, w.S.ClearRejection(ctx, a.ID, "target", g.ID))
	}
	got := due()
	if len(got) != 1 || got[0].CertificateID != failed.ID || got[0].TargetID != one.ID || !got[0].BackoffUntil.IsZero() || got[0].Failures != 1 {
		t.Fatalf("due: %+v", got)
	}
	next, err := w.S.NextDue(ctx)
	must(t, err)
	if next.Placement.IsZero() || next.Placement.After(w.Now()) {
		t.Fatalf("next due: %+v", next)
	}
	w.Check(t)
}

// herd: many agents at once, from many goroutines, share commits and get every one its own answer.
func herd(t *testing.T, w *World) {
	const agents = 130 // more than one batch
	ctx := t.Context()
	hellos := make([]domain.SessionOpen, agents)
	for i := range hellos {
		hellos[i] = w.Hello(w.Agent(t, "h"+strconv.Itoa(i)).ID, "n1")
	}
	for i, out := range w.S.OpenSessions(ctx, hellos) {
		if out.Err != nil || out.Epoch != 1 || out.Agent.ID != hellos[i].AgentID {
			t.Fatalf("%d: %+v", i, out)
		}
	}
	ids := make([]string, agents)
	errs := make([]error, agents)
	var wg sync.WaitGroup
	for i, h := range hellos {
		ids[i] = h.AgentID
		wg.Go(func() {
			out := w.S.OpenSessions(ctx, []domain.SessionOpen{h})[0]
			if errs[i] = out.Err; out.Err == nil && (out.Epoch != 2 || out.Agent.ID != h.AgentID) {
				errs[i] = fmt.Errorf("%+v", out)
			}
		})
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil {
			t.Fatalf("%d: %v", i, err)
		}
	}
	holders, err := w.S.SessionHolders(ctx, ids)
	must(t, err)
	for _, id := range ids {
		if holders[id].Epoch != 2 {
			t.Fatalf("%s: %+v", id, holders[id])
		}
	}
}
