// Package target is the contract between certmesh and the servers and appliances that serve certificates.
//
// A target connector is a Kind value made by Define and listed in connectors/catalog; there is no registration in
// init, no global and no environment variable. The steps are ordered so that a crash between any two of them can be
// settled by a later process from Current and the journalled Receipt alone:
//
//	Current → Stage → (Receipt is journalled) → Commit → Activate (once per reload domain) → Verify
//	                                          ↘ Undo(receipt), at any moment, twice is fine
//
// Every call takes a context, is safe for concurrent use by different targets, never logs a secret and never retries
// for longer than two seconds by itself: the caller owns retry. Errors are classified by protocol/fault; an
// unclassified error counts as a defect in the conformance suite (targettest).
package target

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"log/slog"
	"time"
)

// Fingerprint is the SHA-256 of a certificate's DER form.
type Fingerprint [sha256.Size]byte

// FingerprintOf returns the fingerprint of cert.
func FingerprintOf(cert *x509.Certificate) Fingerprint { return sha256.Sum256(cert.Raw) }

// String returns lower-case hexadecimal.
func (f Fingerprint) String() string { return hex.EncodeToString(f[:]) }

// IsZero reports whether f is unset.
func (f Fingerprint) IsZero() bool { return f == Fingerprint{} }

// Served is what a target holds now. A zero Leaf means that it holds nothing (not an error).
type Served struct {
	Leaf Fingerprint
	// NotAfter of the leaf, zero when nothing is held.
	NotAfter time.Time
	// Since is when it was installed, zero when unknown.
	Since time.Time
}

// Material is what is to be installed. Chain is leaf first, then intermediates in order, without the root.
// KeyPEM returns the private key as PKCS#8 PEM; it is called only by connectors that write keys, and the result must
// not be kept or logged.
type Material struct {
	// CertificateID and Generation name the managed certificate and the serving generation; they are used for names of
	// version directories and never trusted as paths (see file).
	CertificateID string
	Generation    int64
	Chain         []*x509.Certificate
	KeyPEM        func() ([]byte, error)
}

// Leaf returns the fingerprint of the material's first certificate; zero if the chain is empty.
func (m Material) Leaf() Fingerprint {
	if len(m.Chain) == 0 {
		return Fingerprint{}
	}
	return FingerprintOf(m.Chain[0])
}

// Receipt is all that Undo needs, in the connector's own JSON; it holds no private key. The agent journals it before
// Commit is called.
type Receipt json.RawMessage

// Target is a server or appliance that serves certificates.
type Target interface {
	// Current says what the target holds now, read back from where it would be served.
	Current(ctx context.Context) (Served, error)
	// Stage writes m beside what is in use and validates it; it serves nothing new. A failed Stage leaves nothing.
	Stage(ctx context.Context, m Material) (Staged, error)
	// Undo goes back to before Stage; at any moment, from any later process; doing it twice is fine. After Undo of a
	// committed receipt the former material is in place again (Activate makes the service load it).
	Undo(ctx context.Context, r Receipt) error
}

// Staged is material that waits beside the one in use.
type Staged interface {
	// Receipt returns what Undo needs; the caller journals it durably before it calls Commit.
	Receipt() Receipt
	// Commit installs the staged material; it does not make a service reload. All files or none.
	Commit(ctx context.Context) error
}

// Activator is implemented by targets whose service must be told to load what was committed. Targets with an equal
// Domain share one activation: what was committed together is validated and activated once; when that fails the
// caller finds the culprit by bisection, undoes it alone, and activates the rest.
type Activator interface {
	// Domain names what is reloaded, e.g. "nginx:/etc/nginx/nginx.conf".
	Domain() string
	// Activate validates the service's whole configuration and makes it load it. An Invalid or Rejected fault means
	// that the validation failed and nothing was reloaded.
	Activate(ctx context.Context) error
}

// Verifier is implemented by targets that know better than a TLS handshake with the verify address whether m is served.
type Verifier interface {
	Verify(ctx context.Context, m Material) (Proof, error)
}

// Repairer is implemented by targets that can be left half-switched by a crash. Repair runs before anything else when
// an agent starts, for every receipt that is still open in its journal.
type Repairer interface {
	Repair(ctx context.Context, r Receipt) error
}

// Proof says what was seen when a deployment was verified.
type Proof struct {
	Leaf    Fingerprint
	Address string
	At      time.Time
}

// Command is an argument vector that the agent's own configuration allows (never a shell line).
type Command []string

// Env is what a connector may touch. There is nothing global besides it.
type Env struct {
	Log *slog.Logger
	// Now is the clock.
	Now func() time.Time
	// Roots are the absolute directories below which the agent may write; empty allows nothing.
	Roots []string
	// Commands are the argument vectors that may be run; a connector runs one only after Allowed said yes.
	Commands []Command
	// BackupRetention is the default number of former versions kept per target (certmesh: 3; -1 keeps none, and then a
	// failed activation cannot be undone).
	BackupRetention int
}

// Problem is one fault of a settings struct; Field is its JSON path.
type Problem struct{ Field, Message string }

// Facts say, as data, what a kind does and does not do.
type Facts struct {
	// Atomic: readers see the old or the new material, never a mixture.
	Atomic bool
	// Undo: Undo restores the former material.
	Undo bool
	// NeedsKey: the private key is written by the connector.
	NeedsKey bool
	// Unsupported names features of the contract that this kind lacks, for the conformance suite and the docs.
	Unsupported []string
}

// Kind is a target connector: a name, a version, and how to check and open settings.
type Kind struct {
	Name    string
	Version int
	Facts   Facts
	// Check reports every problem of settings (JSON), touching neither network nor disk.
	Check func(settings json.RawMessage) []Problem
	// Open makes a Target; it may touch disk.
	Open func(ctx context.Context, env Env, settings json.RawMessage) (Target, error)
	// Paths are the files and directories that targets of these settings write, as the settings name them; nil, or none: the
	// kind writes none, or they cannot be known beforehand. No two targets of one host may write the same.
	Paths func(settings json.RawMessage) []string
	// Schema describes the settings struct for help, forms and the reference page.
	Schema []SettingDoc
}

// SettingDoc documents one setting, from the struct's tags json, doc and default.
type SettingDoc struct{ Name, Type, Default, Doc string }
