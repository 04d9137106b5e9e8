// Package net carries Raft between nodes: TLS 1.3 with node identities on both ends. A node is dialled by its id; where it
// is at present, and that it is the one, this package finds out.
package net

import (
	"crypto/tls"
	"crypto/x509"
	"regexp"
	"time"
)

// idForm is that of all ids in the mesh.
var idForm = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$`)

// ValidID reports whether id may name a node.
func ValidID(id string) bool { return idForm.MatchString(id) }

// Identity is how this node shows who it is, and whom it believes. Certificate and Roots are asked at every handshake, so
// that renewals need no restart.
type Identity struct {
	TrustDomain string
	Certificate func() *tls.Certificate
	Roots       func() *x509.CertPool
	Now         func() time.Time
	// Admit judges a node that has proven its id; nil: all may enter.
	Admit func(id string) error
}
