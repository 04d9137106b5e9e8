package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"net/url"
	"strings"
	"time"

	"go.step.sm/crypto/pemutil"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Material is a new CA; the caller stores both parts in one transaction.
type Material struct {
	CA   domain.CA
	Keys []domain.SealedKey
}

// Roots is what relying parties are to trust, in DER.
func (m Material) Roots() [][]byte { return m.CA.Chain[len(m.CA.Chain)-1:] }

const year = 365 * 24 * time.Hour

// Defaults of new CAs.
const (
	DefaultRootTTL         = 10 * year
	DefaultIntermediateTTL = 5 * year
	maxRootTTL             = 30 * year
)

// Params describe a new CA. Zero values of all fields after Now take defaults.
type Params struct {
	// ID is the issuer's id; it is part of URLs.
	ID string
	// Name goes into the subjects, e.g. "Example Internal"; at most 40 characters.
	Name string
	// RootName is the root's common name as a whole, at most 64 characters (RFC 5280, appendix A). Empty: Name, "Root CA" and a
	// part of its key's hash, so that two CAs of one name do not share a subject.
	RootName string
	// PublicURL is the base of the CRL and CA URLs, http or https without query; empty: certificates carry neither.
	PublicURL string
	Now       time.Time

	Organization string
	// KeyAlgorithm of root and intermediate, default ECDSA-P256.
	KeyAlgorithm domain.KeyAlgorithm
	// RootTTL and IntermediateTTL: DefaultRootTTL, DefaultIntermediateTTL; the intermediate ends with the root at the latest.
	RootTTL, IntermediateTTL time.Duration
}

func (p Params) check() (Params, error) {
	if p.KeyAlgorithm == "" {
		p.KeyAlgorithm = domain.ECDSAP256
	}
	if p.RootTTL == 0 {
		p.RootTTL = DefaultRootTTL
	}
	if p.IntermediateTTL == 0 {
		p.IntermediateTTL = min(DefaultIntermediateTTL, p.RootTTL)
	}
	switch name := []rune(p.Name); {
	case p.ID == "" || p.Now.IsZero():
		return p, fault.New(fault.Internal, "a CA needs an id and the time")
	case len(name) == 0 || len(name) > 40 || strings.TrimSpace(p.Name) != p.Name:
		return p, fault.InvalidField("name", "a CA's name has 1 to 40 characters without spaces at the ends; it goes into its certificates")
	case len([]rune(p.RootName)) > 64 || strings.TrimSpace(p.RootName) != p.RootName:
		return p, fault.InvalidField("root_name", "a root's common name has at most 64 characters and no spaces at the ends (RFC 5280, appendix A)")
	case len([]rune(p.Organization)) > 64:
		return p, fault.InvalidField("organization", "is longer than 64 characters (RFC 5280, appendix A)")
	case p.RootTTL < time.Hour || p.RootTTL > maxRootTTL:
		return p, fault.InvalidField("root_ttl", "%s is not between 1 h and 30 years", p.RootTTL)
	case p.IntermediateTTL < time.Hour || p.IntermediateTTL > p.RootTTL:
		return p, fault.InvalidField("intermediate_ttl", "%s is not between 1 h and the root's validity", p.IntermediateTTL)
	}
	return p, checkPublicURL(p.PublicURL)
}

func checkPublicURL(s string) error {
	if s == "" {
		return nil
	}
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || !ascii(s) {
		return fault.InvalidField("public_url", "%s is not the base of a URL that relying parties can fetch, e.g. http://pki.example.com", quoted(s))
	}
	return nil
}

