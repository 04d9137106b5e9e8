package store

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
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

// maxTargets bounds the placements that one order makes in one transaction.
const maxTargets = domain.MaxPageSize

// CreateCertificate records an order: the certificate with its names, a placement per target, and per agent a leaf of
// generation 1 with an Issuance job. IssuerID, ProfileID and TargetIDs may be names. The same order again under the same
// RequestID answers the same certificate and its first jobs as they are now; another order under it is a Conflict, and so
// is a name that is taken. Invalid: an issuer, profile or target that is not there or cannot be used.
func (s *Store) CreateCertificate(ctx context.Context, n domain.NewCertificate) (domain.Certificate, []domain.Job, error) {
	if err := prepareOrder(&n); err != nil {
		return domain.Certificate{}, nil, err
	}
	// One id for each agent that could be meant; made here, so that the transaction can be run again.
	ids := s.newIDs(id.Job, len(n.TargetIDs))
	var cert domain.Certificate
	var jobs []domain.Job
	err := s.settled(ctx, "certificate.create", func(t *tx) error {
		var err error
		cert, jobs, err = t.createCertificate(n, ids)
		return err
	})
	if err != nil {
		return domain.Certificate{}, nil, err
	}
	return cert, jobs, nil
}

// prepareOrder checks what needs no row and brings the order into the form in which it is kept.
func prepareOrder(n *domain.NewCertificate) error {
	c := &n.Certificate
	if err := certificateKind.check(c.ID, c.Name); err != nil {
		return err
	}
	if err := checkTexts("owner", c.Owner, "request_id", n.RequestID, "names.common_name", c.Names.CommonName); err != nil {
		return err
	}
	c.Names = domain.Names{CommonName: c.Names.CommonName, DNS: slices.Clone(c.Names.DNS), IP: slices.Clone(c.Names.IP),
		Email: slices.Clone(c.Names.Email), URI: slices.Clone(c.Names.URI)}
	sortNames(&c.Names)
	for _, san := range sanRows(c.Names) {
		if err := checkTexts("names."+san[0], san[1]); err != nil {
			return err
		}
	}
	switch {
	case len(n.TargetIDs) == 0:
		return fault.InvalidField("target_ids", "name at least one target; targets list shows them")
	case len(n.TargetIDs) > maxTargets:
		return fault.InvalidField("target_ids", "names %d targets and at most %d are allowed; order several certificates", len(n.TargetIDs), maxTargets)
	}
	n.TargetIDs = slices.Clone(n.TargetIDs)
	slices.Sort(n.TargetIDs)
	n.TargetIDs = slices.Compact(n.TargetIDs)
	if c.CreatedBy == "" {
		c.CreatedBy = n.Op.Actor
	}
	if c.CreatedAt.IsZero() {
		c.CreatedAt = n.Op.At
	}
	c.CreatedAt = domain.Micro(c.CreatedAt)
	c.UpdatedAt, c.NotAfter = c.CreatedAt, domain.Micro(c.NotAfter)
	c.Status, c.Revision = domain.CertificatePending, 1
	return nil
}

// sanRows are the rows (kind, value) of certificate_san.
func sanRows(n domain.Names) [][2]string {
	var rows [][2]string
	for _, form := range []struct {
		kind   string
		values []string
	}{{"dns", n.DNS}, {"ip", n.IP}, {"email", n.Email}, {"uri", n.URI}} {
		for _, v := range form.values {
			rows = append(rows, [2]string{form.kind, v})
		}
	}
	return rows
}

