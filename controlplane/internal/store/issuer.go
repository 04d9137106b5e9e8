package store

import (
	"context"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

var issuerKind = kind{noun: "issuer", table: "issuer", prefix: id.Issuer, list: "issuers list", get: "issuers get"}

const issuerColumns = "issuer.id, issuer.name, issuer.kind, issuer.settings, issuer.created_at"

func scanIssuer(scan scanner) (domain.Issuer, error) {
	var i domain.Issuer
	var createdAt int64
	err := scan(&i.ID, &i.Name, &i.Kind, &i.Settings, &createdAt)
	i.CreatedAt = fromMicro(createdAt)
	return i, err
}

// CreateIssuer records an issuer; a local one comes with its CA, whose id is the issuer's, and the keys that are ours.
// Conflict when the name is taken.
func (s *Store) CreateIssuer(ctx context.Context, i domain.Issuer, ca domain.CA, keys []domain.SealedKey, op domain.Op) error {
	if err := issuerKind.check(i.ID, i.Name); err != nil {
		return err
	}
	if err := checkTexts("kind", i.Kind, "settings", string(i.Settings), "public_url", ca.PublicURL, "key_uri", ca.KeyURI, "root_key_uri", ca.RootKeyURI); err != nil {
		return err
	}
	switch {
	case i.Kind == "":
		return fault.InvalidField("kind", "must not be empty")
	case i.Kind == domain.IssuerLocal && len(ca.Chain) == 0:
		return fault.InvalidField("ca", "a local issuer needs its CA's chain")
	case ca.ID != "" && ca.ID != i.ID:
		return fault.InvalidField("ca.id", "must be the issuer's id")
	}
	ca.ID = i.ID
	if i.CreatedAt.IsZero() {
		i.CreatedAt = op.At
	}
	if ca.CreatedAt.IsZero() {
		ca.CreatedAt = i.CreatedAt
	}
	return s.settled(ctx, "issuer.create", func(t *tx) error {
		if t.again {
			if kept, err := t.exists("issuer", i.ID); kept || err != nil {
				return err
			}
		}
		if _, err := t.exec("INSERT INTO issuer (id, name, kind, settings, created_at) VALUES ($1, $2, $3, $4, $5)",
			i.ID, i.Name, i.Kind, settingsText(i.Settings), micro(i.CreatedAt)); err != nil {
			return issuerKind.insertError(err, i.Name)
		}
		if len(ca.Chain) > 0 {
			if _, err := t.insertCA(ca); err != nil {
				return err
			}
		}
		if err := t.insertKeys(keys); err != nil {
			return err
		}
		return t.auditOp(op, "issuer.created", "issuer/"+i.ID, map[string]string{"name": i.Name, "kind": i.Kind})
	})
}

// settingsText is a connector's JSON; none is {}.
func settingsText(b []byte) string {
	if len(b) == 0 {
		return "{}"
	}
	return string(b)
}

// Issuers lists issuers by id, and the cursor of the next page.
func (s *Store) Issuers(ctx context.Context, p domain.PageRequest) ([]domain.Issuer, string, error) {
	size, after, err := pageAfter(p, id.Issuer+"_")
	if err != nil {
		return nil, "", err
	}
	var all []domain.Issuer
	err = s.read(ctx, "issuer.list", func(t *tx) error {
		var err error
		all, err = readPage(t, pageQuery{columns: issuerColumns, from: "issuer", key: "issuer.id"},
			size, position(after), scanIssuer)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	all, next := nextCursor(all, size, func(i domain.Issuer) string { return i.ID })
	return all, next, nil
}

// Issuer returns an issuer by its id or name.
func (s *Store) Issuer(ctx context.Context, idOrName string) (domain.Issuer, error) {
	var i domain.Issuer
	err := s.read(ctx, "issuer.get", func(t *tx) error {
		var err error
		i, err = find(t, issuerKind, "SELECT "+issuerColumns+" FROM issuer", idOrName, scanIssuer)
		return err
	})
	return i, err
}
