package node

import (
	"context"

	"github.com/certmesh/certmesh/controlplane/internal/store"
)

// BackupMade says what a backup holds.
type BackupMade = store.BackupMade

// BackupStore copies the SQLite store into the new file to, also while a node runs on it.
func BackupStore(ctx context.Context, c *Configuration, to string) (BackupMade, error) {
	return store.Backup(ctx, c.loaded.Config.Store.DSN, to)
}
