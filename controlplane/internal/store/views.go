package store

import (
	"context"
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

// Certificates lists certificates by id, or by name where the filter has a NamePrefix, with how many of their placements
// hold what is wanted, and the cursor of the next page. The fields of the filter that are set must all hold; issuer,
// profile and agent are ids or names; a NamePrefix is taken literally.
func (s *Store) Certificates(ctx context.Context, f domain.CertificateFilter, p domain.PageRequest) ([]domain.Certificate, map[string]domain.PlacementCounts, string, error) {
	if err := checkTexts("filter.status", string(f.Status), "filter.owner", f.Owner, "filter.name_prefix", f.NamePrefix); err != nil {
		return nil, nil, "", err
	}
	first := id.Certificate + "_"
	if f.NamePrefix != "" {
		first = f.NamePrefix
	}
	size, after, err := pageAfter(p, first)
	if err != nil {
		return nil, nil, "", err
	}
	var all []domain.Certificate
	var next string
	var counts map[string]domain.PlacementCounts
	err = s.read(ctx, "certificate.list", func(t *tx) error {
		q, key, err := t.certificateQuery(f)
		if err != nil {
			return err
		}
		if all, err = readPage(t, q, size, after, scanCertificate); err != nil {
			return err
		}
		all, next = nextCursor(all, size, key)
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

func (t *tx) certificateQuery(f domain.CertificateFilter) (pageQuery, func(domain.Certificate) string, error) {
	q := pageQuery{from: "SELECT " + certificateColumns + " FROM certificate", where: &where{}, key: "certificate.id"}
	key := func(c domain.Certificate) string { return c.ID }
	issuer, err := t.idOf(issuerKind, f.IssuerID)
	if err != nil {
		return q, nil, err
	}
	profile, err := t.idOf(profileKind, f.ProfileID)
	if err != nil {
		return q, nil, err
	}
	agent, err := t.idOf(agentKind, f.AgentID)
	if err != nil {
		return q, nil, err
	}
	if agent != "" {
		// Ordered by the leaf's column, the index of leaves by agent gives the page without a sort. CROSS keeps SQLite, which
		// has no statistics, from beginning with every certificate of a status; to the others it is an inner join.
		q.from = "SELECT " + certificateColumns + " FROM leaf CROSS JOIN certificate"
		q.key = "leaf.certificate_id"
		q.where.equal("leaf.agent_id", agent)
		q.where.and("certificate.id = leaf.certificate_id")
	}
	q.where.equal("certificate.status", string(f.Status))
	q.where.equal("certificate.issuer_id", issuer)
	q.where.equal("certificate.profile_id", profile)
	q.where.equal("certificate.owner", f.Owner)
	if f.NamePrefix != "" {
		q.key = "certificate.name"
		key = func(c domain.Certificate) string { return c.Name }
		err = t.namePrefix(q.where, f.NamePrefix)
	}
	return q, key, err
}

// namePrefix compares ranges of names rather than LIKE: its wildcards need no care, SQLite's ignores case, and a range is
// what an index can lead to. Only where the engine orders text by its bytes is the range all that begins with prefix; a
// PostgreSQL database with a language's collation reads on from the prefix and compares.
func (t *tx) namePrefix(w *where, prefix string) error {
	ordered, err := t.count("SELECT CASE WHEN 'B' < 'a' AND 'a-c' < 'ab' THEN 1 ELSE 0 END")
	if err != nil {
		return err
	}
	w.and("certificate.name >= ?", prefix)
	end := prefixEnd(prefix)
	switch {
	case ordered == 0:
		w.and("substr(certificate.name, 1, "+strconv.Itoa(utf8.RuneCountInString(prefix))+") = ?", prefix)
	case end != "":
		w.and("certificate.name < ?", end)
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

// Jobs lists jobs, the newest first, and the cursor of the next page. The fields of the filter that are set must all
// hold; certificate and agent are ids or names.
func (s *Store) Jobs(ctx context.Context, f domain.JobFilter, p domain.PageRequest) ([]domain.Job, string, error) {
	size, after, err := pageAfter(p, id.Job+"_")
	if err != nil {
		return nil, "", err
	}
	if err := checkTexts("filter.state", string(f.State)); err != nil {
		return nil, "", err
	}
	var all []domain.Job
	err = s.read(ctx, "job.list", func(t *tx) error {
		certificate, err := t.idOf(certificateKind, f.CertificateID)
		if err != nil {
			return err
		}
		agent, err := t.idOf(agentKind, f.AgentID)
		if err != nil {
			return err
		}
		q := pageQuery{from: "SELECT " + jobColumns + " FROM job", where: &where{}, key: "job.id", newest: true}
		if agent != "" && certificate == "" && !f.Open {
			// Only open jobs are indexed by their agent: the table is too hot for an index that people alone would use. The
			// finished ones are found through the agent's certificates (CROSS: in this order on SQLite too).
			q.from = "SELECT " + jobColumns + " FROM leaf CROSS JOIN job"
			q.where.equal("leaf.agent_id", agent)
			q.where.and("job.certificate_id = leaf.certificate_id")
		}
		q.where.equal("job.certificate_id", certificate)
		q.where.equal("job.agent_id", agent)
		q.where.equal("job.state", string(f.State))
		if f.Open {
			q.where.and("job.finished_at IS NULL")
		}
		all, err = readPage(t, q, size, after, scanJob)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	all, next := nextCursor(all, size, func(j domain.Job) string { return j.ID })
	return all, next, nil
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