// NewSelfSigned makes a root and an online intermediate below it, and seals both keys. The root's key signs the
// intermediate here and is not used again until the intermediate is replaced.
func NewSelfSigned(p Params, ring *secret.Keyring) (Material, error) {
	p, err := p.check()
	if err != nil {
		return Material{}, err
	}
	top := authorityTemplate(p, "Root CA", p.RootTTL)
	if p.RootName != "" {
		top.Subject.CommonName = p.RootName
	}
	root, err := newCertificate(p, top, nil)
	if err != nil {
		return Material{}, fmt.Errorf("make the root: %w", err)
	}
	t := authorityTemplate(p, "Issuing CA", p.IntermediateTTL)
	t.MaxPathLen, t.MaxPathLenZero = 0, true
	if root.certificate.NotAfter.Before(t.NotAfter) {
		t.NotAfter = root.certificate.NotAfter
	}
	issuing, err := newCertificate(p, t, root)
	if err != nil {
		return Material{}, fmt.Errorf("make the intermediate: %w", err)
	}
	return material(p, ring, issuing, root)
}

// NewMesh makes the mesh CA: a root that signs the identities of agents and nodes of trustDomain (RFC 5280; SPIFFE
// X509-SVID section 4). p.ID, p.Name, p.PublicURL and p.IntermediateTTL are not used. Its root is version 1 of the trust
// bundle.
func NewMesh(trustDomain string, p Params, ring *secret.Keyring) (Material, error) {
	if err := CheckTrustDomain(trustDomain); err != nil {
		return Material{}, err
	}
	p.ID, p.Name, p.PublicURL, p.IntermediateTTL = domain.MeshCA, "certmesh", "", 0
	p, err := p.check()
	if err != nil {
		return Material{}, err
	}
	root, err := newCertificate(p, meshTemplate(trustDomain, p), nil)
	if err != nil {
		return Material{}, fmt.Errorf("make the mesh CA: %w", err)
	}
	m, err := material(p, ring, root, root)
	m.CA.Generation = 1
	return m, err
}

// meshTemplate leaves room for one CA below the root: its successor, which it vouches for.
func meshTemplate(trustDomain string, p Params) *x509.Certificate {
	t := authorityTemplate(p, "Mesh CA", p.RootTTL)
	t.MaxPathLen = 1
	t.URIs = []*url.URL{{Scheme: "spiffe", Host: trustDomain}}
	return t
}

// authority is a certificate with its key, in the making.
type authority struct {
	certificate *x509.Certificate
	key         crypto.Signer
	scheme      scheme
}

func authorityTemplate(p Params, what string, ttl time.Duration) *x509.Certificate {
	now := p.Now.UTC().Truncate(time.Second)
	t := &x509.Certificate{Subject: pkix.Name{CommonName: p.Name + " " + what}, NotBefore: now.Add(-backdate), NotAfter: now.Add(ttl),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true}
	if p.Organization != "" {
		t.Subject.Organization = []string{p.Organization}
	}
	return t
}

// newCertificate makes a key and a CA certificate for it, signed by parent or, without one, by itself. It is linted
// before it is signed, as everything is.
func newCertificate(p Params, t *x509.Certificate, parent *authority) (*authority, error) {
	kind, err := keyTypeOf(p.KeyAlgorithm)
	if err != nil {
		return nil, err
	}
	key, err := kind.generate()
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "make a key")
	}
	pub, err := inspectKey(key.Public())
	if err != nil {
		return nil, err
	}
	// Two CAs of one name must not share a subject: chains are built by subject, CRLs found by issuer.
	if t.Subject.CommonName != p.RootName {
		t.Subject.CommonName += " " + hex.EncodeToString(pub.skid[:3])
	}
	made := &authority{certificate: t, key: key, scheme: kind.scheme}
	if parent == nil {
		parent = made
	}
	made.certificate, err = certify(t, pub, parent)
	return made, err
}

// certify signs t, a CA's certificate, for a key; signer's own certificate may be t.
func certify(t *x509.Certificate, pub publicKey, signer *authority) (*x509.Certificate, error) {
	var err error
	if t.SerialNumber, err = NewSerial(rand.Reader); err != nil {
		return nil, err
	}
	t.SubjectKeyId = pub.skid
	above := signer.certificate
	l, err := newLinter()
	if err != nil {
		return nil, err
	}
	tbs, err := lintedTBS(t, above, pub.key, signer.scheme, l)
	if err != nil {
		return nil, err
	}
	sig, err := signMessage(signer.key, signer.scheme, tbs)
	if err != nil {
		return nil, err
	}
	identifier, err := signer.scheme.identifier()
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "encode the signature algorithm")
	}
	der, err := assemble(tbs, identifier, sig)
	if err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "read back the CA certificate")
	}
	by := c
	if above != t {
		by = above
	}
	if err := c.CheckSignatureFrom(by); err != nil {
		return nil, fault.Wrap(fault.Internal, err, "verify the CA certificate")
	}
	return c, nil
}

