package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"io"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Request asks for a leaf of an issuing CA.
type Request struct {
	PublicKey crypto.PublicKey
	Names     domain.Names
	Profile   domain.Profile
	Now       time.Time
	// Serial is from NewSerial; nil draws one.
	Serial *big.Int
	// Shard is the CRL that will list the certificate if it is revoked, 0 or more.
	Shard int
}

// Prepared is a linted certificate that lacks its signature. Only a Prepare method makes one.
type Prepared struct {
	tbs                 []byte
	serial, spki        string
	notBefore, notAfter time.Time
}

// TBS is the to-be-signed bytes in DER; record them, then hand them to Sign. They must not be changed.
func (p Prepared) TBS() []byte { return p.tbs }

// Serial is the serial number in lower-case hex without leading zeros.
func (p Prepared) Serial() string { return p.serial }

// SPKI is the SHA-256 of the SubjectPublicKeyInfo in lower-case hex.
func (p Prepared) SPKI() string { return p.spki }

// NotBefore is in UTC, whole seconds.
func (p Prepared) NotBefore() time.Time { return p.notBefore }

// NotAfter is in UTC, whole seconds; the certificate is valid up to and including it.
func (p Prepared) NotAfter() time.Time { return p.notAfter }

// backdate is how far notBefore lies before the present, for clocks that are behind; a tenth of the validity at most.
const backdate = time.Minute

// Prepare builds and lints the certificate for r without using the CA's key. Invalid: the names or the profile are
// wrong. Rejected: the key is not allowed, a lint failed, or the CA cannot issue at r.Now.
func (a *Authority) Prepare(r Request) (Prepared, error) {
	if a.trustDomain != "" {
		return Prepared{}, fault.New(fault.Internal, "the mesh CA signs identities only")
	}
	names, err := CheckNames(r.Names)
	if err != nil {
		return Prepared{}, err
	}
	pub, err := inspectKey(r.PublicKey)
	if err != nil {
		return Prepared{}, err
	}
	if err := allowed(pub.kind.algorithm, r.Profile); err != nil {
		return Prepared{}, err
	}
	if r.Shard < 0 {
		return Prepared{}, fault.New(fault.Internal, "CRL shards are numbered from 0")
	}
	t := &x509.Certificate{}
	if err := setUsage(t, r.Profile.EKUs, pub.kind); err != nil {
		return Prepared{}, err
	}
	if err := setNames(t, names); err != nil {
		return Prepared{}, err
	}
	if err := a.setValidity(t, r.Now, r.Profile.TTL, r.Profile.MaxTTL); err != nil {
		return Prepared{}, err
	}
	if u := a.CRLURL(r.Shard); u != "" {
		t.CRLDistributionPoints = []string{u}
		t.IssuingCertificateURL = []string{a.CAURL()}
	}
	return a.prepare(t, pub, r.Serial)
}

// prepare finishes a leaf's template, captures its to-be-signed bytes and lints them.
func (a *Authority) prepare(t *x509.Certificate, pub publicKey, serial *big.Int) (Prepared, error) {
	if serial == nil {
		var err error
		if serial, err = NewSerial(rand.Reader); err != nil {
			return Prepared{}, err
		}
	}
	if err := checkSerial(serial); err != nil {
		return Prepared{}, err
	}
	t.SerialNumber = serial
	t.SubjectKeyId = pub.skid
	t.BasicConstraintsValid, t.IsCA = true, false
	if a.shadow != nil {
		if err := a.shadow.check(t, pub); err != nil {
			return Prepared{}, err
		}
	}
	tbs, err := lintedTBS(t, a.chain[0], pub.key, a.scheme, a.lint)
	if err != nil {
		return Prepared{}, err
	}
	a.linted.put(sha256.Sum256(tbs))
	return Prepared{tbs: tbs, serial: SerialText(serial), spki: domain.HashHex(pub.spki), notBefore: t.NotBefore, notAfter: t.NotAfter}, nil
}

// lintedTBS builds the to-be-signed bytes of template under parent, whose key signs by s, and lints a copy of the
// certificate that carries a placeholder for its signature.
func lintedTBS(template, parent *x509.Certificate, pub crypto.PublicKey, s scheme, l *linter) ([]byte, error) {
	parentKey := parent.PublicKey
	selfSigned := parentKey == nil
	if selfSigned {
		parentKey = pub // parent is the template: self-signed
	}
	template.SignatureAlgorithm = s.x509
	recorder := &recorder{public: parentKey}
	_, err := x509.CreateCertificate(rand.Reader, template, parent, pub, recorder)
	if !errors.Is(err, errRecorded) {
		return nil, fault.Wrap(fault.Rejected, err, "build the certificate")
	}
	identifier, err := s.identifier()
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "encode the signature algorithm")
	}
	der, err := assemble(recorder.message, identifier, s.placeholder(parentKey))
	if err != nil {
		return nil, err
	}
	if err := l.checkCertificate(der, selfSigned); err != nil {
		return nil, err
	}
	return recorder.message, nil
}

// errRecorded ends x509.CreateCertificate once it has handed over what is to be signed.
var errRecorded = errors.New("recorded, not signed")

// recorder is a crypto.MessageSigner without a private key: it keeps the message and refuses to sign it.
type recorder struct {
	public  crypto.PublicKey
	message []byte
}

func (r *recorder) Public() crypto.PublicKey { return r.public }

