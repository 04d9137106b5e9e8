package store

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
)

// CertificateView returns a certificate (id or name) with its leaves by agent and its placements by target.
func (s *Store) CertificateView(ctx context.Context, idOrName string) (domain.CertificateView, error) {
	var view domain.CertificateView
	err := s.read(ctx, "certificate.get", func(t *tx) error {
		v := domain.CertificateView{TargetNames: map[string]string{}}
		var err error
		if v.Certificate, err = t.certificate(idOrName); err != nil {
			return err
		}
		if v.Leaves, err = t.certificateLeaves(v.Certificate.ID); err != nil {
			return err
		}
		v.Placements, err = collect(t, "SELECT "+placementColumns+`, target.name FROM placement JOIN target ON target.id = placement.target_id
WHERE placement.certificate_id = $1 ORDER BY placement.target_id`, []any{v.Certificate.ID}, func(scan scanner) (domain.Placement, error) {
			var r placementRow
			var name string
			err := scan(append(r.dest(), &name)...)
			v.TargetNames[r.TargetID] = name
			return r.toDomain(), err
		})
		view = v
		return err
	})
	return view, err
}

// Certificates lists certificates as the filter says (domain.CertificateListings are the ways), with how many of their
// placements hold what is wanted, and the cursor of the next page. Issuer, profile and agent are ids or names; a
// NamePrefix is taken literally.
func (s *Store) Certificates(ctx context.Context, f domain.CertificateFilter, p domain.PageRequest) ([]domain.Certificate, map[string]domain.PlacementCounts, string, error) {
	if err := checkTexts("status", string(f.Status), "owner", f.Owner, "name_prefix", f.NamePrefix); err != nil {
		return nil, nil, "", err
	}
	listing, err := f.Listing()
	if err != nil {
		return nil, nil, "", err
	}
	size, after, err := certificateCursor(f, listing, p)
	if err != nil {
		return nil, nil, "", err
	}
	var all []domain.Certificate
	var next string
	var counts map[string]domain.PlacementCounts
	err = s.read(ctx, "certificate.list", func(t *tx) error {
		q, err := t.certificateQuery(f, listing)
		if err != nil {
			return err
		}
		if all, err = readPage(t, q, size, after, scanCertificate); err != nil {
			return err
		}
		all, next = nextCursor(all, size, func(c domain.Certificate) string {
			switch listing.Order {
			case domain.ByName:
				return listPosition(certificateKind.table, listing, c.Name)
			case domain.ByExpiry:
				return listPosition(certificateKind.table, listing, strconv.FormatInt(micro(c.NotAfter), 10), c.ID)
			}
			return listPosition(certificateKind.table, listing, c.ID)
		})
		if err := t.sans(all); err != nil {
			return err
		}
		counts, err = t.placementCounts(all)
		return err
	})
	if err != nil {
		return nil, nil, "", err
	}
	return all, counts, next, nil
}

// certificateCursor reads the cursor into the values of the columns that order the list.
func certificateCursor(f domain.CertificateFilter, of domain.Sorted, p domain.PageRequest) (size int, after []any, err error) {
	parts := 1
	if of.Order == domain.ByExpiry {
		parts = 2
	}
	size, at, err := listCursor(p, certificateKind.table, of, parts)
	if err != nil || at == nil {
		return size, nil, err
	}
	key := at[parts-1]
	if of.Order == domain.ByName {
		if !strings.HasPrefix(key, f.NamePrefix) {
			return 0, nil, errCursor()
		}
		return size, []any{key}, nil
	}
	if !strings.HasPrefix(key, id.Certificate+"_") {
		return 0, nil, errCursor()
	}
	if of.Order == domain.ByCreation {
		return size, []any{key}, nil
	}
	expiry, err := strconv.ParseInt(at[0], 10, 64)
	if err != nil {
		return 0, nil, errCursor()
	}
	// A bound that moves while a client turns pages ("in the next 30 days") may have passed the cursor by.
	if low, high := expiryRange(f); of.Descending && high != nil && expiry >= high.(int64) || !of.Descending && low != nil && expiry < low.(int64) {
		return size, nil, nil
	}
	return size, []any{expiry, key}, nil
}

// expiryRange is the range of not_after, microseconds, the upper end not in it; nil is no end. What is not issued has 0.
func expiryRange(f domain.CertificateFilter) (low, high any) {
	if !f.ExpiresBefore.IsZero() {
		low, high = int64(1), micro(f.ExpiresBefore)
	}
	if !f.ExpiresAfter.IsZero() {
		low = max(1, micro(f.ExpiresAfter))
	}
	return low, high
}

