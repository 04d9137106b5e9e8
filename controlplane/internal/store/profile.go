package store

import (
	"context"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
)

var profileKind = kind{noun: "profile", table: "profile", prefix: id.Profile, list: "profiles list", get: "profiles get"}

const profileColumns = `profile.id, profile.name, profile.key_algorithm, profile.allowed, profile.ekus, profile.ttl,
 profile.max_ttl, profile.created_at`

type profileRow struct {
	domain.Profile
	allowed, ekus          string
	ttl, maxTTL, createdAt int64
}

func (r *profileRow) dest() []any {
	return []any{&r.ID, &r.Name, &r.KeyAlgorithm, &r.allowed, &r.ekus, &r.ttl, &r.maxTTL, &r.createdAt}
}

func (r *profileRow) toDomain() (domain.Profile, error) {
	p := r.Profile
	p.TTL, p.MaxTTL = time.Duration(r.ttl)*time.Microsecond, time.Duration(r.maxTTL)*time.Microsecond
	p.CreatedAt = fromMicro(r.createdAt)
	if err := fromJSON(r.allowed, &p.Allowed); err != nil {
		return p, err
	}
	return p, fromJSON(r.ekus, &p.EKUs)
}

func scanProfile(scan scanner) (domain.Profile, error) {
	var r profileRow
	if err := scan(r.dest()...); err != nil {
		return domain.Profile{}, err
	}
	return r.toDomain()
}

// SeedProfiles adds the profiles whose names are not there yet; it changes none. Their CreatedAt is the time of the
// audit row.
func (s *Store) SeedProfiles(ctx context.Context, profiles []domain.Profile) error {
	seeds := make([]domain.Profile, len(profiles))
	for i, p := range profiles {
		if p.ID == "" {
			p.ID = s.newID(id.Profile)
		}
		if err := profileKind.check(p.ID, p.Name); err != nil {
			return err
		}
		seeds[i] = p
	}
	return s.settled(ctx, "profile.seed", func(t *tx) error {
		for _, p := range seeds {
			allowed, err := jsonText(append([]domain.KeyAlgorithm{}, p.Allowed...))
			if err != nil {
				return err
			}
			ekus, err := jsonText(append([]domain.EKU{}, p.EKUs...))
			if err != nil {
				return err
			}
			n, err := t.exec(`INSERT INTO profile (id, name, key_algorithm, allowed, ekus, ttl, max_ttl, created_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (name) DO NOTHING`, p.ID, p.Name, string(p.KeyAlgorithm), allowed, ekus,
				p.TTL.Microseconds(), p.MaxTTL.Microseconds(), micro(p.CreatedAt))
			if err != nil {
				return err
			}
			if n == 0 {
				continue
			}
			op := domain.Op{Actor: "node:" + t.s.cfg.NodeID, At: p.CreatedAt}
			if err := t.auditOp(op, "profile.created", "profile/"+p.ID, map[string]string{"name": p.Name}); err != nil {
				return err
			}
		}
		return nil
	})
}

// Profiles lists profiles by id, and the cursor of the next page.
func (s *Store) Profiles(ctx context.Context, p domain.PageRequest) ([]domain.Profile, string, error) {
	size, after, err := pageAfter(p, id.Profile+"_")
	if err != nil {
		return nil, "", err
	}
	var all []domain.Profile
	err = s.read(ctx, "profile.list", func(t *tx) error {
		var err error
		all, err = readPage(t, pageQuery{columns: profileColumns, from: "profile", key: "profile.id"},
			size, position(after), scanProfile)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	all, next := nextCursor(all, size, func(p domain.Profile) string { return p.ID })
	return all, next, nil
}

// Profile returns a profile by its id or name.
func (s *Store) Profile(ctx context.Context, idOrName string) (domain.Profile, error) {
	var p domain.Profile
	err := s.read(ctx, "profile.get", func(t *tx) error {
		var err error
		p, err = find(t, profileKind, "SELECT "+profileColumns+" FROM profile", idOrName, scanProfile)
		return err
	})
	return p, err
}
