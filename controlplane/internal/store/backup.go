package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/certmesh/certmesh/protocol/fault"
)

// BackupMade says what a backup holds.
type BackupMade struct {
	Path  string
	Bytes int64
	// Schema is the version of its schema.
	Schema int64
}

// Backup copies the SQLite store of dsn into the new file to, whether or not a node uses it: the copy is one moment of the
// store, its writers do not wait, and what they write meanwhile stays in the write-ahead log until the copy is done. The
// file has mode 0600 and appears under its name only when it is complete, checked and on the disk; what a killed process
// leaves behind is called to.partial-*.
//
// Invalid: a server, which has tools of its own; there is no such store; to exists or cannot be written.
func Backup(ctx context.Context, dsn, to string) (BackupMade, error) {
	from, err := litePath(dsn)
	if err != nil {
		return BackupMade{}, err
	}
	if to, err = filepath.Abs(to); err != nil {
		return BackupMade{}, fault.Wrap(fault.Invalid, err, "the name of the backup cannot be used")
	}
	if _, err := os.Lstat(to); err == nil {
		return BackupMade{}, fault.New(fault.Invalid, "%s exists already; name a new file, no backup is written over another", to)
	}
	// VACUUM INTO wants a file that is empty or not there; this one has its mode before it holds anything.
	f, err := os.CreateTemp(filepath.Dir(to), filepath.Base(to)+".partial-")
	if err != nil {
		return BackupMade{}, fault.Wrap(fault.Invalid, err, "the backup cannot be written; name a file in a directory that exists and has room")
	}
	partial := f.Name()
	made, err := backup(ctx, from, partial)
	if err == nil {
		err = publish(f, partial, to)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(partial) // the error says what matters
		return BackupMade{}, err
	}
	made.Path = to
	return made, nil
}

// litePath is the file of an SQLite store that exists.
func litePath(dsn string) (string, error) {
	scheme, path, _ := strings.Cut(dsn, ":")
	switch scheme {
	case nameSQLite:
	case namePostgres, "postgresql":
		return "", fault.InvalidField("store.dsn", "a PostgreSQL database is backed up by its own tools: pg_dump --format=custom, or pg_basebackup with archived WAL")
	case nameCockroach, "cockroachdb":
		return "", fault.InvalidField("store.dsn", "a CockroachDB database is backed up by its own statement: BACKUP DATABASE … INTO …")
	default:
		return "", fault.InvalidField("store.dsn", "must begin with sqlite:, postgres:// or cockroach://")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", fault.Wrap(fault.Invalid, err, "the SQLite file cannot be used; check store.dsn")
	}
	switch info, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return "", fault.InvalidField("store.dsn", "there is no database %s; set CERTMESH_DATA_DIR or CERTMESH_STORE_DSN as the node has it", path)
	case err != nil:
		return "", fault.Wrap(fault.Invalid, err, "the SQLite file cannot be used; check store.dsn")
	case !info.Mode().IsRegular():
		return "", fault.InvalidField("store.dsn", "%s is not a file", path)
	}
	return path, nil
}

// liteURL is how the driver is told to open a file that exists; mode is rw or ro.
func liteURL(path, mode string, pragmas ...string) string {
	q := url.Values{"mode": {mode}, "_pragma": append([]string{"busy_timeout(5000)"}, pragmas...)}
	return (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: q.Encode()}).String()
}

// backup writes the copy and looks at it.
func backup(ctx context.Context, from, to string) (BackupMade, error) {
	db, err := sql.Open("sqlite", liteURL(from, "rw"))
	if err != nil {
		return BackupMade{}, fmt.Errorf("store: backup: %w", err)
	}
	// In WAL this is a reader of one snapshot: it neither waits for the writer nor lets it wait.
	_, err = db.ExecContext(ctx, "VACUUM INTO ?", to)
	if err = errors.Join(err, db.Close()); err != nil {
		return BackupMade{}, liteTrouble(err, from)
	}
	made, err := inspect(ctx, to)
	if err != nil {
		return BackupMade{}, fmt.Errorf("look at the backup: %w", err)
	}
	return made, nil
}

// liteTrouble gives an error of SQLite that an operator can do something about its sentence.
func liteTrouble(err error, path string) error {
	lite, ok := errors.AsType[*sqlite.Error](err)
	switch {
	case !ok:
		return err
	case lite.Code()&0xff == sqlite3.SQLITE_FULL:
		return fault.Wrap(fault.Exhausted, err, "the disk of the backup is full; nothing is kept under its name")
	case lite.Code()&0xff == sqlite3.SQLITE_NOTADB, lite.Code()&0xff == sqlite3.SQLITE_CORRUPT:
		return fault.Wrap(fault.Invalid, err, "%s is not a sound SQLite database; restore it from an older backup", path)
	}
	return fault.Wrap(fault.Internal, err, "SQLite cannot work with %s", path)
}

// inspect checks every page of the copy and that it is a store.
func inspect(ctx context.Context, path string) (made BackupMade, err error) {
	db, err := sql.Open("sqlite", liteURL(path, "ro"))
	if err != nil {
		return made, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	var verdict string
	if err := db.QueryRowContext(ctx, "PRAGMA integrity_check(1)").Scan(&verdict); err != nil {
		return made, err
	}
	if verdict != "ok" {
		return made, fault.New(fault.Internal, "SQLite finds the copy damaged: %s", verdict)
	}
	if err := db.QueryRowContext(ctx, "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name = 'schema_migration'").Scan(&made.Schema); err != nil {
		return made, err
	}
	if made.Schema == 0 {
		return made, fault.InvalidField("store.dsn", "the database is not a certmesh store: it has no schema")
	}
	if err := db.QueryRowContext(ctx, "SELECT COALESCE(MAX(version), 0) FROM schema_migration").Scan(&made.Schema); err != nil {
		return made, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return made, err
	}
	made.Bytes = info.Size()
	return made, nil
}

// publish brings the finished file to the disk and gives it its name, which nobody may have taken meanwhile.
func publish(f *os.File, partial, to string) error {
	if err := f.Sync(); err != nil {
		return fault.Wrap(fault.Exhausted, err, "the backup cannot be brought to the disk; nothing is kept under its name")
	}
	if err := os.Link(partial, to); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return fault.New(fault.Invalid, "%s was made by somebody else meanwhile; name a new file", to)
		}
		// A file system without hard links.
		if err := os.Rename(partial, to); err != nil {
			return fault.Wrap(fault.Invalid, err, "the backup cannot be given its name")
		}
	} else if err := os.Remove(partial); err != nil {
		return fmt.Errorf("store: remove the backup's working name: %w", err)
	}
	dir, err := os.Open(filepath.Dir(to))
	if err != nil {
		return fmt.Errorf("store: backup: %w", err)
	}
	return errors.Join(dir.Sync(), dir.Close())
}