func (t *tx) certificateQuery(f domain.CertificateFilter, of domain.Sorted) (pageQuery, error) {
	q := pageQuery{columns: certificateColumns, from: "certificate", where: &where{}, key: "certificate.id", newest: of.Descending}
	issuer, err := t.idOf(issuerKind, f.IssuerID)
	if err != nil {
		return q, err
	}
	profile, err := t.idOf(profileKind, f.ProfileID)
	if err != nil {
		return q, err
	}
	agent, err := t.idOf(agentKind, f.AgentID)
	if err != nil {
		return q, err
	}
	// In the order of the index's columns.
	q.lead = slices.Concat(pins("certificate.issuer_id", issuer), pins("certificate.profile_id", profile), pins("leaf.agent_id", agent),
		pins("certificate.owner", f.Owner), pins("certificate.status", string(f.Status)))
	if agent != "" {
		// CROSS keeps SQLite from beginning with the certificates; to the others it is an inner join.
		q.from, q.key = "leaf CROSS JOIN certificate", "leaf.certificate_id"
		q.where.and("certificate.id = leaf.certificate_id")
	}
	switch of.Order {
	case domain.ByName:
		q.key = "certificate.name"
		if f.NamePrefix != "" {
			err = t.namePrefix(&q, f.NamePrefix)
		}
	case domain.ByExpiry:
		q.by = "certificate.not_after"
		q.low, q.high = expiryRange(f)
	}
	if of.Merged {
		for _, status := range domain.CertificateStatuses {
			q.branches = append(q.branches, branch{lead: pins("certificate.status", string(status))})
		}
	}
	return q, err
}

// namePrefix compares ranges of names rather than LIKE: its wildcards need no care, SQLite's ignores case, and a range is
// what an index can lead to. Only where the engine orders text by its bytes is the range all that begins with prefix; a
// PostgreSQL database with a language's collation reads on from the prefix and compares.
func (t *tx) namePrefix(q *pageQuery, prefix string) error {
	ordered, err := t.count("SELECT CASE WHEN 'B' < 'a' AND 'a-c' < 'ab' THEN 1 ELSE 0 END")
	if err != nil {
		return err
	}
	q.low = prefix
	end := prefixEnd(prefix)
	switch {
	case ordered == 0:
		q.where.and("substr(certificate.name, 1, "+strconv.Itoa(utf8.RuneCountInString(prefix))+") = ?", prefix)
	case end != "":
		q.high = end
	}
	return nil
}

// prefixEnd is the least text above all that begins with prefix; empty when there is none.
func prefixEnd(prefix string) string {
	runes := []rune(prefix)
	for len(runes) > 0 {
		last := &runes[len(runes)-1]
		switch *last {
		case utf8.MaxRune:
			runes = runes[:len(runes)-1]
			continue
		case 0xD7FF:
			*last = 0xE000 // the surrogates between are no characters
		default:
			*last++
		}
		return string(runes)
	}
	return ""
}

// placementCounts counts the placements of certificates, and those that hold the leaf's current generation: seen in a
// handshake, or read back where nothing is probed.
func (t *tx) placementCounts(certs []domain.Certificate) (map[string]domain.PlacementCounts, error) {
	counts := make(map[string]domain.PlacementCounts, len(certs))
	if len(certs) == 0 {
		return counts, nil
	}
	ids := make([]string, len(certs))
	for i, c := range certs {
		ids[i] = c.ID
	}
	in, args := inList(3, ids)
	err := t.each(`SELECT placement.certificate_id, COUNT(*), COUNT(CASE WHEN leaf.current_generation > 0 AND
 (placement.state = $1 AND placement.served_generation = leaf.current_generation OR
  placement.state = $2 AND placement.installed_generation = leaf.current_generation) THEN 1 END)
FROM placement JOIN leaf ON leaf.certificate_id = placement.certificate_id AND leaf.agent_id = placement.agent_id
WHERE placement.certificate_id IN `+in+" GROUP BY placement.certificate_id",
		append([]any{string(domain.PlacementServed), string(domain.PlacementInstalled)}, args...), func(scan func(...any) error) error {
			var id string
			var c domain.PlacementCounts
			err := scan(&id, &c.Total, &c.Current)
			counts[id] = c
			return err
		})
	return counts, err
}

