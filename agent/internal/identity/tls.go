package identity

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"regexp"
	"sync"
	"time"

	"github.com/certmesh/certmesh/protocol/fault"
)

var nodePath = regexp.MustCompile(`^/node/[A-Za-z0-9._-]{1,128}$`)

// verifyServer checks that chain leads to one of roots for server authentication and that its leaf is a node of the
// trust domain. The host name is not checked: nodes are known by their SPIFFE id, and addresses change. An empty domain
// accepts any.
func verifyServer(chain, roots []*x509.Certificate, domain string, now time.Time) error {
	if len(chain) == 0 {
		return fault.New(fault.Rejected, "the server sent no certificate")
	}
	inter := x509.NewCertPool()
	for _, c := range chain[1:] {
		inter.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: pool(roots), Intermediates: inter, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
		return fault.Wrap(fault.Rejected, err, "the server's certificate is not of the mesh CA")
	}
	got, path, err := spiffe(chain[0])
	if err != nil {
		return err
	}
	if !nodePath.MatchString(path) {
		return fault.New(fault.Rejected, "the server's certificate names no control-plane node")
	}
	if domain != "" && got != domain {
		return fault.New(fault.Rejected, "the server belongs to trust domain %q, not %q", got, domain)
	}
	return nil
}

// serverConfig returns a TLS 1.3 client configuration whose only judge is check.
func serverConfig(check func(tls.ConnectionState) error) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// The default verification would ask for a host name; VerifyConnection replaces it and runs on every handshake.
		InsecureSkipVerify: true, //nolint:gosec // see VerifyConnection
		VerifyConnection:   check,
	}
}

// Pin verifies a server by the CA fingerprint of a join token and remembers what it saw.
type Pin struct {
	mu     sync.Mutex
	peer   []*x509.Certificate
	domain string
	err    error
}

// Peer returns the chain of the server that was accepted last.
func (p *Pin) Peer() []*x509.Certificate {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.peer
}

// TrustDomain returns the trust domain of the server that was accepted last.
func (p *Pin) TrustDomain() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.domain
}

// Err returns why the last server was refused; nil if none was.
func (p *Pin) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Pinned returns the configuration for Enroll: no client certificate, the server pinned by the token's fingerprint.
func (m *Manager) Pinned(t Token) (*tls.Config, *Pin) {
	p := &Pin{}
	return serverConfig(func(cs tls.ConnectionState) error {
		err := verifyPinned(cs.PeerCertificates, t, m.now())
		p.mu.Lock()
		defer p.mu.Unlock()
		p.err = err
		if err == nil {
			p.peer = cs.PeerCertificates
			p.domain, _, err = spiffe(cs.PeerCertificates[0])
		}
		return err
	}), p
}

func verifyPinned(chain []*x509.Certificate, t Token, now time.Time) error {
	for _, c := range chain {
		if sameRoot(c, t.CA) {
			return verifyServer(chain, []*x509.Certificate{c}, "", now)
		}
	}
	return fault.New(fault.Rejected, "the server does not present the CA that the join token names; check the address, or ask for a new token")
}

// Mutual returns the configuration for Connect and Report with the current identity, which it also returns.
func (m *Manager) Mutual() (*tls.Config, *Identity) {
	m.mu.Lock()
	i := m.current
	m.mu.Unlock()
	cfg := serverConfig(m.judge)
	// A function rather than Certificates: the certificate is sent even if its issuer is not in the server's list.
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &i.cert, nil }
	return cfg, i
}

// Anonymous returns the configuration for Reidentify: the server is judged by the trust bundle, no client certificate.
func (m *Manager) Anonymous() *tls.Config { return serverConfig(m.judge) }

func (m *Manager) judge(cs tls.ConnectionState) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := verifyServer(cs.PeerCertificates, m.roots, m.current.TrustDomain, m.now()); err != nil {
		return err
	}
	m.peer = cs.PeerCertificates
	return nil
}

// Certificate returns the identity's certificate in DER.
func (i *Identity) Certificate() []byte { return i.cert.Certificate[0] }

// Prove signs what Reidentify wants: proof that this side of the TLS connection holds the identity's key.
func (i *Identity) Prove(cs tls.ConnectionState, csr []byte) ([]byte, error) {
	if !cs.HandshakeComplete {
		return nil, fault.New(fault.Retryable, "the TLS connection ended before the proof was made")
	}
	exported, err := cs.ExportKeyingMaterial("EXPORTER-certmesh-reidentify", nil, 32)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the TLS connection yields no exporter value")
	}
	digest := sha256.Sum256(ProofMessage(exported, csr))
	sig, err := ecdsa.SignASN1(rand.Reader, i.key, digest[:])
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the proof cannot be signed")
	}
	return sig, nil
}

// ProofMessage is what a Reidentify proof is a signature over.
func ProofMessage(exported, csr []byte) []byte {
	h := sha256.Sum256(csr)
	msg := append([]byte("certmesh reidentify v1\x00"), exported...)
	return append(msg, h[:]...)
}
