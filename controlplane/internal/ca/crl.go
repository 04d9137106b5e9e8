package ca

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// CRL signs the complete CRL of one shard (RFC 5280 section 5): every revoked, unexpired certificate whose distribution
// point is the shard's. number rises with every CRL of the issuer. The result is linted before it is signed.
func (a *Authority) CRL(number int64, shard int, entries []domain.RevokedEntry, thisUpdate, nextUpdate time.Time) ([]byte, error) {
	thisUpdate, nextUpdate = thisUpdate.UTC().Truncate(time.Second), nextUpdate.UTC().Truncate(time.Second)
	switch {
	case number < 1 || shard < 0:
		return nil, fault.New(fault.Internal, "a CRL has a number above 0 and a shard of 0 or more")
	case !thisUpdate.Before(nextUpdate):
		return nil, fault.New(fault.Internal, "a CRL's nextUpdate lies after its thisUpdate")
	case thisUpdate.After(a.chain[0].NotAfter):
		return nil, fault.New(fault.Rejected, "the CA %q expired at %s and can no longer sign CRLs", a.id, a.chain[0].NotAfter.Format(time.RFC3339))
	}
	point, err := a.issuingDistributionPoint(shard)
	if err != nil {
		return nil, err
	}
	list := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: thisUpdate, NextUpdate: nextUpdate,
		SignatureAlgorithm: a.scheme.x509, ExtraExtensions: []pkix.Extension{point},
		RevokedCertificateEntries: make([]x509.RevocationListEntry, len(entries))}
	for i, e := range entries {
		if list.RevokedCertificateEntries[i], err = revocation(e, thisUpdate); err != nil {
			return nil, err
		}
	}
	recorder := &recorder{public: a.chain[0].PublicKey}
	if _, err := x509.CreateRevocationList(rand.Reader, list, a.chain[0], recorder); !errors.Is(err, errRecorded) {
		return nil, fault.Wrap(fault.Internal, err, "build the CRL")
	}
	draft, err := assemble(recorder.message, a.identifier, a.placeholder)
	if err != nil {
		return nil, err
	}
	if err := a.lint.checkCRL(draft); err != nil {
		return nil, err
	}
	return a.seal(recorder.message)
}

func revocation(e domain.RevokedEntry, thisUpdate time.Time) (x509.RevocationListEntry, error) {
	serial, err := ParseSerial(e.Serial)
	if err != nil {
		return x509.RevocationListEntry{}, err
	}
	switch e.Reason {
	case 0, 1, 2, 3, 4, 5, 6, 9, 10:
	default:
		// 7 is not assigned; 8 (removeFromCRL) belongs to delta CRLs (RFC 5280 section 5.3.1).
		return x509.RevocationListEntry{}, fault.New(fault.Internal, "reason %d of serial %s has no place in a complete CRL", int(e.Reason), e.Serial)
	}
	at := e.RevokedAt.UTC().Truncate(time.Second)
	if at.After(thisUpdate) {
		at = thisUpdate // another node's clock is ahead; a CRL does not foretell
	}
	// A zero reason is left out by crypto/x509: RFC 5280 section 5.3.1 wants unspecified to be absent.
	return x509.RevocationListEntry{SerialNumber: serial, RevocationTime: at, ReasonCode: int(e.Reason)}, nil
}

// issuingDistributionPoint says which certificates the CRL is for (RFC 5280 section 5.2.5): leaves that name the
// shard's URL as their distribution point.
func (a *Authority) issuingDistributionPoint(shard int) (pkix.Extension, error) {
	at := a.CRLURL(shard)
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		if at != "" {
			b.AddASN1(cbasn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { // distributionPoint
				b.AddASN1(cbasn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { // fullName
					b.AddASN1(cbasn1.Tag(6).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte(at)) }) // URI
				})
			})
		}
		b.AddASN1(cbasn1.Tag(1).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte{0xff}) }) // onlyContainsUserCerts
	})
	value, err := b.Bytes()
	if err != nil {
		return pkix.Extension{}, fault.Wrap(fault.Internal, err, "encode the issuing distribution point")
	}
	return pkix.Extension{Id: oidIssuingDistPoint, Critical: true, Value: value}, nil
}
