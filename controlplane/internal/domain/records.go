package domain

import "time"

// What goes into and comes out of the store's use cases. Each store method is one transaction; those that take a slice
// are coalesced (group commit) and answer one outcome per item, in order: one stale item never aborts the others. Err in
// an outcome is a protocol/fault error (Conflict: the caller's attempt, state or epoch is stale; drop the work).

// Op says on whose behalf and when a change is made; it becomes the audit row of the same transaction.
type Op struct {
	Actor      string // see AuditEvent.Actor
	RequestID  string
	RemoteAddr string
	At         time.Time
}

// SessionOpen is a Hello to be recorded: epoch+1, holder = Node.
type SessionOpen struct {
	AgentID, Node, BootID string
	Facts                 Facts
	Labels                map[string]string
	Protocol              int
	Capabilities          []string
	IdentitySerial        string
	At                    time.Time
}

// SessionOpened answers a SessionOpen. Previous is the row as it was before (zero when there was none).
type SessionOpened struct {
	Epoch    Epoch
	Previous Session
	Agent    Agent
	Err      error // Forbidden: retired, quarantined or unknown agent; Unauthorized: identity revoked
}

// Work is an open job with all that an assignment for it needs.
type Work struct {
	Job Job
	// Issuance and Renewal: what was ordered, where (IssuerKind is the issuer's, e.g. IssuerLocal), and by which rules.
	// KeyAlgorithm is the profile's.
	Names                Names
	KeyAlgorithm         KeyAlgorithm
	IssuerID, IssuerKind string
	Profile              Profile
	Policy               Policy
	// Owner is the certificate's: what is scarce is shared between owners in turns.
	Owner string
	// Deployment: the version to install (the leaf's current one) and where.
	Version Version
	Target  Target
}

const (
	// MaxOpenWork is how many open jobs of an agent are read at once. Of an agent that has more a window is read.
	MaxOpenWork = 1024
	// WorkWindow is how many jobs of a kind a window has, shared evenly between owners, and WindowOwners how many owners.
	WorkWindow, WindowOwners = 256, 32
)

// WorkQuery asks for an agent's open work. Out are jobs that the caller has given to the agent: whatever of them is open is
// answered, and the window lies behind them. Attempt is the one the caller knows, 0: it wants the job itself. After is the
// Next of the answer before.
type WorkQuery struct {
	AgentID string
	Out     []JobRef
	After   string
}

// OpenWork answers a WorkQuery: all open jobs but those that wait for approval, or, of more than MaxOpenWork, those of Out
// and a window of the others. A window takes jobs of each kind, first those that are due first, from owners in turns.
type OpenWork struct {
	Work []Work // by age
	// Kept are jobs of Out that are open at the attempt that the caller knows. They may be left out of Work.
	Kept []string
	// More are the kinds of which jobs are left beyond the window.
	More []JobKind
	// MoreOwners: there are owners beyond the window; a query after Next begins with them.
	MoreOwners bool
	Next       string
}

// Dispatch raises a job's attempt from Attempt to Attempt+1 under the session's epoch.
type Dispatch struct {
	JobID, AgentID string
	Attempt        int64
	Epoch          Epoch
	At             time.Time
}

// Acceptance records that an agent has journalled an attempt: tries+1.
type Acceptance struct {
	JobID, AgentID string
	Attempt        int64
	At             time.Time
}

// Failure ends one attempt of a job. Whether it is retried is decided by AfterFailure inside the transaction.
type Failure struct {
	JobID, AgentID string
	Attempt        int64
	Class, Message string
	// Jitter in [0,1) for the retry delay.
	Jitter float64
	At     time.Time
}

// FailureOutcome says what became of the job.
type FailureOutcome struct {
	Job Job // as it now is
	Err error
}

// AfterFailure decides whether a job is tried again: retryable classes, until MaxTries. An attempt that was never
// accepted counts as a try here, so that an agent that always refuses does not loop for ever.
func AfterFailure(j Job, f Failure, mayRetry bool) Job {
	if j.AcceptedAt.IsZero() {
		j.Tries++
	}
	j.ErrorClass, j.Error, j.UpdatedAt = f.Class, f.Message, f.At
	j.AcceptedAt = time.Time{}
	if mayRetry && j.Tries < j.MaxTries {
		j.State = j.Kind.InitialState()
		j.RunAt = Micro(f.At.Add(RetryDelay(j.Tries, f.Jitter)))
		return j
	}
	j.State, j.FinishedAt = JobFailed, f.At
	return j
}

// IntentOutcome answers RecordIntents. Intent is the one to sign, which is the former one when this agent's key has not
// changed (Existing). Issued is set when the version was recorded already: nothing is to be signed. SerialTaken comes with
// a Conflict that another serial resolves.
type IntentOutcome struct {
	Intent      Intent
	Existing    bool
	Issued      *Version
	SerialTaken bool
	Err         error
}

