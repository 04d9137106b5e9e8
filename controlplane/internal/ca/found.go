package ca

import (
	"bytes"
	"crypto/x509"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Found describes a leaf that one of the CAs signed, which is verified by their keys, as far as the certificate tells it.
// NotFound: none of them did. Invalid: it is no certificate, or a CA's. The mesh CA's identities are no leaves.
func Found(der []byte, cas []domain.CA) (domain.FoundLeaf, error) {
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return domain.FoundLeaf{}, fault.Wrap(fault.Invalid, err, "the leaf is no certificate")
	}
	if leaf.IsCA {
		return domain.FoundLeaf{}, fault.New(fault.Invalid, "the leaf is a CA's certificate")
	}
	for _, c := range cas {
		if c.ID == domain.MeshCA || len(c.Chain) == 0 {
			continue
		}
		signer, err := x509.ParseCertificate(c.Chain[0])
		if err != nil {
			return domain.FoundLeaf{}, fault.Wrap(fault.Internal, err, "the certificate of CA %s does not parse", c.ID)
		}
		// The name is compared first: it costs nothing.
		if !bytes.Equal(signer.RawSubject, leaf.RawIssuer) || leaf.CheckSignatureFrom(signer) != nil {
			continue
		}
		key, err := inspectKey(leaf.PublicKey)
		if err != nil {
			return domain.FoundLeaf{}, err
		}
		names := domain.Names{CommonName: leaf.Subject.CommonName, DNS: leaf.DNSNames, Email: leaf.EmailAddresses}
		for _, ip := range leaf.IPAddresses {
			names.IP = append(names.IP, ip.String())
		}
		for _, u := range leaf.URIs {
			names.URI = append(names.URI, u.String())
		}
		chain, err := withoutRoots(c.Chain)
		if err != nil {
			return domain.FoundLeaf{}, err
		}
		return domain.FoundLeaf{IssuerID: c.ID, Serial: SerialText(leaf.SerialNumber), Names: names, DER: der, Chain: chain,
			Fingerprint: domain.HashHex(der), SPKI: domain.HashHex(leaf.RawSubjectPublicKeyInfo), KeyAlgorithm: key.kind.algorithm,
			NotBefore: leaf.NotBefore.UTC(), NotAfter: leaf.NotAfter.UTC()}, nil
	}
	return domain.FoundLeaf{}, fault.New(fault.NotFound, "no CA of this store signed it")
}

// withoutRoots is what a server sends after the leaf.
func withoutRoots(chain [][]byte) ([][]byte, error) {
	var out [][]byte
	for _, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fault.Wrap(fault.Internal, err, "a certificate of a CA's chain does not parse")
		}
		if !selfIssued(c) {
			out = append(out, der)
		}
	}
	return out, nil
}
