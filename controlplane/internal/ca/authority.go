package ca

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Authority is a CA that is able to sign. It is safe for concurrent use.
type Authority struct {
	id, publicURL string
	chain         []*x509.Certificate // the signing certificate first, the root last
	notAfter      time.Time           // the earliest of the chain
	trustDomain   string              // of the mesh CA; empty for issuing CAs
	generation    int64               // of the mesh CA
	vouched       []*x509.Certificate // domain.CA.Vouched
	key           crypto.Signer
	scheme        scheme
	identifier    []byte // AlgorithmIdentifier of scheme, DER
	placeholder   []byte
	lint          *linter
	shadow        *shadow // set if the chain constrains what is issued below it
	linted        seen
}

// Open loads a CA: its certificates from ca, its key from where ca.KeyURI says. keys reads a sealed key by id. It
// refuses a key that does not belong to the certificate.
func Open(ca domain.CA, keys func(id string) (domain.SealedKey, error), ring *secret.Keyring) (*Authority, error) {
	chain, err := parseChain(ca.Chain)
	if err != nil {
		return nil, err
	}
	key, err := openKey(ca.KeyURI, map[string]keySource{sealedScheme: sealedKeys(signingPurpose(ca.ID), keys, ring)})
	if err != nil {
		return nil, err
	}
	return newAuthority(ca, chain, key)
}

func newAuthority(ca domain.CA, chain []*x509.Certificate, key crypto.Signer) (*Authority, error) {
	if !equalKeys(key.Public(), chain[0].PublicKey) {
		return nil, fault.New(fault.Rejected, "the key %s is not the key of CA %q: restore the tables of CAs and sealed keys from one backup", ca.KeyURI, ca.ID)
	}
	pub, err := inspectKey(chain[0].PublicKey)
	if err != nil {
		return nil, err
	}
	a := &Authority{id: ca.ID, publicURL: strings.TrimRight(ca.PublicURL, "/"), chain: chain, notAfter: chain[0].NotAfter,
		key: key, scheme: pub.kind.scheme, placeholder: pub.kind.scheme.placeholder(pub.key)}
	for _, c := range chain {
		if c.NotAfter.Before(a.notAfter) {
			a.notAfter = c.NotAfter
		}
	}
	if ca.ID == domain.MeshCA {
		if a.trustDomain, err = signingTrustDomain(chain[0]); err != nil {
			return nil, err
		}
		a.generation = max(ca.Generation, 1)
		if len(ca.Vouched) > 0 {
			if a.vouched, err = parseChain(ca.Vouched); err != nil {
				return nil, err
			}
		}
	}
	if a.identifier, err = a.scheme.identifier(); err != nil {
		return nil, fault.Wrap(fault.Internal, err, "encode the signature algorithm")
	}
	if a.lint, err = newLinter(); err != nil {
		return nil, err
	}
	if a.shadow, err = newShadow(chain); err != nil {
		return nil, err
	}
	return a, nil
}

func parseChain(ders [][]byte) ([]*x509.Certificate, error) {
	chain := make([]*x509.Certificate, 0, len(ders))
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fault.Wrap(fault.Internal, err, "a stored CA certificate does not parse")
		}
		chain = append(chain, c)
	}
	if len(chain) == 0 {
		return nil, fault.New(fault.Internal, "a CA without a certificate")
	}
	return chain, nil
}

func equalKeys(a, b crypto.PublicKey) bool {
	e, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && e.Equal(b)
}

// ID is the issuer's id, domain.MeshCA for the mesh CA.
func (a *Authority) ID() string { return a.id }

// Certificate is the signing certificate; it must not be changed.
func (a *Authority) Certificate() *x509.Certificate { return a.chain[0] }

// Chain is what is sent after a leaf: the signing certificate and those above it, nearest first, without roots, in DER.
// It is empty when the root itself signs and nothing vouches for it.
func (a *Authority) Chain() [][]byte {
	var out [][]byte
	for _, c := range slices.Concat(a.chain, a.vouched) {
		if !selfIssued(c) {
			out = append(out, c.Raw)
		}
	}
	return out
}

// Root is the last certificate of the chain; it must not be changed.
func (a *Authority) Root() *x509.Certificate { return a.chain[len(a.chain)-1] }

// Roots are those that a node shows after Chain, in DER: a former one that vouches for this one, and this one, which is
// the last.
func (a *Authority) Roots() [][]byte {
	var out [][]byte
	for _, c := range a.vouched {
		if selfIssued(c) {
			out = append(out, c.Raw)
		}
	}
	return append(out, a.Root().Raw)
}

// Generation counts the mesh CAs of a cluster from 1; 0 for issuing CAs.
func (a *Authority) Generation() int64 { return a.generation }

// NotAfter is when the first certificate of the chain expires: nothing is issued beyond it.
func (a *Authority) NotAfter() time.Time { return a.notAfter }

// TrustDomain is that of the mesh CA's identities, empty for issuing CAs.
func (a *Authority) TrustDomain() string { return a.trustDomain }

