package dispatch

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	testAgent  = "agt_1"
	otherAgent = "agt_2"
)

var start = time.Date(2026, 11, 25, 9, 0, 0, 0, time.UTC)

// world is everything around Step: a store that judges as the real one does, an agent with a journal, and the stream
// between them, all of which answer when a test says so.
type world struct {
	fail func(format string, args ...any)
	now  time.Time

	jobs    map[string]domain.Job
	owners  map[string]string // of jobs
	windows windows
	applied map[domain.JobRef]int // outcomes that the store has taken, by attempt
	raised  map[domain.JobRef]bool
	serial  int

	state    State
	epoch    domain.Epoch
	pending  []*use         // unanswered effects
	inFlight map[string]int // reports of a job with the store
	ticks    time.Time
	loads    int

	// The stream: what is on its way in each direction, and what was granted and sent on it.
	down          []Effect
	up            []Report
	granted, sent [Classes]int

	journal  map[string]*entry
	settled  []Settled
	verdicts []Verdict
	foreign  []domain.JobRef
	cancels  []domain.JobRef
	ready    [Classes]int // credits the agent has not told yet
}

// entry is an assignment in the agent's journal.
type entry struct {
	ref    domain.JobRef
	class  Class
	report *Report // what it said last
}

func newWorld(fail func(string, ...any)) *world {
	return &world{fail: fail, now: start, jobs: map[string]domain.Job{}, owners: map[string]string{}, windows: windows{most: domain.MaxOpenWork, lane: domain.WorkWindow, owners: domain.WindowOwners}, applied: map[domain.JobRef]int{}, raised: map[domain.JobRef]bool{},
		journal: map[string]*entry{}, inFlight: map[string]int{}}
}

func (w *world) create(kind domain.JobKind) domain.Job {
	w.serial++
	j := domain.Job{ID: fmt.Sprintf("job_%04d", w.serial), Kind: kind, State: kind.InitialState(), AgentID: testAgent,
		CertificateID: "cert_" + fmt.Sprint(w.serial), Generation: 1, MaxTries: 1000, RunAt: w.now, CreatedAt: w.now}
	w.jobs[j.ID] = j
	return j
}

// judge is the store's.
func (w *world) judge(ref domain.JobRef) error {
	j, ok := w.jobs[ref.JobID]
	switch {
	case !ok || j.AgentID != testAgent:
		return fault.New(fault.NotFound, "no such job")
	case !j.State.Open() || j.Attempt != ref.Attempt || ref.Attempt < 1:
		return fault.New(fault.Conflict, "stale")
	}
	return nil
}

func (w *world) settlement(ref domain.JobRef) domain.Settlement {
	j, ok := w.jobs[ref.JobID]
	s := domain.Settlement{JobID: ref.JobID, Attempt: ref.Attempt}
	if !ok || j.AgentID != testAgent {
		return s
	}
	s.State, s.Kind, s.CertificateID, s.Generation = j.State, j.Kind, j.CertificateID, j.Generation
	s.Open = w.judge(ref) == nil
	return s
}

var errDown = fault.New(fault.Retryable, "the store is down")

// connect is a Hello: credits are counted anew, what the journal holds is listed.
func (w *world) connect(credits [Classes]int) {
	w.state, _ = Step(w.state, Closed{})
	w.state, w.down, w.up = State{}, nil, nil
	w.pending, w.inFlight = nil, map[string]int{}
	w.granted, w.sent, w.ready = credits, [Classes]int{}, [Classes]int{}
	w.epoch++
	e := Opened{AgentID: testAgent, Epoch: w.epoch, Credits: credits, At: w.now}
	for _, id := range slices.Sorted(maps.Keys(w.journal)) {
		en := w.journal[id]
		e.Held = append(e.Held, Held{Ref: en.ref, Reported: en.report != nil && en.report.Kind != ReportAccepted})
		e.Settlements = append(e.Settlements, w.settlement(en.ref))
	}
	e.Work = w.openWork(domain.WorkQuery{Out: wanted(e.Held)})
	w.step(e)
	w.verdicts = w.down[0].(Welcome).Verdicts
	w.agentTakes() // nothing is said before Welcome
}

func (w *world) step(e Event) {
	var effects []Effect
	w.state, effects = Step(w.state, e)
	for _, f := range effects {
		w.effect(f)
	}
}

// use is a use of the store: it happens, and some time later its answer is heard.
type use struct {
	jobID    string
	epoch    domain.Epoch
	happen   func(w *world, broken bool) Event
	happened Event
}

// later queues a use of the store.
func (w *world) later(jobID string, happen func(w *world, broken bool) Event) {
	if jobID != "" {
		if w.inFlight[jobID]++; w.inFlight[jobID] > 1 {
			w.fail("%d reports of %s are with the store at once", w.inFlight[jobID], jobID)
		}
	}
	w.pending = append(w.pending, &use{jobID: jobID, epoch: w.epoch, happen: happen})
}

