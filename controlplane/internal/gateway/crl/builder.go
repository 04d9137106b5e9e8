// Package crl builds the complete CRLs of our own CAs and serves them, with the CA certificates, on the pki listener.
//
// A CRL is built by a fenced duty, once for the whole cluster, and stored; requests read the stored one. A node that
// cannot reach the store goes on serving its last good copy: relying parties must not fail because a database does.
package crl

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Signer signs CRLs for one CA.
type Signer interface {
	CRL(number int64, shard int, entries []domain.RevokedEntry, thisUpdate, nextUpdate time.Time) ([]byte, error)
}

// Store is what building and serving need.
type Store interface {
	Issuers(ctx context.Context, page domain.PageRequest) ([]domain.Issuer, string, error)
	CA(ctx context.Context, id string) (domain.CA, error)
	Revoked(ctx context.Context, issuerID string, now time.Time) ([]domain.RevokedEntry, error)
	CRL(ctx context.Context, issuerID string, shard int) (domain.CRL, error)
	SaveCRL(ctx context.Context, f domain.Fence, c domain.CRL) error
}

// Builder keeps the stored CRLs fresh.
type Builder struct {
	Store Store
	// Signer finds the CA of a local issuer.
	Signer func(ctx context.Context, issuerID string) (Signer, error)
	// Validity is from thisUpdate to nextUpdate; a CRL is rebuilt when half of it is gone.
	Validity time.Duration
	Log      *slog.Logger
}

// Shard is the only one so far; its number is in every URL from the first certificate on.
const Shard = 0

// Build rebuilds every CRL that is missing, half expired, or lacks a revocation. It returns when the next one is half
// expired. Conflict: the duty was lost.
func (b *Builder) Build(ctx context.Context, f domain.Fence, now time.Time) (time.Time, error) {
	var next time.Time
	var problems []error
	for page := (domain.PageRequest{Size: domain.MaxPageSize}); ; {
		issuers, after, err := b.Store.Issuers(ctx, page)
		if err != nil {
			return time.Time{}, fmt.Errorf("list issuers: %w", err)
		}
		for _, i := range issuers {
			if i.Kind != domain.IssuerLocal {
				continue
			}
			at, err := b.build(ctx, f, i.ID, now)
			switch {
			case fault.Is(err, fault.Conflict):
				return time.Time{}, fmt.Errorf("CRL of %s: %w", i.Name, err) // the duty was lost: the others would fail too
			case err != nil:
				// One CA whose key cannot be opened must not stop the others' CRLs.
				problems = append(problems, fmt.Errorf("CRL of %s: %w", i.Name, err))
			case !at.IsZero() && (next.IsZero() || at.Before(next)):
				next = at
			}
		}
		if after == "" {
			return next, errors.Join(problems...)
		}
		page.After = after
	}
}

func (b *Builder) build(ctx context.Context, f domain.Fence, issuerID string, now time.Time) (time.Time, error) {
	now = now.UTC().Truncate(time.Second) // RFC 5280 section 5.1.2.4: times carry no fraction
	// A certificate that has expired stays listed for one validity more: it must be on a CRL that was issued after its end
	// (RFC 5280 section 3.3).
	entries, err := b.Store.Revoked(ctx, issuerID, now.Add(-b.Validity))
	if err != nil {
		return time.Time{}, fmt.Errorf("read revocations: %w", err)
	}
	current, err := b.Store.CRL(ctx, issuerID, Shard)
	if err != nil && !fault.Is(err, fault.NotFound) {
		return time.Time{}, fmt.Errorf("read the current CRL: %w", err)
	}
	if err == nil {
		half := current.ThisUpdate.Add(b.Validity / 2)
		if now.Before(half) && holds(current.DER, entries) {
			return half, nil
		}
	}
	if over, err := b.expired(ctx, issuerID, now); over || err != nil {
		return time.Time{}, err
	}
	signer, err := b.Signer(ctx, issuerID)
	if err != nil {
		return time.Time{}, fmt.Errorf("open the CA: %w", err)
	}
	c := domain.CRL{IssuerID: issuerID, Shard: Shard,
		// Unix milliseconds as a floor: after a restore from backup no number is used twice (RFC 5280 section 5.2.3).
		Number:     max(current.Number+1, now.UnixMilli()),
		ThisUpdate: now, NextUpdate: now.Add(b.Validity), Revoked: len(entries)}
	if c.DER, err = signer.CRL(c.Number, Shard, entries, c.ThisUpdate, c.NextUpdate); err != nil {
		return time.Time{}, fmt.Errorf("sign: %w", err)
	}
	if err := b.Store.SaveCRL(ctx, f, c); err != nil {
		return time.Time{}, fmt.Errorf("save: %w", err)
	}
	b.Log.Info("CRL built", "issuer", issuerID, "number", c.Number, "revoked", c.Revoked)
	return c.ThisUpdate.Add(b.Validity / 2), nil
}

// expired reports whether the CA has: then nothing it issued is valid, and it signs no CRL any more.
func (b *Builder) expired(ctx context.Context, issuerID string, now time.Time) (bool, error) {
	ca, err := b.Store.CA(ctx, issuerID)
	if err != nil {
		return false, fmt.Errorf("read the CA: %w", err)
	}
	if len(ca.Chain) == 0 {
		return false, fault.New(fault.Internal, "the CA has no certificate")
	}
	c, err := x509.ParseCertificate(ca.Chain[0])
	if err != nil {
		return false, fault.Wrap(fault.Internal, err, "the CA's certificate does not parse")
	}
	return now.After(c.NotAfter), nil
}

// holds reports whether the CRL lists every entry. Entries that have expired since may still be listed.
func holds(der []byte, entries []domain.RevokedEntry) bool {
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return false
	}
	listed := make(map[string]int, len(list.RevokedCertificateEntries))
	for _, e := range list.RevokedCertificateEntries {
		listed[e.SerialNumber.Text(16)] = e.ReasonCode
	}
	for _, e := range entries {
		n, ok := new(big.Int).SetString(e.Serial, 16)
		if !ok {
			return false
		}
		if reason, ok := listed[n.Text(16)]; !ok || reason != int(e.Reason) {
			return false
		}
	}
	return true
}
