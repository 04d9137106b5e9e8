package dispatch

import (
	"slices"
	"strings"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Class of work; credits are granted per class.
type Class uint8

// The classes.
const (
	Key    Class = iota // make a key and return a CSR
	Deploy              // install and verify
	Verify              // look, and change nothing
	Classes
)

func (c Class) String() string {
	switch c {
	case Key:
		return "key"
	case Deploy:
		return "deploy"
	case Verify:
		return "verify"
	default:
		return "unknown"
	}
}

// ClassOf is the class of work that a job of kind k is for its agent.
func ClassOf(k domain.JobKind) Class {
	switch k {
	case domain.JobIssuance, domain.JobRenewal:
		return Key
	case domain.JobValidation:
		return Verify
	default:
		return Deploy
	}
}

// MaxCredit bounds what an agent can grant per class; more is taken as this much. It bounds what the control plane keeps
// in flight for one stream.
const MaxCredit = 1024

// Where an item stands.
type phase uint8

const (
	// waiting for its time, a credit, or both.
	waiting phase = iota
	// raising: the store was asked to raise its attempt.
	raising
	// given: the agent has it, or it is on its way there.
	given
)

// item is one open job.
type item struct {
	work  domain.Work
	phase phase
	// bare: only the job's id, kind and attempt are known; Load brings the rest.
	bare bool
	// busy: a report of it, current, is with the store or the issuer.
	busy    bool
	current Report
	// reports wait for their turn, at most one of a kind.
	reports []Report
	// failure is what current is being recorded as.
	failure Failure
	// notBefore delays the next try after the store or the issuer could not be used; tries counts those.
	notBefore time.Time
	tries     int
	// load is the number of the last Load that was begun before the item was known to be open; a later one that does
	// not find the job says that it has ended.
	load int64
}

func (it *item) ref() domain.JobRef {
	return domain.JobRef{JobID: it.work.Job.ID, Attempt: it.work.Job.Attempt}
}

// ask is a report about something that is not among the items: the store says what it is.
type ask struct {
	report    Report
	busy      bool
	notBefore time.Time
	tries     int
}

// maxAsks bounds the reports about unknown work that one stream can have pending. What is beyond it is left out: the
// agent says it again on its next stream.
const maxAsks = 1024

// State is the work of one agent on this node. Step takes a state over: the former value must not be used again.
type State struct {
	agentID string
	epoch   domain.Epoch
	open    bool
	resting bool
	credits [Classes]int
	// items are sorted by job id, which is by age.
	items []*item
	// served is when each owner was last given work, counted in turns; bounded by maxServed.
	served map[string]int64
	turns  int64
	asks   []*ask

	// loads counts Load effects; loading: one is out. loadAt is when the next is due, zero: none is.
	loads     int64
	loading   bool
	loadAt    time.Time
	loadTries int
	// woken: jobs may have changed since the last Load, which began at loadedAt.
	woken    bool
	loadedAt time.Time
	// verify: the next Load is to look whether the session is still this node's.
	verify bool
	// more: there is work of the class beyond the window that was loaded last; given counts what was given of it since that
	// Load. onward and after are the owners behind whom the next window and this one begin; moreOwners: it is not the same.
	more          [Classes]bool
	given         [Classes]int
	moreOwners    bool
	onward, after string
	// ended are jobs that ended while a Load was out, whose answer may be older than that.
	ended []string
	// conflicts counts refused dispatches in a row.
	conflicts int
	// wait is what the last Wait said.
	wait time.Time
	// at is the latest time that an event carried.
	at time.Time
}

// Open reports whether the agent's session is open.
func (s *State) Open() bool { return s.open }

// Credits are the grants that are not used up.
func (s *State) Credits() [Classes]int { return s.credits }

// Counts are the jobs by where they stand: waiting for time or credit, and with the agent (or on their way).
func (s *State) Counts() (waits, out int) {
	for _, it := range s.items {
		if it.phase == waiting {
			waits++
		} else {
			out++
		}
	}
	return waits, out
}

// Event is what happened.
type Event interface{ event() }

// The events that come from outside.
type (
	// Opened: the session was recorded under Epoch, then the agent's work was loaded, as in Loaded; whatever of Held is open
	// is in it. Held is what the agent's journal holds, with the store's settlements in the same order.
	Opened struct {
		AgentID     string
		Epoch       domain.Epoch
		Credits     [Classes]int
		Held        []Held
		Settlements []domain.Settlement
		Work        domain.OpenWork
		At          time.Time
	}
	// Granted: the agent is ready for more.
	Granted struct {
		Class  Class
		Amount int
		At     time.Time
	}
	// Woken: jobs of the agent may have been created, changed or cancelled.
	Woken struct{ At time.Time }
	// Reported: the agent said something about an assignment.
	Reported struct {
		Report Report
		At     time.Time
	}
	// Ticked: the time of the last Wait has come.
	Ticked struct{ At time.Time }
	// Resting: the agent is to connect elsewhere. No further work is given; what it has goes on.
	Resting struct{}
	// Closed: the stream has ended. Answers still come in; nothing more is dispatched.
	Closed struct{}
)

// The events that answer effects.
type (
	// Loaded answers Load.
	Loaded struct {
		Work domain.OpenWork
		Err  error
		At   time.Time
	}
	// Raised answers Raise.
	Raised struct {
		JobID   string
		Attempt int64 // as in Raise
		Err     error
		At      time.Time
	}
	// AcceptedDone answers Accept.
	AcceptedDone struct {
		Ref domain.JobRef
		Err error
		At  time.Time
	}
	// Issued answers Issue.
	Issued struct {
		Ref         domain.JobRef
		Generation  int64
		Deployments []domain.Work
		Err         error
		At          time.Time
	}
	// Completed answers Complete.
	Completed struct {
		Ref        domain.JobRef
		Settlement domain.Settlement
		Err        error
		At         time.Time
	}
	// FailedDone answers Fail. Job is the job as it now is.
	FailedDone struct {
		Ref domain.JobRef
		Job domain.Job
		Err error
		At  time.Time
	}
	// Inquired answers Inquire.
	Inquired struct {
		Ref        domain.JobRef
		Settlement domain.Settlement
		Err        error
		At         time.Time
	}
)

func (Opened) event()       {}
func (Granted) event()      {}
func (Woken) event()        {}
func (Reported) event()     {}
func (Ticked) event()       {}
func (Resting) event()      {}
func (Closed) event()       {}
func (Loaded) event()       {}
func (Raised) event()       {}
func (AcceptedDone) event() {}
func (Issued) event()       {}
func (Completed) event()    {}
func (FailedDone) event()   {}
func (Inquired) event()     {}

// Effect is what is to be done.
type Effect interface{ effect() }

// The effects. Those of the first group are answered by an event, once each, whether the session is still open or not.
type (
	// Load asks the store for open work of the agent: see domain.WorkQuery. Verify: and, before it, whether the session is
	// still this node's; if it is not the stream ends.
	Load struct {
		Verify bool
		Out    []domain.JobRef
		After  string
	}
	// Raise asks the store to raise an attempt.
	Raise struct{ Dispatch domain.Dispatch }
	// Accept records that the agent has the attempt in its journal.
	Accept struct{ Acceptance domain.Acceptance }
	// Issue has the CSR checked, signed and recorded.
	Issue struct {
		Work domain.Work
		CSR  []byte
	}
	// Complete records a success.
	Complete struct{ Result domain.DeployResult }
	// Fail records the end of an attempt; Jitter is the caller's to draw.
	Fail struct{ Failure domain.Failure }
	// Inquire asks the store what became of an attempt.
	Inquire struct{ Ref domain.JobRef }

	// Welcome tells the agent the verdicts, before anything else is sent.
	Welcome struct{ Verdicts []Verdict }
	// Assign sends the work; its job's attempt has been raised.
	Assign struct{ Work domain.Work }
	// Cancel asks the agent to stop an attempt.
	Cancel struct{ Ref domain.JobRef }
	// Settle tells the agent how an attempt ended.
	Settle struct{ Settled Settled }
	// Foreign: the agent spoke of a job that is not its own. Nothing is changed by it; it is for the trail.
	Foreign struct{ Ref domain.JobRef }
	// Wait asks for a Ticked at Until, in place of any former Wait; zero: for none.
	Wait struct{ Until time.Time }
)

func (Load) effect()     {}
func (Raise) effect()    {}
func (Accept) effect()   {}
func (Issue) effect()    {}
func (Complete) effect() {}
func (Fail) effect()     {}
func (Inquire) effect()  {}
func (Welcome) effect()  {}
func (Assign) effect()   {}
func (Cancel) effect()   {}
func (Settle) effect()   {}
func (Foreign) effect()  {}
func (Wait) effect()     {}

// Step advances s by e.
func Step(s State, e Event) (State, []Effect) {
	m := &machine{State: s}
	switch e := e.(type) {
	case Opened:
		m.clock(e.At)
		m.opened(e)
	case Granted:
		m.clock(e.At)
		if m.open && e.Class < Classes && e.Amount > 0 {
			m.credits[e.Class] = min(m.credits[e.Class]+min(e.Amount, MaxCredit), MaxCredit)
		}
	case Woken:
		m.clock(e.At)
		m.woken = true
	case Reported:
		m.clock(e.At)
		m.reported(e.Report)
	case Ticked:
		m.clock(e.At)
	case Resting:
		m.resting = true
		return m.State, nil
	case Closed:
		m.open = false
		return m.State, nil
	case Loaded:
		m.clock(e.At)
		m.loaded(e)
	case Raised:
		m.clock(e.At)
		m.raised(e)
	case AcceptedDone:
		m.clock(e.At)
		m.acceptedDone(e)
	case Issued:
		m.clock(e.At)
		m.issued(e)
	case Completed:
		m.clock(e.At)
		m.completed(e)
	case FailedDone:
		m.clock(e.At)
		m.failedDone(e)
	case Inquired:
		m.clock(e.At)
		m.inquired(e)
	}
	m.pump()
	return m.State, m.out
}

// machine is one step under way.
type machine struct {
	State
	out []Effect
}

// clock moves the time on. Answers are stamped before they queue for the step, so that a later one may carry an earlier
// time: it counts as now.
func (m *machine) clock(at time.Time) {
	if at.After(m.at) {
		m.at = at
	}
}

func (m *machine) do(e Effect) { m.out = append(m.out, e) }

// backoff is the pause after the store or the issuer could not be used: 1 s doubling to 30 s. It needs no jitter: what
// waits for it is spread by when it failed.
func backoff(tries int) time.Duration {
	return min(time.Second<<min(tries, 5), 30*time.Second)
}

func (m *machine) find(jobID string) (int, *item) {
	i, ok := slices.BinarySearchFunc(m.items, jobID, func(it *item, id string) int { return strings.Compare(it.work.Job.ID, id) })
	if !ok {
		return i, nil
	}
	return i, m.items[i]
}

func (m *machine) insert(it *item) {
	i, _ := m.find(it.work.Job.ID)
	m.items = slices.Insert(m.items, i, it)
}

// remove forgets an item that has ended, or of which the truth is to be loaded.
func (m *machine) remove(it *item) {
	if i, have := m.find(it.work.Job.ID); have == it {
		m.items = slices.Delete(m.items, i, i+1)
	}
	if m.loading {
		m.ended = append(m.ended, it.work.Job.ID)
	}
	if len(m.items) == 0 {
		m.items = nil // an idle agent keeps no array
	}
}

// reload has the work loaded at t, or earlier if that was planned.
func (m *machine) reload(t time.Time) {
	if m.loadAt.IsZero() || t.Before(m.loadAt) {
		m.loadAt = t
	}
}

// pump begins whatever can begin now, and says when to look again.
func (m *machine) pump() {
	if !m.open {
		return
	}
	m.resume()
	if m.woken && !m.loading {
		// With plenty in hand nothing gains by being read at once, and each Load reads all of it again.
		at := m.at
		if later := m.loadedAt.Add(loadPause); m.at.Before(later) && m.inHand(Classes) >= plenty {
			at = later
		}
		m.reload(at)
	}
	m.refill()
	if !m.loading && !m.loadAt.IsZero() && !m.at.Before(m.loadAt) {
		m.load()
	}
	var next time.Time
	soonest := func(t time.Time) {
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	if !m.loading && !m.loadAt.IsZero() {
		soonest(m.loadAt)
	}
	var ready [Classes][]*item
	for _, it := range m.items {
		switch {
		case it.phase == given && !it.busy && len(it.reports) > 0 && m.at.Before(it.notBefore):
			soonest(it.notBefore)
		case it.phase == waiting:
			t := it.work.Job.RunAt
			if it.notBefore.After(t) {
				t = it.notBefore
			}
			c := ClassOf(it.work.Job.Kind)
			switch {
			case m.at.Before(t):
				soonest(t)
			case m.credits[c] > 0 && !m.resting:
				ready[c] = append(ready[c], it)
			}
		}
	}
	for c, items := range ready {
		m.give(Class(c), items)
	}
	for _, a := range m.asks {
		if !a.busy && m.at.Before(a.notBefore) {
			soonest(a.notBefore)
		}
	}
	if !next.Equal(m.wait) {
		m.wait = next
		m.do(Wait{Until: next})
	}
}

const (
	// plenty is how many jobs that wait for credit are enough to go on with for loadPause, after which the work is loaded again;
	// it bounds what a job of another owner waits for being seen.
	plenty    = 64
	loadPause = 250 * time.Millisecond
)

// maxServed bounds what is remembered of turns. Forgetting them costs an owner one turn.
const maxServed = 4096

// give spends the credits of a class on items, which are runnable and by age: owners take turns, the one that was served
// longest ago first, and within an owner the oldest. So a hundred thousand jobs of one owner delay another's by one.
func (m *machine) give(c Class, items []*item) {
	lanes := map[string][]*item{}
	var owners []string // by their oldest item
	for _, it := range items {
		o := it.work.Owner
		if lanes[o] == nil {
			owners = append(owners, o)
		}
		lanes[o] = append(lanes[o], it)
	}
	for m.credits[c] > 0 && len(owners) > 0 {
		first := 0
		for i, o := range owners {
			if m.served[o] < m.served[owners[first]] {
				first = i
			}
		}
		o := owners[first]
		it := lanes[o][0]
		if lanes[o] = lanes[o][1:]; len(lanes[o]) == 0 {
			owners = slices.Delete(owners, first, first+1)
		}
		if m.served == nil || len(m.served) > maxServed {
			m.served = map[string]int64{}
		}
		m.turns++
		m.served[o] = m.turns
		m.credits[c]--
		m.given[c]++
		it.phase = raising
		m.do(Raise{domain.Dispatch{JobID: it.work.Job.ID, AgentID: m.agentID, Attempt: it.work.Job.Attempt, Epoch: m.epoch, At: m.at}})
	}
}

// opened begins the session: the verdicts on what the agent holds, and the work.
func (m *machine) opened(e Opened) {
	m.agentID, m.epoch, m.open = e.AgentID, e.Epoch, true
	for c, n := range e.Credits {
		m.credits[c] = min(max(n, 0), MaxCredit)
	}
	for _, w := range e.Work.Work {
		if _, have := m.find(w.Job.ID); have == nil {
			m.insert(&item{work: w})
		}
	}
	m.window(e.Work)
	verdicts := make([]Verdict, 0, len(e.Held))
	var foreign []domain.JobRef
	for i, h := range e.Held {
		if i >= len(e.Settlements) {
			break
		}
		s := e.Settlements[i]
		if !s.Open {
			st := settledBy(h.Ref, s)
			verdicts = append(verdicts, Verdict{Ref: h.Ref, Decision: Forget, Settled: st})
			if s.State == "" {
				foreign = append(foreign, h.Ref)
			}
			continue
		}
		_, it := m.find(h.Ref.JobID)
		switch {
		case it == nil:
			// It ended between the two reads, or lacks what an assignment needs; a report will tell.
			it = &item{work: domain.Work{Job: bareJob(m.agentID, h.Ref, s)}, bare: true}
			m.insert(it)
		case it.work.Job.Attempt != h.Ref.Attempt:
			verdicts = append(verdicts, Verdict{Ref: h.Ref, Decision: Forget, Settled: Settled{Ref: h.Ref, Outcome: Ignored}})
			continue
		}
		it.phase = given
		v := Verdict{Ref: h.Ref, Decision: RedoReport}
		if !h.Reported {
			v.Decision = Continue
			// The acceptance may have been lost with the former stream; the store knows whether it counts.
			it.reports = append(it.reports, Report{Kind: ReportAccepted, Ref: h.Ref})
		}
		verdicts = append(verdicts, v)
	}
	m.do(Welcome{Verdicts: verdicts})
	for _, ref := range foreign {
		m.do(Foreign{Ref: ref})
	}
	for _, it := range m.items {
		m.next(it)
	}
}

func bareJob(agentID string, ref domain.JobRef, s domain.Settlement) domain.Job {
	return domain.Job{ID: ref.JobID, AgentID: agentID, Attempt: ref.Attempt, Kind: s.Kind, State: s.State,
		CertificateID: s.CertificateID, Generation: s.Generation}
}

// loaded reconciles what is believed with what the store has.
func (m *machine) loaded(e Loaded) {
	if !m.loading {
		return
	}
	m.loading = false
	ended := m.ended
	m.ended = nil
	if e.Err != nil {
		m.reload(m.at.Add(backoff(m.loadTries)))
		m.loadTries++
		return
	}
	m.loadTries = 0
	m.window(e.Work)
	open := make(map[string]struct{}, len(e.Work.Work)+len(e.Work.Kept))
	for _, id := range e.Work.Kept {
		open[id] = struct{}{}
	}
	for _, w := range e.Work.Work {
		open[w.Job.ID] = struct{}{}
		if !slices.Contains(ended, w.Job.ID) {
			m.merge(w)
		}
	}
	for _, it := range slices.Clone(m.items) {
		if _, ok := open[it.work.Job.ID]; ok || it.load >= m.loads || it.busy || it.phase == raising {
			continue
		}
		switch {
		case it.bare && len(it.reports) > 0:
			// The store judges the report; without an order nothing can be issued.
			it.failure = Failure{Class: fault.Retryable, Message: "the order could not be read"}
			m.fail(it, it.reports[0])
			it.reports = it.reports[1:]
		default:
			if it.phase == given {
				m.do(Cancel{Ref: it.ref()})
			}
			m.remove(it)
		}
	}
}

// merge takes work that the store has into account.
func (m *machine) merge(w domain.Work) {
	_, it := m.find(w.Job.ID)
	switch {
	case it == nil:
		m.insert(&item{work: w, load: m.loads})
	case it.busy || it.phase == raising:
		// The answer that is awaited says what became of it.
	case w.Job.Attempt == it.work.Job.Attempt:
		it.work, it.bare = w, false
		m.next(it)
	case w.Job.Attempt > it.work.Job.Attempt:
		// Reaped, or moved to a newer generation: what the agent has is stale. It is asked to stop, because its place is
		// needed for the next attempt.
		if it.phase == given {
			m.do(Cancel{Ref: it.ref()})
		}
		*it = item{work: w, load: m.loads}
	}
}

func (m *machine) raised(e Raised) {
	_, it := m.find(e.JobID)
	if it == nil || it.phase != raising || it.work.Job.Attempt != e.Attempt {
		return
	}
	it.load = m.loads
	if e.Err == nil {
		it.phase, it.tries, it.notBefore = given, 0, time.Time{}
		it.work.Job.Attempt++
		it.work.Job.AcceptedAt = time.Time{}
		m.conflicts = 0
		if m.open {
			m.do(Assign{Work: it.work})
		}
		return
	}
	c := ClassOf(it.work.Job.Kind)
	m.credits[c] = min(m.credits[c]+1, MaxCredit)
	if fault.MayRetry(e.Err) {
		it.phase, it.notBefore = waiting, m.at.Add(backoff(it.tries))
		it.tries++
		// Whether it was raised is not known.
		m.reload(it.notBefore)
		return
	}
	// What was believed of the job or of the session is wrong. The pause grows, so that a belief that stays wrong for
	// whatever reason costs little.
	m.remove(it)
	m.verify = true
	pause := time.Duration(0)
	if m.conflicts > 0 {
		pause = backoff(m.conflicts - 1)
	}
	m.conflicts++
	m.reload(m.at.Add(pause))
}
