package work

import (
	"cmp"
	"encoding/json"
	"math"
	"slices"

	"github.com/certmesh/certmesh/agent/internal/journal"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// MaxOpen bounds the journal. Above it no credit is granted, so that an agent whose results nobody settles stops
// taking work; and a Hello that lists this many open assignments stays far below 64 KiB.
const MaxOpen = 512

// model is the agent's side of all open assignments: a pure state machine. step takes an event and returns what is to
// be done, in order; it knows no clock, disk or network, which is what lets the tests run thousands of random orders.
//
//	Assigned → (store) → Accepted, run → Done → (store) → Csr or Result → Settled → (keys) → dropped
//	                                              Attached: what is finished is sent again, what is not is run
type model struct {
	items map[string]*item
	// limit is how many assignments of a class may be in work at once; unspent are the credits the server holds.
	limit, unspent map[agentpb.WorkClass]int
	attached       bool
	// sick: the journal could not be written. No credit is granted until a probe succeeds.
	sick bool
}

// item is one open assignment.
type item struct {
	entry *journal.Entry
	// busy: it is being stored for the first time, or run; it occupies a place of its class.
	busy bool
	// running is the attempt that a worker runs now; 0: none.
	running int64
	// stored: the entry is on disk and Accepted may be said.
	stored bool
	// storing is the entry on whose store it hangs what is said next: Accepted, or the outcome. nil: none.
	storing *journal.Entry
	// settled came while a worker ran; it is acted on when the worker has ended.
	settled *agentpb.Settled
	// gone: forgotten by the server while a worker ran.
	gone bool
}

func newModel(limit map[agentpb.WorkClass]int) *model {
	return &model{items: map[string]*item{}, limit: limit, unspent: map[agentpb.WorkClass]int{}}
}

// The events.
type (
	// evRestored: an entry read from the journal at start.
	evRestored struct{ entry *journal.Entry }
	// evGreeted: Hello is being made; credits are counted anew from here.
	evGreeted struct{}
	// evAttached: Welcome arrived with the verdicts.
	evAttached struct{ verdicts []*agentpb.Verdict }
	evDetached struct{}
	// evAssigned: an assignment arrived; refusal says that it cannot be done here.
	evAssigned struct {
		a       *agentpb.Assignment
		refusal *agentpb.Failure
	}
	// evStored answers doStore.
	evStored struct {
		entry   *journal.Entry
		failure *agentpb.Failure
	}
	// evFinished: a worker ended with a CSR (and its key) or a result; neither: it was stopped with the process.
	evFinished struct {
		id        string
		attempt   int64
		csr, spki []byte
		result    *agentpb.Result
	}
	evSettled struct{ s *agentpb.Settled }
	evCancel  struct{ c *agentpb.Cancel }
	// evProbed: the journal was probed.
	evProbed struct{ ok bool }
)

// The effects.
type (
	// doStore writes the entry durably, after all that were stored or dropped before; the answer is a stored event.
	doStore struct{ entry *journal.Entry }
	// doSend hands a message to the stream, if there is one.
	doSend struct{ m *agentpb.ConnectRequest }
	// doStart runs the entry in a worker; its end is a finished event.
	doStart struct{ entry *journal.Entry }
	// doStop asks the worker to end early if it still can.
	doStop struct{ id string }
	// doSettle acts on keys as Settled says, then drops the entry. s may be nil: only drop.
	doSettle struct {
		entry *journal.Entry
		s     *agentpb.Settled
	}
)

func (m *model) step(ev any) []any {
	var out []any
	switch e := ev.(type) {
	case evRestored:
		m.items[e.entry.Assignment.GetId()] = &item{entry: e.entry, stored: true}
	case evGreeted:
		m.attached = false
		for c := range m.limit {
			m.unspent[c] = 0
			m.unspent[c] = m.ready(c)
		}
	case evAttached:
		m.attached = true
		out = m.attach(e.verdicts)
	case evDetached:
		m.attached = false
	case evAssigned:
		out = m.assign(e)
	case evStored:
		out = m.storedEntry(e)
	case evFinished:
		out = m.finish(e)
	case evSettled:
		out = m.settle(e.s)
	case evCancel:
		out = m.cancel(e.c)
	case evProbed:
		m.sick = !e.ok
	}
	return append(out, m.grant()...)
}

// busyIn counts the places of class c that are taken.
func (m *model) busyIn(c agentpb.WorkClass) int {
	n := 0
	for _, it := range m.items {
		if it.busy && it.entry.Assignment.GetClass() == c {
			n++
		}
	}
	return n
}

// ready is how many more credits of class c the agent can give now.
func (m *model) ready(c agentpb.WorkClass) int {
	if m.sick || len(m.items) >= MaxOpen {
		return 0
	}
	return max(m.limit[c]-m.busyIn(c)-m.unspent[c], 0)
}

// grant gives the credits the agent is ready for. It is level-triggered: after every event it looks anew.
func (m *model) grant() []any {
	if !m.attached {
		return nil
	}
	var out []any
	for _, c := range m.classes() {
		if n := m.ready(c); n > 0 {
			m.unspent[c] += n
			out = append(out, doSend{&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Credit{
				Credit: &agentpb.Credit{Class: c, Amount: int32(min(n, math.MaxInt32))}}}})
		}
	}
	return out
}

