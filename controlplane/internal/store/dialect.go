package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/certmesh/certmesh/protocol/fault"
)

// dialect holds all that differs between the engines.
type dialect struct {
	name string
	// folder of the migrations.
	folder string
	// bytes is the type word for byte strings: CAST(x AS BYTEA) silently stores 0 on SQLite.
	bytes string
	// arrays: a parameter may be an array.
	arrays bool
	// ddlInTx: schema changes take part in transactions.
	ddlInTx bool
}

const (
	nameSQLite    = "sqlite"
	namePostgres  = "postgres"
	nameCockroach = "cockroach"
)

func dialectOf(name string) *dialect {
	switch name {
	case nameSQLite:
		return &dialect{name: name, folder: "sqlite", bytes: "BLOB", ddlInTx: true}
	case nameCockroach:
		return &dialect{name: name, folder: "cockroach", bytes: "BYTEA", arrays: true}
	default:
		return &dialect{name: namePostgres, folder: "cockroach", bytes: "BYTEA", arrays: true, ddlInTx: true}
	}
}

// sqlState is implemented by pgconn.PgError and by the injected errors of the test seam.
type sqlState interface{ SQLState() string }

func stateOf(err error) string {
	var s sqlState
	if errors.As(err, &s) {
		return s.SQLState()
	}
	return ""
}

// mayRepeat reports whether the whole transaction is to be run again: nothing of it was kept.
func mayRepeat(err error) bool {
	switch stateOf(err) {
	case "40001", // serialization_failure
		"40P01", // deadlock_detected
		"55P03", // lock_not_available: a paused writer holds the row until idle_in_transaction_session_timeout
		"25P03": // idle_in_transaction_session_timeout: this process was stopped for longer than that
		return true
	}
	if _, ok := errors.AsType[cutOff](err); ok {
		return true
	}
	if lite, ok := errors.AsType[*sqlite.Error](err); ok {
		c := lite.Code() & 0xff
		return c == sqlite3.SQLITE_BUSY || c == sqlite3.SQLITE_LOCKED
	}
	return false
}

// lostInCommit reports whether an error of COMMIT leaves open if the transaction was kept.
func lostInCommit(err error) bool {
	switch s := stateOf(err); {
	case s == "40003": // statement_completion_unknown
		return true
	case s == "08007": // transaction_resolution_unknown
		return true
	case strings.HasPrefix(s, "57P"): // the server is going down; it may have committed before it said so
		return true
	case s != "":
		return false
	}
	return gone(err) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// gone reports whether the connection to the database was lost or never made.
func gone(err error) bool {
	var op net.Error
	var conn *pgconn.ConnectError
	switch s := stateOf(err); {
	case strings.HasPrefix(s, "08"), strings.HasPrefix(s, "57P"), s == "53300":
		return true
	case s != "":
		return false
	}
	return errors.Is(err, driver.ErrBadConn) || errors.Is(err, sql.ErrConnDone) || errors.As(err, &op) ||
		errors.As(err, &conn) || pgconn.SafeToRetry(err) || pgconn.Timeout(err) || isEOF(err)
}

// isUnique reports whether err is a violation of a unique key, and of which: "table.column", the columns joined by "_"
// when there are several, and "table.pkey" for the primary key. On PostgreSQL the transaction is spoilt then: return.
func isUnique(err error) (key string, ok bool) {
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "23505" {
		key := strings.TrimPrefix(pg.ConstraintName, pg.TableName+"_")
		return pg.TableName + "." + strings.TrimSuffix(key, "_key"), true
	}
	var lite *sqlite.Error
	if !errors.As(err, &lite) {
		return "", false
	}
	const mark = "constraint failed: "
	text := lite.Error()
	i := strings.LastIndex(text, mark)
	if i < 0 {
		return "", false
	}
	text = text[i+len(mark):]
	if j := strings.LastIndex(text, " ("); j >= 0 {
		text = text[:j]
	}
	table, _, _ := strings.Cut(text, ".")
	switch lite.Code() {
	case sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
		return table + ".pkey", true
	case sqlite3.SQLITE_CONSTRAINT_UNIQUE:
		cols := strings.Split(text, ", ")
		for n := range cols {
			_, cols[n], _ = strings.Cut(cols[n], ".")
		}
		return table + "." + strings.Join(cols, "_"), true
	}
	return "", false
}

// classify gives an error that leaves the store its class; classified ones pass.
func classify(name string, err error) error {
	var f *fault.Error
	switch {
	case err == nil, errors.As(err, &f), errors.Is(err, ErrCut):
		return err
	case errors.Is(err, errAmbiguous):
		return fault.Wrap(fault.Retryable, err, "the database did not say whether %s was kept; ask again", name)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("store: %s: %w", name, err)
	case gone(err):
		return fault.Wrap(fault.Retryable, err, "the database does not answer; try again when it does")
	case mayRepeat(err):
		return fault.Wrap(fault.Retryable, err, "the database was too busy for %s; try again", name)
	default:
		return fault.Wrap(fault.Internal, err, "the store failed at %s", name)
	}
}
