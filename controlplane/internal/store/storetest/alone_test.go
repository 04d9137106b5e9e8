package storetest

import (
	"strings"
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/protocol/fault"
)

// A command that needs a store for itself is refused while another has it open, and not a moment longer.
func TestAlone(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		dsn := e.New(t)
		ctx := t.Context()
		alone, err := store.Alone(ctx, dsn)
		must(t, err)
		// Two commands in a row, the second before the first has closed: what the first opened counts on SQLite alone.
		s, err := store.Open(ctx, store.Config{DSN: dsn})
		must(t, err)
		must(t, s.CheckSchema(ctx))
		if _, err := store.Alone(ctx, dsn); !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "stop") {
			t.Errorf("while it is open: %v", err)
		}
		must(t, s.Close())
		if _, err = store.Alone(ctx, dsn); err != nil {
			t.Errorf("after it was closed: %v", err)
		}
		s, err = store.Open(ctx, store.Config{DSN: alone})
		must(t, err)
		must(t, s.CheckSchema(ctx))
		must(t, s.Close())
	})
	if _, err := store.Alone(t.Context(), "postgres://u:hunter2@[::1/x"); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("a DSN that is none: %v", err)
	}
}
