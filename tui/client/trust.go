package client

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
)

// DefaultPort is the operators' gRPC listener, where an address names none.
const DefaultPort = "8442"

// Address completes what a person types as a server: host, host:port or https://host:port.
func Address(s string) (string, error) {
	in := s
	s = strings.TrimSuffix(strings.TrimPrefix(s, "https://"), "/")
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port = strings.TrimSuffix(strings.TrimPrefix(s, "["), "]"), DefaultPort
		if strings.Contains(host, ":") && net.ParseIP(host) == nil {
			host = ""
		}
	}
	n, perr := net.LookupPort("tcp", port)
	if host == "" || perr != nil || n == 0 || strings.ContainsAny(host, "/@ \t\r\n?#") {
		return "", fmt.Errorf("%q is not the address of a server; give HOST:PORT, e.g. mesh.example.com:%s", in, DefaultPort)
	}
	return net.JoinHostPort(host, port), nil
}

// Fingerprint is the SHA-256 of a certificate in hex, as join tokens carry it.
func Fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// ParseFingerprint reads a SHA-256 fingerprint in hex; colons, blanks, capitals and the name of the hash may be there,
// as other tools print them.
func ParseFingerprint(s string) (string, error) {
	clean := strings.ToLower(strings.NewReplacer(":", "", " ", "").Replace(s))
	clean = strings.TrimPrefix(strings.TrimPrefix(strings.TrimPrefix(clean, "sha256fingerprint="), "sha-256"), "sha256")
	if b, err := hex.DecodeString(clean); err != nil || len(b) != sha256.Size {
		return "", fmt.Errorf("%q is not a SHA-256 fingerprint; give its 64 hexadecimal digits", s)
	}
	return clean, nil
}

// ParseCA reads the CA certificates of a PEM file.
func ParseCA(data []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, errors.New("the CA file holds a certificate that cannot be read; give the PEM of the mesh root")
		}
		if !c.IsCA {
			return nil, fmt.Errorf("the CA file holds a certificate that is no CA (%s); give the PEM of the mesh root", c.Subject)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New("the CA file holds no certificate; give the PEM of the mesh root")
	}
	return out, nil
}

// EncodeCA is the reverse of ParseCA for one certificate.
func EncodeCA(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}

// distrust is a server that is not the one meant. It is never retried into.
type distrust struct{ message, next string }

func (d *distrust) Error() string { return d.message + "; " + d.next }

// verify checks that the chain a server sent is valid for host and ends in one of roots.
func verify(address string, chain, roots []*x509.Certificate, now time.Time) error {
	if len(chain) == 0 {
		return &distrust{"the server at " + address + " sent no certificate", "check the address"}
	}
	pool, inter := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range roots {
		pool.AddCert(c)
	}
	for _, c := range chain[1:] {
		inter.AddCert(c)
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	_, err = chain[0].Verify(x509.VerifyOptions{
		Roots: pool, Intermediates: inter, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown):
		return &distrust{
			fmt.Sprintf("the server at %s is not of the CA that the profile trusts: its chain ends in %s", address, Fingerprint(chain[len(chain)-1])),
			"check the address, or log in again with certmesh login",
		}
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return &distrust{
			fmt.Sprintf("the certificate of the server at %s is valid from %s to %s only", address,
				chain[0].NotBefore.UTC().Format(time.RFC3339), chain[0].NotAfter.UTC().Format(time.RFC3339)),
			"check the clocks of both machines",
		}
	case err != nil:
		return &distrust{"the certificate of the server at " + address + " cannot be trusted: " + err.Error(), "check the address and the CA"}
	}
	if err := chain[0].VerifyHostname(host); err != nil {
		names := append([]string(nil), chain[0].DNSNames...)
		for _, ip := range chain[0].IPAddresses {
			names = append(names, ip.String())
		}
		return &distrust{
			fmt.Sprintf("the server's certificate is for %s, not for %s", strings.Join(names, ", "), host),
			"use one of those names, or add this one to the server's CERTMESH_NODE_NAMES",
		}
	}
	return nil
}

// Presented connects to a server, trusting nobody, and returns the certificates it shows. They prove nothing yet.
func Presented(ctx context.Context, address string) ([]*x509.Certificate, error) {
	d := tls.Dialer{Config: &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"},
		InsecureSkipVerify: true, //nolint:gosec // nothing is sent; the caller compares a fingerprint
	}}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, unreachable(address, err)
	}
	defer conn.Close()
	t, ok := conn.(*tls.Conn)
	if !ok {
		return nil, errors.New("the connection is not TLS")
	}
	chain := t.ConnectionState().PeerCertificates
	if len(chain) == 0 {
		return nil, &distrust{"the server at " + address + " sent no certificate", "check the address"}
	}
	return chain, nil
}

// Pin checks a presented chain against the fingerprint of a CA in it, and returns that CA. It is the one at the end, or,
// while a server's CA is being changed, the former one before it.
func Pin(address string, chain []*x509.Certificate, fingerprint string, now time.Time) (*x509.Certificate, error) {
	root := chain[len(chain)-1]
	for _, c := range chain[1:] {
		if Fingerprint(c) == fingerprint {
			root = c
		}
	}
	if got := Fingerprint(root); got != fingerprint {
		return nil, &distrust{
			fmt.Sprintf("the server at %s presents the CA %s, not %s", address, got, fingerprint),
			"check the address and the fingerprint; if both are right, somebody sits in between",
		}
	}
	if !root.IsCA {
		return nil, &distrust{"what the server at " + address + " presents under this fingerprint is no CA", "check the address"}
	}
	return root, verify(address, chain, []*x509.Certificate{root}, now)
}

// Successors are the roots in a presented chain whose subject and key root has signed, so that who trusts root may trust
// them: the CA that a server is being changed to.
func Successors(chain []*x509.Certificate, root *x509.Certificate, now time.Time) []*x509.Certificate {
	signed := func(next *x509.Certificate) bool {
		for _, c := range chain {
			if c.IsCA && bytes.Equal(c.RawSubject, next.RawSubject) && bytes.Equal(c.RawSubjectPublicKeyInfo, next.RawSubjectPublicKeyInfo) &&
				!now.Before(c.NotBefore) && now.Before(c.NotAfter) && c.CheckSignatureFrom(root) == nil {
				return true
			}
		}
		return false
	}
	var out []*x509.Certificate
	for _, c := range chain {
		if c.IsCA && !c.Equal(root) && c.CheckSignatureFrom(c) == nil && signed(c) {
			out = append(out, c)
		}
	}
	return out
}
