package store

import (
	"context"

	"github.com/certmesh/certmesh/protocol/fault"
)

// Meta returns the cluster-wide value of key; NotFound when it was never set.
func (s *Store) Meta(ctx context.Context, key string) (string, error) {
	var value string
	err := s.read(ctx, "meta.get", func(t *tx) error {
		var err error
		value, err = t.meta(key)
		return err
	})
	return value, err
}

func (t *tx) meta(key string) (string, error) {
	return one(t, fault.New(fault.NotFound, "the cluster has no value for %q yet", key),
		"SELECT value FROM meta WHERE key = $1", []any{key}, scanText)
}

// SetMetaIfAbsent sets key unless it has a value, and returns the one in force: the first writer's.
func (s *Store) SetMetaIfAbsent(ctx context.Context, key, value string) (string, error) {
	if err := checkTexts("key", key, "value", value); err != nil {
		return "", err
	}
	var inForce string
	err := s.settled(ctx, "meta.set", func(t *tx) error {
		_, err := t.exec("INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING", key, value)
		if err != nil {
			return err
		}
		inForce, err = t.meta(key)
		return err
	})
	return inForce, err
}
