package store

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

var (
	certificateKind = kind{noun: "certificate", table: "certificate", prefix: id.Certificate, list: "certs list", get: "certs get"}
	jobKind         = kind{noun: "job", table: "job", prefix: id.Job, list: "jobs list", get: "jobs get"}
)

const certificateColumns = `certificate.id, certificate.name, certificate.common_name, certificate.issuer_id, certificate.profile_id,
 certificate.owner, certificate.policy, certificate.status, certificate.not_after, certificate.created_by, certificate.created_at,
 certificate.updated_at, certificate.revision`

type certificateRow struct {
	domain.Certificate
	policy                         string
	notAfter, createdAt, updatedAt int64
}

func (r *certificateRow) dest() []any {
	return []any{&r.ID, &r.Name, &r.Names.CommonName, &r.IssuerID, &r.ProfileID, &r.Owner, &r.policy, &r.Status, &r.notAfter,
		&r.CreatedBy, &r.createdAt, &r.updatedAt, &r.Revision}
}

func (r *certificateRow) toDomain() (domain.Certificate, error) {
	c := r.Certificate
	c.NotAfter, c.CreatedAt, c.UpdatedAt = fromMicro(r.notAfter), fromMicro(r.createdAt), fromMicro(r.updatedAt)
	return c, fromJSON(r.policy, &c.Policy)
}

// scanCertificate reads all but the alternative names (sans).
func scanCertificate(scan scanner) (domain.Certificate, error) {
	var r certificateRow
	if err := scan(r.dest()...); err != nil {
		return domain.Certificate{}, err
	}
	return r.toDomain()
}

// certificate reads a certificate with its names by its id or name.
func (t *tx) certificate(idOrName string) (domain.Certificate, error) {
	c, err := find(t, certificateKind, "SELECT "+certificateColumns+" FROM certificate", idOrName, scanCertificate)
	if err != nil {
		return c, err
	}
	all := []domain.Certificate{c}
	err = t.sans(all)
	return all[0], err
}

// sans adds the alternative names, each form sorted.
func (t *tx) sans(certs []domain.Certificate) error {
	if len(certs) == 0 {
		return nil
	}
	at := make(map[string]*domain.Names, len(certs))
	ids := make([]string, len(certs))
	for i := range certs {
		ids[i] = certs[i].ID
		at[ids[i]] = &certs[i].Names
	}
	in, args := inList(1, ids)
	err := t.each("SELECT certificate_id, kind, value FROM certificate_san WHERE certificate_id IN "+in, args,
		func(scan func(...any) error) error {
			var id, kind, value string
			if err := scan(&id, &kind, &value); err != nil {
				return err
			}
			return addName(at[id], kind, value)
		})
	for _, n := range at {
		sortNames(n)
	}
	return err
}

// sortNames puts names into the form in which they are kept: sorted in byte order whatever an engine's collation, and
// each once.
func sortNames(n *domain.Names) {
	for _, form := range []*[]string{&n.DNS, &n.IP, &n.Email, &n.URI} {
		slices.Sort(*form)
		*form = slices.Compact(*form)
	}
}

// certificateLeaves reads a certificate's leaves by agent.
func (t *tx) certificateLeaves(certificateID string) ([]domain.Leaf, error) {
	return collect(t, "SELECT "+leafColumns+" FROM leaf WHERE leaf.certificate_id = $1 ORDER BY leaf.agent_id",
		[]any{certificateID}, scanLeaf)
}

