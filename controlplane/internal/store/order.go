package store

import (
	"context"
	"slices"
	"strconv"
	"strings"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

// maxTargets bounds the placements that one order makes in one transaction.
const maxTargets = domain.MaxPageSize

// CreateCertificate records an order: the certificate with its names, a placement per target, and per agent a leaf of
// generation 1 with an Issuance job. IssuerID, ProfileID and TargetIDs may be names. The same order again under the same
// RequestID answers the same certificate and its first jobs as they are now; another order under it is a Conflict, and so
// is a name that is taken. Invalid: an issuer, profile or target that is not there or cannot be used. Orders at the same
// time share a commit; what is wrong with one is found before anything of it is written, and leaves the others alone.
func (s *Store) CreateCertificate(ctx context.Context, n domain.NewCertificate) (domain.Certificate, []domain.Job, error) {
	if err := prepareOrder(&n); err != nil {
		return domain.Certificate{}, nil, err
	}
	// One id for each agent that could be meant; made here, so that the transaction can be run again.
	o := s.batches.orders.do(ctx, []newOrder{{n, s.newIDs(id.Job, len(n.TargetIDs))}})[0]
	return o.cert, o.jobs, o.err
}

// newOrder is an order that has been prepared, with ids for its jobs.
type newOrder struct {
	domain.NewCertificate
	jobIDs []string
}

// key keeps an order and its repetition out of one transaction: the later is answered by what the former has kept.
func (n newOrder) key() string {
	if n.RequestID != "" {
		return n.RequestID
	}
	return n.Certificate.ID
}

type orderOutcome struct {
	cert domain.Certificate
	jobs []domain.Job
	err  error
	// sites are the targets of an order that is to be written.
	sites []orderTarget
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

func (s *Store) orderAll(ctx context.Context, items []newOrder) ([]orderOutcome, error) {
	var outs []orderOutcome
	err := s.settled(ctx, "certificate.create", func(t *tx) error {
		outs = make([]orderOutcome, len(items))
		good, err := t.judgeOrders(items, outs)
		if err != nil || len(good) == 0 {
			return err
		}
		return t.writeOrders(items, good, outs)
	})
	return outs, err
}

// judgeOrders answers what needs no writing (refusals, repetitions) and returns the others, with the ids of what they
// name filled in. An order sees those before it as if they were written.
func (t *tx) judgeOrders(items []newOrder, outs []orderOutcome) (good []int, err error) {
	var ids, names, requests, targets []string
	for _, it := range items {
		ids, names = append(ids, it.Certificate.ID), append(names, it.Certificate.Name)
		targets = append(targets, it.TargetIDs...)
		if it.RequestID != "" {
			requests = append(requests, it.RequestID)
		}
	}
	haveID, err := t.certificatesBy("certificate.id", ids)
	if err != nil {
		return nil, err
	}
	haveName, err := t.certificatesBy("certificate.name", names)
	if err != nil {
		return nil, err
	}
	haveRequest, err := t.certificatesBy("certificate.request_id", requests)
	if err != nil {
		return nil, err
	}
	found, err := t.orderTargets(targets)
	if err != nil {
		return nil, err
	}
	holders, err := t.holders(found)
	if err != nil {
		return nil, err
	}
	parts := map[kind]map[string]partOutcome{issuerKind: {}, profileKind: {}}
	judge := func(it newOrder) (o orderOutcome, fresh bool, err error) {
		c := it.Certificate
		if _, kept := haveID[c.ID]; kept && t.again {
			o, err := t.ordered(c.ID)
			return o, false, err
		}
		sites, err := pick(found, it.TargetIDs)
		if err != nil {
			return orderOutcome{err: err}, false, nil //nolint:nilerr // this order is refused; the others of its batch go on
		}
		for _, p := range []struct {
			kind  kind
			field string
			key   *string
		}{{issuerKind, "issuer_id", &c.IssuerID}, {profileKind, "profile_id", &c.ProfileID}} {
			part, err := t.orderPart(parts[p.kind], p.kind, p.field, *p.key)
			if err != nil {
				return o, false, err
			}
			if part.refused != nil {
				return orderOutcome{err: part.refused}, false, nil //nolint:nilerr // as above
			}
			*p.key = part.id
		}
		o.cert, o.sites = c, sites
		if have := haveRequest[it.RequestID]; have != "" {
			o, err := t.repeated(have, c, sites)
			return o, false, err
		}
		if o.err = usable(sites); o.err != nil {
			return o, false, nil //nolint:nilerr // as above
		}
		if _, taken := haveID[c.ID]; taken {
			o.err = certificateKind.second()
		} else if _, taken := haveName[c.Name]; taken {
			o.err = certificateKind.taken(c.Name)
		} else {
			o.err = free(sites, holders)
		}
		return o, o.err == nil, nil
	}
	for i, it := range items {
		var fresh bool
		if outs[i], fresh, err = judge(it); err != nil {
			return nil, err
		}
		if outs[i].err != nil {
			outs[i] = orderOutcome{err: outs[i].err}
		}
		if !fresh {
			continue
		}
		good = append(good, i)
		c := outs[i].cert
		haveID[c.ID], haveName[c.Name] = c.ID, c.ID
		for _, g := range outs[i].sites {
			holders[g.ID] = c.Name
		}
	}
	return good, nil
}

// certificatesBy returns the ids of certificates by a unique column's values.
func (t *tx) certificatesBy(column string, values []string) (map[string]string, error) {
	found := map[string]string{}
	err := chunks(values, func(values []string) error {
		in, args := inList(1, values)
		return t.each("SELECT "+column+", certificate.id FROM certificate WHERE "+column+" IN "+in, args, func(scan func(...any) error) error {
			var value, id string
			err := scan(&value, &id)
			found[value] = id
			return err
		})
	})
	return found, err
}

// writeOrders writes what judgeOrders found good. Rows that come in between are met by the unique keys: the engine answers
// 40001, or the counts differ, and the next run judges again.
func (t *tx) writeOrders(items []newOrder, good []int, outs []orderOutcome) error {
	created := int64(0)
	err := chunks(good, func(good []int) error {
		v := t.values(`id text, name text, cn text, issuer text, profile text, owner text, policy text, status text, shard int,
request text, actor text, at int, revision int`)
		for _, i := range good {
			c := outs[i].cert
			policy, err := jsonText(c.Policy)
			if err != nil {
				return err
			}
			v.add(c.ID, c.Name, c.Names.CommonName, c.IssuerID, c.ProfileID, c.Owner, policy, string(c.Status), domain.ShardOf(c.ID),
				nullText(items[i].RequestID), c.CreatedBy, micro(c.CreatedAt), c.Revision)
		}
		n, err := t.exec(v.with()+`
INSERT INTO certificate (id, name, common_name, issuer_id, profile_id, owner, policy, status, not_after, status_at,
 shard, request_id, created_by, created_at, updated_at, revision)
SELECT v.id, v.name, v.cn, v.issuer, v.profile, v.owner, v.policy, v.status, 0, NULL, v.shard, v.request, v.actor, v.at, v.at, v.revision
FROM v WHERE v.id IS NOT NULL ON CONFLICT DO NOTHING`, v.args...)
		created += n
		return err
	})
	if err != nil {
		return err
	}
	if int(created) != len(good) {
		return errMoved
	}
	var sans []sanRow
	var leaves []domain.Leaf
	var placements []domain.Placement
	var jobs []domain.Job
	for _, i := range good {
		c, op := outs[i].cert, items[i].Op
		for _, r := range sanRows(c.Names) {
			sans = append(sans, sanRow{c.ID, r[0], r[1]})
		}
		var agents []string
		for _, g := range outs[i].sites {
			agents = append(agents, g.AgentID)
			placements = append(placements, domain.Placement{CertificateID: c.ID, TargetID: g.ID, AgentID: g.AgentID, UpdatedAt: c.CreatedAt})
		}
		slices.Sort(agents)
		agents = slices.Compact(agents)
		for n, a := range agents {
			leaves = append(leaves, domain.Leaf{CertificateID: c.ID, AgentID: a})
			j := newJob(items[i].jobIDs[n], domain.JobIssuance, c.ID, a, "", 1, "ordered", op.RequestID, op.At)
			j.State = c.Policy.FirstState(domain.JobIssuance)
			outs[i].jobs = append(outs[i].jobs, j)
			if err := t.auditOp(op, "job.created", "job/"+j.ID, createdDetail(j)); err != nil {
				return err
			}
		}
		jobs = append(jobs, outs[i].jobs...)
		if err := t.auditOp(op, "certificate.created", "certificate/"+c.ID, map[string]string{"name": c.Name, "issuer": c.IssuerID,
			"profile": c.ProfileID, "targets": strconv.Itoa(len(outs[i].sites)), "agents": strconv.Itoa(len(agents))}); err != nil {
			return err
		}
	}
	if err := chunks(sans, t.insertSANs); err != nil {
		return err
	}
	if err := chunks(leaves, t.insertLeaves); err != nil {
		return err
	}
	if err := chunks(placements, t.insertPlacements); err != nil {
		return err
	}
	opened, err := t.insertJobs(jobs)
	if err == nil && len(opened) != len(jobs) {
		err = errMoved
	}
	return err
}

// partOutcome is the id of what an order names by id or name, or why it is refused.
type partOutcome struct {
	id      string
	refused error
}

// orderPart resolves what an order names by id or name, each once a batch.
func (t *tx) orderPart(known map[string]partOutcome, k kind, field, key string) (partOutcome, error) {
	if part, ok := known[key]; ok {
		return part, nil
	}
	var part partOutcome
	var err error
	part.id, err = find(t, k, "SELECT "+k.table+".id FROM "+k.table, key, scanText)
	if fault.Is(err, fault.NotFound) {
		part.refused, err = fault.InvalidField(field, "there is no %s %q; %s shows them", k.noun, key, k.list), nil
	}
	if err == nil {
		known[key] = part
	}
	return part, err
}

// orderTarget is a target with the state of its agent.
type orderTarget struct {
	domain.Target
	agentState domain.AgentState
}

// orderTargets reads the targets that orders name by id or name, under both.
func (t *tx) orderTargets(keys []string) (map[string]orderTarget, error) {
	byColumn := map[string][]string{}
	for _, k := range keys {
		if storable(k) {
			byColumn[targetKind.column(k)] = append(byColumn[targetKind.column(k)], k)
		}
	}
	found := map[string]orderTarget{}
	for _, column := range []string{"target.id", "target.name"} {
		keys := byColumn[column]
		slices.Sort(keys)
		err := chunks(slices.Compact(keys), func(keys []string) error {
			in, args := inList(1, keys)
			return t.each("SELECT "+targetColumns+", agent.state FROM target JOIN agent ON agent.id = target.agent_id WHERE "+column+" IN "+in,
				args, func(scan func(...any) error) error {
					var r targetRow
					var state domain.AgentState
					err := scan(append(r.dest(), &state)...)
					g := orderTarget{r.toDomain(), state}
					found[r.ID], found[r.Name] = g, g
					return err
				})
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

// pick returns the targets that one order names, each once, by id.
func pick(found map[string]orderTarget, keys []string) ([]orderTarget, error) {
	all := make([]orderTarget, 0, len(keys))
	for _, k := range keys {
		g, ok := found[k]
		if !ok {
			return nil, missingTarget(k)
		}
		all = append(all, g)
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

// holders are the names of the certificates that targets hold. Revoked and archived certificates hold none.
func (t *tx) holders(targets map[string]orderTarget) (map[string]string, error) {
	var ids []string
	for _, g := range targets {
		ids = append(ids, g.ID)
	}
	slices.Sort(ids)
	holders := map[string]string{}
	err := chunks(slices.Compact(ids), func(ids []string) error {
		in, args := inList(3, ids)
		return t.each(`SELECT placement.target_id, certificate.name FROM placement JOIN certificate ON certificate.id = placement.certificate_id
WHERE certificate.status NOT IN ($1, $2) AND placement.target_id IN `+in,
			append([]any{string(domain.CertificateRevoked), string(domain.CertificateArchived)}, args...), func(scan func(...any) error) error {
				var target, holder string
				err := scan(&target, &holder)
				holders[target] = holder
				return err
			})
	})
	return holders, err
}

// free refuses an order at a target that holds another certificate: the later deployment would overwrite the former, and
// both would count as served.
func free(targets []orderTarget, holders map[string]string) error {
	for _, g := range targets {
		if holder, held := holders[g.ID]; held {
			return fault.New(fault.Conflict, "target %q holds certificate %q, and a target holds one; renew that certificate, or place this one at another target",
				g.Name, holder)
		}
	}
	return nil
}

// sanRow is a row of certificate_san.
type sanRow struct{ certificateID, kind, value string }

func (t *tx) insertSANs(rows []sanRow) error {
	v := t.values("c text, kind text, value text")
	for _, r := range rows {
		v.add(r.certificateID, r.kind, r.value)
	}
	_, err := t.exec(v.with()+`
INSERT INTO certificate_san (certificate_id, kind, value)
SELECT v.c, v.kind, v.value FROM v WHERE v.kind IS NOT NULL`, v.args...)
	return err
}

func (t *tx) insertLeaves(leaves []domain.Leaf) error {
	v := t.values("c text, a text, shard int")
	for _, l := range leaves {
		v.add(l.CertificateID, l.AgentID, domain.ShardOf(l.CertificateID))
	}
	_, err := t.exec(v.with()+`
INSERT INTO leaf (certificate_id, agent_id, generation, current_generation, serial, not_before, not_after, due_at, failures,
 backoff_until, last_error, revoked, shard)
SELECT v.c, v.a, 1, 0, '', 0, 0, NULL, 0, 0, '', FALSE, v.shard FROM v WHERE v.a IS NOT NULL`, v.args...)
	return err
}

func (t *tx) insertPlacements(placements []domain.Placement) error {
	v := t.values("c text, x text, a text, shard int, at int")
	for _, p := range placements {
		v.add(p.CertificateID, p.TargetID, p.AgentID, domain.ShardOf(p.CertificateID), micro(p.UpdatedAt))
	}
	text := v.with()
	_, err := t.exec(text+`
INSERT INTO placement (certificate_id, target_id, agent_id, state, installed_generation, served_generation, installed_fingerprint,
 served_fingerprint, served_at, due_at, failures, backoff_until, last_error, shard, updated_at)
SELECT v.c, v.x, v.a, `+v.arg(string(domain.PlacementPending))+`, 0, 0, '', '', 0, NULL, 0, 0, '', v.shard, v.at
FROM v WHERE v.x IS NOT NULL`, v.args...)
	return err
}

// ordered answers for an order that was kept before.
func (t *tx) ordered(certificateID string) (orderOutcome, error) {
	c, err := t.certificate(certificateID)
	if err != nil {
		return orderOutcome{}, err
	}
	jobs, err := collect(t, "SELECT "+jobColumns+" FROM job WHERE job.certificate_id = $1 AND job.kind = $2 AND job.generation = 1 ORDER BY job.agent_id",
		[]any{certificateID, string(domain.JobIssuance)}, scanJob)
	return orderOutcome{cert: c, jobs: jobs}, err
}

// repeated answers for an order under a request id that was used: only if it asks for the same.
func (t *tx) repeated(certificateID string, c domain.Certificate, targets []orderTarget) (orderOutcome, error) {
	have, err := t.ordered(certificateID)
	if err != nil {
		return have, err
	}
	placed, err := collect(t, "SELECT target_id FROM placement WHERE certificate_id = $1", []any{certificateID}, scanText)
	if err != nil {
		return have, err
	}
	var wanted []string
	for _, g := range targets {
		wanted = append(wanted, g.ID)
	}
	slices.Sort(placed)
	was, err := orderText(have.cert, placed)
	if err != nil {
		return have, err
	}
	is, err := orderText(c, wanted)
	if err != nil {
		return have, err
	}
	if was != is {
		return orderOutcome{err: fault.New(fault.Conflict,
			"certificate %q was ordered with this request id, and differently; use a new request id for a new order", have.cert.Name)}, nil
	}
	return have, nil
}

// orderText is what an operator asked for, in a form that can be compared.
func orderText(c domain.Certificate, targets []string) (string, error) {
	return jsonText([]any{c.Name, c.Names, c.IssuerID, c.ProfileID, c.Owner, c.Policy, c.CreatedBy, targets})
}
