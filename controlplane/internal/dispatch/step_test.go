package dispatch

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

func both(n int) [Classes]int { return [Classes]int{n, n, n} }

func testWorld(t *testing.T) *world {
	return newWorld(func(f string, args ...any) { t.Helper(); t.Fatalf(f, args...) })
}

// TestRandomOrders drives the step through random orders of everything that can happen, then lets it come to rest:
// assignments never exceed grants, an attempt is applied at most once, nothing is lost.
func TestRandomOrders(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(func(f string, args ...any) { t.Helper(); t.Fatalf(f, args...) })
		w.connect(both(rapid.IntRange(0, 3).Draw(t, "credits")))
		kinds := []domain.JobKind{domain.JobIssuance, domain.JobRenewal, domain.JobDeployment, domain.JobValidation}
		job := func(t *rapid.T) string {
			ids := slices.Sorted(maps.Keys(w.jobs))
			if len(ids) == 0 {
				t.Skip()
			}
			return rapid.SampledFrom(ids).Draw(t, "job")
		}
		held := func(t *rapid.T) *entry {
			ids := slices.Sorted(maps.Keys(w.journal))
			if len(ids) == 0 {
				t.Skip()
			}
			return w.journal[rapid.SampledFrom(ids).Draw(t, "held")]
		}
		t.Repeat(map[string]func(*rapid.T){
			"": func(*rapid.T) {},
			"create": func(t *rapid.T) {
				w.create(rapid.SampledFrom(kinds).Draw(t, "kind"))
				if rapid.Bool().Draw(t, "wake") {
					w.step(Woken{At: w.now})
				}
			},
			"cancel": func(t *rapid.T) {
				id := job(t)
				if j := w.jobs[id]; j.State.Open() {
					j.State, j.FinishedAt = domain.JobCancelled, w.now
					w.jobs[id] = j
					w.step(Woken{At: w.now})
				}
			},
			"reap": func(t *rapid.T) {
				id := job(t)
				if j := w.jobs[id]; j.State.Open() && j.Attempt > 0 {
					j.Attempt++
					j.State, j.AcceptedAt = j.Kind.InitialState(), time.Time{}
					w.jobs[id] = j
					if rapid.Bool().Draw(t, "wake") {
						w.step(Woken{At: w.now})
					}
				}
			},
			"store answers": func(t *rapid.T) {
				if len(w.pending) == 0 {
					t.Skip()
				}
				w.answer(rapid.IntRange(0, len(w.pending)-1).Draw(t, "which"), rapid.IntRange(0, 5).Draw(t, "broken") == 0)
			},
			"store commits": func(t *rapid.T) {
				if len(w.pending) == 0 {
					t.Skip()
				}
				w.commit(rapid.IntRange(0, len(w.pending)-1).Draw(t, "which"), rapid.IntRange(0, 5).Draw(t, "broken") == 0)
			},
			"agent takes":  func(*rapid.T) { w.agentTakes() },
			"server takes": func(*rapid.T) { w.serverTakes() },
			"agent works":  func(t *rapid.T) { w.works(held(t), rapid.IntRange(0, 3).Draw(t, "ok") > 0) },
			"agent refuses": func(t *rapid.T) {
				en := held(t)
				delete(w.journal, en.ref.JobID)
				w.up = append(w.up, Report{Kind: ReportRefused, Ref: en.ref, Failure: Failure{fault.Exhausted, "the disk is full"}})
			},
			"agent repeats": func(t *rapid.T) {
				if en := held(t); en.report != nil {
					w.up = append(w.up, *en.report)
				}
			},
			"agent lies": func(t *rapid.T) {
				// Of attempts that were: a Settled of one that never was would end the agent's own.
				ref := domain.JobRef{JobID: job(t)}
				ref.Attempt = rapid.Int64Range(-1, w.jobs[ref.JobID].Attempt).Draw(t, "attempt")
				kind := ReportKind(rapid.IntRange(0, int(ReportRefused)).Draw(t, "kind"))
				// A lie about its own, awaited attempt is the agent's to tell.
				if w.judge(ref) != nil {
					w.up = append(w.up, Report{Kind: kind, Ref: ref, Failure: Failure{fault.Internal, "lie"}})
				}
			},
			"grant": func(*rapid.T) { w.grant() },
			"more":  func(t *rapid.T) { w.ready[rapid.IntRange(0, 1).Draw(t, "class")]++ },
			"time": func(t *rapid.T) {
				w.now = w.now.Add(time.Duration(rapid.IntRange(1, 5000).Draw(t, "ms")) * time.Millisecond)
				w.tickIfDue()
			},
			"reconnect": func(t *rapid.T) { w.connect(both(rapid.IntRange(0, 3).Draw(t, "credits"))) },
		})
		// The net under lost wake-ups, and an agent that is ready.
		w.step(Woken{At: w.now})
		w.ready[Key], w.ready[Deploy], w.ready[Verify] = w.ready[Key]+2, w.ready[Deploy]+2, w.ready[Verify]+2
		w.settle()
	})
}

