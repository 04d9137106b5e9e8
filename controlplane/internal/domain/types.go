package domain

import "time"

// KeyAlgorithm names a key type with its size.
type KeyAlgorithm string

const (
	ECDSAP256 KeyAlgorithm = "ECDSA-P256"
	ECDSAP384 KeyAlgorithm = "ECDSA-P384"
	RSA2048   KeyAlgorithm = "RSA-2048"
	RSA3072   KeyAlgorithm = "RSA-3072"
	RSA4096   KeyAlgorithm = "RSA-4096"
	Ed25519   KeyAlgorithm = "Ed25519"
)

// KeyAlgorithms lists what agents can make, the default first.
var KeyAlgorithms = []KeyAlgorithm{ECDSAP256, ECDSAP384, RSA2048, RSA3072, RSA4096, Ed25519}

// Names are the subject and subject alternative names of a certificate, sorted by form (RFC 5280 section 4.2.1.6).
type Names struct {
	CommonName string   `json:"common_name,omitempty"`
	DNS        []string `json:"dns,omitempty"`
	IP         []string `json:"ip,omitempty"` // canonical text form
	Email      []string `json:"email,omitempty"`
	URI        []string `json:"uri,omitempty"`
}

// EKU is an extended key usage by the name RFC 5280 section 4.2.1.12 gives it.
type EKU string

const (
	EKUServerAuth      EKU = "serverAuth"
	EKUClientAuth      EKU = "clientAuth"
	EKUCodeSigning     EKU = "codeSigning"
	EKUEmailProtection EKU = "emailProtection"
	EKUTimeStamping    EKU = "timeStamping"
)

// Profile constrains what may be issued.
type Profile struct {
	ID, Name string
	// KeyAlgorithm is what agents make; Allowed is what a CSR may carry (it includes KeyAlgorithm).
	KeyAlgorithm KeyAlgorithm
	Allowed      []KeyAlgorithm
	EKUs         []EKU
	// TTL is the validity asked for; MaxTTL caps it.
	TTL, MaxTTL time.Duration
	CreatedAt   time.Time
}

// ShortLived reports whether certificates of this profile need no revocation: they expire within the hour.
func (p Profile) ShortLived() bool { return p.TTL < time.Hour }

// Issuer is a CA account. Kind "local" is a CA of ours.
type Issuer struct {
	ID, Name, Kind string
	// Settings is the connector's own JSON, without secrets.
	Settings  []byte
	CreatedAt time.Time
}

// IssuerLocal is the kind of our own CAs.
const IssuerLocal = "local"

// CA is the material of a local issuer or of the mesh CA.
type CA struct {
	// ID is the issuer's id, or "mesh" for the mesh CA (MeshCA).
	ID string
	// Chain is the signing certificate first, then its issuers up to and including the root, in DER.
	Chain [][]byte
	// KeyURI names the signing key, e.g. "sealed:key_…"; RootKeyURI the root's, empty if it is not ours.
	KeyURI, RootKeyURI string
	// PublicURL is the base of the CDP and AIA URLs, e.g. "http://pki.example.com:8080".
	PublicURL string
	// Generation counts the mesh CAs of a cluster from 1; it is of no meaning to issuers. 0: 1.
	Generation int64
	// Vouched is what nodes show besides the chain while a former root is trusted too: this root's key signed by the former
	// root, and the former root. Who knows only the former one accepts this one by it. Empty: there is no former root, or its
	// path length forbids it.
	Vouched   [][]byte
	CreatedAt time.Time
}

// MeshCA is the id of the CA that signs the identities of agents and nodes.
const MeshCA = "mesh"

// SealedKey is a private key as it lies in the database: AES-256-GCM under a data key that is wrapped by the
// key-encryption key KEKID.
type SealedKey struct {
	ID         string
	Purpose    string
	KEKID      string
	WrappedDEK []byte
	Ciphertext []byte
	CreatedAt  time.Time
}