func (m *model) classes() []agentpb.WorkClass {
	cs := make([]agentpb.WorkClass, 0, len(m.limit))
	for c := range m.limit {
		cs = append(cs, c)
	}
	slices.Sort(cs)
	return cs
}

func (m *model) sorted() []*item {
	out := make([]*item, 0, len(m.items))
	for _, it := range m.items {
		out = append(out, it)
	}
	slices.SortFunc(out, func(a, b *item) int { return cmp.Compare(a.entry.Assignment.GetId(), b.entry.Assignment.GetId()) })
	return out
}

// open lists what Hello says is open. What is still being stored is not: it was never accepted.
func (m *model) open() []*agentpb.OpenAssignment {
	var out []*agentpb.OpenAssignment
	for _, it := range m.sorted() {
		if it.stored && !it.gone {
			phase := it.entry.Phase()
			if it.storing != nil {
				phase = agentpb.Phase_PHASE_ACCEPTED // the outcome is on its way to the disk
			}
			out = append(out, &agentpb.OpenAssignment{Id: it.entry.Assignment.GetId(),
				Attempt: it.entry.Assignment.GetAttempt(), Phase: phase})
		}
	}
	return out
}

// attach acts on the verdicts. What is finished is sent again whether or not the verdict asks for it: only Settled
// ends that.
func (m *model) attach(verdicts []*agentpb.Verdict) []any {
	by := map[string]*agentpb.Verdict{}
	for _, v := range verdicts {
		by[v.GetId()] = v
	}
	var out []any
	for _, it := range m.sorted() {
		a := it.entry.Assignment
		if !it.stored {
			continue
		}
		if v := by[a.GetId()]; v.GetDecision() == agentpb.Verdict_DECISION_FORGET && v.GetAttempt() >= a.GetAttempt() {
			out = append(out, m.end(it, v.GetSettled())...)
			continue
		}
		switch {
		case it.gone || it.settled != nil || it.storing != nil:
		case it.entry.Phase() != agentpb.Phase_PHASE_ACCEPTED:
			out = append(out, report(it.entry))
		case it.running == 0:
			out = append(out, m.run(it)...)
		}
	}
	return out
}

// report is the message that says how far an entry got.
func report(e *journal.Entry) doSend {
	if e.Result != nil {
		return doSend{&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Result{Result: e.Result}}}
	}
	return doSend{&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Csr{Csr: &agentpb.Csr{
		Id: e.Assignment.GetId(), Attempt: e.Assignment.GetAttempt(), Csr: e.CSR}}}}
}

func (m *model) run(it *item) []any {
	it.busy, it.running = true, it.entry.Assignment.GetAttempt()
	return []any{doStart{it.entry}}
}

func rejected(a *agentpb.Assignment, f *agentpb.Failure) doSend {
	return doSend{&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Rejected{Rejected: &agentpb.Rejected{
		AssignmentId: a.GetId(), Attempt: a.GetAttempt(), Failure: f}}}}
}

func failed(c fault.Class, msg string) *agentpb.Failure {
	return &agentpb.Failure{Class: string(c), Message: msg}
}

func (m *model) assign(e evAssigned) []any {
	a := e.a
	_, known := m.limit[a.GetClass()]
	overspent := known && m.unspent[a.GetClass()] <= 0
	if known && !overspent {
		m.unspent[a.GetClass()]--
	}
	if e.refusal != nil {
		return []any{rejected(a, e.refusal)}
	}
	if !known {
		return []any{rejected(a, failed(fault.Unsupported, "this agent does no work of that class"))}
	}
	it := m.items[a.GetId()]
	if it == nil {
		if overspent {
			return []any{rejected(a, failed(fault.Exhausted, "no credit of this class is left on this stream"))}
		}
		it = &item{entry: &journal.Entry{Assignment: a}, busy: true}
		it.storing = it.entry
		m.items[a.GetId()] = it
		return []any{doStore{it.entry}}
	}
	held := it.entry.Assignment.GetAttempt()
	switch {
	case a.GetAttempt() < held:
		return []any{rejected(a, failed(fault.Conflict, "a later attempt of this assignment is open here"))}
	case a.GetAttempt() == held && !it.gone && it.settled == nil:
		// Delivered twice: say again what was said.
		if !it.stored {
			return nil
		}
		out := []any{accepted(a)}
		if it.entry.Phase() != agentpb.Phase_PHASE_ACCEPTED && it.storing == nil {
			out = append(out, report(it.entry))
		}
		return out
	}
	// A later attempt takes the entry over; an installation that is not finished keeps its receipt. The worker of the
	// former attempt is asked to stop, and its end starts this one.
	out := []any(nil)
	it.entry = &journal.Entry{Assignment: a, Receipt: it.entry.Receipt}
	it.storing = it.entry
	it.stored, it.settled, it.gone, it.busy = false, nil, false, true
	if it.running != 0 {
		out = append(out, doStop{a.GetId()})
	}
	return append(out, doStore{it.entry})
}

