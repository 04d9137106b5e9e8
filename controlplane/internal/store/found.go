package store

import (
	"context"
	"database/sql"
	"strconv"
	"strings"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

// AdoptLeaves takes in leaves that agents hold and that are not on record. After a recovery a leaf of before it becomes a
// version of its certificate again, with its intent: leaf and placements follow if it is the newest, and what is revoked
// with the certificate is revoked. Every other leaf is written down with its agent (FoundLeaves), so that it is known and
// can be revoked. Each is its own transaction; the same leaf again is Known.
//
// The callers have verified that the issuer signed the leaf. That the agent has its key is not proven: an agent could claim
// another's leaf of a certificate that both have, and nothing but the inventory's column would be wrong.
func (s *Store) AdoptLeaves(ctx context.Context, leaves []domain.FoundLeaf, op domain.Op) ([]domain.Adopted, error) {
	outs := make([]domain.Adopted, len(leaves))
	for i, l := range leaves {
		if err := checkTexts("serial", l.Serial, "certificate_id", l.CertificateID, "agent_id", l.AgentID); err != nil {
			return nil, err
		}
		intent := s.newID(id.Intent)
		err := s.settled(ctx, "leaf.adopt", func(t *tx) error {
			var err error
			outs[i], err = t.adopt(l, intent, op)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return outs, nil
}

func (t *tx) adopt(l domain.FoundLeaf, intentID string, op domain.Op) (domain.Adopted, error) {
	known := domain.Adopted{Adoption: domain.AdoptionKnown}
	// A serial that a CRL of before the restore listed: now it is known who has it.
	if n, err := t.exec(`UPDATE found_leaf SET agent_id = $1, certificate_id = $2, generation = $3, der = $4, fingerprint = $5, not_after = $6
WHERE issuer_id = $7 AND serial = $8 AND agent_id = ''`, l.AgentID, l.CertificateID, l.Generation, l.DER, l.Fingerprint, micro(l.NotAfter), l.IssuerID, l.Serial); err != nil || n > 0 {
		return known, err
	}
	for _, table := range []string{"version", "found_leaf"} {
		n, err := t.count("SELECT COUNT(*) FROM "+table+" WHERE issuer_id = $1 AND serial = $2", l.IssuerID, l.Serial)
		if n > 0 || err != nil {
			return known, err
		}
	}
	if err := t.lockCertificates([]string{l.CertificateID}); err != nil {
		return known, err
	}
	have, reason, err := t.mayBeVersion(l)
	if err != nil {
		return known, err
	}
	detail := map[string]string{"agent": l.AgentID, "issuer": l.IssuerID, "serial": l.Serial, "fingerprint": l.Fingerprint,
		"generation": strconv.FormatInt(l.Generation, 10), "not_after": l.NotAfter.UTC().Format(time.RFC3339)}
	if reason == "" {
		if err := t.adoptVersion(l, have, intentID, op); err != nil {
			return known, err
		}
		return domain.Adopted{Adoption: domain.AdoptionVersion}, t.auditOp(op, "certificate.adopted", "certificate/"+l.CertificateID, detail)
	}
	if _, err := t.exec(`INSERT INTO found_leaf (issuer_id, serial, agent_id, certificate_id, generation, der, fingerprint, not_after, reason,
 revoked_at, revocation_reason, found_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, NULL, 0, $10)`,
		l.IssuerID, l.Serial, l.AgentID, l.CertificateID, l.Generation, l.DER, l.Fingerprint, micro(l.NotAfter), reason, micro(op.At)); err != nil {
		return known, err
	}
	detail["reason"] = reason
	return domain.Adopted{Adoption: domain.AdoptionFound, Reason: reason}, t.auditOp(op, "leaf.found", "agent/"+l.AgentID, detail)
}

// mayBeVersion says why a leaf cannot be a version of the certificate that its agent names; empty: it can.
func (t *tx) mayBeVersion(l domain.FoundLeaf) (have leafState, reason string, err error) {
	recovery, err := t.recovery()
	if err != nil {
		return have, "", err
	}
	switch {
	case recovery == 0:
		return have, "the store was never recovered from a backup, and knows of no such issuance", nil
	case l.NotBefore.After(fromMicro(recovery)):
		return have, "it was signed after the last recovery, and no such issuance is known", nil
	}
	states, err := t.leafStates([]leafID{{l.CertificateID, l.AgentID}})
	if err != nil {
		return have, "", err
	}
	have, ok := states[leafID{l.CertificateID, l.AgentID}]
	if !ok {
		return have, "no certificate of this id is ordered for this agent; the order was lost with the restore", nil
	}
	c, err := t.certificate(l.CertificateID)
	if err != nil {
		return have, "", err
	}
	switch {
	case c.IssuerID != l.IssuerID:
		return have, "the certificate is ordered from another issuer", nil
	case !domain.SameNames(c.Names, l.Names):
		return have, "the certificate is ordered for other names", nil
	case l.Generation < 1 || l.Generation >= have.leaf.Generation:
		return have, "its generation cannot have been issued before the recovery", nil
	}
	taken, err := t.count("SELECT COUNT(*) FROM version WHERE certificate_id = $1 AND agent_id = $2 AND generation = $3", l.CertificateID, l.AgentID, l.Generation)
	if taken > 0 || err != nil {
		return have, "another version has its generation", err
	}
	// An intent of the backup may have been signed after it, with exactly these bytes.
	taken, err = t.count(`SELECT COUNT(*) FROM intent WHERE certificate_id = $1 AND agent_id = $2 AND generation = $3 AND
 NOT (state = $4 AND issuer_id = $5 AND serial = $6 AND spki = $7)`, l.CertificateID, l.AgentID, l.Generation, string(domain.IntentAbandoned), l.IssuerID, l.Serial, l.SPKI)
	if taken > 0 || err != nil {
		return have, "another key or serial was recorded for its generation", err
	}
	taken, err = t.count("SELECT COUNT(*) FROM intent WHERE issuer_id = $1 AND serial = $2 AND NOT (certificate_id = $3 AND agent_id = $4 AND generation = $5)",
		l.IssuerID, l.Serial, l.CertificateID, l.AgentID, l.Generation)
	if taken > 0 || err != nil {
		return have, "its serial was recorded for another generation", err
	}
	return have, "", nil
}

// adoptVersion writes what RecordIssued wrote and the restore lost.
func (t *tx) adoptVersion(l domain.FoundLeaf, have leafState, intentID string, op domain.Op) error {
	var revokedAt any
	reason := domain.RevocationReason(0)
	if have.leaf.Revoked || have.status == domain.CertificateRevoked {
		// What was revoked of this leaf was revoked for all generations, and for a reason that the others carry.
		revokedAt = micro(op.At)
		err := t.queryRow("SELECT COALESCE(MAX(revocation_reason), 0) FROM version WHERE certificate_id = $1 AND agent_id = $2 AND revoked_at IS NOT NULL",
			l.CertificateID, l.AgentID).Scan(&reason)
		if err != nil {
			return err
		}
	}
	if _, err := t.exec(`INSERT INTO version (issuer_id, serial, certificate_id, agent_id, generation, der, chain, fingerprint, spki, key_algorithm,
 not_before, not_after, revoked_at, revocation_reason, created_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)`,
		l.IssuerID, l.Serial, l.CertificateID, l.AgentID, l.Generation, l.DER, joinDER(l.Chain), strings.ToLower(l.Fingerprint), l.SPKI,
		string(l.KeyAlgorithm), micro(l.NotBefore), micro(l.NotAfter), revokedAt, int64(reason), micro(op.At)); err != nil {
		return err
	}
	consumed := string(domain.IntentConsumed)
	n, err := t.exec("UPDATE intent SET state = $1 WHERE issuer_id = $2 AND serial = $3", consumed, l.IssuerID, l.Serial)
	if err != nil {
		return err
	}
	if n == 0 {
		if _, err := t.exec(`INSERT INTO intent (id, certificate_id, agent_id, generation, job_id, attempt, issuer_id, serial, tbs, order_key, ref, spki,
 state, recovery, created_at) VALUES ($1, $2, $3, $4, '', 0, $5, $6, NULL, '', '', $7, $8, 0, $9)`, intentID, l.CertificateID, l.AgentID,
			l.Generation, l.IssuerID, l.Serial, l.SPKI, consumed, micro(op.At)); err != nil {
			return err
		}
	}
	if l.Generation <= have.leaf.Current {
		return nil
	}
	// When it is due is for the renewal duty to say, which looks at it at once; while a job is open nothing is due.
	if _, err := t.exec(`UPDATE leaf SET current_generation = $1, serial = $2, not_before = $3, not_after = $4,
 due_at = CASE WHEN due_at IS NULL THEN NULL ELSE CAST($5 AS BIGINT) END WHERE certificate_id = $6 AND agent_id = $7`, l.Generation, l.Serial,
		micro(l.NotBefore), micro(l.NotAfter), micro(op.At), l.CertificateID, l.AgentID); err != nil {
		return err
	}
	if have.ended() == nil {
		if err := t.adoptPlacements(l, op); err != nil {
			return err
		}
	}
	return t.restatusLocked([]string{l.CertificateID}, op.At, true)
}

// adoptPlacements makes the agent's placements due, which most likely hold the leaf already: the deployment proves it. An
// open deployment of an older generation is moved.
func (t *tx) adoptPlacements(l domain.FoundLeaf, op domain.Op) error {
	key := leafID{l.CertificateID, l.AgentID}
	placements, err := t.placementsOf([]leafID{key})
	if err != nil {
		return err
	}
	due := map[placementID]time.Time{}
	var changes []change
	for _, at := range placements[key] {
		switch {
		case !at.hasOpen:
			due[placementID{l.CertificateID, at.target.ID}] = op.At
		case at.open.Kind == domain.JobDeployment && at.open.Generation < l.Generation:
			moved := at.open
			moved.Generation, moved.State, moved.Attempt, moved.Tries = l.Generation, moved.Kind.InitialState(), moved.Attempt+1, 0
			moved.AcceptedAt, moved.RunAt, moved.UpdatedAt = time.Time{}, domain.Micro(op.At), domain.Micro(op.At)
			changes = append(changes, change{at.open, moved})
		}
	}
	kept, err := t.saveJobs(changes)
	if err != nil {
		return err
	}
	if len(kept) != len(changes) {
		return errMoved
	}
	return t.placementsDue(due)
}

// ReadmitIdentity records a client certificate of an agent that the restore has lost: its holder has shown it, and the mesh CA
// has signed it, which the caller has verified. Conflict: it is of after the last recovery, or there was none; or it is
// known. Forbidden: the agent is retired. Whether it was revoked after the backup nobody knows.
func (s *Store) ReadmitIdentity(ctx context.Context, i domain.Identity, op domain.Op) error {
	if err := checkTexts("serial", i.Serial, "spki", i.SPKI); err != nil {
		return err
	}
	return s.settled(ctx, "identity.readmit", func(t *tx) error {
		recovery, err := t.recovery()
		if err != nil {
			return err
		}
		if recovery == 0 || i.NotBefore.After(fromMicro(recovery)) {
			return fault.New(fault.Conflict, "identity %s was not issued here, and the store was not recovered since it was made", i.Serial)
		}
		a, err := t.agent(i.AgentID)
		if err != nil {
			return err
		}
		if a.State == domain.AgentRetired {
			return fault.New(fault.Forbidden, "agent %q is retired", a.Name)
		}
		have, err := t.identity(i.Serial)
		if err == nil {
			if t.again && have.AgentID == a.ID {
				return nil
			}
			return fault.New(fault.Conflict, "identity %s is known", i.Serial)
		}
		if !fault.Is(err, fault.NotFound) {
			return err
		}
		if _, err := t.exec(`INSERT INTO agent_identity (serial, agent_id, spki, not_before, not_after, revoked_at, first_used_at, created_at, generation)
VALUES ($1, $2, $3, $4, $5, 0, $6, $6, $7)`, i.Serial, a.ID, i.SPKI, micro(i.NotBefore), micro(i.NotAfter), micro(op.At), max(i.Generation, 1)); err != nil {
			return err
		}
		return t.auditOp(op, "identity.readmitted", "agent/"+a.ID, map[string]string{"serial": i.Serial})
	})
}

// FoundLeaves lists the leaves that agents hold and no version could be made of, by issuer and serial. There are as many as
// orders were lost in restores.
func (s *Store) FoundLeaves(ctx context.Context) ([]domain.FoundLeaf, error) {
	var all []domain.FoundLeaf
	err := s.read(ctx, "leaf.found", func(t *tx) error {
		var err error
		all, err = collect(t, `SELECT issuer_id, serial, agent_id, certificate_id, generation, der, fingerprint, not_after, reason, revoked_at,
 revocation_reason, found_at FROM found_leaf ORDER BY issuer_id, serial`, nil, func(scan scanner) (domain.FoundLeaf, error) {
			var l domain.FoundLeaf
			var notAfter, foundAt int64
			var revokedAt sql.NullInt64
			err := scan(&l.IssuerID, &l.Serial, &l.AgentID, &l.CertificateID, &l.Generation, &l.DER, &l.Fingerprint, &notAfter, &l.Reason, &revokedAt,
				&l.RevocationReason, &foundAt)
			l.NotAfter, l.RevokedAt, l.FoundAt = fromMicro(notAfter), fromNull(revokedAt), fromMicro(foundAt)
			return l, err
		})
		return err
	})
	return all, err
}

// RevokeFoundLeaf puts a found leaf on its issuer's next CRL. Again it changes nothing. NotFound: no found leaf has the serial.
func (s *Store) RevokeFoundLeaf(ctx context.Context, serial string, reason domain.RevocationReason, op domain.Op) error {
	missing := fault.New(fault.NotFound, "no found leaf has the serial %q; certmeshd recover leaves lists them", serial)
	if !storable(serial) || serial == "" {
		return missing
	}
	return s.settled(ctx, "leaf.revoke_found", func(t *tx) error {
		n, err := t.count("SELECT COUNT(*) FROM found_leaf WHERE serial = $1", serial)
		if err != nil {
			return err
		}
		if n == 0 {
			return missing
		}
		changed, err := t.exec("UPDATE found_leaf SET revoked_at = $1, revocation_reason = $2 WHERE serial = $3 AND revoked_at IS NULL",
			micro(op.At), int64(reason), serial)
		if err != nil || changed == 0 {
			return err
		}
		return t.auditOp(op, "leaf.revoked", "serial/"+serial, map[string]string{"reason": strconv.FormatInt(int64(reason), 10)})
	})
}