// Issued is a signed version to be recorded: it consumes the intent, completes the job, moves the leaf, and creates
// deployment jobs for the agent's placements.
type Issued struct {
	Version  Version
	IntentID string
	JobID    string
	Attempt  int64
	// DueAt is when the renewal duty looks at the leaf next; StatusAt when the certificate becomes Expiring.
	DueAt, StatusAt time.Time
	RequestID       string
	At              time.Time
}

// IssuedOutcome carries the version as it is recorded, which another signature of the same bytes may have reached first,
// and the deployment work that was created, ready for dispatch.
type IssuedOutcome struct {
	Version     Version
	Deployments []Work
	Err         error
}

// DeployResult is an agent's report of success.
type DeployResult struct {
	JobID, AgentID                          string
	Attempt                                 int64
	InstalledFingerprint, ServedFingerprint string // hex; ServedFingerprint empty: not probed
	Address                                 string
	ServedAt                                time.Time
	At                                      time.Time
}

// DeployOutcome says which keys the agent may retire (see Settlement.RetireBelow).
type DeployOutcome struct {
	Settlement Settlement
	Err        error
}

// Settlement is what an agent is told about an assignment that has ended.
type Settlement struct {
	JobID         string
	Attempt       int64
	State         JobState
	CertificateID string
	Generation    int64
	// RetireBelow: keys of lower generations are unused at every placement of this agent; 0: none.
	RetireBelow       int64
	ErrorClass, Error string
	// Open is set instead when the job still waits for a report of exactly this attempt.
	Open bool
	Kind JobKind
}

// NewJob asks for a job; made by duties and operators.
type NewJob struct {
	Kind                             JobKind
	CertificateID, AgentID, TargetID string
	Reason                           string
}

// NewJobOutcome: Created is false when an equal job was open already; Job is then that one.
type NewJobOutcome struct {
	Job     Job
	Created bool
	Err     error
}

// DueLeaf is a leaf whose DueAt has come, with what the decision needs.
type DueLeaf struct {
	Leaf    Leaf
	Policy  Policy
	Profile Profile
	Status  CertificateStatus
	// OpenJob: an issuance or renewal job is open.
	OpenJob bool
}

// DuePlacement is a placement that does not hold what is wanted and whose back-off has passed.
type DuePlacement struct {
	Placement Placement
	Wanted    int64 // the leaf's current generation
	OpenJob   bool
	Enabled   bool
}

// NewCertificate is an order.
type NewCertificate struct {
	Certificate Certificate
	TargetIDs   []string
	// RequestID makes the order safe to repeat; empty: not.
	RequestID string
	Op        Op
}

// Enrollment joins a host.
type Enrollment struct {
	TokenID   string
	TokenHash []byte
	SPKI      string
	// AgentID is used if the (token, SPKI) is new; the outcome says which id holds.
	AgentID, Name string
	Facts         Facts
	Op            Op
}

// Seen is a beat to be flushed.
type Seen struct {
	AgentID string
	At      time.Time
}

// StateRejection is an agent's refusal of a state, kept until a later version is applied.
type StateRejection struct {
	AgentID, Kind, Name string
	Version             int64
	Reason              string
	At                  time.Time
}

// ReapLimits are how long a job may stand still while its agent is online.
type ReapLimits struct {
	AwaitingCSR, AwaitingApproval, Running time.Duration
}

// RevokedEntry is one line of a CRL.
type RevokedEntry struct {
	Serial    string
	RevokedAt time.Time
	Reason    RevocationReason
	NotAfter  time.Time
}

// PageRequest asks for at most Size rows after the cursor After (the last row's key, empty: the beginning).
type PageRequest struct {
	Size  int
	After string
}

// MaxPageSize is the greatest page; a greater size is an error, never cut silently.
const MaxPageSize = 1000

// CertificateFilter selects certificates; empty fields select all. Not every combination can be listed: see Listing.
type CertificateFilter struct {
	Status                     CertificateStatus
	IssuerID, ProfileID        string
	AgentID, Owner, NamePrefix string
	// What is issued and expires before the one time and not before the other; zero times do not bound.
	ExpiresBefore, ExpiresAfter time.Time
	// Sort is an Order, with "-" before it the other way round. Empty: by name with NamePrefix, by expiry with a bound of it,
	// else by creation.
	Sort string
}

// JobFilter selects jobs.
type JobFilter struct {
	State                  JobState
	CertificateID, AgentID string
	Open                   bool
}

// Counts are sizes of the estate.
type Counts struct {
	Certificates      map[CertificateStatus]int64
	Agents            map[AgentState]int64
	OpenJobs          map[JobState]int64
	PlacementsLagging int64
}

// CertificateView is a certificate with what hangs on it.
type CertificateView struct {
	Certificate Certificate
	Leaves      []Leaf
	Placements  []Placement
	// TargetNames by target id.
	TargetNames map[string]string
}

// PlacementCounts are how many of a certificate's placements hold the wanted generation.
type PlacementCounts struct{ Current, Total int }

// JobRef names one attempt of a job.
type JobRef struct {
	JobID   string
	Attempt int64
}

// NextDue is when the duties have something to do next, zero where nothing is planned.
type NextDue struct{ Leaf, Placement, Status time.Time }