// RenewCertificate opens a renewal (an issuance where nothing is issued yet) for every leaf of a certificate (id or name)
// at once, whatever its back-off, or returns the job that is open; by agent. Leaves that are revoked or at retired agents
// are left out. Conflict when none is left, or the certificate is revoked or archived.
func (s *Store) RenewCertificate(ctx context.Context, certificateID, reason string, op domain.Op) ([]domain.Job, error) {
	if err := checkTexts("reason", reason); err != nil {
		return nil, err
	}
	var jobs []domain.Job
	err := s.settled(ctx, "certificate.renew", func(t *tx) error {
		c, err := find(t, certificateKind, "SELECT "+certificateColumns+" FROM certificate", certificateID, scanCertificate)
		if err != nil {
			return err
		}
		if c.Status == domain.CertificateRevoked || c.Status == domain.CertificateArchived {
			return fault.New(fault.Conflict, "certificate %q is %s and is not renewed; order a new one with certs create", c.Name, c.Status)
		}
		leaves, err := t.certificateLeaves(c.ID)
		if err != nil {
			return err
		}
		var items []domain.NewJob
		for _, l := range leaves {
			if !l.Revoked {
				items = append(items, domain.NewJob{CertificateID: c.ID, AgentID: l.AgentID, Reason: reason})
			}
		}
		outs, err := t.openLeafJobs(items, t.s.newIDs(id.Job, len(items)), op)
		if err != nil {
			return err
		}
		jobs = nil
		created := 0
		for _, o := range outs {
			if o.Err == nil {
				jobs = append(jobs, o.Job)
			}
			if o.Created {
				created++
			}
		}
		if len(jobs) == 0 {
			return fault.New(fault.Conflict, "certificate %q has no leaf left to renew: all are revoked or at retired agents; order a new one with certs create", c.Name)
		}
		if created == 0 {
			return nil
		}
		if _, err := t.exec("UPDATE leaf SET backoff_until = 0 WHERE certificate_id = $1 AND due_at IS NULL AND backoff_until > 0", c.ID); err != nil {
			return err
		}
		return t.auditOp(op, "certificate.renewal_ordered", "certificate/"+c.ID, map[string]string{"reason": reason, "jobs": strconv.Itoa(created)})
	})
	return jobs, err
}

// RevokeCertificate revokes every version of a certificate (id or name) that has not expired, cancels its open jobs,
// abandons what was about to be signed, and makes it Revoked for good: nothing of it is due any more. It returns the
// serials that are revoked and have not expired, sorted. Once more it changes nothing and answers the same.
func (s *Store) RevokeCertificate(ctx context.Context, certificateID string, reason domain.RevocationReason, op domain.Op) (domain.Certificate, []string, error) {
	var cert domain.Certificate
	var serials []string
	err := s.settled(ctx, "certificate.revoke", func(t *tx) error {
		c, err := t.certificate(certificateID)
		if err != nil {
			return err
		}
		if c.Status != domain.CertificateRevoked {
			if c, err = t.revokeCertificate(c, reason, op); err != nil {
				return err
			}
		}
		serials, err = collect(t, `SELECT serial FROM version WHERE certificate_id = $1 AND revoked_at IS NOT NULL AND not_after > $2`,
			[]any{c.ID, micro(op.At)}, scanText)
		slices.Sort(serials)
		cert = c
		return err
	})
	if err != nil {
		return domain.Certificate{}, nil, err
	}
	return cert, serials, nil
}

func (t *tx) revokeCertificate(c domain.Certificate, reason domain.RevocationReason, op domain.Op) (domain.Certificate, error) {
	now := micro(op.At)
	n, err := t.exec(`UPDATE certificate SET status = $1, status_at = NULL, updated_at = $2, revision = revision + 1
WHERE id = $3 AND revision = $4`, string(domain.CertificateRevoked), now, c.ID, c.Revision)
	if err != nil {
		return c, err
	}
	if n != 1 {
		return c, errMoved
	}
	c.Status, c.UpdatedAt, c.Revision = domain.CertificateRevoked, domain.Micro(op.At), c.Revision+1
	revoked, err := t.exec(`UPDATE version SET revoked_at = $1, revocation_reason = $2
WHERE certificate_id = $3 AND revoked_at IS NULL AND not_after > $1`, now, int(reason), c.ID)
	if err != nil {
		return c, err
	}
	jobs, err := t.cancelJobs("job.certificate_id", c.ID, "the certificate was revoked", op)
	if err != nil {
		return c, err
	}
	if _, err := t.exec("UPDATE leaf SET revoked = TRUE, due_at = NULL WHERE certificate_id = $1", c.ID); err != nil {
		return c, err
	}
	if _, err := t.exec("UPDATE placement SET due_at = NULL, updated_at = $1 WHERE certificate_id = $2 AND due_at IS NOT NULL", now, c.ID); err != nil {
		return c, err
	}
	return c, t.auditOp(op, "certificate.revoked", "certificate/"+c.ID, map[string]string{"reason": reason.String(),
		"versions": strconv.FormatInt(revoked, 10), "jobs": strconv.Itoa(len(jobs))})
}

