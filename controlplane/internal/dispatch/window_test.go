package dispatch

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// windows are the bounds of the world's store.
type windows struct{ most, lane, owners int }

func wanted(held []Held) []domain.JobRef {
	var refs []domain.JobRef
	for _, h := range held {
		refs = append(refs, domain.JobRef{JobID: h.Ref.JobID})
	}
	return refs
}

// openWork answers as the store does.
func (w *world) openWork(q domain.WorkQuery) domain.OpenWork {
	var answer domain.OpenWork
	var open []domain.Job
	for _, id := range slices.Sorted(maps.Keys(w.jobs)) {
		if j := w.jobs[id]; j.State.Open() && j.AgentID == testAgent {
			open = append(open, j)
		}
	}
	add := func(j domain.Job) {
		answer.Work = append(answer.Work, domain.Work{Job: j, Owner: w.owners[j.ID]})
	}
	if len(open) <= w.windows.most {
		for _, j := range open {
			add(j)
		}
		return answer
	}
	out := map[string]int64{}
	for _, r := range q.Out {
		out[r.JobID] = r.Attempt
	}
	lanes := map[string]map[domain.JobKind][]domain.Job{}
	for _, j := range open {
		o := w.owners[j.ID]
		if lanes[o] == nil {
			lanes[o] = map[domain.JobKind][]domain.Job{}
		}
		switch attempt, isOut := out[j.ID]; {
		case isOut && attempt == j.Attempt:
			answer.Kept = append(answer.Kept, j.ID)
		case isOut:
			add(j)
		default:
			lanes[o][j.Kind] = append(lanes[o][j.Kind], j)
		}
	}
	owners := slices.Sorted(maps.Keys(lanes))
	first, _ := slices.BinarySearch(owners, q.After)
	if first < len(owners) && owners[first] == q.After {
		first++
	}
	owners = slices.Concat(owners[first:], owners[:first])
	if len(owners) > w.windows.owners {
		owners = owners[:w.windows.owners]
		answer.MoreOwners, answer.Next = true, owners[len(owners)-1]
	}
	for _, k := range []domain.JobKind{domain.JobIssuance, domain.JobRenewal, domain.JobDeployment, domain.JobValidation} {
		n, left := 0, 0
		for rank := range len(open) {
			for _, o := range owners {
				lane := lanes[o][k]
				if rank == 0 {
					slices.SortStableFunc(lane, func(a, b domain.Job) int { return a.RunAt.Compare(b.RunAt) })
				}
				switch {
				case rank >= len(lane):
				case n < w.windows.lane:
					n++
					add(lane[rank])
				default:
					left++
				}
			}
		}
		if left > 0 {
			answer.More = append(answer.More, k)
		}
	}
	slices.SortFunc(answer.Work, func(a, b domain.Work) int { return cmp.Compare(a.Job.ID, b.Job.ID) })
	return answer
}

// TestWindowsLoseNothing: with far more work than is in hand, in any mix of owners and kinds, with an agent that fails now
// and then and goes away in the middle, every job is done in the end, and what is in hand stays bounded.
func TestWindowsLoseNothing(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(func(f string, args ...any) { t.Helper(); t.Fatalf(f, args...) })
		w.windows = windows{most: 12, lane: 6, owners: 3}
		kinds := []domain.JobKind{domain.JobIssuance, domain.JobRenewal, domain.JobDeployment, domain.JobValidation}
		owners := rapid.IntRange(1, 8).Draw(t, "owners")
		for range rapid.IntRange(10, 120).Draw(t, "jobs") {
			j := w.create(rapid.SampledFrom(kinds).Draw(t, "kind"))
			w.owners[j.ID] = fmt.Sprint("owner", rapid.IntRange(0, owners-1).Draw(t, "owner"))
			if rapid.IntRange(0, 4).Draw(t, "rests") == 0 {
				j.RunAt = w.now.Add(time.Duration(rapid.IntRange(1, 600).Draw(t, "s")) * time.Second)
				w.jobs[j.ID] = j
			}
		}
		w.connect(both(rapid.IntRange(0, 4).Draw(t, "credits")))
		for range rapid.IntRange(0, 200).Draw(t, "steps") {
			switch rapid.IntRange(0, 7).Draw(t, "what") {
			case 0:
				if len(w.pending) > 0 {
					w.answer(0, rapid.IntRange(0, 9).Draw(t, "broken") == 0)
				}
			case 1:
				w.answerAll()
			case 2:
				w.deliver()
			case 3:
				for _, id := range slices.Sorted(maps.Keys(w.journal)) {
					if en := w.journal[id]; en.report == nil {
						w.works(en, rapid.IntRange(0, 3).Draw(t, "ok") > 0)
					}
				}
			case 4:
				w.grant()
			case 5:
				w.now = w.now.Add(time.Duration(rapid.IntRange(1, 5000).Draw(t, "ms")) * time.Millisecond)
				w.tickIfDue()
			case 6:
				if rapid.IntRange(0, 9).Draw(t, "away") == 0 {
					w.connect(both(rapid.IntRange(0, 4).Draw(t, "credits")))
				}
			case 7:
				w.step(Woken{At: w.now})
			}
		}
		w.ready[Key], w.ready[Deploy], w.ready[Verify] = w.ready[Key]+2, w.ready[Deploy]+2, w.ready[Verify]+2
		w.settle()
	})
}