// Policy is the renewal policy of a certificate.
type Policy struct {
	// Fraction of the lifetime after which a leaf is due, in (0, 1); 0 means the default 2/3.
	Fraction float64 `json:"fraction,omitempty"`
	// AlertThresholdsDays are the inventory's thresholds; the greatest that is shorter than the lifetime marks
	// "Expiring".
	AlertThresholdsDays []int `json:"alert_thresholds_days,omitempty"`
	// Windows restrict when automatic renewals may start (UTC); empty means always.
	Windows []Window `json:"windows,omitempty"`
	// Disabled stops automatic renewal; renewals on request still work.
	Disabled bool `json:"disabled,omitempty"`
	// RequireApproval holds each issuance and renewal until an operator who did not ask for it has approved it.
	RequireApproval bool `json:"require_approval,omitempty"`
}

// FirstState is the state in which an issuance or renewal under this policy is created. A failed try returns it to
// JobKind.InitialState: what was approved once is not asked for again.
func (p Policy) FirstState(k JobKind) JobState {
	if p.RequireApproval && (k == JobIssuance || k == JobRenewal) {
		return JobAwaitingApproval
	}
	return k.InitialState()
}

// Window is a weekly time span in UTC: from Start to End minutes after midnight on the given days (0 is Sunday); End
// may be lower than Start and then crosses midnight.
type Window struct {
	Days       []int `json:"days"`
	Start, End int
}

// Certificate is a managed certificate: what an operator ordered.
type Certificate struct {
	ID, Name            string
	Names               Names
	IssuerID, ProfileID string
	Owner               string
	Policy              Policy
	Status              CertificateStatus
	// NotAfter is the earliest expiry of its leaves, zero when none is issued.
	NotAfter             time.Time
	CreatedBy            string
	CreatedAt, UpdatedAt time.Time
	Revision             int64
}

// Leaf is what one agent holds of one certificate: its own key and its own current version.
type Leaf struct {
	CertificateID, AgentID string
	// Generation is the highest ever ordered; Current the one last issued (0: none), with its Serial.
	Generation, Current int64
	Serial              string
	NotBefore, NotAfter time.Time
	// DueAt is when the renewal duty looks at this leaf again; zero never.
	DueAt time.Time
	// Failures counts issuance or renewal jobs that failed in a row; BackoffUntil is when the next may start.
	Failures     int
	BackoffUntil time.Time
	LastError    string
	Revoked      bool
}

// Target is a server or appliance reached through an agent.
type Target struct {
	ID, Name, AgentID, Kind string
	Settings                []byte // the connector's JSON
	// VerifyAddress is host:port for the TLS probe; empty means "installed, not probed".
	VerifyAddress, ServerName string
	Enabled                   bool
	CreatedAt                 time.Time
	Revision                  int64
}

// Placement is one certificate at one target.
type Placement struct {
	CertificateID, TargetID, AgentID string
	State                            PlacementState
	// InstalledGeneration and ServedGeneration are the last ones proven; the fingerprints are SHA-256 in hex.
	InstalledGeneration, ServedGeneration   int64
	InstalledFingerprint, ServedFingerprint string
	ServedAt                                time.Time
	Failures                                int
	BackoffUntil                            time.Time
	LastError                               string
	// DriftedAt is when its agent found that somebody had changed it; zero: it is as the last deployment left it.
	DriftedAt time.Time
	UpdatedAt time.Time
}

// Job is a unit of work with one owner.
type Job struct {
	ID            string
	Kind          JobKind
	State         JobState
	CertificateID string
	AgentID       string // whose stream carries it
	TargetID      string // Deployment and Validation only
	Generation    int64
	Attempt       int64 // fencing token
	Tries         int   // accepted tries
	MaxTries      int
	RunAt         time.Time // not before
	// AcceptedAt is when the agent journalled the running attempt; zero before.
	AcceptedAt time.Time
	// ErrorClass and Error describe the last failure; Reason says why the job exists.
	ErrorClass, Error, Reason string
	RequestID                 string
	CreatedAt, UpdatedAt      time.Time
	FinishedAt                time.Time
}