func accepted(a *agentpb.Assignment) doSend {
	return doSend{&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Accepted{Accepted: &agentpb.Accepted{
		Id: a.GetId(), Attempt: a.GetAttempt()}}}}
}

// storedEntry says what was to be said once the entry is on disk. An outcome is said even if it could not be stored, because
// doing the work again yields the same and the server judges by attempt.
func (m *model) storedEntry(e evStored) []any {
	if e.failure != nil {
		m.sick = true
	}
	it := m.items[e.entry.Assignment.GetId()]
	if it == nil || it.storing != e.entry {
		return nil
	}
	it.storing = nil
	if it.stored {
		it.busy = false
		return []any{report(e.entry)}
	}
	if e.failure != nil {
		if it.running == 0 {
			// Nothing was promised. A former attempt's entry may be left on disk: the next Welcome says to forget it.
			delete(m.items, e.entry.Assignment.GetId())
		} else {
			it.gone, it.stored = true, true
		}
		return []any{rejected(it.entry.Assignment, e.failure)}
	}
	it.stored = true
	out := []any{accepted(it.entry.Assignment)}
	if it.running == 0 {
		out = append(out, m.run(it)...)
	}
	return out
}

// finish takes a worker's end. The outcome is stored before it is sent, see storedEntry.
func (m *model) finish(e evFinished) []any {
	it := m.items[e.id]
	if it == nil || it.running != e.attempt {
		return nil
	}
	it.running = 0
	if e.result != nil {
		// The worker has finished or undone its installation; a clone, because others may hold the entry.
		it.entry = it.entry.Clone()
		it.entry.Receipt = nil
	}
	if it.gone || it.settled != nil {
		it.busy = false
		return m.end(it, it.settled)
	}
	if e.attempt != it.entry.Assignment.GetAttempt() {
		if !it.stored {
			return nil
		}
		return m.run(it)
	}
	if e.result == nil && len(e.csr) == 0 {
		it.busy = false
		return nil
	}
	next := it.entry.Clone()
	next.CSR, next.SPKI, next.Result = e.csr, e.spki, e.result
	it.entry, it.storing = next, next
	return []any{doStore{next}}
}

func (m *model) settle(s *agentpb.Settled) []any {
	it := m.items[s.GetId()]
	if it == nil || s.GetAttempt() < it.entry.Assignment.GetAttempt() {
		return nil
	}
	return m.end(it, s)
}

// staged notes the receipt of a running installation; the caller has the entry stored before anything is committed, and
// begins with that before the next step.
func (m *model) staged(id string, attempt int64, r json.RawMessage) *journal.Entry {
	it := m.items[id]
	if it == nil || it.running != attempt {
		return nil
	}
	it.entry = it.entry.Clone()
	it.entry.Receipt = r
	return it.entry
}

// end forgets an item, after its worker if one runs.
func (m *model) end(it *item, s *agentpb.Settled) []any {
	if it.running != 0 {
		it.settled, it.gone = s, true
		return []any{doStop{it.entry.Assignment.GetId()}}
	}
	delete(m.items, it.entry.Assignment.GetId())
	return []any{doSettle{it.entry, s}}
}

func (m *model) cancel(c *agentpb.Cancel) []any {
	it := m.items[c.GetId()]
	if it == nil || it.gone || c.GetAttempt() != it.entry.Assignment.GetAttempt() {
		return nil
	}
	switch {
	case it.running != 0:
		return []any{doStop{c.GetId()}}
	case !it.stored, it.entry.Result != nil && it.storing != nil:
		return nil
	case it.entry.Result != nil:
		return []any{report(it.entry)}
	}
	next := it.entry.Clone()
	next.Result = &agentpb.Result{Id: c.GetId(), Attempt: c.GetAttempt(), Outcome: &agentpb.Result_Failure{
		Failure: failed(fault.Rejected, "cancelled before it was done")}}
	it.entry, it.storing = next, next
	return []any{doStore{next}}
}
