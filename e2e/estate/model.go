package estate

import "time"

// What `certmesh … --format json` prints, as far as it is looked at here. Protobuf's JSON has 64-bit integers as strings.

// Certificate is a managed certificate.
type Certificate struct {
	ID                string      `json:"id"`
	Name              string      `json:"name"`
	Status            string      `json:"status"`
	NotAfter          time.Time   `json:"not_after"`
	CreatedAt         time.Time   `json:"created_at"`
	PlacementsCurrent int         `json:"placements_current"`
	PlacementsTotal   int         `json:"placements_total"`
	Leaves            []Leaf      `json:"leaves"`
	Placements        []Placement `json:"placements"`
}

// Leaf is what one agent holds of a certificate.
type Leaf struct {
	AgentID           string    `json:"agent_id"`
	Generation        int64     `json:"generation,string"`
	OrderedGeneration int64     `json:"ordered_generation,string"`
	Serial            string    `json:"serial"`
	NotAfter          time.Time `json:"not_after"`
	Failures          int       `json:"failures"`
	LastError         string    `json:"last_error"`
}

// Placement is a certificate at a target.
type Placement struct {
	TargetName           string    `json:"target_name"`
	AgentID              string    `json:"agent_id"`
	State                string    `json:"state"`
	InstalledGeneration  int64     `json:"installed_generation,string"`
	ServedGeneration     int64     `json:"served_generation,string"`
	InstalledFingerprint string    `json:"installed_fingerprint"`
	ServedFingerprint    string    `json:"served_fingerprint"`
	ServedAt             time.Time `json:"served_at"`
	LastError            string    `json:"last_error"`
	Current              bool      `json:"current"`
}

// Version is one signed certificate.
type Version struct {
	Serial           string    `json:"serial"`
	AgentID          string    `json:"agent_id"`
	Generation       int64     `json:"generation,string"`
	Fingerprint      string    `json:"fingerprint"`
	KeyAlgorithm     string    `json:"key_algorithm"`
	NotBefore        time.Time `json:"not_before"`
	NotAfter         time.Time `json:"not_after"`
	RevokedAt        time.Time `json:"revoked_at"`
	RevocationReason string    `json:"revocation_reason"`
	PEM              string    `json:"pem"`
	CreatedAt        time.Time `json:"created_at"`
	IssuerID         string    `json:"issuer_id"`
}

// Agent is a host.
type Agent struct {
	ID             string            `json:"id"`
	Name           string            `json:"name"`
	State          string            `json:"state"`
	Reason         string            `json:"reason"`
	Labels         map[string]string `json:"labels"`
	RejectedStates []string          `json:"rejected_states"`
}

// Job is a unit of work.
type Job struct {
	ID            string    `json:"id"`
	Kind          string    `json:"kind"`
	State         string    `json:"state"`
	CertificateID string    `json:"certificate_id"`
	AgentID       string    `json:"agent_id"`
	TargetID      string    `json:"target_id"`
	Generation    int64     `json:"generation,string"`
	Attempt       int64     `json:"attempt,string"`
	Tries         int       `json:"tries"`
	ErrorClass    string    `json:"error_class"`
	Error         string    `json:"error"`
	Reason        string    `json:"reason"`
	CreatedAt     time.Time `json:"created_at"`
	FinishedAt    time.Time `json:"finished_at"`
}

// Issuer is a CA.
type Issuer struct {
	ID       string    `json:"id"`
	Name     string    `json:"name"`
	ChainPEM string    `json:"chain_pem"`
	NotAfter time.Time `json:"not_after"`
}

// AuditEvent is a row of the trail.
type AuditEvent struct {
	Actor    string            `json:"actor"`
	Action   string            `json:"action"`
	Resource string            `json:"resource"`
	Outcome  string            `json:"outcome"`
	Detail   map[string]string `json:"detail"`
}

// Explanation is what `certmesh certs why` says.
type Explanation struct {
	Leaves []struct {
		AgentID string `json:"agent_id"`
		Due     bool   `json:"due"`
		Reason  string `json:"reason"`
	} `json:"leaves"`
	Placements []struct {
		TargetName string `json:"target_name"`
		Current    bool   `json:"current"`
		WaitsFor   string `json:"waits_for"`
	} `json:"placements"`
}

// Lists as the tool prints them.
type (
	certificateList struct {
		Certificates []Certificate `json:"certificates"`
		NextCursor   string        `json:"next_cursor"`
	}
	versionList struct {
		Versions   []Version `json:"versions"`
		NextCursor string    `json:"next_cursor"`
	}
	jobList struct {
		Jobs       []Job  `json:"jobs"`
		NextCursor string `json:"next_cursor"`
	}
	eventList struct {
		Events     []AuditEvent `json:"events"`
		NextCursor string       `json:"next_cursor"`
	}
)
