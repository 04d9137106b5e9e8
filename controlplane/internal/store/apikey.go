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

// APIKeyByHash returns the key whose secret has this SHA-256. Whether it has expired or was revoked is for the caller to
// judge; it knows the time.
func (s *Store) APIKeyByHash(ctx context.Context, hash []byte) (domain.APIKey, error) {
	var k domain.APIKey
	err := s.read(ctx, "apikey.get", func(t *tx) error {
		var err error
		k, err = one(t, fault.New(fault.NotFound, "no such API key; make one with certmeshd apikey create"),
			"SELECT id, name, role, hash, expires_at, revoked_at, created_at FROM api_key WHERE hash = $1", []any{hash},
			func(scan scanner) (domain.APIKey, error) {
				var k domain.APIKey
				var expiresAt, revokedAt, createdAt int64
				err := scan(&k.ID, &k.Name, &k.Role, &k.Hash, &expiresAt, &revokedAt, &createdAt)
				k.ExpiresAt, k.RevokedAt, k.CreatedAt = fromMicro(expiresAt), fromMicro(revokedAt), fromMicro(createdAt)
				return k, err
			})
		return err
	})
	return k, err
}
