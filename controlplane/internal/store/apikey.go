package store

import (
	"context"
	"crypto/sha256"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

var apiKeyKind = kind{noun: "API key", table: "api_key", prefix: id.APIKey}

// CreateAPIKey records an operator's key by the SHA-256 of its secret. Conflict when the name is taken.
func (s *Store) CreateAPIKey(ctx context.Context, k domain.APIKey, op domain.Op) error {
	if err := apiKeyKind.check(k.ID, k.Name); err != nil {
		return err
	}
	if err := checkTexts("role", k.Role); err != nil {
		return err
	}
	if len(k.Hash) != sha256.Size {
		return fault.InvalidField("hash", "must be the SHA-256 of the secret")
	}
	if k.CreatedAt.IsZero() {
		k.CreatedAt = op.At
	}
	return s.settled(ctx, "apikey.create", func(t *tx) error {
		if t.again {
			if kept, err := t.exists("api_key", k.ID); kept || err != nil {
				return err
			}
		}
		if _, err := t.exec(`INSERT INTO api_key (id, name, role, hash, expires_at, revoked_at, created_at)
VALUES ($1, $2, $3, $4, $5, $6, $7)`, k.ID, k.Name, k.Role, k.Hash, micro(k.ExpiresAt), micro(k.RevokedAt), micro(k.CreatedAt)); err != nil {
			return apiKeyKind.insertError(err, k.Name)
		}
		return t.auditOp(op, "apikey.created", "apikey/"+k.ID, map[string]string{"name": k.Name, "role": k.Role})
	})
}

const apiKeyColumns = "id, name, role, hash, expires_at, revoked_at, created_at" //nolint:gosec // names of columns

func scanAPIKey(scan scanner) (domain.APIKey, error) {
	var k domain.APIKey
	var expiresAt, revokedAt, createdAt int64
	err := scan(&k.ID, &k.Name, &k.Role, &k.Hash, &expiresAt, &revokedAt, &createdAt)
	k.ExpiresAt, k.RevokedAt, k.CreatedAt = fromMicro(expiresAt), fromMicro(revokedAt), fromMicro(createdAt)
	return k, err
}

// APIKeyByHash returns the key whose secret has this SHA-256. Whether it has expired or was revoked is for the caller to
// judge; it knows the time.
func (s *Store) APIKeyByHash(ctx context.Context, hash []byte) (domain.APIKey, error) {
	var k domain.APIKey
	err := s.read(ctx, "apikey.get", func(t *tx) error {
		var err error
		k, err = one(t, fault.New(fault.NotFound, "no such API key; make one with certmeshd apikey create"),
			"SELECT "+apiKeyColumns+" FROM api_key WHERE hash = $1", []any{hash}, scanAPIKey)
		return err
	})
	return k, err
}

// APIKeys lists all operators' keys by name, without their hashes. There are as many as operators and tools.
func (s *Store) APIKeys(ctx context.Context) ([]domain.APIKey, error) {
	var all []domain.APIKey
	err := s.read(ctx, "apikey.list", func(t *tx) error {
		var err error
		all, err = collect(t, "SELECT "+apiKeyColumns+" FROM api_key ORDER BY name", nil, scanAPIKey)
		return err
	})
	for i := range all {
		all[i].Hash = nil
	}
	return all, err
}

// RevokeAPIKey ends an operator's key for good, by name. Revoking it again changes nothing. NotFound when there is none.
func (s *Store) RevokeAPIKey(ctx context.Context, name string, op domain.Op) (domain.APIKey, error) {
	if err := checkTexts("name", name); err != nil {
		return domain.APIKey{}, err
	}
	var k domain.APIKey
	err := s.settled(ctx, "apikey.revoke", func(t *tx) error {
		var err error
		k, err = one(t, fault.New(fault.NotFound, "no API key is called %q; certmeshd apikey list shows them", name),
			"SELECT "+apiKeyColumns+" FROM api_key WHERE name = $1", []any{name}, scanAPIKey)
		if err != nil || !k.RevokedAt.IsZero() {
			return err
		}
		n, err := t.exec("UPDATE api_key SET revoked_at = $1 WHERE id = $2 AND revoked_at = 0", micro(op.At), k.ID)
		if err != nil || n == 0 {
			return err
		}
		k.RevokedAt = domain.Micro(op.At)
		return t.auditOp(op, "apikey.revoked", "apikey/"+k.ID, map[string]string{"name": k.Name})
	})
	k.Hash = nil
	return k, err
}
