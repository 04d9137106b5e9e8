package work

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"net/url"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// maxCSR leaves room for the message around it.
const maxCSR = 60 << 10

// newCSR signs a PKCS#10 for exactly the names of k, split by form. It is the same for the same key and names: ECDSA
// signs deterministically when no randomness is given (RFC 6979), the other algorithms always do.
func newCSR(k *agentpb.KeyWork, key crypto.Signer) ([]byte, error) {
	req := &x509.CertificateRequest{
		Subject:        pkix.Name{CommonName: k.GetCommonName()},
		DNSNames:       k.GetDnsNames(),
		EmailAddresses: k.GetEmailAddresses(),
	}
	for _, s := range k.GetIpAddresses() {
		ip := net.ParseIP(s)
		if ip == nil {
			return nil, fault.InvalidField("ip_addresses", "%q is not an IP address", clean(s, 64, false))
		}
		req.IPAddresses = append(req.IPAddresses, ip)
	}
	for _, s := range k.GetUris() {
		u, err := url.Parse(s)
		if err != nil {
			return nil, fault.InvalidField("uris", "%q is not a URI", clean(s, 200, false))
		}
		req.URIs = append(req.URIs, u)
	}
	der, err := x509.CreateCertificateRequest(nil, req, key)
	if err != nil {
		return nil, fault.Wrap(fault.Invalid, err, "no certificate request can be made of these names; use plain ASCII names")
	}
	if len(der) > maxCSR {
		return nil, fault.New(fault.Exhausted, "the certificate request has %d bytes, more than %d; use fewer names", len(der), maxCSR)
	}
	return der, nil
}
