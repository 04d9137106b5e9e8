package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"slices"

	"github.com/certmesh/certmesh/protocol/fault"
)

// shadow tells before signing whether a leaf would be valid below a chain with name constraints or extended key usages
// (RFC 5280 sections 4.2.1.10 and 4.2.1.12). It is a copy of the chain under a throw-away key: a leaf signed with that
// key is verified by crypto/x509 exactly as relying parties will verify the real one, and the real key stays unused.
type shadow struct {
	key   *ecdsa.PrivateKey
	chain []*x509.Certificate // copies, the signing certificate first
	roots *x509.CertPool
	above *x509.CertPool
}

// newShadow returns nil for a chain that constrains nothing.
func newShadow(chain []*x509.Certificate) (*shadow, error) {
	if !slices.ContainsFunc(chain, constrains) {
		return nil, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "make a throw-away key")
	}
	s := &shadow{key: key, chain: make([]*x509.Certificate, len(chain)), roots: x509.NewCertPool(), above: x509.NewCertPool()}
	for i := len(chain) - 1; i >= 0; i-- {
		t := *chain[i]
		t.SignatureAlgorithm, t.PublicKey = 0, nil
		parent := &t
		if i+1 < len(chain) {
			parent = s.chain[i+1]
		}
		der, err := x509.CreateCertificate(rand.Reader, &t, parent, key.Public(), key)
		if err != nil {
			return nil, fault.Wrap(fault.Invalid, err, "copy the CA's constraints")
		}
		if s.chain[i], err = x509.ParseCertificate(der); err != nil {
			return nil, fault.Wrap(fault.Invalid, err, "copy the CA's constraints")
		}
		if i+1 == len(chain) {
			s.roots.AddCert(s.chain[i])
		} else {
			s.above.AddCert(s.chain[i])
		}
	}
	return s, nil
}

func constrains(c *x509.Certificate) bool {
	return len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) > 0 ||
		len(c.PermittedDNSDomains)+len(c.ExcludedDNSDomains)+len(c.PermittedIPRanges)+len(c.ExcludedIPRanges)+
			len(c.PermittedEmailAddresses)+len(c.ExcludedEmailAddresses)+len(c.PermittedURIDomains)+len(c.ExcludedURIDomains) > 0
}

// check refuses a leaf that relying parties would refuse.
func (s *shadow) check(t *x509.Certificate, pub publicKey) error {
	leaf := *t
	leaf.SignatureAlgorithm = 0
	der, err := x509.CreateCertificate(rand.Reader, &leaf, s.chain[0], pub.key, s.key)
	if err != nil {
		return fault.Wrap(fault.Rejected, err, "build the certificate")
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return fault.Wrap(fault.Rejected, err, "the certificate does not parse and was not signed")
	}
	for _, use := range t.ExtKeyUsage {
		if _, err := c.Verify(x509.VerifyOptions{Roots: s.roots, Intermediates: s.above, CurrentTime: t.NotBefore, KeyUsages: []x509.ExtKeyUsage{use}}); err != nil {
			return fault.Wrap(fault.Rejected, err, "the CA's own certificate does not allow this (name constraints or extended key usage)")
		}
	}
	return nil
}