func (w *world) tickIfDue() {
	if !w.ticks.IsZero() && !w.now.Before(w.ticks) {
		w.ticks = time.Time{}
		w.step(Ticked{At: w.now})
	}
}

func TestOldestFirstWithinCredits(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	for range 5 {
		w.create(domain.JobRenewal)
	}
	w.connect([Classes]int{Key: 2})
	w.answerAll()
	w.wantSent(t, "job_0001", "job_0002")
	w.granted[Key]++
	w.step(Granted{Class: Key, Amount: 1, At: w.now})
	w.answerAll()
	w.wantSent(t, "job_0001", "job_0002", "job_0003")
	if waits, out := w.state.Counts(); waits != 2 || out != 3 {
		t.Fatalf("%d wait and %d are out", waits, out)
	}
	if c := w.state.Credits(); c != both(0) {
		t.Fatalf("credits left: %v", c)
	}
}

// TestOwnersTakeTurns: with k owners waiting, each is served within k credits, however many jobs the others have, and
// each owner's jobs go out by age.
func TestOwnersTakeTurns(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		owners := rapid.IntRange(1, 6).Draw(t, "owners")
		waiting := map[string][]string{}
		var work []domain.Work
		for i := range rapid.IntRange(1, 60).Draw(t, "jobs") {
			o := fmt.Sprint("owner", rapid.IntRange(0, owners-1).Draw(t, "owner"))
			j := domain.Job{ID: fmt.Sprintf("job_%04d", i), Kind: domain.JobRenewal, State: domain.JobAwaitingCSR, AgentID: testAgent}
			work = append(work, domain.Work{Job: j, Owner: o})
			waiting[o] = append(waiting[o], j.ID)
		}
		at := time.Unix(1_800_000_000, 0)
		s, _ := Step(State{}, Opened{AgentID: testAgent, Epoch: 1, Work: domain.OpenWork{Work: work}, At: at})
		since := map[string]int{}
		for range work {
			var effects []Effect
			if s, effects = Step(s, Granted{Class: Key, Amount: 1, At: at}); len(effects) == 0 {
				t.Fatal("a credit was not spent while jobs wait")
			}
			for _, f := range effects {
				raise, ok := f.(Raise)
				if !ok {
					continue
				}
				for o, ids := range waiting {
					if len(ids) == 0 || ids[0] != raise.Dispatch.JobID {
						continue
					}
					waiting[o], since[o] = ids[1:], 0
					for other, ids := range waiting {
						if other != o && len(ids) > 0 {
							if since[other]++; since[other] >= owners {
								t.Fatalf("%s waits while %d others were served", other, since[other])
							}
						}
					}
				}
			}
		}
		for o, ids := range waiting {
			if len(ids) > 0 {
				t.Fatalf("jobs of %s were not given, or not by age: %v", o, ids)
			}
		}
	})
}

