package store

import (
	"context"
	"strconv"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// Relisted says what a published CRL brought back.
type Relisted struct {
	// Certificates are the names of those that are revoked again, because the leaf that they have now is listed.
	Certificates []string
	// Versions and Unknown are how many further serials were revoked that are known, and that are not.
	Versions, Unknown int64
}

// Relist brings back the revocations of a CRL that was published after the backup from which the store was restored.
// A certificate whose present leaf is listed was revoked, and is again; a listed version was, and is; a serial that is not
// known is kept as a found leaf without an agent, so that CRLs go on to list it, until notAfter, which is no earlier
// than any leaf's. The next CRL has a number above this one's. What is revoked already stays as it is.
//
// The caller has verified that the issuer signed the CRL.
func (s *Store) Relist(ctx context.Context, issuerID string, number int64, entries []domain.RevokedEntry, notAfter time.Time, op domain.Op) (Relisted, error) {
	var r Relisted
	for len(entries) > 0 {
		some := entries[:min(len(entries), maxBatch)]
		entries = entries[len(some):]
		current, err := s.currentOf(ctx, issuerID, some)
		if err != nil {
			return r, err
		}
		for id, reason := range current {
			c, _, err := s.RevokeCertificate(ctx, id, reason, op)
			if err != nil {
				return r, err
			}
			r.Certificates = append(r.Certificates, c.Name)
		}
		var versions, unknown int64
		err = s.settled(ctx, "crl.relist", func(t *tx) error {
			versions, unknown, err = t.relist(issuerID, some, notAfter, op)
			return err
		})
		if err != nil {
			return r, err
		}
		r.Versions, r.Unknown = r.Versions+versions, r.Unknown+unknown
	}
	return r, s.settled(ctx, "crl.number", func(t *tx) error {
		_, err := t.exec("UPDATE crl SET number = $1 WHERE issuer_id = $2 AND number < $1", number, issuerID)
		return err
	})
}

// currentOf finds the certificates of which a leaf's present version is listed, unless that was superseded: then its agent
// had lost the key, and the certificate lives on.
func (s *Store) currentOf(ctx context.Context, issuerID string, entries []domain.RevokedEntry) (map[string]domain.RevocationReason, error) {
	found := map[string]domain.RevocationReason{}
	err := s.settled(ctx, "crl.current", func(t *tx) error {
		clear(found)
		v := t.values("number text, reason int")
		for _, e := range entries {
			if e.Reason != superseded {
				v.add(e.Serial, int64(e.Reason))
			}
		}
		if v.rows == 0 {
			return nil
		}
		text := v.with()
		return t.each(text+` SELECT version.certificate_id, v.reason FROM v JOIN version ON version.issuer_id = `+v.arg(issuerID)+` AND version.serial = v.number
JOIN leaf ON leaf.certificate_id = version.certificate_id AND leaf.agent_id = version.agent_id
WHERE leaf.current_generation = version.generation AND NOT leaf.revoked`, v.args, func(scan func(...any) error) error {
			var id string
			var reason domain.RevocationReason
			err := scan(&id, &reason)
			found[id] = reason
			return err
		})
	})
	return found, err
}

// relist revokes the versions that are listed, and keeps the serials that are not known.
func (t *tx) relist(issuerID string, entries []domain.RevokedEntry, notAfter time.Time, op domain.Op) (versions, unknown int64, err error) {
	list := func() (*valueList, string) {
		v := t.values("number text, at int, reason int")
		for _, e := range entries {
			v.add(e.Serial, micro(e.RevokedAt), int64(e.Reason))
		}
		return v, v.with()
	}
	v, text := list()
	if versions, err = t.exec(text+` UPDATE version SET revoked_at = v.at, revocation_reason = v.reason
FROM v WHERE version.issuer_id = `+v.arg(issuerID)+` AND version.serial = v.number AND version.revoked_at IS NULL`, v.args...); err != nil {
		return 0, 0, err
	}
	v, text = list()
	issuer := v.arg(issuerID)
	if unknown, err = t.exec(text+` INSERT INTO found_leaf (issuer_id, serial, agent_id, certificate_id, generation, der, fingerprint, not_after, reason,
 revoked_at, revocation_reason, found_at)
SELECT CAST(`+issuer+` AS TEXT), v.number, '', '', 0, CAST(`+v.arg([]byte{})+` AS `+t.s.d.bytes+`), '', CAST(`+v.arg(micro(notAfter))+` AS BIGINT), 'a CRL of before the restore lists it', v.at, v.reason, CAST(`+v.arg(micro(op.At))+` AS BIGINT)
FROM v WHERE v.number IS NOT NULL AND NOT EXISTS (SELECT 1 FROM version WHERE version.issuer_id = `+issuer+` AND version.serial = v.number)
ON CONFLICT (issuer_id, serial) DO NOTHING`, v.args...); err != nil {
		return 0, 0, err
	}
	if versions+unknown == 0 {
		return 0, 0, nil
	}
	return versions, unknown, t.auditOp(op, "crl.relisted", "issuer/"+issuerID, map[string]string{
		"versions": strconv.FormatInt(versions, 10), "unknown": strconv.FormatInt(unknown, 10)})
}
