package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/protocol/fault"
)

// BackupMade says what a backup holds.
type BackupMade = store.BackupMade

// BackupStore copies the SQLite store into the new file to, also while a node runs on it.
func BackupStore(ctx context.Context, c *Configuration, to string) (BackupMade, error) {
	return store.Backup(ctx, c.loaded.Config.Store.DSN, to)
}

// Copied says what was copied of one table.
type Copied = store.Copied

// CopyStore copies the store of one DSN into the empty database of another and compares every row; said is called for each
// table that was. No node may run on either: Conflict. It goes on where a former run was killed.
func CopyStore(ctx context.Context, c *Configuration, from, to string, said func(Copied)) error {
	if from == to {
		return fault.New(fault.Invalid, "--from and --to are the same store")
	}
	// A node of this data directory must not start meanwhile.
	return locked(c, func() error {
		source, err := openMover(ctx, c, "--from", from)
		if err != nil {
			return err
		}
		err = func() error {
			target, err := openMover(ctx, c, "--to", to)
			if err != nil {
				return err
			}
			return errors.Join(copyStore(ctx, source, target, said), target.Close())
		}()
		return errors.Join(err, source.Close())
	})
}

func copyStore(ctx context.Context, source, target *store.Store, said func(Copied)) error {
	has, _, err := target.SchemaVersion(ctx)
	if err == nil && has == 0 {
		err = target.Migrate(ctx)
	}
	if err == nil {
		_, err = source.CopyTo(ctx, target, store.CopyOptions{Op: console(), Said: said})
	}
	return err
}

// openMover opens a store that nobody else has open; flag is where its DSN came from.
func openMover(ctx context.Context, c *Configuration, flag, dsn string) (*store.Store, error) {
	path, lite := strings.CutPrefix(dsn, "sqlite:")
	_, missing := os.Stat(path)
	if !lite || missing == nil || flag == "--from" {
		var err error
		if dsn, err = store.Alone(ctx, dsn); err != nil {
			return nil, fmt.Errorf("%s: %w", flag, err)
		}
	}
	s, err := store.Open(ctx, store.Config{DSN: dsn, NodeID: c.loaded.Config.Node.ID, Now: time.Now, NewID: id.New, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	return s, nil
}
