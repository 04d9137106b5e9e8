package history

import "time"

// State is what is found once the nemesis has gone and all is at rest.
type State struct {
	// Now is when it was read.
	Now          time.Time
	Certificates []Certificate
	Leaves       []Leaf
	Placements   []Placement
	Versions     []Version
	Jobs         []Job
	Agents       []Agent
	Audit        []Audit
	Duties       []Duty
	CRLs         []List
	// Nodes are the processes that live, as agents' sessions name them.
	Nodes []string
	// Seen is what the nodes answer about certificates.
	Seen []Seen
	// Files is what lies at the targets.
	Files []File
}

// Certificate is a row.
type Certificate struct {
	ID, Name, Status, RequestID string
}

// Leaf is what an agent holds of a certificate.
type Leaf struct {
	CertificateID, AgentID, Serial, LastError string
	// Ordered is the highest generation that was ordered, Held the last that was issued.
	Ordered, Held int64
}

// Placement is a certificate at a target.
type Placement struct {
	CertificateID, TargetID, AgentID string
	Installed                        int64
}

// Version is a signed certificate.
type Version struct {
	IssuerID, Serial, CertificateID, AgentID string
	Generation                               int64
	Revoked                                  bool
	NotAfter                                 time.Time
}

// Job is a unit of work; in an answer only some of it is told.
type Job struct {
	ID            string    `json:"id"`
	Kind          string    `json:"kind,omitempty"`
	State         string    `json:"state,omitempty"`
	CertificateID string    `json:"certificate_id,omitempty"`
	AgentID       string    `json:"agent_id,omitempty"`
	RequestID     string    `json:"request_id,omitempty"`
	Error         string    `json:"error,omitempty"`
	Generation    int64     `json:"generation,omitempty"`
	Attempt       int64     `json:"attempt,omitempty"`
	Tries         int64     `json:"tries,omitempty"`
	RunAt         time.Time `json:"run_at,omitzero"`
	Finished      bool      `json:"finished,omitempty"`
}

// Agent is a host, and who holds its stream.
type Agent struct {
	ID, Name, State, Holder string
}

// Audit is a row of the trail.
type Audit struct {
	At                                          time.Time
	Actor, Action, Resource, Outcome, RequestID string
	Detail                                      map[string]string
}

// Duty is a row of the fence.
type Duty struct {
	Name, Holder string
	Epoch        int64
}

// List is the CRL that is in force.
type List struct {
	IssuerID string
	Number   int64
	Serials  []string
}

// Seen is what a node answers about a certificate.
type Seen struct {
	Node, CertificateID, Status string
	Generations                 map[string]int64
}

// File is what lies at a target; a problem is why it cannot be used.
type File struct {
	TargetID, Serial, Problem string
}