// cancelJobs ends all open jobs of an agent or a certificate (column) because nothing of it is wanted any more, and
// abandons the intents that they would have signed. The caller settles leaves, placements and status.
func (t *tx) cancelJobs(column, key, why string, op domain.Op) ([]domain.Job, error) {
	open, err := collect(t, "SELECT "+jobColumns+" FROM job WHERE "+column+" = $1 AND job.finished_at IS NULL ORDER BY job.id", []any{key}, scanJob)
	if err != nil {
		return nil, err
	}
	changes := make([]change, len(open))
	for i, j := range open {
		changes[i] = change{j, cancelled(j, why, op)}
		open[i] = changes[i].after
		if err := t.auditOp(op, "job.cancelled", "job/"+j.ID, map[string]string{"certificate": j.CertificateID, "reason": why}); err != nil {
			return nil, err
		}
	}
	kept, err := t.saveJobs(changes)
	if err != nil {
		return nil, err
	}
	if len(kept) != len(changes) {
		return nil, errMoved
	}
	// By certificate, because that leads the key of intents; an agent's certificates are those of its open jobs: an intent
	// is open only while its job is.
	return open, chunks(leafCertificates(open), func(ids []string) error {
		in, args := inList(4, ids)
		agent := ""
		if column == "job.agent_id" {
			agent = key
		}
		_, err := t.exec("UPDATE intent SET state = $1 WHERE state = $2 AND (agent_id = $3 OR $3 = '') AND certificate_id IN "+in,
			append([]any{string(domain.IntentAbandoned), string(domain.IntentOpen), agent}, args...)...)
		return err
	})
}

func cancelled(j domain.Job, why string, op domain.Op) domain.Job {
	j.State, j.Error, j.ErrorClass = domain.JobCancelled, why, ""
	j.AcceptedAt, j.UpdatedAt, j.FinishedAt = time.Time{}, domain.Micro(op.At), domain.Micro(op.At)
	return j
}

// leafCertificates are the certificates of issuance and renewal jobs, sorted.
func leafCertificates(jobs []domain.Job) []string {
	var ids []string
	for _, j := range jobs {
		if forLeaf(j.Kind) {
			ids = append(ids, j.CertificateID)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// CancelJob ends an open job as an operator wishes. What it was for is still wanted: its leaf or placement is due again
// after an hour's rest. A job that is Cancelled is returned as it is; Conflict when it is Completed or Failed.
func (s *Store) CancelJob(ctx context.Context, jobID string, op domain.Op) (domain.Job, error) {
	var job domain.Job
	err := s.settled(ctx, "job.cancel", func(t *tx) error {
		j, err := t.job(jobID)
		if err != nil {
			return err
		}
		if j.State == domain.JobCancelled {
			job = j
			return nil
		}
		if !j.State.Open() {
			return fault.New(fault.Conflict, "job %s is %s; only a job that is not finished can be cancelled", j.ID, j.State)
		}
		if job, err = t.cancelOne(j, "cancelled by "+op.Actor, op); err != nil {
			return err
		}
		return t.auditOp(op, "job.cancelled", "job/"+j.ID, map[string]string{"certificate": j.CertificateID, "before": string(j.State),
			"attempt": fmt.Sprint(j.Attempt)})
	})
	return job, err
}

// cancelOne cancels an open job and lets rest what it was for.
func (t *tx) cancelOne(j domain.Job, why string, op domain.Op) (domain.Job, error) {
	done := cancelled(j, why, op)
	kept, err := t.saveJobs([]change{{j, done}})
	if err != nil {
		return j, err
	}
	if !kept[j.ID] {
		return j, errMoved
	}
	rest := t.restPlacements
	if forLeaf(j.Kind) {
		rest = t.restLeaves
	}
	if err := rest([]domain.Job{done}); err != nil {
		return j, err
	}
	return done, t.restatus(leafCertificates([]domain.Job{done}), op.At)
}

func (t *tx) job(jobID string) (domain.Job, error) {
	missing := jobKind.missing(jobID)
	if !storable(jobID) {
		return domain.Job{}, missing
	}
	return one(t, missing, "SELECT "+jobColumns+" FROM job WHERE job.id = $1", []any{jobID}, scanJob)
}