// TestWindowIsBounded: of very many jobs a window is in hand, however often it is loaded, and jobs of another owner behind
// them go out in turn.
func TestWindowIsBounded(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	for range 4 * domain.MaxOpenWork {
		j := w.create(domain.JobDeployment)
		w.owners[j.ID] = "big"
	}
	small := w.create(domain.JobDeployment)
	w.owners[small.ID] = "small"
	w.connect(both(0))
	check := func() {
		t.Helper()
		if waits, out := w.state.Counts(); waits > 2*domain.WorkWindow {
			t.Fatalf("%d wait in hand, %d are out", waits, out)
		}
	}
	check()
	for n := 1; n <= 2*domain.MaxOpenWork; n++ {
		w.granted[Deploy]++
		w.step(Granted{Class: Deploy, Amount: 1, At: w.now})
		w.answerAll()
		if j := w.jobs[small.ID]; n == 2 && j.Attempt != 1 {
			t.Fatal("the other owner's job did not have the second turn")
		}
		if n%100 == 0 {
			w.now = w.now.Add(time.Second)
			w.step(Woken{At: w.now})
			w.answerAll()
		}
		check()
	}
	if _, out := w.state.Counts(); out != 2*domain.MaxOpenWork {
		t.Fatalf("%d are out", out)
	}
	if most := 2*domain.MaxOpenWork/windowLow + 2*domain.MaxOpenWork/100 + 2; w.loads > most {
		t.Errorf("%d loads, at most %d are needed", w.loads, most)
	}
}

// TestWindowsTakeOwnersInTurn: more owners than a window has, some of whom have only work that rests.
func TestWindowsTakeOwnersInTurn(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	w.windows = windows{most: 4, lane: 4, owners: 2}
	for i := range 40 {
		j := w.create(domain.JobRenewal)
		w.owners[j.ID] = fmt.Sprint("owner", i%10)
		if i%10 < 6 {
			j.RunAt = w.now.Add(time.Hour)
			w.jobs[j.ID] = j
		}
	}
	w.connect(both(1))
	begun := w.now
	w.ready[Key] = 20
	for range 2000 {
		done := 0
		for _, j := range w.jobs {
			if j.State == domain.JobCompleted && j.Kind == domain.JobRenewal {
				done++
			}
		}
		if done >= 16 {
			break
		}
		switch {
		case len(w.pending) > 0:
			w.answer(0, false)
		case w.serverTakes() || w.agentTakes() || w.unsaid():
		case w.ready != [Classes]int{}:
			w.grant()
		default:
			w.now, w.ticks = w.ticks, time.Time{}
			w.step(Ticked{At: w.now})
		}
	}
	if took := w.now.Sub(begun); took > 5*time.Minute {
		t.Errorf("what could run at once waited %v behind what rests", took)
	}
	w.ready[Key], w.ready[Deploy], w.ready[Verify] = 2, 2, 2
	w.settle()
}

// TestFailureOutsideTheWindow: a report of work that was given and is not in the window is recorded like any other, and the
// agent is not asked to stop it.
func TestFailureOutsideTheWindow(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	w.windows = windows{most: 4, lane: 2, owners: 2}
	for range 20 {
		w.create(domain.JobDeployment)
	}
	w.connect(both(6))
	w.answerAll()
	w.deliver()
	w.now = w.now.Add(time.Second)
	w.step(Woken{At: w.now})
	w.answerAll()
	if len(w.cancels) > 0 || len(w.journal) != 6 {
		t.Fatalf("the agent holds %d and was asked to stop %v", len(w.journal), w.cancels)
	}
	w.works(w.journal["job_0001"], false)
	w.deliver()
	if j := w.jobs["job_0001"]; j.Tries != 1 || w.settled[0].Failure.Class != fault.Retryable {
		t.Fatalf("%+v, %+v", j, w.settled)
	}
	// The next stream: what the journal holds goes on.
	w.connect(both(2))
	for _, v := range w.verdicts {
		if v.Decision != Continue {
			t.Errorf("of %v the agent was told %d", v.Ref, v.Decision)
		}
	}
	w.settle()
}

// TestWhatWasNotLookedAtIsNoTry: a request that the issuer has no time for waits, and its job keeps its tries.
func TestWhatWasNotLookedAtIsNoTry(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	j := w.create(domain.JobRenewal)
	w.connect(both(1))
	w.answerAll()
	w.deliver()
	w.works(w.journal[j.ID], true)
	w.serverTakes()
	w.pending = nil
	w.inFlight = map[string]int{}
	w.step(Issued{Ref: w.journal[j.ID].ref, Err: fault.Limited(w.now.Add(time.Second), "in a moment"), At: w.now})
	if len(w.pending) > 0 || len(w.settled) > 0 || w.ticks.IsZero() {
		t.Fatalf("%d uses of the store, settled %v, waits until %v", len(w.pending), w.settled, w.ticks)
	}
	w.settle()
	if got := w.jobs[j.ID]; got.State != domain.JobCompleted || got.Tries != 1 {
		t.Errorf("the job is %s after %d tries", got.State, got.Tries)
	}
}
