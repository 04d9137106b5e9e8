package store

import (
	"database/sql"
	"slices"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// restatus derives the status, the earliest expiry and the next change by time of the certificates anew, from what this
// transaction sees, and writes those that changed. Every transaction that changes a leaf, or opens or ends a leaf job,
// ends with it.
func (t *tx) restatus(certificateIDs []string, at time.Time) error {
	if err := t.lockCertificates(certificateIDs); err != nil {
		return err
	}
	return t.restatusLocked(certificateIDs, at, false)
}

// restatusLocked is restatus under the certificates' locks. always: the rows are written although nothing changed.
func (t *tx) restatusLocked(certificateIDs []string, at time.Time, always bool) error {
	return certificateChunks(certificateIDs, func(ids []string) error { return t.restatusChunk(ids, at, always) })
}

// lockCertificates keeps everybody else from changing leaves and status of the certificates until the commit. A
// SERIALIZABLE transaction that waited here for one that wrote the row fails and is run again. SQLite has one writer.
func (t *tx) lockCertificates(ids []string) error {
	if t.s.d.name == nameSQLite {
		return nil
	}
	return certificateChunks(ids, func(ids []string) error {
		in, args := inList(1, ids)
		return t.each("SELECT certificate.id FROM certificate WHERE certificate.id IN "+in+" ORDER BY certificate.id FOR UPDATE", args,
			func(scan func(...any) error) error {
				var id string
				return scan(&id)
			})
	})
}

// certificateChunks calls fn with the ids, sorted and each once, so many at a time as one statement takes.
func certificateChunks(ids []string, fn func(ids []string) error) error {
	ids = slices.Clone(ids)
	slices.Sort(ids)
	return chunks(slices.Compact(ids), fn)
}

type statusRow struct {
	status   domain.CertificateStatus
	policy   domain.Policy
	notAfter int64
	statusAt sql.NullInt64
	leaves   []domain.Leaf
	renewing bool
}

func (t *tx) restatusChunk(ids []string, at time.Time, always bool) error {
	in, args := inList(1, ids)
	found := map[string]*statusRow{}
	err := t.each(`SELECT certificate.id, certificate.status, certificate.policy, certificate.not_after, certificate.status_at,
 CASE WHEN job.id IS NULL THEN 0 ELSE 1 END, `+leafColumns+`
FROM certificate JOIN leaf ON leaf.certificate_id = certificate.id
LEFT JOIN job ON job.open_key = 'leaf:' || leaf.certificate_id || ':' || leaf.agent_id
WHERE certificate.id IN `+in, args, func(scan func(...any) error) error {
		var id, policy string
		var open int
		var r statusRow
		var l leafRow
		if err := scan(append([]any{&id, &r.status, &policy, &r.notAfter, &r.statusAt, &open}, l.dest()...)...); err != nil {
			return err
		}
		have := found[id]
		if have == nil {
			if err := fromJSON(policy, &r.policy); err != nil {
				return err
			}
			have = &r
			found[id] = have
		}
		have.leaves = append(have.leaves, l.toDomain())
		have.renewing = have.renewing || open == 1
		return nil
	})
	if err != nil {
		return err
	}
	v := t.values("k text, status text, not_after int, status_at int")
	for _, id := range ids {
		r := found[id]
		if r == nil {
			continue
		}
		status := domain.StatusOf(r.status, r.policy, r.leaves, r.renewing, at)
		notAfter, statusAt := leafTimes(status, r.policy, r.leaves, at)
		was := fromNull(r.statusAt)
		if always || status != r.status || micro(notAfter) != r.notAfter || micro(statusAt) != micro(was) {
			v.add(id, string(status), micro(notAfter), nullMicro(statusAt))
		}
	}
	if v.rows == 0 {
		return nil
	}
	text := v.with()
	_, err = t.exec(text+`
UPDATE certificate SET status = v.status, not_after = v.not_after, status_at = v.status_at,
 updated_at = `+v.arg(micro(at))+`, revision = revision + 1
FROM v WHERE certificate.id = v.k`, v.args...)
	return err
}

// leafTimes returns the earliest expiry of the issued leaves and when the status may next change by time alone; zero
// where there is none.
func leafTimes(status domain.CertificateStatus, p domain.Policy, leaves []domain.Leaf, at time.Time) (notAfter, statusAt time.Time) {
	first := func(have *time.Time, next time.Time) {
		if have.IsZero() || next.Before(*have) {
			*have = next
		}
	}
	for _, l := range leaves {
		if l.Current == 0 {
			continue
		}
		first(&notAfter, l.NotAfter)
		for _, change := range []time.Time{domain.Micro(domain.ExpiringAt(l.NotBefore, l.NotAfter, p.AlertThresholdsDays)), l.NotAfter} {
			// StatusOf compares with !now.Before(change): at exactly change it has changed already.
			if change.After(at) {
				first(&statusAt, change)
			}
		}
	}
	if status == domain.CertificateRevoked || status == domain.CertificateArchived {
		statusAt = time.Time{}
	}
	return notAfter, statusAt
}