// TestEveryRunnableJobIsDispatched: with credits for all, all go out at once.
func TestEveryRunnableJobIsDispatched(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	for range 300 {
		w.create(domain.JobDeployment)
	}
	w.connect(both(300))
	w.answerAll()
	if _, out := w.state.Counts(); out != 300 {
		t.Fatalf("%d of 300 are out", out)
	}
	w.settle()
}

func (w *world) answerAll() {
	for len(w.pending) > 0 {
		w.answer(0, false)
	}
}

func (w *world) wantSent(t *testing.T, ids ...string) {
	t.Helper()
	var got []string
	for _, m := range w.down {
		if a, ok := m.(Assign); ok {
			got = append(got, a.Work.Job.ID)
		}
	}
	if !slices.Equal(got, ids) {
		t.Fatalf("sent %v, want %v", got, ids)
	}
}

// TestDispatchWaitsForItsTime: a failed try rests until RunAt and is then sent again with a higher attempt.
func TestDispatchWaitsForItsTime(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	j := w.create(domain.JobDeployment)
	w.connect(both(5))
	w.answerAll()
	w.deliver()
	w.works(w.journal[j.ID], false)
	w.serverTakes()
	w.answerAll()
	after := w.jobs[j.ID]
	if after.Tries != 1 || !after.State.Open() || !after.RunAt.After(w.now) {
		t.Fatalf("after a failure the job is %+v", after)
	}
	if !w.ticks.Equal(after.RunAt) {
		t.Fatalf("waits until %v, the job runs at %v", w.ticks, after.RunAt)
	}
	if len(w.pending) > 0 {
		t.Fatal("it was tried again before its time")
	}
	w.deliver()
	if len(w.settled) != 1 || w.settled[0].Outcome != Failed || w.settled[0].Failure.Message != "it did not work" {
		t.Fatalf("the agent was told %+v", w.settled)
	}
	w.settle()
	if got := w.jobs[j.ID]; got.State != domain.JobCompleted || got.Attempt <= after.Attempt {
		t.Fatalf("the job ended as %+v", got)
	}
}

// deliver lets the agent take all and the server hear all that follows at once.
func (w *world) deliver() {
	for w.agentTakes() || w.serverTakes() {
		w.answerAll()
	}
}

// TestRefusedDispatchGivesItsCreditBack: what is not sent costs nothing, and a stale belief is loaded anew with a pause
// that grows.
func TestRefusedDispatchGivesItsCreditBack(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	j := w.create(domain.JobRenewal)
	w.connect([Classes]int{Key: 1})
	stale := w.jobs[j.ID]
	stale.Attempt = 7
	w.jobs[j.ID] = stale
	w.answer(0, false)
	if c := w.state.Credits(); c[Key] != 1 {
		t.Fatalf("credits left: %v", c)
	}
	if w.loads != 1 {
		t.Fatalf("%d loads after a conflict", w.loads)
	}
	w.ready = both(2)
	w.settle()
	// An epoch that is no longer ours: every dispatch is refused, at a rate that falls.
	w.create(domain.JobRenewal)
	w.epoch++
	w.pending = nil
	before := w.loads
	w.step(Woken{At: w.now})
	for range 50 {
		if len(w.pending) == 0 {
			break
		}
		w.later2(t)
	}
	if n := w.loads - before; n > 3 {
		t.Fatalf("%d loads without a pause", n)
	}
	if w.ticks.IsZero() {
		t.Fatal("nothing is planned")
	}
}

// later2 answers as a store whose session is another's.
func (w *world) later2(t *testing.T) {
	t.Helper()
	w.pending = nil
	for _, it := range w.state.items {
		if it.phase == raising {
			w.step(Raised{JobID: it.work.Job.ID, Attempt: it.work.Job.Attempt, Err: fault.New(fault.Conflict, "not this epoch"), At: w.now})
			return
		}
	}
	w.step(Loaded{Work: w.openWork(domain.WorkQuery{}), At: w.now})
}

