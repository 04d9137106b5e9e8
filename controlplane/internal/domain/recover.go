package domain

import (
	"maps"
	"slices"
	"strings"
	"time"
)

// After a restore from backup the rows are those of an earlier time, while agents, relying parties and perhaps a node that
// stood still know what came after. Recovery raises every number that fences something above all that may have been given
// out in between: each is at least the moment of the recovery (epochs and attempts in microseconds, generations in seconds,
// CRL numbers in milliseconds, all since 1970), and none of them is counted up that fast.

// Recovery says what a recovery did.
type Recovery struct {
	// Generation is the recovery generation: the moment in microseconds, or one more than the former.
	Generation int64
	// What was raised.
	Leaves, Duties, Sessions, Nodes, Jobs, Targets, CRLs int64
	// Abandoned are the intents that will never be signed.
	Abandoned int64
	// Alive again, because what was done to them after the backup is not known: see Trusted.
	Trusted Trusted
}

// Trusted counts what a restored store trusts, whatever was done to it after the backup.
type Trusted struct{ APIKeys, JoinTokens, ClusterTokens, Nodes, Agents, Identities int64 }

// Raised is a counter that fences, after a recovery at floor.
func Raised(counter, floor int64) int64 { return max(counter+1, floor) }

// FoundLeaf is a leaf of one of our own CAs that an agent holds and that no version is known of. That its CA signed it
// was verified; its certificate and generation are what the agent says.
type FoundLeaf struct {
	IssuerID, Serial       string
	AgentID, CertificateID string
	Generation             int64
	Names                  Names
	DER                    []byte
	Chain                  [][]byte // as in Version
	Fingerprint, SPKI      string
	KeyAlgorithm           KeyAlgorithm
	NotBefore, NotAfter    time.Time
	// Reason says in words why it is no version of a certificate.
	Reason           string
	RevokedAt        time.Time
	RevocationReason RevocationReason
	FoundAt          time.Time
}

// Adoption is what became of a FoundLeaf.
type Adoption string

const (
	// AdoptionKnown: it is on record.
	AdoptionKnown Adoption = "known"
	// AdoptionVersion: it is a version of its certificate again.
	AdoptionVersion Adoption = "version"
	// AdoptionFound: it was written down with its agent, revocable, because no version could be made of it.
	AdoptionFound Adoption = "found"
)

// Adopted answers a FoundLeaf; Reason says why it is no version.
type Adopted struct {
	Adoption Adoption
	Reason   string
}

// SameNames reports whether two certificates are for the same names, whatever their order and case, and whether the common
// name stands among the alternative names as well.
func SameNames(a, b Names) bool { return maps.Equal(nameSet(a), nameSet(b)) }

func nameSet(n Names) map[string]bool {
	set := map[string]bool{}
	for _, v := range slices.Concat([]string{n.CommonName}, n.DNS, n.IP, n.Email, n.URI) {
		if v != "" {
			set[strings.ToLower(v)] = true
		}
	}
	return set
}
