// Package identity keeps who the agent is: its key and certificate from the mesh CA, and the roots it accepts servers
// from. It makes the key on the host, renews in two phases (the next key waits beside the current one, the former
// identity stays until the new one has worked once) and never sends or logs a private key.
//
// Files, all 0600, in the data directory's "identity" folder:
//
//	identity.pem        the identity in use: key, then certificate and intermediates
//	identity-old.pem    the one before, until identity.pem has worked
//	identity-next.key   the key of an identity that was asked for and not yet received
//	enrol.json          the join token of an enrolment whose answer is outstanding
//	trust-bundle.pb     the newest trust bundle
package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io/fs"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/agent/internal/durable"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Grace is how long after its end an identity can still be renewed by Reidentify.
const Grace = 30 * 24 * time.Hour

const (
	fileCurrent = "identity.pem"
	fileOld     = "identity-old.pem"
	fileNext    = "identity-next.key"
	fileEnrol   = "enrol.json"
	fileBundle  = "trust-bundle.pb"
)

// Identity is one certificate of the mesh CA with its key. It is immutable.
type Identity struct {
	AgentID     string
	TrustDomain string
	Serial      string
	NotBefore   time.Time
	NotAfter    time.Time

	key  *ecdsa.PrivateKey
	cert tls.Certificate
}

// RenewAt is when the identity should be renewed: half of its life, spread by up to a twentieth so that agents enrolled
// together do not renew together. It is the same after every restart.
func (i *Identity) RenewAt() time.Time {
	life := i.NotAfter.Sub(i.NotBefore)
	return i.NotBefore.Add(life/2 + time.Duration(float64(life)/20*i.fraction()))
}

// fraction in [0, 1) is the same for one identity always, and spreads what is done with many.
func (i *Identity) fraction() float64 {
	h := sha256.Sum256(i.cert.Leaf.Raw)
	return float64(binary.BigEndian.Uint16(h[:])) / 65536
}

// Standing says what an identity is good for at a moment.
type Standing int

const (
	// Missing: there is none; enrol.
	Missing Standing = iota
	// Good: connect with it.
	Good
	// Lapsed: expired within Grace; renew by Reidentify.
	Lapsed
	// Lost: expired longer ago than Grace; enrol again.
	Lost
)

// StandingAt judges i, which may be nil, at now.
func (i *Identity) StandingAt(now time.Time) Standing {
	switch {
	case i == nil:
		return Missing
	case now.Before(i.NotAfter):
		return Good
	case now.Before(i.NotAfter.Add(Grace)):
		return Lapsed
	default:
		return Lost
	}
}

// Manager owns the identity and the trust bundle. It is safe for concurrent use.
type Manager struct {
	files durable.Store
	now   func() time.Time
	log   *slog.Logger

	mu      sync.Mutex
	current *Identity
	old     *Identity
	next    *ecdsa.PrivateKey
	bundle  *agentpb.TrustBundle
	roots   []*x509.Certificate
	// bundleAt is when this process opened the bundle or took it into force.
	bundleAt time.Time
	// peer is the chain of the last server that was accepted; a trust bundle that would lock it out is refused.
	peer []*x509.Certificate
}

// Open reads what is on disk. Damaged files are an error that names them: a guess would be worse.
func Open(files durable.Store, now func() time.Time, log *slog.Logger) (*Manager, error) {
	m := &Manager{files: files, now: now, log: log}
	var err error
	if m.current, err = m.read(fileCurrent); err != nil {
		return nil, err
	}
	if m.old, err = m.read(fileOld); err != nil {
		log.Warn("former identity is unreadable and ignored", "err", err)
		m.old = nil
	}
	data, err := files.Read(fileNext)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fault.Wrap(fault.Retryable, err, "the key of the next identity cannot be read")
	default:
		if m.next, err = decodeKey(data); err != nil {
			return nil, fault.Wrap(fault.Internal, err, "%s is damaged; remove it and start again", fileNext)
		}
	}
	if m.next != nil && m.current != nil && m.next.Equal(m.current.key) {
		// The process ended between the promotion and this removal.
		m.next = nil
		if err := files.Remove(fileNext); err != nil {
			return nil, err
		}
	}
	data, err = files.Read(fileBundle)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if m.current != nil {
			return nil, fault.New(fault.Internal, "%s is missing beside the identity; remove %s and enrol again", fileBundle, fileCurrent)
		}
	case err != nil:
		return nil, fault.Wrap(fault.Retryable, err, "the trust bundle cannot be read")
	default:
		b := &agentpb.TrustBundle{}
		if err := proto.Unmarshal(data, b); err != nil {
			return nil, fault.Wrap(fault.Internal, err, "%s is damaged; remove the identity folder and enrol again", fileBundle)
		}
		if m.roots, err = parseRoots(b); err != nil {
			return nil, fault.Wrap(fault.Internal, err, "%s is damaged; remove the identity folder and enrol again", fileBundle)
		}
		m.bundle, m.bundleAt = b, now()
	}
	return m, nil
}