// CRLURL is the distribution point of a shard (RFC 5280 section 4.2.1.13), empty without a public URL.
func (a *Authority) CRLURL(shard int) string {
	if a.publicURL == "" {
		return ""
	}
	return a.publicURL + "/.well-known/pki/crl/" + url.PathEscape(a.id) + "/" + strconv.Itoa(shard)
}

// CAURL is where the signing certificate is served (caIssuers, RFC 5280 section 4.2.2.1), empty without a public URL.
func (a *Authority) CAURL() string {
	if a.publicURL == "" {
		return ""
	}
	return a.publicURL + "/.well-known/pki/ca/" + url.PathEscape(a.id)
}

// Sign signs tbs, which a Prepare of this or a former process made, and returns the certificate in DER. Bytes that were
// not linted since this process started are linted and checked to be a leaf of this CA first (Rejected if they are
// not). The signature is verified once before it is returned.
func (a *Authority) Sign(tbs []byte) ([]byte, error) {
	if !a.linted.take(sha256.Sum256(tbs)) {
		if err := a.admit(tbs); err != nil {
			return nil, err
		}
	}
	return a.seal(tbs)
}

// admit decides whether bytes of unknown origin are a certificate that Prepare could have made.
func (a *Authority) admit(tbs []byte) error {
	der, err := assemble(tbs, a.identifier, a.placeholder)
	if err != nil {
		return err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return fault.Wrap(fault.Rejected, err, "the recorded certificate does not parse; abandon the intent and order again")
	}
	issuer := a.chain[0]
	switch {
	case !bytes.Equal(c.RawTBSCertificate, tbs):
		return fault.New(fault.Rejected, "the recorded certificate has trailing data; abandon the intent and order again")
	case !bytes.Equal(c.RawIssuer, issuer.RawSubject), !bytes.Equal(c.AuthorityKeyId, issuer.SubjectKeyId),
		c.SignatureAlgorithm != a.scheme.x509:
		return fault.New(fault.Rejected, "the recorded certificate was prepared for another CA than %q; abandon the intent and order again", a.id)
	case c.IsCA, !c.BasicConstraintsValid, c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return fault.New(fault.Rejected, "the recorded certificate is one of a CA, which is not issued here; abandon the intent")
	case c.NotAfter.After(a.notAfter):
		return fault.New(fault.Rejected, "the recorded certificate outlives its CA; abandon the intent and order again")
	}
	return a.lint.checkCertificate(der, false)
}

// seal signs to-be-signed bytes of any kind (certificate or CRL) with the CA's key and verifies the result.
func (a *Authority) seal(tbs []byte) ([]byte, error) {
	sig, err := signMessage(a.key, a.scheme, tbs)
	if err != nil {
		return nil, err
	}
	if err := a.chain[0].CheckSignature(a.scheme.x509, tbs, sig); err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the key of CA %q made a signature that its certificate does not verify", a.id)
	}
	return assemble(tbs, a.identifier, sig)
}

func signMessage(key crypto.Signer, s scheme, tbs []byte) ([]byte, error) {
	sig, err := crypto.SignMessage(key, rand.Reader, tbs, s.hash)
	if err != nil {
		return nil, fault.Wrap(fault.Retryable, err, "sign with the CA key")
	}
	return sig, nil
}

// assemble puts the three parts of a signed object together (RFC 5280 sections 4.1 and 5.1).
func assemble(tbs, identifier, sig []byte) ([]byte, error) {
	b := cryptobyte.NewBuilder(make([]byte, 0, len(tbs)+len(identifier)+len(sig)+16))
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		b.AddBytes(identifier)
		b.AddASN1BitString(sig)
	})
	der, err := b.Bytes()
	if err != nil {
		return nil, fault.Wrap(fault.Rejected, err, "put the certificate together")
	}
	return der, nil
}

// selfIssued reports whether subject and issuer are one (RFC 5280 section 3.2).
func selfIssued(c *x509.Certificate) bool { return bytes.Equal(c.RawSubject, c.RawIssuer) }

// seen remembers the hashes of what was linted and not yet signed. It is bounded: what falls out is linted again.
type seen struct {
	mu   sync.Mutex
	sums map[[sha256.Size]byte]struct{}
}

const maxSeen = 4096

func (s *seen) put(sum [sha256.Size]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sums == nil {
		s.sums = make(map[[sha256.Size]byte]struct{})
	}
	for old := range s.sums {
		if len(s.sums) < maxSeen {
			break
		}
		delete(s.sums, old)
	}
	s.sums[sum] = struct{}{}
}

func (s *seen) take(sum [sha256.Size]byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.sums[sum]
	delete(s.sums, sum)
	return ok
}

// oid helpers shared by requests and CRLs (RFC 5280 section 4.2.1).
var (
	oidSubjectKeyID     = asn1.ObjectIdentifier{2, 5, 29, 14}
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidIssuingDistPoint = asn1.ObjectIdentifier{2, 5, 29, 28}
	oidExtKeyUsage      = asn1.ObjectIdentifier{2, 5, 29, 37}
)