// commit lets a use happen without its answer being heard yet.
func (w *world) commit(i int, broken bool) {
	if u := w.pending[i]; u.happened == nil {
		u.happened = u.happen(w, broken)
	}
}

func (w *world) effect(f Effect) {
	switch f := f.(type) {
	case Load:
		w.loads++
		w.later("", func(w *world, broken bool) Event {
			if broken {
				return Loaded{Err: errDown, At: w.now}
			}
			return Loaded{Work: w.openWork(domain.WorkQuery{Out: f.Out, After: f.After}), At: w.now}
		})
	case Raise:
		w.raise(f.Dispatch)
	case Accept:
		a := f.Acceptance
		ref := domain.JobRef{JobID: a.JobID, Attempt: a.Attempt}
		w.later(a.JobID, func(w *world, broken bool) Event {
			err := w.judge(ref)
			if broken {
				err = errDown
			}
			if err == nil {
				j := w.jobs[a.JobID]
				if j.AcceptedAt.IsZero() {
					j.Tries++
				}
				j.AcceptedAt = w.now
				w.jobs[a.JobID] = j
			}
			return AcceptedDone{Ref: ref, Err: err, At: w.now}
		})
	case Issue:
		w.issue(f)
	case Complete:
		r := f.Result
		ref := domain.JobRef{JobID: r.JobID, Attempt: r.Attempt}
		w.later(r.JobID, func(w *world, broken bool) Event {
			err := w.judge(ref)
			if broken {
				err = errDown
			}
			if err == nil {
				w.end(ref, domain.JobCompleted)
			}
			return Completed{Ref: ref, Settlement: w.settlement(ref), Err: err, At: w.now}
		})
	case Fail:
		x := f.Failure
		ref := domain.JobRef{JobID: x.JobID, Attempt: x.Attempt}
		w.later(x.JobID, func(w *world, broken bool) Event {
			err := w.judge(ref)
			if broken {
				err = errDown
			}
			var j domain.Job
			if err == nil {
				w.applied[ref]++
				j = domain.AfterFailure(w.jobs[x.JobID], x, fault.MayRetry(&fault.Error{Class: fault.Class(x.Class)}))
				if j.State.Open() {
					j.Attempt++
				}
				w.jobs[j.ID] = j
			}
			return FailedDone{Ref: ref, Job: j, Err: err, At: w.now}
		})
	case Inquire:
		w.later("", func(w *world, broken bool) Event {
			if broken {
				return Inquired{Ref: f.Ref, Err: errDown, At: w.now}
			}
			return Inquired{Ref: f.Ref, Settlement: w.settlement(f.Ref), At: w.now}
		})
	case Assign:
		c := ClassOf(f.Work.Job.Kind)
		if w.sent[c]++; w.sent[c] > w.granted[c] {
			w.fail("%d %s assignments sent, %d granted", w.sent[c], c, w.granted[c])
		}
		ref := domain.JobRef{JobID: f.Work.Job.ID, Attempt: f.Work.Job.Attempt}
		if !w.raised[ref] {
			w.fail("%v was sent and never raised", ref)
		}
		w.down = append(w.down, f)
	case Foreign:
		w.foreign = append(w.foreign, f.Ref)
	case Wait:
		w.ticks = f.Until
	case Cancel:
		w.cancels = append(w.cancels, f.Ref)
		w.down = append(w.down, f)
	default:
		w.down = append(w.down, f)
	}
}

func (w *world) raise(d domain.Dispatch) {
	w.later("", func(w *world, broken bool) Event {
		j, ok := w.jobs[d.JobID]
		var err error
		switch {
		case !ok || !j.State.Open() || j.Attempt != d.Attempt || j.AgentID != d.AgentID || d.Epoch != w.epoch:
			err = fault.New(fault.Conflict, "stale")
		case broken && w.now.UnixNano()%2 == 0:
			err = errDown
		default:
			j.Attempt++
			j.State, j.AcceptedAt = j.Kind.InitialState(), time.Time{}
			w.jobs[d.JobID] = j
			w.raised[domain.JobRef{JobID: d.JobID, Attempt: j.Attempt}] = true
			if broken {
				err = errDown // kept, but nobody was told
			}
		}
		return Raised{JobID: d.JobID, Attempt: d.Attempt, Err: err, At: w.now}
	})
}

func (w *world) issue(f Issue) {
	j := f.Work.Job
	ref := domain.JobRef{JobID: j.ID, Attempt: j.Attempt}
	w.later(j.ID, func(w *world, broken bool) Event {
		err := w.judge(ref)
		switch {
		case broken:
			err = errDown
		case err == nil && string(f.CSR) == "bad":
			err = fault.New(fault.Invalid, "the request names other things")
		}
		e := Issued{Ref: ref, Generation: j.Generation, Err: err, At: w.now}
		if err == nil {
			w.end(ref, domain.JobCompleted)
			e.Deployments = []domain.Work{{Job: w.create(domain.JobDeployment)}}
		}
		return e
	})
}