func (m *Manager) read(name string) (*Identity, error) {
	data, err := m.files.Read(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(fault.Retryable, err, "%s cannot be read", name)
	}
	i, err := decode(data)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "%s is damaged; restore it, or remove it and enrol again", name)
	}
	return i, nil
}

// Current returns the identity in use; nil before enrolment.
func (m *Manager) Current() *Identity {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.current
}

// Bundle returns the version of the trust bundle held; 0 for none.
func (m *Manager) Bundle() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.bundle.GetVersion()
}

// NextCSR returns a PKCS#10 for the next identity. The key is made and persisted at the first call and the same one is
// used until an identity for it arrives, so that a lost answer can be asked for again.
func (m *Manager) NextCSR() ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.next == nil {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, fault.Wrap(fault.Internal, err, "the identity key could not be made")
		}
		data, err := encodeKey(key)
		if err != nil {
			return nil, err
		}
		if err := m.files.Write(fileNext, data); err != nil {
			return nil, err
		}
		m.next = key
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "certmesh agent"}}, m.next)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the identity request could not be signed")
	}
	return csr, nil
}

// SaveToken persists the token before Enroll is called, so that an enrolment whose answer was lost goes on after a
// restart without the flag.
func (m *Manager) SaveToken(t Token) error {
	data, err := json.Marshal(map[string]string{"join_token": t.raw})
	if err != nil {
		return fault.Wrap(fault.Internal, err, "the join token cannot be encoded")
	}
	return m.files.Write(fileEnrol, data)
}

// SavedToken returns the token of an enrolment whose answer is outstanding.
func (m *Manager) SavedToken() (Token, bool) {
	data, err := m.files.Read(fileEnrol)
	if err != nil {
		return Token{}, false
	}
	var v map[string]string
	if json.Unmarshal(data, &v) != nil {
		return Token{}, false
	}
	t, err := ParseToken(v["join_token"])
	return t, err == nil
}

// Enrolled installs the answer of Enroll. pin is what the connection it came over was verified with.
func (m *Manager) Enrolled(resp *agentpb.EnrollResponse, pin *Pin) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	roots, err := parseRoots(resp.GetTrustBundle())
	if err != nil {
		return err
	}
	if td := pin.TrustDomain(); td != resp.GetTrustDomain() {
		return fault.New(fault.Rejected, "the server says trust domain %q but its own certificate says %q", clip(resp.GetTrustDomain()), td)
	}
	if err := verifyServer(pin.Peer(), roots, resp.GetTrustDomain(), m.now()); err != nil {
		return fault.Wrap(fault.Rejected, err, "the trust bundle that the server sent does not contain its own CA")
	}
	if err := m.installLocked(resp.GetChain(), roots, resp.GetAgentId(), resp.GetTrustDomain(), resp.GetTrustBundle()); err != nil {
		return err
	}
	return m.files.Remove(fileEnrol)
}

// Issued installs a renewed identity from the stream.
func (m *Manager) Issued(chain [][]byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.installLocked(chain, m.roots, m.current.AgentID, m.current.TrustDomain, nil)
}

// Reidentified installs the answer of Reidentify.
func (m *Manager) Reidentified(resp *agentpb.ReidentifyResponse) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	roots, bundle := m.roots, (*agentpb.TrustBundle)(nil)
	if b := resp.GetTrustBundle(); b.GetVersion() > m.bundle.GetVersion() {
		r, err := parseRoots(b)
		if err != nil {
			return err
		}
		if err := m.verifiesPeerLocked(b.GetVersion(), r, m.current.TrustDomain); err != nil {
			return err
		}
		roots, bundle = r, b
	}
	return m.installLocked(resp.GetChain(), roots, m.current.AgentID, m.current.TrustDomain, bundle)
}