// Versions lists what was issued for a certificate (id or name), agent by agent, each agent's newest first, and the
// cursor of the next page.
func (s *Store) Versions(ctx context.Context, certificateID string, p domain.PageRequest) ([]domain.Version, string, error) {
	size, after, err := pageAfter(p, id.Agent+"_")
	if err != nil {
		return nil, "", err
	}
	agent, text, _ := strings.Cut(after, "/")
	generation, err := strconv.ParseInt(text, 10, 64)
	if after != "" && err != nil {
		return nil, "", errCursor()
	}
	var all []domain.Version
	err = s.read(ctx, "version.list", func(t *tx) error {
		c, err := find(t, certificateKind, "SELECT certificate.id FROM certificate", certificateID, scanText)
		if err != nil {
			return err
		}
		w := &where{}
		w.equal("version.certificate_id", c)
		if after != "" {
			w.and("(version.agent_id, version.generation) < (?, ?)", agent, generation)
		}
		all, err = collect(t, "SELECT "+versionColumns+" FROM version"+w.text()+
			" ORDER BY version.agent_id DESC, version.generation DESC LIMIT "+w.arg(size+1), w.args, scanVersion)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	all, next := nextCursor(all, size, func(v domain.Version) string {
		return v.AgentID + "/" + strconv.FormatInt(v.Generation, 10)
	})
	return all, next, nil
}

// Jobs lists jobs, the newest first, as the filter says (domain.JobListings are the ways), and the cursor of the next page.
// Certificate and agent are ids or names.
func (s *Store) Jobs(ctx context.Context, f domain.JobFilter, p domain.PageRequest) ([]domain.Job, string, error) {
	if err := checkTexts("state", string(f.State)); err != nil {
		return nil, "", err
	}
	listing, err := f.Listing()
	if err != nil {
		return nil, "", err
	}
	size, at, err := listCursor(p, jobKind.table, listing, 1)
	if err != nil {
		return nil, "", err
	}
	after := position(strings.Join(at, ""))
	if at != nil && !strings.HasPrefix(at[0], id.Job+"_") {
		return nil, "", errCursor()
	}
	var all []domain.Job
	err = s.read(ctx, "job.list", func(t *tx) error {
		q, err := t.jobQuery(f)
		if err != nil {
			return err
		}
		all, err = readPage(t, q, size, after, scanJob)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	all, next := nextCursor(all, size, func(j domain.Job) string { return listPosition(jobKind.table, listing, j.ID) })
	return all, next, nil
}

func (t *tx) jobQuery(f domain.JobFilter) (pageQuery, error) {
	q := pageQuery{columns: jobColumns, from: "job", where: &where{}, key: "job.id", newest: true}
	certificate, err := t.idOf(certificateKind, f.CertificateID)
	if err != nil {
		return q, err
	}
	agent, err := t.idOf(agentKind, f.AgentID)
	if err != nil {
		return q, err
	}
	unfinished, finished := "job.finished_at IS NULL", "job.finished_at IS NOT NULL"
	switch open := f.Open && !f.State.Open(); {
	case agent != "" && open:
		q.lead = pins("job.agent_id", agent)
		q.where.and(unfinished)
	case agent != "" && f.State != "":
		q.lead = slices.Concat(pins("job.agent_id", agent), pins("job.state", string(f.State)))
		q.where.and(finished)
	case agent != "":
		q.lead = pins("job.agent_id", agent)
		q.branches = append(q.branches, branch{term: unfinished})
		for _, state := range domain.FinishedJobStates {
			q.branches = append(q.branches, branch{term: finished, lead: pins("job.state", string(state))})
		}
	case certificate != "" && open:
		// At most one job is open per leaf and per placement, and its open_key names them.
		q.branches = []branch{
			{from: "leaf CROSS JOIN job", term: "leaf.certificate_id = ? AND job.open_key = 'leaf:' || leaf.certificate_id || ':' || leaf.agent_id",
				args: []any{certificate}, few: true},
			{from: "placement CROSS JOIN job", term: "placement.certificate_id = ? AND job.open_key = 'placement:' || placement.certificate_id || ':' || placement.target_id",
				args: []any{certificate}, few: true},
		}
	case open:
		for _, state := range domain.OpenJobStates {
			q.branches = append(q.branches, branch{lead: pins("job.state", string(state))})
		}
	default:
		q.lead = slices.Concat(pins("job.certificate_id", certificate), pins("job.state", string(f.State)))
	}
	return q, nil
}

// Job returns a job by its id.
func (s *Store) Job(ctx context.Context, jobID string) (domain.Job, error) {
	var j domain.Job
	err := s.read(ctx, "job.get", func(t *tx) error {
		var err error
		j, err = t.job(jobID)
		return err
	})
	return j, err
}