func (r *recorder) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("a digest cannot be recorded")
}

func (r *recorder) SignMessage(_ io.Reader, msg []byte, _ crypto.SignerOpts) ([]byte, error) {
	r.message = slices.Clone(msg)
	return nil, errRecorded
}

// usage is what an extended key usage means for a certificate.
type usage struct {
	eku x509.ExtKeyUsage
	key x509.KeyUsage
	// transport: RSA keys get keyEncipherment too.
	transport bool
}

// usages adapts key usage to purpose. RFC 5280 section 4.2.1.12 lists what is consistent: clients sign, they decrypt
// nothing, so that only what serves TLS may transport keys.
var usages = map[domain.EKU]usage{
	domain.EKUServerAuth:      {x509.ExtKeyUsageServerAuth, x509.KeyUsageDigitalSignature, true},
	domain.EKUClientAuth:      {x509.ExtKeyUsageClientAuth, x509.KeyUsageDigitalSignature, false},
	domain.EKUCodeSigning:     {x509.ExtKeyUsageCodeSigning, x509.KeyUsageDigitalSignature, false},
	domain.EKUEmailProtection: {x509.ExtKeyUsageEmailProtection, x509.KeyUsageDigitalSignature | x509.KeyUsageContentCommitment, false},
	domain.EKUTimeStamping:    {x509.ExtKeyUsageTimeStamping, x509.KeyUsageDigitalSignature | x509.KeyUsageContentCommitment, false},
}

func setUsage(t *x509.Certificate, ekus []domain.EKU, kind keyType) error {
	if len(ekus) == 0 {
		return fault.InvalidField("profile.ekus", "a profile needs at least one extended key usage, e.g. serverAuth")
	}
	for _, e := range ekus {
		u, ok := usages[e]
		if !ok {
			return fault.InvalidField("profile.ekus", "%s is not an extended key usage; use serverAuth, clientAuth, codeSigning, emailProtection or timeStamping", quoted(string(e)))
		}
		if slices.Contains(t.ExtKeyUsage, u.eku) {
			continue
		}
		t.ExtKeyUsage = append(t.ExtKeyUsage, u.eku)
		t.KeyUsage |= u.key
		if u.transport && kind.keyEncipherment {
			t.KeyUsage |= x509.KeyUsageKeyEncipherment
		}
	}
	if slices.Contains(t.ExtKeyUsage, x509.ExtKeyUsageTimeStamping) {
		// RFC 3161 section 2.3: the only usage, and critical.
		if len(t.ExtKeyUsage) > 1 {
			return fault.InvalidField("profile.ekus", "timeStamping excludes every other usage (RFC 3161 section 2.3); use a profile of its own")
		}
		value, err := asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 8}})
		if err != nil {
			return fault.Wrap(fault.Internal, err, "encode timeStamping")
		}
		t.ExtraExtensions = append(t.ExtraExtensions, pkix.Extension{Id: oidExtKeyUsage, Critical: true, Value: value})
	}
	return nil
}

// setNames fills subject and SANs from names that CheckNames returned.
func setNames(t *x509.Certificate, n domain.Names) error {
	t.Subject = pkix.Name{CommonName: n.CommonName}
	t.DNSNames, t.EmailAddresses = n.DNS, n.Email
	for _, s := range n.IP {
		ip, err := netip.ParseAddr(s)
		if err != nil {
			return fault.InvalidField("names.ip", "%s is not an IP address", quoted(s))
		}
		t.IPAddresses = append(t.IPAddresses, net.IP(ip.AsSlice()))
	}
	for _, s := range n.URI {
		u, err := url.Parse(s)
		if err != nil {
			return fault.InvalidField("names.uri", "%s is not a URI", quoted(s))
		}
		t.URIs = append(t.URIs, u)
	}
	return nil
}

// setValidity sets the period: from now, backdated, for ttl, at most limit (0: no limit) and never beyond the CA's own.
func (a *Authority) setValidity(t *x509.Certificate, now time.Time, ttl, limit time.Duration) error {
	if limit > 0 {
		ttl = min(ttl, limit)
	}
	issuer := a.chain[0]
	switch {
	case ttl < time.Minute:
		return fault.InvalidField("profile.ttl", "a validity of %s is too short; give a minute or more", ttl)
	case now.Before(issuer.NotBefore):
		return fault.New(fault.Rejected, "the CA %q is not valid before %s; check this node's clock", a.id, issuer.NotBefore.Format(time.RFC3339))
	case !now.Before(a.notAfter):
		return fault.New(fault.Rejected, "the CA %q expired at %s; create its successor and move its certificates there", a.id, a.notAfter.Format(time.RFC3339))
	}
	now = now.UTC().Truncate(time.Second) // RFC 5280 section 4.1.2.5: no fractions
	t.NotBefore = now.Add(-min(backdate, ttl/10)).Truncate(time.Second)
	if t.NotBefore.Before(issuer.NotBefore) {
		t.NotBefore = issuer.NotBefore.UTC()
	}
	t.NotAfter = now.Add(ttl)
	if limit > 0 {
		// The period includes both its ends (RFC 5280 section 4.1.2.5).
		if last := t.NotBefore.Add(limit - time.Second).Truncate(time.Second); last.Before(t.NotAfter) {
			t.NotAfter = last
		}
	}
	if a.notAfter.Before(t.NotAfter) {
		t.NotAfter = a.notAfter.UTC()
	}
	return nil
}
