package target

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	// DefaultVerifyTimeout is how long ProbeTLS asks when it is not told.
	DefaultVerifyTimeout = 5 * time.Second
	// A reloading server answers with the old certificate for some milliseconds, a large one for seconds.
	probeFirst = 2 * time.Millisecond
	probeLast  = 500 * time.Millisecond
	// probeAttempt bounds one connection, so that one lost packet does not use up the whole timeout.
	probeAttempt = 2 * time.Second
	// verifyPatience is the contract's bound on what a connector retries by itself.
	verifyPatience = 2 * time.Second
)

// ProbeOptions of ProbeTLS.
type ProbeOptions struct {
	// Timeout of the whole probe; 0 is DefaultVerifyTimeout. The context may end it sooner.
	Timeout time.Duration
	// Now is the clock of Proof.At.
	Now func() time.Time
}

// ProbeTLS connects to address (host:port) until a TLS handshake shows the leaf want, and returns what was seen. It asks
// at least once and then at intervals of a quarter of what it has waited until its timeout, because servers reload asynchronously: an old
// worker may still answer after a successful reload. serverName is sent as SNI; empty sends none.
//
// The chain is not validated: the leaf's fingerprint says exactly what is to be served, whoever signed it.
//
// Errors: Invalid for a malformed address; Conflict, naming what was served instead; Retryable if nothing could be
// reached or ctx ended.
func ProbeTLS(ctx context.Context, address, serverName string, want Fingerprint, o ProbeOptions) (Proof, error) {
	if msg := addressProblem(address); msg != "" {
		return Proof{}, fault.InvalidField("verify_address", "%s", msg)
	}
	if o.Timeout <= 0 {
		o.Timeout = DefaultVerifyTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	// The last answer says more than a connection cut by the timeout.
	var last error
	for waited, wait := time.Duration(0), probeFirst; ; waited, wait = waited+wait, min(max((waited+wait)/4, probeFirst), probeLast) {
		leaf, err := probeOnce(ctx, address, serverName)
		switch {
		case err != nil:
			if last == nil || ctx.Err() == nil {
				last = fault.Wrap(fault.Retryable, err, "no TLS handshake with %s succeeded (%s); check that the service runs and that verify_address is its TLS port", address, printable(cause(err), 200))
			}
		case FingerprintOf(leaf) == want:
			return Proof{Leaf: want, Address: address, At: o.Now()}, nil
		default:
			last = fault.New(fault.Conflict, "%s serves %s instead of the new one (SHA-256 %s); check that the service loads the installed files and that verify_address and server_name lead to it",
				address, describe(leaf), want)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return Proof{}, last
		}
	}
}

func cause(err error) string {
	var oe *net.OpError
	if errors.As(err, &oe) && oe.Err != nil {
		return oe.Err.Error()
	}
	return err.Error()
}

func probeOnce(ctx context.Context, address, serverName string) (*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, probeAttempt)
	defer cancel()
	d := tls.Dialer{NetDialer: &net.Dialer{}, Config: &tls.Config{
		ServerName:         serverName,
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true, //nolint:gosec // the leaf is compared by fingerprint, which is stricter than a chain
	}}
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	tc, ok := c.(*tls.Conn)
	if !ok || len(tc.ConnectionState().PeerCertificates) == 0 {
		return nil, errors.New("the server showed no certificate")
	}
	return tc.ConnectionState().PeerCertificates[0], nil
}

// describe names a certificate from elsewhere.
func describe(c *x509.Certificate) string {
	name := c.Subject.CommonName
	if len(c.DNSNames) > 0 {
		name = c.DNSNames[0]
	}
	return fmt.Sprintf("the certificate of %q with serial %x, valid until %s (SHA-256 %s)", printable(name, 100),
		c.SerialNumber, c.NotAfter.UTC().Format(time.RFC3339), FingerprintOf(c))
}

func addressProblem(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err != nil || host == "" {
		return "must be host:port, such as 127.0.0.1:443"
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return "must end with a port between 1 and 65535, such as 127.0.0.1:443"
	}
	if clean(address, false) != address || len(address) > 300 {
		return "must be host:port in plain text"
	}
	return ""
}

// VerifySettings say where a handshake shows what a target serves; every kind that serves TLS has them.
type VerifySettings struct {
	VerifyAddress string `json:"verify_address" doc:"host:port for a TLS handshake after the deployment; empty: the certificate counts as installed, not as served."`
	ServerName    string `json:"server_name" doc:"Name sent in that handshake (SNI); empty: none."`
}

// Problems reports what is wrong with s.
func (s VerifySettings) Problems() []Problem {
	var ps []Problem
	if s.VerifyAddress != "" {
		if msg := addressProblem(s.VerifyAddress); msg != "" {
			ps = append(ps, Problem{"verify_address", msg})
		}
	} else if s.ServerName != "" {
		ps = append(ps, Problem{"server_name", "is used in the handshake with verify_address; give that too"})
	}
	if len(s.ServerName) > 253 || printable(s.ServerName, 253) != s.ServerName {
		ps = append(ps, Problem{"server_name", "must be a host name of at most 253 characters"})
	}
	return ps
}

// Verify asks the verify address for m's leaf, for at most two seconds: a caller that has more patience calls again.
func (s VerifySettings) Verify(ctx context.Context, env Env, m Material) (Proof, error) {
	return ProbeTLS(ctx, s.VerifyAddress, s.ServerName, m.Leaf(), ProbeOptions{Timeout: verifyPatience, Now: env.Now})
}

// Probed adds a Verifier to t when the settings name an address; without one t stays what it is, and its caller knows
// that nothing was seen.
func (s VerifySettings) Probed(env Env, t Target) Target {
	if s.VerifyAddress == "" {
		return t
	}
	v := verifier{s, env}
	r, repairs := t.(Repairer)
	a, activates := t.(Activator)
	switch {
	case repairs && activates:
		return struct {
			Target
			Repairer
			Activator
			verifier
		}{t, r, a, v}
	case repairs:
		return struct {
			Target
			Repairer
			verifier
		}{t, r, v}
	case activates:
		return struct {
			Target
			Activator
			verifier
		}{t, a, v}
	default:
		return struct {
			Target
			verifier
		}{t, v}
	}
}

type verifier struct {
	settings VerifySettings
	env      Env
}

func (v verifier) Verify(ctx context.Context, m Material) (Proof, error) {
	return v.settings.Verify(ctx, v.env, m)
}