// material seals the keys of signer and root, which may be one.
func material(p Params, ring *secret.Keyring, signer, root *authority) (Material, error) {
	m := Material{CA: domain.CA{ID: p.ID, Chain: [][]byte{signer.certificate.Raw}, PublicURL: p.PublicURL, CreatedAt: domain.Micro(p.Now)}}
	keyID := id.New(id.Key)
	sealed, err := sealKey(signer.key, keyID, signingPurpose(p.ID), ring, p.Now)
	if err != nil {
		return Material{}, err
	}
	m.Keys = append(m.Keys, sealed)
	m.CA.KeyURI = sealedScheme + ":" + keyID
	if signer == root {
		m.CA.RootKeyURI = m.CA.KeyURI
		return m, nil
	}
	rootID := id.New(id.Key)
	if sealed, err = sealKey(root.key, rootID, rootPurpose(p.ID), ring, p.Now); err != nil {
		return Material{}, err
	}
	m.Keys = append(m.Keys, sealed)
	m.CA.Chain = append(m.CA.Chain, root.certificate.Raw)
	m.CA.RootKeyURI = sealedScheme + ":" + rootID
	return m, nil
}

// Import is a CA that exists already, given as files.
type Import struct {
	ID, PublicURL string
	Now           time.Time
	// Certificates is PEM: the CA's certificate first, then those above it in order, the root last.
	Certificates []byte
	// Key is the CA's private key in PEM (PKCS#8, PKCS#1 or SEC 1), encrypted with Password or in clear. Neither is kept.
	Key, Password []byte
}

// maxImport bounds each of the files of an Import.
const maxImport = 256 << 10

// FromPEM takes over a CA from files (sub-CA mode): the certificate is a CA's and may sign certificates and CRLs, each
// certificate is signed by the next, none has expired, and the key belongs to the first. Errors are Invalid and say
// which file is wrong and why.
func FromPEM(in Import, ring *secret.Keyring) (Material, error) {
	if in.ID == "" || in.Now.IsZero() {
		return Material{}, fault.New(fault.Internal, "a CA needs an id and the time")
	}
	if err := checkPublicURL(in.PublicURL); err != nil {
		return Material{}, err
	}
	chain, err := chainFromPEM(in.Certificates, in.Now)
	if err != nil {
		return Material{}, err
	}
	key, err := keyFromPEM(in.Key, in.Password)
	if err != nil {
		return Material{}, err
	}
	if !equalKeys(key.Public(), chain[0].PublicKey) {
		return Material{}, fault.InvalidField("key", "does not belong to the first certificate (%s)", quoted(chain[0].Subject.String()))
	}
	keyID := id.New(id.Key)
	sealed, err := sealKey(key, keyID, signingPurpose(in.ID), ring, in.Now)
	if err != nil {
		return Material{}, err
	}
	m := Material{CA: domain.CA{ID: in.ID, PublicURL: in.PublicURL, KeyURI: sealedScheme + ":" + keyID, CreatedAt: domain.Micro(in.Now)},
		Keys: []domain.SealedKey{sealed}}
	for _, c := range chain {
		m.CA.Chain = append(m.CA.Chain, c.Raw)
	}
	return m, nil
}

