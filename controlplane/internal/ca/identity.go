package ca

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"regexp"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Kinds of identities in the mesh.
const (
	KindAgent = "agent"
	KindNode  = "node"
)

// DefaultIdentityTTL is the validity of identities.
const DefaultIdentityTTL = 7 * 24 * time.Hour

// IdentityRequest asks the mesh CA for a client certificate of an agent, or a client and server certificate of a node.
type IdentityRequest struct {
	PublicKey crypto.PublicKey // from CheckIdentityCSR
	Kind      string           // KindAgent or KindNode
	ID        string           // letters, digits, dash, dot, underscore; at most 128
	// DNS and IP are the names under which a node is reached; agents have none.
	DNS, IP []string
	// TTL is the validity; 0: DefaultIdentityTTL.
	TTL time.Duration
	Now time.Time
	// Serial is from NewSerial; nil draws one.
	Serial *big.Int
}

var (
	trustDomainForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,253}[a-z0-9])?$`)
	identityForm    = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$`)
	// spiffeForm is the only form of ids in this mesh; it leaves no room for escapes, ports, user names or queries.
	spiffeForm = regexp.MustCompile(`^spiffe://([a-z0-9._-]{1,255})/(agent|node)/([A-Za-z0-9_-][A-Za-z0-9._-]{0,127})$`)
)

// CheckTrustDomain refuses what cannot be the trust domain of SPIFFE ids (SPIFFE ID section 2.1).
func CheckTrustDomain(td string) error {
	if !trustDomainForm.MatchString(td) {
		return fault.InvalidField("mesh.trust_domain", "%s is not a trust domain: lower-case letters, digits, dots, dashes and underscores, at most 255", quoted(td))
	}
	return nil
}

// SPIFFEID is the id under which the mesh knows an agent or node.
func SPIFFEID(trustDomain, kind, id string) string {
	return "spiffe://" + trustDomain + "/" + kind + "/" + id
}

func identityKey(a domain.KeyAlgorithm) error {
	if a == domain.ECDSAP256 {
		return nil
	}
	return fault.New(fault.Rejected, "identities of the mesh have %s keys, not %s", domain.ECDSAP256, a)
}

// PrepareIdentity builds and lints an identity as Prepare does a leaf; Sign signs it. Revocation of identities is
// checked in the database by the nodes, so they name no CRL.
func (a *Authority) PrepareIdentity(r IdentityRequest) (Prepared, error) {
	if a.trustDomain == "" {
		return Prepared{}, fault.New(fault.Internal, "CA %q is not the mesh CA and does not sign identities", a.id)
	}
	pub, err := inspectKey(r.PublicKey)
	if err != nil {
		return Prepared{}, err
	}
	if err := identityKey(pub.kind.algorithm); err != nil {
		return Prepared{}, err
	}
	if !identityForm.MatchString(r.ID) {
		return Prepared{}, fault.InvalidField("id", "%s cannot be part of a SPIFFE id: letters, digits, dashes, dots and underscores, at most 128, no dot first", quoted(r.ID))
	}
	ekus := []domain.EKU{domain.EKUClientAuth}
	switch r.Kind {
	case KindAgent:
		if len(r.DNS)+len(r.IP) > 0 {
			return Prepared{}, fault.New(fault.Internal, "an agent's identity carries no host names")
		}
	case KindNode:
		ekus = append(ekus, domain.EKUServerAuth)
	default:
		return Prepared{}, fault.New(fault.Internal, "%s is not a kind of identity", quoted(r.Kind))
	}
	names, err := CheckNames(domain.Names{DNS: r.DNS, IP: r.IP, URI: []string{SPIFFEID(a.trustDomain, r.Kind, r.ID)}})
	if err != nil {
		return Prepared{}, err
	}
	t := &x509.Certificate{}
	if err := setUsage(t, ekus, pub.kind); err != nil {
		return Prepared{}, err
	}
	if err := setNames(t, names); err != nil {
		return Prepared{}, err
	}
	// Only for people who look at it; nothing reads the subject.
	t.Subject = pkix.Name{CommonName: shortened(r.ID, maxCommonName), OrganizationalUnit: []string{r.Kind}}
	ttl := r.TTL
	if ttl == 0 {
		ttl = DefaultIdentityTTL
	}
	if err := a.setValidity(t, r.Now, ttl, 0); err != nil {
		return Prepared{}, err
	}
	return a.prepare(t, pub, r.Serial)
}

func shortened(s string, most int) string {
	if len(s) > most {
		return s[:most]
	}
	return s
}

// ParseSPIFFE returns the identity in a certificate whose chain has been verified already. It is strict: a leaf with
// exactly one URI SAN of the form spiffe://<trust domain>/agent|node/<id> (SPIFFE X509-SVID section 2). Unauthorized
// otherwise.
func ParseSPIFFE(c *x509.Certificate) (trustDomain, kind, id string, err error) {
	switch {
	case c == nil:
		return "", "", "", fault.New(fault.Unauthorized, "no client certificate was shown")
	case c.IsCA, c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return "", "", "", fault.New(fault.Unauthorized, "the certificate is a CA's, not an identity")
	case len(c.URIs) != 1:
		return "", "", "", fault.New(fault.Unauthorized, "the certificate has %d URI names; an identity has exactly one", len(c.URIs))
	}
	m := spiffeForm.FindStringSubmatch(c.URIs[0].String())
	if m == nil {
		return "", "", "", fault.New(fault.Unauthorized, "%s is not an identity of this mesh: spiffe://<trust domain>/agent|node/<id>", quoted(c.URIs[0].String()))
	}
	return m[1], m[2], m[3], nil
}

// signingTrustDomain reads the trust domain from the mesh CA's own certificate.
func signingTrustDomain(c *x509.Certificate) (string, error) {
	if len(c.URIs) == 1 {
		td := c.URIs[0].Host
		if *c.URIs[0] == (url.URL{Scheme: "spiffe", Host: td}) && CheckTrustDomain(td) == nil {
			return td, nil
		}
	}
	return "", fault.New(fault.Internal, "the mesh CA's certificate names no trust domain")
}

// Bundle is a version of what agents and nodes trust one another by; a higher version replaces a lower one.
type Bundle struct {
	Version int64
	Roots   [][]byte // DER
}

// Pool returns the roots for TLS.
func (b Bundle) Pool() (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	roots, err := parseChain(b.Roots)
	if err != nil {
		return nil, err
	}
	for _, c := range roots {
		pool.AddCert(c)
	}
	return pool, nil
}

// Fingerprints are the SHA-256 of the roots in lower-case hex, as join tokens carry them.
func (b Bundle) Fingerprints() []string {
	out := make([]string, len(b.Roots))
	for i, r := range b.Roots {
		out[i] = domain.HashHex(r)
	}
	return out
}