// Intent is recorded before anything is signed.
type Intent struct {
	ID                     string
	CertificateID, AgentID string
	Generation             int64
	JobID                  string
	Attempt                int64
	IssuerID, Serial       string // serial in lower-case hex without leading zeros
	TBS                    []byte // linted to-be-signed bytes; nil for external CAs
	// OrderKey makes an order at an external CA idempotent; Ref is the CA's own reference once known.
	OrderKey, Ref string
	SPKI          string // SHA-256 of the SubjectPublicKeyInfo, hex
	State         IntentState
	Recovery      int64
	CreatedAt     time.Time
	// StaleBefore is not kept: an open intent that was made before it is not signed any more, because too much of the
	// validity in its bytes has gone by. Zero: every one is signed.
	StaleBefore time.Time
}

// Version is one signed certificate.
type Version struct {
	IssuerID, Serial       string
	CertificateID, AgentID string
	Generation             int64
	DER                    []byte
	Chain                  [][]byte // issuers of DER, nearest first, without the root
	Fingerprint            string
	SPKI                   string
	KeyAlgorithm           KeyAlgorithm
	NotBefore, NotAfter    time.Time
	RevokedAt              time.Time
	RevocationReason       RevocationReason
	CreatedAt              time.Time
}

// Agent is a host that joined.
type Agent struct {
	ID, Name string
	State    AgentState
	Labels   map[string]string
	Facts    Facts
	// Reason says why an agent is quarantined or retired.
	Reason              string
	Protocol            int
	Capabilities        []string
	CreatedAt, LastSeen time.Time
	OfflineSince        time.Time
}

// Facts are what an agent says of its host; hostile input, bounded and stripped before it is stored.
type Facts struct {
	OS           string `json:"os,omitempty"`
	Platform     string `json:"platform,omitempty"`
	Architecture string `json:"architecture,omitempty"`
	IPAddress    string `json:"ip_address,omitempty"`
	Hostname     string `json:"hostname,omitempty"`
	Version      string `json:"version,omitempty"`
}

// Identity is one client certificate of an agent.
type Identity struct {
	Serial, AgentID, SPKI string
	NotBefore, NotAfter   time.Time
	RevokedAt             time.Time
	FirstUsedAt           time.Time
	CreatedAt             time.Time
	// Generation is the mesh CA's that signed it; 0: 1.
	Generation int64
}

// JoinToken lets hosts enrol. Only the SHA-256 of its secret is stored.
type JoinToken struct {
	ID        string
	Hash      []byte
	Labels    map[string]string
	MaxUses   int // 0 means 1
	Uses      int
	ExpiresAt time.Time
	RevokedAt time.Time
	CreatedBy string
	CreatedAt time.Time
}

// APIKey is an operator's credential. Only the SHA-256 of its secret is stored.
type APIKey struct {
	ID, Name, Role string
	Hash           []byte
	ExpiresAt      time.Time
	RevokedAt      time.Time
	CreatedAt      time.Time
}

// AuditEvent is one row of the trail. It holds no secret and is never changed.
type AuditEvent struct {
	ID         string
	At         time.Time
	Actor      string // "operator:<key name>", "agent:<id>", "node:<id>", "anonymous"
	Action     string // e.g. "certificate.issued"
	Resource   string // e.g. "certificate/cert_…"
	Outcome    string // "ok" or a fault class
	RequestID  string
	RemoteAddr string
	Detail     map[string]string
}

// CRL is a complete CRL of one issuer's shard.
type CRL struct {
	IssuerID               string
	Shard                  int
	Number                 int64
	DER                    []byte
	ThisUpdate, NextUpdate time.Time
	Revoked                int
}

// Micro truncates t to what the store keeps: microseconds, UTC. The zero time stays zero.
func Micro(t time.Time) time.Time {
	if t.IsZero() {
		return time.Time{}
	}
	return t.UTC().Truncate(time.Microsecond)
}