var agentID = regexp.MustCompile(`^agt_[0-9a-f]{32}$`)

// installLocked checks everything before it writes anything. The bundle is written first: identity.pem is what says
// that the agent is enrolled.
func (m *Manager) installLocked(chain [][]byte, roots []*x509.Certificate, id, domain string, bundle *agentpb.TrustBundle) error {
	if m.next == nil {
		return fault.New(fault.Conflict, "an identity arrived that was not asked for")
	}
	if !agentID.MatchString(id) {
		return fault.New(fault.Rejected, "the server sent %q as agent id", clip(id))
	}
	data, err := encodeKey(m.next)
	if err != nil {
		return err
	}
	for _, der := range chain {
		data = append(data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	i, err := decode(data)
	if err != nil {
		return fault.Wrap(fault.Rejected, err, "the server sent an unusable identity")
	}
	if i.AgentID != id || i.TrustDomain != domain {
		return fault.New(fault.Rejected, "the server sent an identity of another agent")
	}
	inter := x509.NewCertPool()
	for _, der := range chain[1:] {
		if c, err := x509.ParseCertificate(der); err == nil {
			inter.AddCert(c)
		}
	}
	if _, err := i.cert.Leaf.Verify(x509.VerifyOptions{Roots: pool(roots), Intermediates: inter, CurrentTime: m.now(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return fault.Wrap(fault.Rejected, err, "the server sent an identity that its trust bundle does not verify; check the clocks of both")
	}
	if bundle != nil {
		if err := m.writeBundleLocked(bundle, roots); err != nil {
			return err
		}
	}
	if m.current != nil {
		cur, err := m.files.Read(fileCurrent)
		if err != nil {
			return fault.Wrap(fault.Retryable, err, "%s cannot be read", fileCurrent)
		}
		if err := m.files.Write(fileOld, cur); err != nil {
			return err
		}
		m.old = m.current
	}
	if err := m.files.Write(fileCurrent, data); err != nil {
		return err
	}
	m.current, m.next = i, nil
	return m.files.Remove(fileNext)
}

// Worked is called after the current identity was accepted by a server: the former one is deleted.
func (m *Manager) Worked(used *Identity) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.old == nil || used != m.current {
		return
	}
	if err := m.files.Remove(fileOld); err != nil {
		m.log.Warn("former identity cannot be removed", "err", err)
		return
	}
	m.old = nil
}

// Refused is called when servers refuse the identity used. If the former one is still good it is put back, and Refused
// says true.
func (m *Manager) Refused(used *Identity) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.old == nil || used != m.current || m.old.StandingAt(m.now()) != Good {
		return false
	}
	data, err := m.files.Read(fileOld)
	if err == nil {
		err = m.files.Write(fileCurrent, data)
	}
	if err != nil {
		m.log.Warn("former identity cannot be put back", "err", err)
		return false
	}
	m.current, m.old = m.old, nil
	if err := m.files.Remove(fileOld); err != nil {
		m.log.Warn("former identity's copy cannot be removed", "err", err)
	}
	return true
}

// ApplyBundle takes a newer trust bundle into force. A bundle that does not verify the server it came from is refused:
// it would lock the agent out.
func (m *Manager) ApplyBundle(b *agentpb.TrustBundle) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if b.GetVersion() <= m.bundle.GetVersion() {
		return nil
	}
	roots, err := parseRoots(b)
	if err != nil {
		return err
	}
	if m.current != nil {
		if err := m.verifiesPeerLocked(b.GetVersion(), roots, m.current.TrustDomain); err != nil {
			return err
		}
	}
	return m.writeBundleLocked(b, roots)
}

// verifiesPeerLocked refuses roots that would lock out the server that sent them.
func (m *Manager) verifiesPeerLocked(version int64, roots []*x509.Certificate, domain string) error {
	if len(m.peer) == 0 {
		return nil
	}
	if err := verifyServer(m.peer, roots, domain, m.now()); err != nil {
		return fault.Wrap(fault.Conflict, err, "trust bundle version %d does not verify the server that sent it", version)
	}
	return nil
}

func (m *Manager) writeBundleLocked(b *agentpb.TrustBundle, roots []*x509.Certificate) error {
	data, err := proto.Marshal(b)
	if err != nil {
		return fault.Wrap(fault.Internal, err, "the trust bundle cannot be encoded")
	}
	if err := m.files.Write(fileBundle, data); err != nil {
		return err
	}
	m.bundle, m.roots, m.bundleAt = proto.CloneOf(b), roots, m.now()
	return nil
}

// maxRoots bounds a trust bundle; a roll-over needs two.
const maxRoots = 32

func parseRoots(b *agentpb.TrustBundle) ([]*x509.Certificate, error) {
	if n := len(b.GetRoots()); n == 0 || n > maxRoots {
		return nil, fault.InvalidField("trust_bundle.roots", "holds %d certificates; 1 to %d are expected", n, maxRoots)
	}
	var roots []*x509.Certificate
	for _, der := range b.GetRoots() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fault.InvalidField("trust_bundle.roots", "a certificate cannot be decoded")
		}
		if !c.IsCA || !c.BasicConstraintsValid {
			return nil, fault.InvalidField("trust_bundle.roots", "a certificate is not a CA's")
		}
		roots = append(roots, c)
	}
	return roots, nil
}