// TestForeignJobsChangeNothing: reports about another agent's job are answered Ignored, noted, and touch nothing.
func TestForeignJobsChangeNothing(t *testing.T) {
	t.Parallel()
	for kind := ReportAccepted; kind <= ReportRefused; kind++ {
		w := testWorld(t)
		j := w.create(domain.JobDeployment)
		j.AgentID, j.Attempt = otherAgent, 1
		w.jobs[j.ID] = j
		w.connect(both(1))
		w.step(Reported{Report: Report{Kind: kind, Ref: domain.JobRef{JobID: j.ID, Attempt: 1}}, At: w.now})
		w.answerAll()
		w.deliver()
		if w.jobs[j.ID] != j {
			t.Fatalf("report %d changed another agent's job: %+v", kind, w.jobs[j.ID])
		}
		if len(w.foreign) != 1 || len(w.settled) != 1 || w.settled[0].Outcome != Ignored || w.settled[0].CertificateID != "" {
			t.Fatalf("report %d: noted %v, told %+v", kind, w.foreign, w.settled)
		}
	}
}

// TestReplayedResult: the same result again is answered with what was recorded, and applied once.
func TestReplayedResult(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	j := w.create(domain.JobRenewal)
	w.connect(both(2))
	w.answerAll()
	w.deliver()
	en := w.journal[j.ID]
	w.works(en, true)
	replay := *en.report
	w.deliver()
	w.step(Reported{Report: replay, At: w.now})
	w.step(Reported{Report: replay, At: w.now})
	w.answerAll()
	w.deliver()
	ok := 0
	for _, s := range w.settled {
		if s.Ref.JobID == j.ID {
			if s.Outcome != OK || s.Generation != 1 {
				t.Fatalf("the agent was told %+v", s)
			}
			ok++
		}
	}
	if ok < 2 || w.applied[en.ref] != 1 {
		t.Fatalf("told %d times, applied %d times", ok, w.applied[en.ref])
	}
}

// TestVerdicts: what the journal holds is continued, reported again or forgotten, outside the credits.
func TestVerdicts(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	w.connect(both(9))
	goes := w.create(domain.JobRenewal)
	said := w.create(domain.JobDeployment)
	done := w.create(domain.JobRenewal)
	stale := w.create(domain.JobDeployment)
	w.step(Woken{At: w.now})
	w.answerAll()
	w.deliver()
	w.works(w.journal[said.ID], true)
	w.works(w.journal[done.ID], true)
	w.up = nil // lost with the stream
	w.end(domain.JobRef{JobID: done.ID, Attempt: 1}, domain.JobCompleted)
	moved := w.jobs[stale.ID]
	moved.Attempt++
	w.jobs[stale.ID] = moved
	w.journal["job_zz"] = &entry{ref: domain.JobRef{JobID: "job_zz", Attempt: 3}}

	w.connect(both(0))
	verdicts := map[string]Verdict{}
	for _, v := range w.verdicts {
		verdicts[v.Ref.JobID] = v
	}
	for id, want := range map[string]Decision{goes.ID: Continue, said.ID: RedoReport, done.ID: Forget, stale.ID: Forget, "job_zz": Forget} {
		if v, ok := verdicts[id]; !ok || v.Decision != want {
			t.Errorf("the verdict on %s is %+v, want %d", id, v, want)
		}
	}
	if v := verdicts[done.ID]; v.Settled.Outcome != OK || v.Settled.Generation != 1 {
		t.Errorf("a completed one is told as %+v", v.Settled)
	}
	if v := verdicts[stale.ID]; v.Settled.Outcome != Ignored {
		t.Errorf("a stale one is told as %+v", v.Settled)
	}
	if len(w.foreign) != 1 || w.foreign[0].JobID != "job_zz" {
		t.Errorf("noted as foreign: %v", w.foreign)
	}
	w.deliver()
	if w.jobs[said.ID].State != domain.JobCompleted {
		t.Errorf("what was reported again was not recorded: %+v", w.jobs[said.ID])
	}
	w.ready = both(3)
	w.settle()
}