func (t *tx) createCertificate(n domain.NewCertificate, jobIDs []string) (domain.Certificate, []domain.Job, error) {
	fail := func(err error) (domain.Certificate, []domain.Job, error) { return domain.Certificate{}, nil, err }
	c := n.Certificate
	if t.again {
		if kept, err := t.exists("certificate", c.ID); err != nil {
			return fail(err)
		} else if kept {
			return t.ordered(c.ID)
		}
	}
	targets, err := t.orderTargets(n.TargetIDs)
	if err != nil {
		return fail(err)
	}
	if c.IssuerID, err = t.orderPart(issuerKind, "issuer_id", c.IssuerID); err != nil {
		return fail(err)
	}
	if c.ProfileID, err = t.orderPart(profileKind, "profile_id", c.ProfileID); err != nil {
		return fail(err)
	}
	if n.RequestID != "" {
		have, err := one(t, nil, "SELECT id FROM certificate WHERE request_id = $1", []any{n.RequestID}, scanText)
		if err != nil {
			return fail(err)
		}
		if have != "" {
			return t.repeated(have, c, targets)
		}
	}
	if err := usable(targets); err != nil {
		return fail(err)
	}
	policy, err := jsonText(c.Policy)
	if err != nil {
		return fail(err)
	}
	shard := domain.ShardOf(c.ID)
	// ON CONFLICT, because of two equal orders at once the second must not hear that its own name is taken: where it cannot
	// see the row it runs into, the engine answers 40001, and the next run finds the first order by its request id.
	created, err := t.exec(`INSERT INTO certificate (id, name, common_name, issuer_id, profile_id, owner, policy, status, not_after, status_at,
 shard, request_id, created_by, created_at, updated_at, revision)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 0, NULL, $9, $10, $11, $12, $12, $13) ON CONFLICT DO NOTHING`, c.ID, c.Name, c.Names.CommonName,
		c.IssuerID, c.ProfileID, c.Owner, policy, string(c.Status), shard, nullText(n.RequestID), c.CreatedBy, micro(c.CreatedAt), c.Revision)
	if err != nil {
		return fail(err)
	}
	if created == 0 {
		switch there, err := t.exists("certificate", c.ID); {
		case err != nil:
			return fail(err)
		case there:
			return fail(certificateKind.second())
		default:
			return fail(certificateKind.taken(c.Name))
		}
	}
	if err := t.free(targets); err != nil {
		return fail(err)
	}
	if err := chunks(sanRows(c.Names), func(rows [][2]string) error {
		v := t.values("kind text, value text")
		for _, r := range rows {
			v.add(r[0], r[1])
		}
		text := v.with()
		_, err := t.exec(text+`
INSERT INTO certificate_san (certificate_id, kind, value)
SELECT `+v.arg(c.ID)+`, v.kind, v.value FROM v WHERE v.kind IS NOT NULL`, v.args...)
		return err
	}); err != nil {
		return fail(err)
	}
	var agents []string
	for _, g := range targets {
		agents = append(agents, g.AgentID)
	}
	slices.Sort(agents)
	agents = slices.Compact(agents)
	if err := t.insertLeaves(c.ID, agents, shard); err != nil {
		return fail(err)
	}
	if err := t.insertPlacements(c, targets, shard); err != nil {
		return fail(err)
	}
	jobs := make([]domain.Job, len(agents))
	for i, a := range agents {
		jobs[i] = newJob(jobIDs[i], domain.JobIssuance, c.ID, a, "", 1, "ordered", n.Op.RequestID, n.Op.At)
		jobs[i].State = c.Policy.FirstState(domain.JobIssuance)
	}
	if err := t.createAll(jobs, n.Op); err != nil {
		return fail(err)
	}
	return c, jobs, t.auditOp(n.Op, "certificate.created", "certificate/"+c.ID, map[string]string{"name": c.Name,
		"issuer": c.IssuerID, "profile": c.ProfileID, "targets": strconv.Itoa(len(targets)), "agents": strconv.Itoa(len(agents))})
}

// orderPart resolves what an order names by id or name.
func (t *tx) orderPart(k kind, field, key string) (string, error) {
	found, err := find(t, k, "SELECT "+k.table+".id FROM "+k.table, key, scanText)
	if fault.Is(err, fault.NotFound) {
		return "", fault.InvalidField(field, "there is no %s %q; %s shows them", k.noun, key, k.list)
	}
	return found, err
}

// orderTarget is a target with the state of its agent.
type orderTarget struct {
	domain.Target
	agentState domain.AgentState
}

// orderTargets reads the targets that an order names by id or name, each once, by id.
func (t *tx) orderTargets(keys []string) ([]orderTarget, error) {
	byColumn := map[string][]string{}
	for _, k := range keys {
		if !storable(k) {
			return nil, missingTarget(k)
		}
		byColumn[targetKind.column(k)] = append(byColumn[targetKind.column(k)], k)
	}
	var all []orderTarget
	found := map[string]bool{}
	for _, column := range []string{"target.id", "target.name"} {
		err := chunks(byColumn[column], func(keys []string) error {
			in, args := inList(1, keys)
			return t.each("SELECT "+targetColumns+", agent.state FROM target JOIN agent ON agent.id = target.agent_id WHERE "+column+" IN "+in,
				args, func(scan func(...any) error) error {
					var r targetRow
					var state domain.AgentState
					err := scan(append(r.dest(), &state)...)
					all = append(all, orderTarget{r.toDomain(), state})
					found[r.ID], found[r.Name] = true, true
					return err
				})
		})
		if err != nil {
			return nil, err
		}
	}
	for _, k := range keys {
		if !found[k] {
			return nil, missingTarget(k)
		}
	}
	slices.SortFunc(all, func(a, b orderTarget) int { return strings.Compare(a.ID, b.ID) })
	return slices.CompactFunc(all, func(a, b orderTarget) bool { return a.ID == b.ID }), nil
}

func missingTarget(key string) error {
	return fault.InvalidField("target_ids", "there is no target %q; targets list shows them", key)
}

