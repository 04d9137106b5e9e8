package store

import (
	"context"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

const caColumns = "ca.id, ca.chain, ca.key_uri, ca.root_key_uri, ca.public_url, ca.created_at, ca.generation, ca.vouched"

func scanCA(scan scanner) (domain.CA, error) {
	var c domain.CA
	var chain, vouched []byte
	var createdAt int64
	if err := scan(&c.ID, &chain, &c.KeyURI, &c.RootKeyURI, &c.PublicURL, &createdAt, &c.Generation, &vouched); err != nil {
		return domain.CA{}, err
	}
	c.CreatedAt = fromMicro(createdAt)
	var err error
	if c.Chain, err = splitDER(chain); err != nil {
		return domain.CA{}, err
	}
	c.Vouched, err = splitDER(vouched)
	return c, err
}

// InstallCA records a CA with its keys unless one of its id is there, and returns the one in force: of nodes that start
// at the same time the first wins, and the others throw their keys away. roots, given with the mesh CA alone, become
// version 1 of the trust bundle.
func (s *Store) InstallCA(ctx context.Context, ca domain.CA, keys []domain.SealedKey, roots [][]byte, op domain.Op) (domain.CA, error) {
	if err := checkTexts("ca.id", ca.ID, "ca.key_uri", ca.KeyURI, "ca.root_key_uri", ca.RootKeyURI, "ca.public_url", ca.PublicURL); err != nil {
		return domain.CA{}, err
	}
	if ca.ID == "" || len(ca.Chain) == 0 || ca.KeyURI == "" {
		return domain.CA{}, fault.InvalidField("ca", "needs an id, a chain and the URI of its key")
	}
	if ca.CreatedAt.IsZero() {
		ca.CreatedAt = op.At
	}
	var inForce domain.CA
	err := s.settled(ctx, "ca.install", func(t *tx) error {
		first, err := t.insertCA(ca)
		if err != nil {
			return err
		}
		if first {
			if err := t.insertKeys(keys); err != nil {
				return err
			}
			if len(roots) > 0 {
				if _, err := t.exec("INSERT INTO trust_bundle (version, roots, created_at) VALUES (1, $1, $2) ON CONFLICT (version) DO NOTHING",
					joinDER(roots), micro(op.At)); err != nil {
					return err
				}
			}
			if err := t.auditOp(op, "ca.installed", "ca/"+ca.ID, nil); err != nil {
				return err
			}
		}
		inForce, err = t.ca(ca.ID)
		return err
	})
	return inForce, err
}

// insertCA reports false when a CA of this id was there already.
func (t *tx) insertCA(ca domain.CA) (bool, error) {
	n, err := t.exec(`INSERT INTO ca (id, chain, key_uri, root_key_uri, public_url, created_at)
VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (id) DO NOTHING`,
		ca.ID, joinDER(ca.Chain), ca.KeyURI, ca.RootKeyURI, ca.PublicURL, micro(ca.CreatedAt))
	return n == 1, err
}

func (t *tx) insertKeys(keys []domain.SealedKey) error {
	for _, k := range keys {
		if _, err := t.exec(`INSERT INTO sealed_key (id, purpose, kek_id, wrapped_dek, ciphertext, created_at)
VALUES ($1, $2, $3, $4, $5, $6)`, k.ID, k.Purpose, k.KEKID, k.WrappedDEK, k.Ciphertext, micro(k.CreatedAt)); err != nil {
			return err
		}
	}
	return nil
}

func (t *tx) ca(id string) (domain.CA, error) {
	return one(t, fault.New(fault.NotFound, "no CA %q; issuers list shows the issuers", id),
		"SELECT "+caColumns+" FROM ca WHERE ca.id = $1", []any{id}, scanCA)
}

// CA returns the material of a local issuer, or of the mesh CA (domain.MeshCA).
func (s *Store) CA(ctx context.Context, id string) (domain.CA, error) {
	var ca domain.CA
	err := s.read(ctx, "ca.get", func(t *tx) error {
		var err error
		ca, err = t.ca(id)
		return err
	})
	return ca, err
}

// CAs returns the material of all CAs by id. There are as many as local issuers, and one more.
func (s *Store) CAs(ctx context.Context) ([]domain.CA, error) {
	var all []domain.CA
	err := s.read(ctx, "ca.list", func(t *tx) error {
		var err error
		all, err = collect(t, "SELECT "+caColumns+" FROM ca ORDER BY ca.id", nil, scanCA)
		return err
	})
	return all, err
}

// SealedKey returns a private key as it is kept: only the holder of its key-encryption key can open it.
func (s *Store) SealedKey(ctx context.Context, id string) (domain.SealedKey, error) {
	var k domain.SealedKey
	err := s.read(ctx, "key.get", func(t *tx) error {
		var err error
		k, err = one(t, fault.New(fault.NotFound, "no sealed key %q; the database lacks a key that a CA names: restore it from a backup", id),
			"SELECT id, purpose, kek_id, wrapped_dek, ciphertext, created_at FROM sealed_key WHERE id = $1", []any{id},
			func(scan scanner) (domain.SealedKey, error) {
				var k domain.SealedKey
				var createdAt int64
				err := scan(&k.ID, &k.Purpose, &k.KEKID, &k.WrappedDEK, &k.Ciphertext, &createdAt)
				k.CreatedAt = fromMicro(createdAt)
				return k, err
			})
		return err
	})
	return k, err
}

// TrustBundle returns the roots that agents and nodes trust one another by, in DER, with their version.
func (s *Store) TrustBundle(ctx context.Context) (version int64, roots [][]byte, err error) {
	err = s.read(ctx, "trust.get", func(t *tx) error {
		var err error
		version, roots, err = t.trustBundle()
		return err
	})
	return version, roots, err
}
