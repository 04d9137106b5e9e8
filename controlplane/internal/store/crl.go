package store

import (
	"context"
	"database/sql"
	"strconv"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Revoked lists an issuer's revoked certificates that have not expired at now, by serial: the lines of a complete CRL.
func (s *Store) Revoked(ctx context.Context, issuerID string, now time.Time) ([]domain.RevokedEntry, error) {
	var all []domain.RevokedEntry
	err := s.read(ctx, "crl.entries", func(t *tx) error {
		var err error
		all, err = collect(t, `SELECT serial, revoked_at, revocation_reason, not_after FROM version
WHERE issuer_id = $1 AND revoked_at IS NOT NULL AND not_after > $2
UNION ALL SELECT serial, revoked_at, revocation_reason, not_after FROM found_leaf
WHERE issuer_id = $1 AND revoked_at IS NOT NULL AND not_after > $2 ORDER BY serial`, []any{issuerID, micro(now)},
			func(scan scanner) (domain.RevokedEntry, error) {
				var e domain.RevokedEntry
				var revokedAt sql.NullInt64
				var notAfter int64
				err := scan(&e.Serial, &revokedAt, &e.Reason, &notAfter)
				e.RevokedAt, e.NotAfter = fromNull(revokedAt), fromMicro(notAfter)
				return e, err
			})
		return err
	})
	return all, err
}

// CRL returns the stored CRL of an issuer's shard; NotFound until one was built.
func (s *Store) CRL(ctx context.Context, issuerID string, shard int) (domain.CRL, error) {
	var c domain.CRL
	err := s.read(ctx, "crl.get", func(t *tx) error {
		var err error
		c, err = t.crl(issuerID, shard)
		return err
	})
	return c, err
}

func (t *tx) crl(issuerID string, shard int) (domain.CRL, error) {
	missing := fault.New(fault.NotFound, "issuer %q has no CRL yet; one is built within a minute of its creation", issuerID)
	if !storable(issuerID) {
		return domain.CRL{}, missing
	}
	return one(t, missing, `SELECT issuer_id, shard, number, der, this_update, next_update, revoked FROM crl
WHERE issuer_id = $1 AND shard = $2`, []any{issuerID, shard}, func(scan scanner) (domain.CRL, error) {
		var c domain.CRL
		var thisUpdate, nextUpdate int64
		err := scan(&c.IssuerID, &c.Shard, &c.Number, &c.DER, &thisUpdate, &nextUpdate, &c.Revoked)
		c.ThisUpdate, c.NextUpdate = fromMicro(thisUpdate), fromMicro(nextUpdate)
		return c, err
	})
}

// SaveCRL stores a CRL under a duty's fence. Its number must be greater than the stored one's (RFC 5280 section 5.2.3):
// Conflict otherwise, or when the duty was lost.
func (s *Store) SaveCRL(ctx context.Context, f domain.Fence, c domain.CRL) error {
	if len(c.DER) == 0 || c.Number < 1 {
		return fault.New(fault.Internal, "a CRL needs its bytes and a number above zero")
	}
	return s.settled(ctx, "crl.save", func(t *tx) error {
		if err := t.fence(f); err != nil {
			return err
		}
		n, err := t.exec(`INSERT INTO crl (issuer_id, shard, number, der, this_update, next_update, revoked)
VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT (issuer_id, shard) DO UPDATE SET number = excluded.number, der = excluded.der, this_update = excluded.this_update,
 next_update = excluded.next_update, revoked = excluded.revoked
WHERE crl.number < excluded.number`, c.IssuerID, c.Shard, c.Number, c.DER, micro(c.ThisUpdate), micro(c.NextUpdate), c.Revoked)
		if err != nil {
			return err
		}
		if n == 0 {
			have, err := t.crl(c.IssuerID, c.Shard)
			if err != nil || t.again && have.Number == c.Number && string(have.DER) == string(c.DER) {
				return err
			}
			return fault.New(fault.Conflict, "the CRL of %s has number %d already; number %d is not greater", c.IssuerID, have.Number, c.Number)
		}
		op := domain.Op{Actor: "node:" + f.Holder, At: c.ThisUpdate}
		return t.auditOp(op, "crl.published", "issuer/"+c.IssuerID, map[string]string{"number": strconv.FormatInt(c.Number, 10),
			"revoked": strconv.Itoa(c.Revoked), "shard": strconv.Itoa(c.Shard)})
	})
}