// TestCancelReachesTheAgent: a job that an operator cancels is taken back, and the agent's late answer ignored.
func TestCancelReachesTheAgent(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	j := w.create(domain.JobDeployment)
	w.connect(both(1))
	w.answerAll()
	w.deliver()
	c := w.jobs[j.ID]
	c.State = domain.JobCancelled
	w.jobs[j.ID] = c
	w.step(Woken{At: w.now})
	w.answerAll()
	if len(w.cancels) != 1 || w.cancels[0].JobID != j.ID {
		t.Fatalf("cancelled at the agent: %v", w.cancels)
	}
	w.deliver()
	if len(w.settled) != 1 || w.settled[0].Outcome != Ignored {
		t.Fatalf("the agent was told %+v", w.settled)
	}
	w.settle()
}

// TestSnapshotOlderThanItsAnswer: a load that was read before a job ended or was raised must not bring the past back.
func TestSnapshotOlderThanItsAnswer(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	j := w.create(domain.JobDeployment)
	w.connect(both(1))
	w.answerAll()
	w.deliver()
	old := w.openWork(domain.WorkQuery{})
	w.step(Woken{At: w.now}) // the load is out, with the old snapshot
	w.works(w.journal[j.ID], true)
	w.serverTakes()
	w.answer(1, false) // completed meanwhile
	w.pending = nil
	w.step(Loaded{Work: old, At: w.now})
	if waits, out := w.state.Counts(); waits+out != 0 {
		t.Fatalf("the past came back: %d wait, %d are out", waits, out)
	}
	// Read before the attempt was raised: what the agent has stays with it.
	given := w.create(domain.JobDeployment)
	before := w.openWork(domain.WorkQuery{})
	w.ready = both(1)
	w.grant()
	w.step(Woken{At: w.now})
	w.answerAll()
	w.deliver()
	w.step(Woken{At: w.now})
	w.pending = nil
	w.step(Loaded{Work: before, At: w.now})
	if _, out := w.state.Counts(); out != 1 || len(w.cancels) != 0 || w.jobs[given.ID].Attempt != 1 {
		t.Fatalf("an old snapshot moved a job: %d are out, cancelled %v", out, w.cancels)
	}
	// And the other way round: a job that was learned of after the snapshot is not taken for ended.
	w.step(Woken{At: w.now})
	w.pending = nil
	d := w.create(domain.JobDeployment)
	m := machine{State: w.state}
	m.merge(domain.Work{Job: d})
	w.state = m.State
	w.step(Loaded{At: w.now})
	if waits, _ := w.state.Counts(); waits != 1 {
		t.Fatal("a new job was taken for an ended one")
	}
}

// TestReportsSurviveAStoreThatIsDown: a result that cannot be recorded is kept and recorded later.
func TestReportsSurviveAStoreThatIsDown(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	j := w.create(domain.JobDeployment)
	w.connect(both(1))
	w.answerAll()
	w.deliver()
	w.works(w.journal[j.ID], true)
	w.serverTakes()
	for range 6 {
		if len(w.pending) != 1 {
			t.Fatalf("%d uses of the store", len(w.pending))
		}
		w.answer(0, true)
		if w.ticks.IsZero() {
			t.Fatal("it is not tried again")
		}
		w.now = w.ticks
		w.tickIfDue()
	}
	w.settle()
	if w.jobs[j.ID].State != domain.JobCompleted {
		t.Fatalf("the job is %+v", w.jobs[j.ID])
	}
}

