package dispatch

import (
	"errors"
	"slices"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// ReportKind is what an agent says about an assignment.
type ReportKind uint8

// The kinds of reports.
const (
	ReportAccepted ReportKind = iota // it is in the agent's journal
	ReportCSR                        // a key was made
	ReportDeployed                   // installed and verified, or verified alone
	ReportFailed                     // tried and failed
	ReportRefused                    // never accepted; the agent keeps nothing of it
)

// Report is one such message. The agent's text in it has been bounded and stripped.
type Report struct {
	Kind ReportKind
	Ref  domain.JobRef
	// CSR of ReportCSR.
	CSR []byte
	// Deployed of ReportDeployed; its ids and time are filled in by Step.
	Deployed domain.DeployResult
	// Failure of ReportFailed and ReportRefused.
	Failure Failure
}

// Failure is a classified error in words.
type Failure struct {
	Class   fault.Class
	Message string
}

// Held is an assignment in the agent's journal.
type Held struct {
	Ref domain.JobRef
	// Reported: a CSR or result was made.
	Reported bool
}

// Decision on a held assignment.
type Decision uint8

// The decisions.
const (
	Continue   Decision = iota // go on
	RedoReport                 // send the CSR or result again
	Forget                     // it has ended or is stale
)

// Verdict is a decision with, for Forget, what became of the attempt.
type Verdict struct {
	Ref      domain.JobRef
	Decision Decision
	Settled  Settled
}

// Outcome of a settled attempt.
type Outcome uint8

// The outcomes.
const (
	OK      Outcome = iota // recorded as done
	Failed                 // recorded as failed; it may be assigned again with a higher attempt
	Ignored                // stale, cancelled, unknown or another agent's: nothing was changed
)

func (o Outcome) String() string {
	switch o {
	case OK:
		return "ok"
	case Failed:
		return "failed"
	default:
		return "ignored"
	}
}

// Settled says how an attempt ended.
type Settled struct {
	Ref                     domain.JobRef
	Outcome                 Outcome
	Class                   Class
	CertificateID           string
	Generation, RetireBelow int64
	// Failure says why the outcome is not OK.
	Failure Failure
}

// settledBy says what the store's settlement means to the agent.
func settledBy(ref domain.JobRef, s domain.Settlement) Settled {
	st := Settled{Ref: ref, Outcome: Ignored, Class: ClassOf(s.Kind), CertificateID: s.CertificateID}
	switch s.State {
	case domain.JobCompleted:
		st.Outcome, st.RetireBelow = OK, s.RetireBelow
		if st.Class == Key {
			st.Generation = s.Generation
		}
	case domain.JobFailed:
		st.Outcome, st.Failure = Failed, Failure{fault.Class(s.ErrorClass), s.Error}
	case domain.JobCancelled:
		st.Failure = Failure{fault.Rejected, "the job was cancelled"}
	case "":
		st.CertificateID = ""
		st.Failure = Failure{fault.NotFound, "there is no such job of this agent"}
	default:
		st.Failure = Failure{fault.Conflict, "a later attempt is awaited"}
	}
	return st
}

// FailureOf is what an agent or an operator may be told of err: its class, and the first classified error's sentence,
// after its field, unless it is a defect of ours.
func FailureOf(err error) Failure {
	f := Failure{Class: fault.ClassOf(err), Message: "something failed inside the control plane; its log has the details"}
	var e *fault.Error
	switch {
	case !errors.As(err, &e):
		if f.Class == fault.Retryable {
			f.Message = "it took too long"
		}
	case e.Class == fault.Internal:
	case e.Field != "":
		f.Message = e.Field + ": " + e.Message
	default:
		f.Message = e.Message
	}
	return f
}

// reported takes a report to its item, or has the store asked what it is about.
func (m *machine) reported(r Report) {
	_, it := m.find(r.Ref.JobID)
	if it == nil || it.phase != given || it.work.Job.Attempt != r.Ref.Attempt {
		m.ask(r)
		return
	}
	same := func(o Report) bool { return o.Kind == r.Kind }
	if it.busy && same(it.current) || slices.ContainsFunc(it.reports, same) {
		return
	}
	it.reports = append(it.reports, r)
	m.next(it)
}

// next begins with the first report that waits, if it can be begun now.
func (m *machine) next(it *item) {
	if it.busy || it.phase != given || len(it.reports) == 0 || m.at.Before(it.notBefore) {
		return
	}
	r := it.reports[0]
	if it.bare && r.Kind == ReportCSR {
		if !m.loading && m.loadAt.IsZero() {
			m.reload(m.at)
		}
		return
	}
	it.reports = it.reports[1:]
	if len(it.reports) == 0 {
		it.reports = nil
	}
	class := ClassOf(it.work.Job.Kind)
	switch {
	case r.Kind == ReportAccepted:
		it.busy, it.current = true, r
		m.do(Accept{domain.Acceptance{JobID: r.Ref.JobID, AgentID: m.agentID, Attempt: r.Ref.Attempt, At: m.at}})
	case r.Kind == ReportCSR && class == Key:
		it.busy, it.current = true, r
		m.do(Issue{Work: it.work, CSR: r.CSR})
	case r.Kind == ReportDeployed && class != Key:
		it.busy, it.current = true, r
		d := r.Deployed
		d.JobID, d.AgentID, d.Attempt, d.At = r.Ref.JobID, m.agentID, r.Ref.Attempt, m.at
		m.do(Complete{d})
	case r.Kind == ReportCSR, r.Kind == ReportDeployed:
		it.failure = Failure{fault.Invalid, "the answer does not fit the work: a CSR answers key work, a deployment report answers deployments and verifications"}
		m.fail(it, r)
	default:
		it.failure = r.Failure
		if r.Kind == ReportRefused && class == Verify && it.failure.Class == fault.Conflict {
			// Of a verification a Conflict says what was seen, and nobody looked.
			it.failure.Class = fault.Rejected
		}
		m.fail(it, r)
	}
}

// fail has it.failure recorded in answer to r.
func (m *machine) fail(it *item, r Report) {
	it.busy, it.current = true, r
	m.do(Fail{domain.Failure{JobID: r.Ref.JobID, AgentID: m.agentID, Attempt: r.Ref.Attempt,
		Class: string(it.failure.Class), Message: it.failure.Message, At: m.at}})
}

// answered returns the item whose current report has got its answer.
func (m *machine) answered(ref domain.JobRef) *item {
	_, it := m.find(ref.JobID)
	if it == nil || !it.busy || it.current.Ref != ref {
		return nil
	}
	it.busy, it.load = false, m.loads
	return it
}

// later keeps the report for another try: the store could not be used.
func (m *machine) later(it *item) {
	it.reports = slices.Insert(it.reports, 0, it.current)
	it.notBefore = m.at.Add(backoff(it.tries))
	it.tries++
}

// doubt drops what was believed: the store refused it. It is asked what became of the attempt, and for all work.
func (m *machine) doubt(it *item) {
	m.remove(it)
	m.reload(m.at)
	if it.current.Kind != ReportAccepted && it.current.Kind != ReportRefused {
		m.ask(it.current)
	}
}

func (m *machine) acceptedDone(e AcceptedDone) {
	it := m.answered(e.Ref)
	if it == nil {
		return
	}
	switch {
	case e.Err == nil:
		it.tries = 0
	case fault.MayRetry(e.Err):
		// An acceptance only counts a try; what follows it tells the same.
	case len(it.reports) > 0:
		// What follows is judged by the store as well, and its answer goes to the agent.
	default:
		m.remove(it)
		m.reload(m.at)
		return
	}
	m.next(it)
}

func (m *machine) issued(e Issued) {
	it := m.answered(e.Ref)
	if it == nil {
		return
	}
	switch {
	case e.Err == nil:
		m.remove(it)
		m.do(Settle{Settled{Ref: e.Ref, Outcome: OK, Class: Key, CertificateID: it.work.Job.CertificateID, Generation: e.Generation}})
		for _, w := range e.Deployments {
			if w.Job.AgentID == m.agentID {
				w.Owner = it.work.Owner
				m.merge(w)
			}
		}
	case fault.Is(e.Err, fault.Conflict), fault.Is(e.Err, fault.NotFound):
		m.doubt(it)
	case fault.Is(e.Err, fault.RateLimited):
		// Nobody has looked at the request: to wait is no try.
		m.later(it)
	default:
		it.failure = FailureOf(e.Err)
		m.fail(it, it.current)
	}
}

func (m *machine) completed(e Completed) {
	it := m.answered(e.Ref)
	if it == nil {
		return
	}
	switch {
	case e.Err == nil:
		m.remove(it)
		m.do(Settle{settledBy(e.Ref, e.Settlement)})
	case fault.Is(e.Err, fault.Conflict), fault.Is(e.Err, fault.NotFound):
		m.doubt(it)
	case fault.MayRetry(e.Err):
		m.later(it)
	default:
		it.failure = FailureOf(e.Err)
		m.fail(it, it.current)
	}
}

func (m *machine) failedDone(e FailedDone) {
	it := m.answered(e.Ref)
	if it == nil {
		return
	}
	switch {
	case e.Err == nil:
		if it.current.Kind != ReportRefused {
			m.do(Settle{Settled{Ref: e.Ref, Outcome: Failed, Class: ClassOf(e.Job.Kind), CertificateID: e.Job.CertificateID, Failure: it.failure}})
		}
		if !e.Job.State.Open() {
			m.remove(it)
			return
		}
		if it.bare {
			m.remove(it)
			m.reload(m.at)
			return
		}
		w := it.work
		w.Job = e.Job
		*it = item{work: w, load: m.loads}
	case fault.MayRetry(e.Err):
		m.later(it)
	default:
		m.doubt(it)
	}
}

// ask has the store asked about a report that fits no item.
func (m *machine) ask(r Report) {
	same := func(a *ask) bool { return a.report.Ref == r.Ref && a.report.Kind == r.Kind }
	if len(m.asks) >= maxAsks || slices.ContainsFunc(m.asks, same) {
		return
	}
	a := &ask{report: r}
	m.asks = append(m.asks, a)
	m.inquire(a)
}

// inquire asks once per attempt at a time: the answer serves all reports about it.
func (m *machine) inquire(a *ask) {
	out := slices.ContainsFunc(m.asks, func(o *ask) bool { return o != a && o.busy && o.report.Ref == a.report.Ref })
	a.busy = true
	if !out {
		m.do(Inquire{Ref: a.report.Ref})
	}
}

func (m *machine) inquired(e Inquired) {
	var about []*ask
	m.asks = slices.DeleteFunc(m.asks, func(a *ask) bool {
		if !a.busy || a.report.Ref != e.Ref {
			return false
		}
		if e.Err != nil {
			a.busy, a.notBefore = false, m.at.Add(backoff(a.tries))
			a.tries++
			return false
		}
		about = append(about, a)
		return true
	})
	if len(m.asks) == 0 {
		m.asks = nil
	}
	if len(about) == 0 {
		return
	}
	if !e.Settlement.Open {
		if e.Settlement.State == "" {
			m.do(Foreign{Ref: e.Ref})
		}
		m.do(Settle{settledBy(e.Ref, e.Settlement)})
		return
	}
	// It is awaited after all, and was not known here.
	_, it := m.find(e.Ref.JobID)
	switch {
	case it == nil:
		it = &item{work: domain.Work{Job: bareJob(m.agentID, e.Ref, e.Settlement)}, bare: true, phase: given, load: m.loads}
		m.insert(it)
		m.reload(m.at)
	case it.work.Job.Attempt == e.Ref.Attempt && it.phase == waiting:
		it.phase = given
	case it.work.Job.Attempt != e.Ref.Attempt || it.phase == raising:
		// The attempt is being raised or was: the report is stale, or will be.
		m.do(Settle{Settled{Ref: e.Ref, Outcome: Ignored, Failure: Failure{fault.Conflict, "a later attempt is awaited"}}})
		return
	}
	for _, a := range about {
		m.reported(a.report)
	}
}

// resume goes on with what has waited for its time, whichever event shows that it has come.
func (m *machine) resume() {
	for _, it := range m.items {
		m.next(it)
	}
	for _, a := range m.asks {
		if !a.busy && !m.at.Before(a.notBefore) {
			a.notBefore = time.Time{}
			m.inquire(a)
		}
	}
}
