package identity

import (
	"bytes"
	"crypto/x509"
	"time"
)

// changeSpread is the time over which agents ask for an identity of the CA that signs now, once they know of it; for short
// lives the share changeShare.
const (
	changeSpread = 30 * time.Minute
	changeShare  = 20
)

// RenewAt is id.RenewAt, or earlier when another CA than id's signs by now: the first root of the trust bundle is the one
// that signs. The time is spread, so that the agents of a control plane do not all ask when its CA is changed.
func (m *Manager) RenewAt(id *Identity) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	at := id.RenewAt()
	if !superseded(id.cert.Leaf, m.roots) {
		return at
	}
	spread := min(changeSpread, id.NotAfter.Sub(id.NotBefore)/changeShare)
	if soon := m.bundleAt.Add(time.Duration(id.fraction() * float64(spread))); soon.Before(at) {
		return soon
	}
	return at
}

// superseded says that leaf is of a root that is trusted still but not the first any more. By key identifiers: one that was
// signed below an intermediate is of none of the roots, and is left alone.
func superseded(leaf *x509.Certificate, roots []*x509.Certificate) bool {
	for i, r := range roots {
		if len(r.SubjectKeyId) > 0 && bytes.Equal(leaf.AuthorityKeyId, r.SubjectKeyId) {
			return i > 0
		}
	}
	return false
}