func pool(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the identity key cannot be encoded")
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func decodeKey(data []byte) (*ecdsa.PrivateKey, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fault.New(fault.Internal, "no PKCS#8 key in PEM")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the key cannot be decoded")
	}
	ec, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fault.New(fault.Internal, "the key is not an ECDSA key")
	}
	return ec, nil
}

// decode reads key and chain and checks that they belong together and name an agent.
func decode(data []byte) (*Identity, error) {
	key, err := decodeKey(data)
	if err != nil {
		return nil, err
	}
	i := &Identity{key: key}
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type == "CERTIFICATE" {
			i.cert.Certificate = append(i.cert.Certificate, block.Bytes)
		}
	}
	if len(i.cert.Certificate) == 0 {
		return nil, fault.New(fault.Internal, "no certificate")
	}
	leaf, err := x509.ParseCertificate(i.cert.Certificate[0])
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the certificate cannot be decoded")
	}
	pub, ok := leaf.PublicKey.(*ecdsa.PublicKey)
	if !ok || !pub.Equal(key.Public()) {
		return nil, fault.New(fault.Internal, "the certificate is for another key")
	}
	domain, path, err := spiffe(leaf)
	if err != nil {
		return nil, err
	}
	id, ok := strings.CutPrefix(path, "/agent/")
	if !ok || !agentID.MatchString(id) {
		return nil, fault.New(fault.Internal, "the certificate names no agent")
	}
	i.cert.PrivateKey, i.cert.Leaf = crypto.Signer(key), leaf
	i.AgentID, i.TrustDomain = id, domain
	i.Serial, i.NotBefore, i.NotAfter = leaf.SerialNumber.Text(16), leaf.NotBefore, leaf.NotAfter
	return i, nil
}

var spiffeID = regexp.MustCompile(`^spiffe://([a-z0-9._-]{1,255})(/[A-Za-z0-9/._-]{1,512})$`)

// spiffe returns the trust domain and path of a certificate's only URI SAN (X509-SVID section 2: exactly one).
func spiffe(c *x509.Certificate) (domain, path string, err error) {
	if len(c.URIs) != 1 {
		return "", "", fault.New(fault.Rejected, "the certificate has %d URI names where a SPIFFE id is expected", len(c.URIs))
	}
	m := spiffeID.FindStringSubmatch(c.URIs[0].String())
	if m == nil {
		return "", "", fault.New(fault.Rejected, "the certificate's URI name is not a SPIFFE id")
	}
	return m[1], m[2], nil
}

// clip bounds text of the other side before it is shown.
func clip(s string) string {
	const most = 200
	s = strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f {
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, ""))
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// sameRoot says whether der is the certificate with the fingerprint.
func sameRoot(c *x509.Certificate, fp [sha256.Size]byte) bool {
	got := sha256.Sum256(c.Raw)
	return bytes.Equal(got[:], fp[:])
}
