package store

import (
	"context"
	"time"
)

// ServerTime is the time by the clock of the database's host, which is the one that nodes have in common. Zero: the store is
// embedded and has no clock of its own. Nothing in the store depends on it: times are the callers'.
func (s *Store) ServerTime(ctx context.Context) (time.Time, error) {
	if s.Dialect() == "sqlite" {
		return time.Time{}, nil
	}
	var at int64
	err := s.read(ctx, "clock", func(t *tx) error {
		return t.queryRow("SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)").Scan(&at)
	})
	return fromMicro(at), err
}
