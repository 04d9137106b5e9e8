package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Listed is a CRL of one of our CAs.
type Listed struct {
	IssuerID string
	Number   int64
	Entries  []domain.RevokedEntry
	// NotAfter is when the CA's certificate ends, and with it all that it has issued.
	NotAfter time.Time
}

// ReadCRL reads a CRL, PEM or DER, that one of the CAs signed, which is verified by their keys. Invalid: it is none, or
// none of them did.
func ReadCRL(data []byte, cas []domain.CA) (Listed, error) {
	if block, _ := pem.Decode(data); block != nil {
		data = block.Bytes
	}
	list, err := x509.ParseRevocationList(data)
	if err != nil {
		return Listed{}, fault.Wrap(fault.Invalid, err, "it is no CRL")
	}
	for _, c := range cas {
		if c.ID == domain.MeshCA || len(c.Chain) == 0 {
			continue
		}
		signer, err := x509.ParseCertificate(c.Chain[0])
		if err != nil {
			return Listed{}, fault.Wrap(fault.Internal, err, "the certificate of CA %s does not parse", c.ID)
		}
		if !bytes.Equal(signer.RawSubject, list.RawIssuer) || list.CheckSignatureFrom(signer) != nil {
			continue
		}
		if list.Number == nil || !list.Number.IsInt64() {
			return Listed{}, fault.New(fault.Invalid, "the CRL has no number, or one that is none of ours")
		}
		l := Listed{IssuerID: c.ID, Number: list.Number.Int64(), NotAfter: signer.NotAfter}
		for _, e := range list.RevokedCertificateEntries {
			l.Entries = append(l.Entries, domain.RevokedEntry{Serial: SerialText(e.SerialNumber), RevokedAt: e.RevocationTime.UTC(), Reason: domain.RevocationReason(e.ReasonCode)})
		}
		return l, nil
	}
	return Listed{}, fault.New(fault.Invalid, "no CA of this store signed the CRL")
}