// TestMisfits: a CSR for a deployment and a deployment of a key fail the job; nothing is issued or recorded as done.
func TestMisfits(t *testing.T) {
	t.Parallel()
	for kind, say := range map[domain.JobKind]ReportKind{domain.JobDeployment: ReportCSR, domain.JobRenewal: ReportDeployed} {
		w := testWorld(t)
		j := w.create(kind)
		w.connect(both(1))
		w.answerAll()
		w.deliver()
		w.up = append(w.up, Report{Kind: say, Ref: w.journal[j.ID].ref})
		w.deliver()
		if got := w.jobs[j.ID]; got.State != domain.JobFailed || got.ErrorClass != string(fault.Invalid) {
			t.Errorf("%s answered with %d: the job is %+v", kind, say, got)
		}
	}
}

// TestHostileCredits: no amount makes the control plane keep more than MaxCredit in flight, or overflow.
func TestHostileCredits(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	w.connect([Classes]int{1 << 40, -5})
	for range 10 {
		w.step(Granted{Class: Key, Amount: int(^uint(0) >> 1), At: w.now})
		w.step(Granted{Class: Deploy, Amount: -3, At: w.now})
		w.step(Granted{Class: Classes + 3, Amount: 1, At: w.now})
	}
	if c := w.state.Credits(); c != [Classes]int{MaxCredit, 0} {
		t.Fatalf("credits: %v", c)
	}
}

// TestAsksAreBounded: an agent cannot fill the memory with reports about nothing.
func TestAsksAreBounded(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	w.connect(both(0))
	for i := range 3 * maxAsks {
		w.step(Reported{Report: Report{Kind: ReportAccepted, Ref: domain.JobRef{JobID: "job_x", Attempt: int64(i)}}, At: w.now})
	}
	if len(w.state.asks) != maxAsks || len(w.pending) != maxAsks {
		t.Fatalf("%d asks, %d uses of the store", len(w.state.asks), len(w.pending))
	}
}

func TestNothingIsDispatchedAfterTheEnd(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	j := w.create(domain.JobRenewal)
	w.connect(both(3))
	w.answerAll()
	w.deliver()
	w.works(w.journal[j.ID], true)
	w.serverTakes()
	w.state, _ = Step(w.state, Closed{})
	w.down = nil
	w.answerAll() // what was under way is finished
	if w.jobs[j.ID].State != domain.JobCompleted {
		t.Fatal("what was under way was dropped")
	}
	w.step(Granted{Class: Deploy, Amount: 1, At: w.now})
	w.step(Woken{At: w.now})
	for _, m := range w.down {
		if _, ok := m.(Assign); ok || len(w.pending) > 0 {
			t.Fatalf("after the end: %+v, %d uses of the store", m, len(w.pending))
		}
	}
}

// TestVerifications: they are dispatched under credits of their own. An agent that is too old to grant any leaves them waiting and
// everything else alone. What an agent refuses to look at says nothing about the target.
func TestVerifications(t *testing.T) {
	t.Parallel()
	j := domain.Job{ID: "job_1", Kind: domain.JobValidation, State: domain.JobPending, AgentID: "agt_1", MaxTries: 3}
	at := time.Unix(1000, 0)
	s, out := Step(State{}, Opened{AgentID: "agt_1", Epoch: 1, Credits: [Classes]int{Key: 4, Deploy: 4}, Work: domain.OpenWork{Work: []domain.Work{{Job: j}}}, At: at})
	if slices.ContainsFunc(out, func(e Effect) bool { _, ok := e.(Raise); return ok }) {
		t.Fatalf("dispatched without credit: %v", out)
	}
	s, out = Step(s, Granted{Class: Verify, Amount: 1, At: at})
	if _, ok := out[0].(Raise); !ok {
		t.Fatalf("%v", out)
	}
	s, _ = Step(s, Raised{JobID: j.ID, At: at})
	_, out = Step(s, Reported{At: at, Report: Report{Kind: ReportRefused, Ref: domain.JobRef{JobID: j.ID, Attempt: 1},
		Failure: Failure{fault.Conflict, "a later attempt is open here"}}})
	if f, ok := out[0].(Fail); !ok || f.Failure.Class != string(fault.Rejected) {
		t.Fatalf("%v", out)
	}
}
