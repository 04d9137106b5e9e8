package agentd

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/certmesh/certmesh/connectors/target"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// hostFacts describes this host; what cannot be found out stays empty.
func hostFacts(version string) *agentpb.Facts {
	host, _ := os.Hostname() // empty means unknown
	return &agentpb.Facts{Os: runtime.GOOS, Platform: platform("/etc/os-release"), Architecture: runtime.GOARCH,
		IpAddress: ownAddress(), Hostname: host, Version: version}
}

// platform names the distribution as os-release(5) does, e.g. "debian 13".
func platform(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return runtime.GOOS
	}
	defer func() { _ = f.Close() }()
	v := map[string]string{}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if k, val, ok := strings.Cut(sc.Text(), "="); ok && (k == "ID" || k == "VERSION_ID") {
			v[k] = strings.Trim(val, `"'`)
		}
	}
	return clip(cmp.Or(strings.TrimSpace(v["ID"]+" "+v["VERSION_ID"]), runtime.GOOS))
}

// ownAddress is the host's first address that others may reach, IPv4 before IPv6.
func ownAddress() string {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return ""
	}
	six := ""
	for _, a := range addrs {
		n, ok := a.(*net.IPNet)
		switch {
		case !ok || !n.IP.IsGlobalUnicast():
		case n.IP.To4() != nil:
			return n.IP.String()
		case six == "":
			six = n.IP.String()
		}
	}
	return six
}

// probeAttempt bounds one handshake, so that a lost packet does not use up the time of a whole verification.
const probeAttempt = 2 * time.Second

// handshake returns the probe that asks a service which leaf it serves. The chain is not judged: the fingerprint is
// compared, which is stricter.
func handshake(clk clockwork.Clock) func(ctx context.Context, address, serverName string) (target.Proof, error) {
	return func(ctx context.Context, address, serverName string) (target.Proof, error) {
		ctx, cancel := context.WithTimeout(ctx, probeAttempt)
		defer cancel()
		d := tls.Dialer{Config: &tls.Config{
			ServerName:         serverName,
			MinVersion:         tls.VersionTLS12,
			InsecureSkipVerify: true, //nolint:gosec // the leaf is compared by fingerprint
		}}
		c, err := d.DialContext(ctx, "tcp", address)
		if err != nil {
			var oe *net.OpError
			if errors.As(err, &oe) && oe.Err != nil {
				err = oe.Err
			}
			return target.Proof{}, fault.Wrap(fault.Retryable, err, "no TLS handshake with %s succeeded (%s); check that the service runs and that verify_address is its TLS port", clip(address), clip(err.Error()))
		}
		defer func() { _ = c.Close() }()
		tc, ok := c.(*tls.Conn)
		if !ok || len(tc.ConnectionState().PeerCertificates) == 0 {
			return target.Proof{}, fault.New(fault.Retryable, "%s showed no certificate", clip(address))
		}
		return target.Proof{Leaf: target.FingerprintOf(tc.ConnectionState().PeerCertificates[0]), Address: address, At: clk.Now()}, nil
	}
}
