// Package identity tells which node stands at the other end of a TLS connection. The mesh knows nodes by their SPIFFE ids
// (spiffe://<trust domain>/node/<id>, SPIFFE X509-SVID section 2), so that an address may change and names need not match.
package identity

import (
	"crypto/tls"
	"crypto/x509"
	"strings"

	"github.com/certmesh/certmesh/protocol/fault"
)

// Node returns the id of the node whose certificate this is. Unauthorized: it is an agent's, of another trust domain, or no
// identity of a mesh at all.
func Node(c *x509.Certificate, trustDomain string) (string, error) {
	if len(c.URIs) != 1 {
		return "", fault.New(fault.Unauthorized, "the certificate is no node's: it has %d URI names instead of one SPIFFE id", len(c.URIs))
	}
	uri := c.URIs[0].String()
	rest, ok := strings.CutPrefix(uri, "spiffe://")
	domain, path, _ := strings.Cut(rest, "/")
	kind, id, _ := strings.Cut(path, "/")
	switch {
	case !ok || id == "" || strings.ContainsAny(id, "/?#%@"):
		return "", fault.New(fault.Unauthorized, "%q is not a node's SPIFFE id", uri)
	case domain != trustDomain:
		return "", fault.New(fault.Unauthorized, "the certificate is of trust domain %q, this cluster's is %q: set mesh.trust_domain the same on every node", domain, trustDomain)
	case kind != "node":
		return "", fault.New(fault.Unauthorized, "the certificate is not a node's but that of %s %s", kind, id)
	}
	return id, nil
}

// Client is the TLS configuration for calling a node. want is the id it must show; empty: any node of the trust domain, for
// addresses of which nothing more is known yet.
func Client(certificate func() *tls.Certificate, roots func() *x509.CertPool, trustDomain, want string, protocols ...string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: protocols,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if c := certificate(); c != nil {
				return c, nil
			}
			return nil, fault.New(fault.Internal, "this node has no identity yet")
		},
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection does it: nodes are known by their ids, not by host names
		VerifyConnection: func(s tls.ConnectionState) error {
			id, err := Verify(s, roots(), x509.ExtKeyUsageServerAuth, trustDomain)
			if err == nil && want != "" && id != want {
				err = fault.New(fault.Unauthorized, "node %s answers where node %s is expected", id, want)
			}
			return err
		},
	}
}

// Server is the TLS configuration of a listener for nodes alone.
func Server(certificate func() *tls.Certificate, roots func() *x509.CertPool, trustDomain string, protocols ...string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             protocols,
		ClientAuth:             tls.RequireAnyClientCert, // verified below, against the roots of this moment
		SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if c := certificate(); c != nil {
				return c, nil
			}
			return nil, fault.New(fault.Internal, "this node has no identity yet")
		},
		VerifyConnection: func(s tls.ConnectionState) error {
			_, err := Verify(s, roots(), x509.ExtKeyUsageClientAuth, trustDomain)
			return err
		},
	}
}

// Verify checks the chain that the other end has shown and returns the node's id.
func Verify(s tls.ConnectionState, roots *x509.CertPool, usage x509.ExtKeyUsage, trustDomain string) (string, error) {
	if len(s.PeerCertificates) == 0 {
		return "", fault.New(fault.Unauthorized, "the other end has shown no certificate")
	}
	if roots == nil {
		roots = x509.NewCertPool() // nil would mean the system's
	}
	intermediates := x509.NewCertPool()
	for _, c := range s.PeerCertificates[1:] {
		intermediates.AddCert(c)
	}
	leaf := s.PeerCertificates[0]
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
		return "", fault.Wrap(fault.Unauthorized, err, "the other node's certificate is not good")
	}
	return Node(leaf, trustDomain)
}
