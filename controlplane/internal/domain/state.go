package domain

import (
	"fmt"
	"slices"

	"github.com/certmesh/certmesh/protocol/fault"
)

// CertificateStatus is the one word an operator sees for a managed certificate. It is derived by StatusOf from the
// certificate's leaves and stored, so that lists can filter by it. "Active" says issued; whether it is served is
// another fact, kept per placement.
type CertificateStatus string

const (
	CertificatePending           CertificateStatus = "Pending"           // ordered, no leaf issued yet
	CertificateActive            CertificateStatus = "Active"            // every leaf is issued and valid
	CertificateExpiring          CertificateStatus = "Expiring"          // within the alert threshold
	CertificateExpired           CertificateStatus = "Expired"           // a leaf is past notAfter
	CertificateRenewalInProgress CertificateStatus = "RenewalInProgress" // a renewal job is open
	CertificateFailed            CertificateStatus = "Failed"            // the last issuance or renewal failed for good; it is still due
	CertificateRevoked           CertificateStatus = "Revoked"           // revoked by an operator; not renewed
	CertificateArchived          CertificateStatus = "Archived"          // no longer managed; kept for its history
)

// CertificateStatuses lists them all.
var CertificateStatuses = []CertificateStatus{
	CertificatePending, CertificateActive, CertificateExpiring, CertificateExpired, CertificateRenewalInProgress,
	CertificateFailed, CertificateRevoked, CertificateArchived,
}

// JobKind is what a job does.
type JobKind string

const (
	JobIssuance   JobKind = "Issuance"   // first leaf of a (certificate, agent)
	JobRenewal    JobKind = "Renewal"    // a later leaf
	JobDeployment JobKind = "Deployment" // install and verify on one placement
	JobValidation JobKind = "Validation" // verify one placement without installing
)

// JobState is where a job stands.
type JobState string

const (
	JobPending          JobState = "Pending"          // runnable once RunAt has come
	JobAwaitingCSR      JobState = "AwaitingCSR"      // the agent is to make a key and send a CSR
	JobAwaitingApproval JobState = "AwaitingApproval" // an operator is to decide
	JobRunning          JobState = "Running"          // accepted by whoever does it
	JobCompleted        JobState = "Completed"
	JobFailed           JobState = "Failed"
	JobCancelled        JobState = "Cancelled"
)

// OpenJobStates lists the states of jobs that are still to be finished.
var OpenJobStates = []JobState{JobPending, JobAwaitingCSR, JobAwaitingApproval, JobRunning}

// FinishedJobStates lists the others.
var FinishedJobStates = []JobState{JobCompleted, JobFailed, JobCancelled}

// Open reports whether a job in state s is still to be finished.
func (s JobState) Open() bool { return slices.Contains(OpenJobStates, s) }

// jobTransitions is the only list of legal moves of a job. A move from a state to itself is legal where a later
// attempt starts over.
var jobTransitions = map[JobState][]JobState{
	JobPending:          {JobPending, JobRunning, JobFailed, JobCancelled, JobCompleted},
	JobAwaitingCSR:      {JobAwaitingCSR, JobRunning, JobCompleted, JobFailed, JobCancelled},
	JobAwaitingApproval: {JobAwaitingCSR, JobPending, JobFailed, JobCancelled},
	JobRunning:          {JobRunning, JobPending, JobAwaitingCSR, JobCompleted, JobFailed, JobCancelled},
}

// CheckTransition returns a Conflict fault unless a job may move from one state to the other.
func CheckTransition(from, to JobState) error {
	if slices.Contains(jobTransitions[from], to) {
		return nil
	}
	return fault.New(fault.Conflict, "a job that is %s cannot become %s", from, to)
}

// InitialState is the state in which a job of kind k is created and to which a failed try returns it.
func (k JobKind) InitialState() JobState {
	if k == JobIssuance || k == JobRenewal {
		return JobAwaitingCSR
	}
	return JobPending
}

// PlacementState is what is known of one certificate at one target.
type PlacementState string

const (
	PlacementPending   PlacementState = "Pending"   // nothing deployed yet, or changed by others since (DriftedAt)
	PlacementInstalled PlacementState = "Installed" // read back by Current, but not probed (no verify address)
	PlacementServed    PlacementState = "Served"    // seen in a TLS handshake
	PlacementFailed    PlacementState = "Failed"    // the last deployment failed for good; the duty tries again
)

// AgentState is what the control plane thinks of an agent.
type AgentState string

const (
	AgentOnline      AgentState = "Online"
	AgentStale       AgentState = "Stale"       // no beat for a while
	AgentOffline     AgentState = "Offline"     // no stream
	AgentQuarantined AgentState = "Quarantined" // two machines use one identity; an operator must decide
	AgentRetired     AgentState = "Retired"     // removed by an operator; its identity is revoked
)

// AgentStates lists them all.
var AgentStates = []AgentState{AgentOnline, AgentStale, AgentOffline, AgentQuarantined, AgentRetired}

var agentTransitions = map[AgentState][]AgentState{
	AgentOffline:     {AgentOnline, AgentOffline, AgentQuarantined, AgentRetired},
	AgentOnline:      {AgentOnline, AgentStale, AgentOffline, AgentQuarantined, AgentRetired},
	AgentStale:       {AgentOnline, AgentOffline, AgentStale, AgentQuarantined, AgentRetired},
	AgentQuarantined: {AgentOffline, AgentQuarantined, AgentRetired},
	AgentRetired:     {},
}

// CheckAgentTransition returns a Conflict fault unless an agent may move from one state to the other.
func CheckAgentTransition(from, to AgentState) error {
	if slices.Contains(agentTransitions[from], to) {
		return nil
	}
	return fault.New(fault.Conflict, "an agent that is %s cannot become %s", from, to)
}

// IntentState is where an intent to sign stands.
type IntentState string

const (
	IntentOpen      IntentState = "Open"      // recorded; a retry signs these very bytes
	IntentConsumed  IntentState = "Consumed"  // a version was recorded from it
	IntentAbandoned IntentState = "Abandoned" // never to be signed (again)
)

// RevocationReason is a CRLReason of RFC 5280 section 5.3.1.
type RevocationReason int

var reasonNames = map[string]RevocationReason{
	"unspecified": 0, "keyCompromise": 1, "caCompromise": 2, "affiliationChanged": 3, "superseded": 4,
	"cessationOfOperation": 5, "certificateHold": 6, "privilegeWithdrawn": 9,
}

// ParseRevocationReason reads a reason by its RFC 5280 name.
func ParseRevocationReason(s string) (RevocationReason, error) {
	if s == "" {
		return 0, nil
	}
	if r, ok := reasonNames[s]; ok {
		return r, nil
	}
	names := make([]string, 0, len(reasonNames))
	for n := range reasonNames {
		names = append(names, n)
	}
	slices.Sort(names)
	return 0, fault.InvalidField("reason", "%q is not a revocation reason; use one of %v", s, names)
}

func (r RevocationReason) String() string {
	for n, v := range reasonNames {
		if v == r {
			return n
		}
	}
	return fmt.Sprintf("reason(%d)", int(r))
}
