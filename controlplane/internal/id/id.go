// Package id makes the ids of rows: prefix_<UUIDv7>, so that a person sees what an id names and ids sort by the time
// they were made. It stands apart from domain because it reads the clock and the random source.
package id

import (
	"strings"

	"github.com/google/uuid"
)

// The prefixes.
const (
	Certificate  = "cert"
	Agent        = "agt"
	Job          = "job"
	Issuer       = "iss"
	Profile      = "prof"
	Target       = "tgt"
	Intent       = "int"
	Token        = "jt"
	ClusterToken = "ct"
	Cluster      = "cl"
	Instance     = "run"
	APIKey       = "key"
	Audit        = "aud"
	Key          = "sk"
	Request      = "req"
)

// New returns prefix_ and 32 hex digits, sortable by time and unique without coordination.
func New(prefix string) string {
	u, err := uuid.NewV7()
	if err != nil {
		// The operating system's random source failed; nothing that follows could be trusted.
		panic("id: no random source: " + err.Error())
	}
	return prefix + "_" + strings.ReplaceAll(u.String(), "-", "")
}
