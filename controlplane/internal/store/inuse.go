package store

import (
	"context"
	"database/sql"
	"errors"
	"net/url"
	"strings"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/certmesh/certmesh/protocol/fault"
)

// applicationName is how nodes and commands call themselves to a server.
const applicationName = "certmesh"

// moverName is how those call themselves that need a store for themselves.
const moverName = "certmesh-mover"

// Alone returns the DSN with which a command that needs the store for itself opens it, after it has looked that nobody
// else has it open: a node, or another command. It does not keep anybody from opening it afterwards. A database that does
// not exist is open to nobody.
//
// Conflict: it is in use.
func Alone(ctx context.Context, dsn string) (string, error) {
	scheme, rest, _ := strings.Cut(dsn, ":")
	if scheme == nameSQLite {
		return dsn, aloneSQLite(ctx, rest)
	}
	u, err := url.Parse(dsn)
	if err != nil {
		return "", fault.InvalidField("store.dsn", "is not a URL") // the parser's error repeats the URL with its password
	}
	q := u.Query()
	q.Set("application_name", moverName)
	u.RawQuery = q.Encode()
	dsn = u.String()
	s, err := Open(ctx, Config{DSN: dsn, MaxReaders: 1})
	if err != nil {
		return "", err
	}
	var others int64
	// A server notices a little later that a process has ended.
	for tries := 0; tries == 0 || others > 0 && tries < 16 && err == nil && pause(ctx, 8) == nil; tries++ {
		err = s.read(ctx, "alone", func(t *tx) error {
			var err error
			others, err = t.count(s.d.othersConnected(), applicationName)
			return err
		})
	}
	if err = errors.Join(err, s.Close()); err != nil {
		return "", err
	}
	if others > 0 {
		return "", inUse("%d connections of certmeshd to the database are open; stop every node first", others)
	}
	return dsn, nil
}

func inUse(format string, args ...any) error { return fault.New(fault.Conflict, format, args...) }

// othersConnected counts the connections of an application to this database.
func (d *dialect) othersConnected() string {
	if d.name == nameCockroach {
		return "SELECT COUNT(*) FROM crdb_internal.cluster_sessions WHERE application_name = $1"
	}
	return "SELECT COUNT(*) FROM pg_stat_activity WHERE application_name = $1 AND datname = current_database()"
}

// aloneSQLite takes the lock that nobody gets while another connection has the file open: in WAL each keeps a shared one.
func aloneSQLite(ctx context.Context, path string) (err error) {
	path, err = litePath(nameSQLite + ":" + path)
	if err != nil {
		return err
	}
	db, err := sql.Open("sqlite", liteURL(path, "rw", "locking_mode(EXCLUSIVE)", "busy_timeout(0)"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	conn, err := db.Conn(ctx)
	if err != nil {
		return liteBusy(err, path)
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if _, err := conn.ExecContext(ctx, "BEGIN EXCLUSIVE"); err != nil {
		return liteBusy(err, path)
	}
	_, err = conn.ExecContext(ctx, "ROLLBACK")
	return err
}

func liteBusy(err error, path string) error {
	lite, ok := errors.AsType[*sqlite.Error](err)
	if ok && (lite.Code()&0xff == sqlite3.SQLITE_BUSY || lite.Code()&0xff == sqlite3.SQLITE_LOCKED) {
		return fault.Wrap(fault.Conflict, err, "another process has %s open; stop the node first", path)
	}
	return liteTrouble(err, path)
}