func usable(targets []orderTarget) error {
	for _, g := range targets {
		switch {
		case !g.Enabled:
			return fault.InvalidField("target_ids", "target %q is disabled; enable it or leave it out", g.Name)
		case g.agentState == domain.AgentRetired:
			return fault.InvalidField("target_ids", "target %q belongs to a retired agent; leave it out", g.Name)
		}
	}
	return nil
}

// free refuses an order at a target that holds another certificate: the later deployment would overwrite the former, and
// both would count as served. Revoked and archived certificates hold none.
func (t *tx) free(targets []orderTarget) error {
	return chunks(targets, func(targets []orderTarget) error {
		names := make(map[string]string, len(targets))
		ids := make([]string, len(targets))
		for i, g := range targets {
			ids[i], names[g.ID] = g.ID, g.Name
		}
		in, args := inList(3, ids)
		var target, holder string
		err := t.queryRow(`SELECT placement.target_id, certificate.name FROM placement JOIN certificate ON certificate.id = placement.certificate_id
WHERE certificate.status NOT IN ($1, $2) AND placement.target_id IN `+in+" ORDER BY placement.target_id LIMIT 1",
			append([]any{string(domain.CertificateRevoked), string(domain.CertificateArchived)}, args...)...).Scan(&target, &holder)
		switch {
		case isNoRows(err):
			return nil
		case err != nil:
			return err
		}
		return fault.New(fault.Conflict, "target %q holds certificate %q, and a target holds one; renew that certificate, or place this one at another target",
			names[target], holder)
	})
}

func (t *tx) insertLeaves(certificateID string, agents []string, shard int) error {
	return chunks(agents, func(agents []string) error {
		v := t.values("a text")
		for _, a := range agents {
			v.add(a)
		}
		text := v.with()
		_, err := t.exec(text+`
INSERT INTO leaf (certificate_id, agent_id, generation, current_generation, serial, not_before, not_after, due_at, failures,
 backoff_until, last_error, revoked, shard)
SELECT `+v.arg(certificateID)+`, v.a, 1, 0, '', 0, 0, NULL, 0, 0, '', FALSE, `+v.arg(shard)+` FROM v WHERE v.a IS NOT NULL`, v.args...)
		return err
	})
}

func (t *tx) insertPlacements(c domain.Certificate, targets []orderTarget, shard int) error {
	return chunks(targets, func(targets []orderTarget) error {
		v := t.values("x text, a text")
		for _, g := range targets {
			v.add(g.ID, g.AgentID)
		}
		text := v.with()
		_, err := t.exec(text+`
INSERT INTO placement (certificate_id, target_id, agent_id, state, installed_generation, served_generation, installed_fingerprint,
 served_fingerprint, served_at, due_at, failures, backoff_until, last_error, shard, updated_at)
SELECT `+v.arg(c.ID)+`, v.x, v.a, `+v.arg(string(domain.PlacementPending))+`, 0, 0, '', '', 0, NULL, 0, 0, '', `+v.arg(shard)+`, `+
			v.arg(micro(c.CreatedAt))+` FROM v WHERE v.x IS NOT NULL`, v.args...)
		return err
	})
}

// ordered answers for an order that was kept before.
func (t *tx) ordered(certificateID string) (domain.Certificate, []domain.Job, error) {
	c, err := t.certificate(certificateID)
	if err != nil {
		return c, nil, err
	}
	jobs, err := collect(t, "SELECT "+jobColumns+" FROM job WHERE job.certificate_id = $1 AND job.kind = $2 AND job.generation = 1 ORDER BY job.agent_id",
		[]any{certificateID, string(domain.JobIssuance)}, scanJob)
	return c, jobs, err
}

// repeated answers for an order under a request id that was used: only if it asks for the same.
func (t *tx) repeated(certificateID string, c domain.Certificate, targets []orderTarget) (domain.Certificate, []domain.Job, error) {
	have, jobs, err := t.ordered(certificateID)
	if err != nil {
		return have, nil, err
	}
	placed, err := collect(t, "SELECT target_id FROM placement WHERE certificate_id = $1", []any{certificateID}, scanText)
	if err != nil {
		return have, nil, err
	}
	var wanted []string
	for _, g := range targets {
		wanted = append(wanted, g.ID)
	}
	slices.Sort(placed)
	was, err := orderText(have, placed)
	if err != nil {
		return have, nil, err
	}
	is, err := orderText(c, wanted)
	if err != nil {
		return have, nil, err
	}
	if was != is {
		return domain.Certificate{}, nil, fault.New(fault.Conflict,
			"certificate %q was ordered with this request id, and differently; use a new request id for a new order", have.Name)
	}
	return have, jobs, nil
}

// orderText is what an operator asked for, in a form that can be compared.
func orderText(c domain.Certificate, targets []string) (string, error) {
	return jsonText([]any{c.Name, c.Names, c.IssuerID, c.ProfileID, c.Owner, c.Policy, c.CreatedBy, targets})
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