func (w *world) end(ref domain.JobRef, s domain.JobState) {
	w.applied[ref]++
	if w.applied[ref] > 1 {
		w.fail("%v was applied twice", ref)
	}
	j := w.jobs[ref.JobID]
	j.State, j.FinishedAt = s, w.now
	w.jobs[ref.JobID] = j
}

// agentTakes lets the agent handle the next message, as the real one does.
func (w *world) agentTakes() bool {
	if len(w.down) == 0 {
		return false
	}
	m := w.down[0]
	w.down = w.down[1:]
	switch m := m.(type) {
	case Welcome:
		for _, v := range m.Verdicts {
			en := w.journal[v.Ref.JobID]
			switch {
			case en == nil:
				w.fail("a verdict on %v, which is not held", v.Ref)
			case v.Decision == Forget:
				delete(w.journal, v.Ref.JobID)
			case v.Decision == RedoReport:
				w.up = append(w.up, *en.report)
			}
		}
	case Assign:
		j := m.Work.Job
		w.ready[ClassOf(j.Kind)]++
		if en := w.journal[j.ID]; en != nil && en.ref.Attempt >= j.Attempt {
			return true
		}
		w.journal[j.ID] = &entry{ref: domain.JobRef{JobID: j.ID, Attempt: j.Attempt}, class: ClassOf(j.Kind)}
		w.up = append(w.up, Report{Kind: ReportAccepted, Ref: w.journal[j.ID].ref})
	case Cancel:
		if en := w.journal[m.Ref.JobID]; en != nil && en.ref == m.Ref {
			w.says(en, Report{Kind: ReportFailed, Ref: en.ref, Failure: Failure{fault.Rejected, "cancelled"}})
		}
	case Settle:
		w.settled = append(w.settled, m.Settled)
		if en := w.journal[m.Settled.Ref.JobID]; en != nil && m.Settled.Ref.Attempt >= en.ref.Attempt {
			delete(w.journal, m.Settled.Ref.JobID)
		}
	}
	return true
}

func (w *world) says(en *entry, r Report) {
	en.report = &r
	w.up = append(w.up, r)
}

// works lets the agent finish an assignment.
func (w *world) works(en *entry, ok bool) {
	switch {
	case !ok:
		w.says(en, Report{Kind: ReportFailed, Ref: en.ref, Failure: Failure{fault.Retryable, "it did not work"}})
	case en.class == Key:
		w.says(en, Report{Kind: ReportCSR, Ref: en.ref, CSR: []byte("csr")})
	default:
		w.says(en, Report{Kind: ReportDeployed, Ref: en.ref})
	}
}

func (w *world) grant() {
	for c, n := range w.ready {
		if n > 0 {
			w.ready[c] = 0
			w.granted[c] += n
			w.step(Granted{Class: Class(c), Amount: n, At: w.now})
		}
	}
}

func (w *world) serverTakes() bool {
	if len(w.up) == 0 {
		return false
	}
	r := w.up[0]
	w.up = w.up[1:]
	w.step(Reported{Report: r, At: w.now})
	return true
}

func (w *world) answer(i int, broken bool) {
	w.commit(i, broken)
	u := w.pending[i]
	w.pending = slices.Delete(w.pending, i, i+1)
	if u.jobID != "" {
		w.inFlight[u.jobID]--
	}
	w.step(u.happened)
}

// settle runs everything to its end with a store that works and an agent that succeeds, and fails if anything stays open.
func (w *world) settle() {
	for range 20000 {
		switch {
		case len(w.pending) > 0:
			w.answer(0, false)
		case w.serverTakes() || w.agentTakes():
		case w.unsaid():
		case w.ready != [Classes]int{}:
			w.grant()
		case !w.ticks.IsZero():
			w.now = w.ticks
			w.ticks = time.Time{}
			w.step(Ticked{At: w.now})
		default:
			w.quiet()
			return
		}
	}
	w.fail("it does not come to rest: %+v", w.state)
}

// unsaid lets the agent work on what it has not reported.
func (w *world) unsaid() bool {
	for _, id := range slices.Sorted(maps.Keys(w.journal)) {
		if en := w.journal[id]; en.report == nil {
			w.works(en, true)
			return true
		}
	}
	return false
}

func (w *world) quiet() {
	for _, id := range slices.Sorted(maps.Keys(w.jobs)) {
		if j := w.jobs[id]; j.AgentID == testAgent && j.State.Open() {
			w.fail("job %s stays %s at attempt %d", id, j.State, j.Attempt)
		}
	}
	for _, en := range w.journal {
		w.fail("the agent still holds %v", en.ref)
	}
	if waits, out := w.state.Counts(); waits+out > 0 {
		w.fail("%d jobs wait and %d are out, none is open", waits, out)
	}
	for c, n := range w.state.Credits() {
		if n != w.granted[c]-w.sent[c] {
			w.fail("%d %s credits are left of %d, after %d assignments", n, Class(c), w.granted[c], w.sent[c])
		}
	}
	if len(w.state.asks) > 0 {
		w.fail("%d reports are still asked about", len(w.state.asks))
	}
}