func keyFromPEM(text, password []byte) (crypto.Signer, error) {
	if len(text) == 0 || len(text) > maxImport {
		return nil, fault.InvalidField("key", "has %d bytes; give the CA's private key in PEM", len(text))
	}
	var opts []pemutil.Options
	if len(password) > 0 {
		opts = append(opts, pemutil.WithPassword(password))
	} else {
		// Without this an encrypted key would make the library ask at the terminal.
		opts = append(opts, pemutil.WithPasswordPrompt("", func(string) ([]byte, error) {
			return nil, fault.InvalidField("password", "the private key is encrypted; give its password")
		}))
	}
	// The causes are not kept: they may quote the file, which is a secret.
	key, err := pemutil.ParseKey(text, opts...)
	if err != nil {
		if fault.Is(err, fault.Invalid) {
			return nil, fault.InvalidField("password", "the private key is encrypted; give its password")
		}
		return nil, fault.InvalidField("key", "is no private key in PEM, or the password is wrong")
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fault.InvalidField("key", "is not a private key; give the CA's private key in PEM")
	}
	return signer, nil
}

func chainFromPEM(text []byte, now time.Time) ([]*x509.Certificate, error) {
	const field = "certificates"
	if len(text) > maxImport {
		return nil, fault.InvalidField(field, "has %d bytes; give the CA's certificate and those above it in PEM", len(text))
	}
	var chain []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fault.InvalidField(field, "holds a PEM block of type %s; only certificates belong there", quoted(block.Type))
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			e := fault.InvalidField(field, "certificate %d does not parse", len(chain)+1)
			e.Err = err
			return nil, e
		}
		if chain = append(chain, c); len(chain) > 8 {
			return nil, fault.InvalidField(field, "holds more than 8 certificates; give the CA's and those above it only")
		}
	}
	if len(chain) == 0 {
		return nil, fault.InvalidField(field, "holds no certificate in PEM")
	}
	for i, c := range chain {
		name := quoted(c.Subject.String())
		switch {
		case !c.BasicConstraintsValid || !c.IsCA:
			return nil, fault.InvalidField(field, "%s is not a CA's: its basic constraints lack CA", name)
		case c.KeyUsage&x509.KeyUsageCertSign == 0:
			return nil, fault.InvalidField(field, "%s may not sign certificates: its key usage lacks keyCertSign", name)
		case now.Before(c.NotBefore):
			return nil, fault.InvalidField(field, "%s is not valid before %s", name, c.NotBefore.Format(time.RFC3339))
		case !now.Before(c.NotAfter):
			return nil, fault.InvalidField(field, "%s expired at %s; have it renewed first", name, c.NotAfter.Format(time.RFC3339))
		case i+1 == len(chain):
			if c.CheckSignatureFrom(c) != nil {
				return nil, fault.InvalidField(field, "%s is the last and not a root; append its issuers up to and including the root", name)
			}
		default:
			if err := c.CheckSignatureFrom(chain[i+1]); err != nil {
				e := fault.InvalidField(field, "%s was not signed by the one after it, %s; order them from the CA to the root", name, quoted(chain[i+1].Subject.String()))
				e.Err = err
				return nil, e
			}
			// Counted from below: pathLen is how many CAs may stand between c and a leaf (RFC 5280 section 4.2.1.9).
		}
		if c.MaxPathLen >= 0 && (c.MaxPathLen > 0 || c.MaxPathLenZero) && c.MaxPathLen < i {
			return nil, fault.InvalidField(field, "%s allows %d CAs below it, here are %d (path length)", name, c.MaxPathLen, i)
		}
	}
	first := chain[0]
	switch {
	case first.KeyUsage&x509.KeyUsageCRLSign == 0:
		return nil, fault.InvalidField(field, "%s may not sign CRLs: its key usage lacks cRLSign, and nothing it issues could be revoked", quoted(first.Subject.String()))
	case len(first.SubjectKeyId) == 0:
		return nil, fault.InvalidField(field, "%s has no subject key identifier, which a CA must have (RFC 5280 section 4.2.1.2)", quoted(first.Subject.String()))
	case len(first.Subject.ToRDNSequence()) == 0:
		return nil, fault.InvalidField(field, "the CA's certificate has an empty subject (RFC 5280 section 4.1.2.4)")
	}
	if _, err := inspectKey(first.PublicKey); err != nil {
		return nil, fmt.Errorf("the CA's key: %w", err)
	}
	return chain, nil
}
