package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/migrations"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Config is what Open needs.
type Config struct {
	// DSN is "sqlite:/path/file.db", "postgres://…" or "cockroach://…" (which is a postgres URL under another name).
	DSN string
	// NodeID names this node in audit rows of its own doing.
	NodeID string
	// Now gives the time of a schema migration and measures how long transactions take; all other times are arguments.
	// Nil: time.Now.
	Now func() time.Time
	Log *slog.Logger
	// MaxReaders bounds the connections (SQLite: open files) that read; 0: 4. Writers on a server are twice as many.
	MaxReaders int
	// NewID makes ids from a prefix; nil: id.New.
	NewID func(prefix string) string
	// Metrics may be nil.
	Metrics prometheus.Registerer

	// Faults, Observe and Migrations are seams for tests. Observe is given each statement before it is sent; Migrations are
	// the schema's steps, nil: the embedded ones.
	Faults     Faults
	Observe    func(statement string, args []any)
	Migrations fs.FS
}

// Store is the truth of the cluster. Its methods may be called from any goroutine.
type Store struct {
	cfg     Config
	d       *dialect
	log     *slog.Logger
	newID   func(prefix string) string
	metrics *metrics

	writer, reader *sql.DB   // a server
	lite           *litePool // SQLite

	batches batches
	// shared is the context of the transactions that callers share; cut ends them.
	shared context.Context
	cut    context.CancelFunc
	close  sync.Once
}

const (
	defaultReaders = 4
	// A server ends the session of a process that stands still inside a transaction (a stopped virtual machine that holds
	// a fence), and nobody waits longer for a lock than a retry is worth.
	idleInTransaction = "5s"
	lockTimeout       = "3s"
)

// pointLookups are settings of PostgreSQL's planner for the connections that write. Every statement there finds few rows by a
// key, whatever the size of the tables, and is sent thousands of times: it is planned once, by its indexes, also in the first
// hours of a database, which has no statistics yet.
var pointLookups = map[string]string{
	"plan_cache_mode":  "force_generic_plan",
	"enable_seqscan":   "off",
	"enable_hashjoin":  "off",
	"enable_mergejoin": "off",
	"jit":              "off",
}

// Open connects. It does not change the schema (Migrate) and does not ask whether a server answers (Ping).
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now //nolint:forbidigo // the default that is promised
	}
	if cfg.NewID == nil {
		cfg.NewID = id.New
	}
	if cfg.Migrations == nil {
		cfg.Migrations = migrations.FS
	}
	if cfg.MaxReaders <= 0 {
		cfg.MaxReaders = defaultReaders
	}
	s := &Store{cfg: cfg, log: cfg.Log, newID: cfg.NewID, metrics: newMetrics(cfg.Metrics)}
	s.shared, s.cut = context.WithCancel(context.Background()) //nolint:forbidigo // the store's own life, which Cut ends
	scheme, rest, _ := strings.Cut(cfg.DSN, ":")
	var err error
	switch scheme {
	case nameSQLite:
		s.d = dialectOf(nameSQLite)
		s.lite, err = openSQLite(ctx, rest, cfg.MaxReaders)
	case namePostgres, "postgresql":
		s.d = dialectOf(namePostgres)
		err = s.openServer(cfg.DSN)
	case nameCockroach, "cockroachdb":
		s.d = dialectOf(nameCockroach)
		err = s.openServer("postgres:" + rest)
	default:
		// The DSN may hold a password: it is not repeated.
		return nil, fault.InvalidField("store.dsn", "must begin with sqlite:, postgres:// or cockroach://")
	}
	if err != nil {
		return nil, fault.Wrap(fault.Invalid, err, "the store cannot be opened; check store.dsn")
	}
	s.batches.start(s)
	return s, nil
}

func (s *Store) openServer(dsn string) error {
	if _, err := url.Parse(dsn); err != nil {
		return errors.New("store.dsn is not a URL") // the parser's error repeats the URL with its password
	}
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		if _, ok := errors.AsType[*pgconn.ParseConfigError](err); ok {
			return fmt.Errorf("store.dsn: %w", err) // pgx hides the password itself
		}
		return errors.New("store.dsn cannot be read")
	}
	for k, v := range map[string]string{
		"idle_in_transaction_session_timeout": idleInTransaction,
		"lock_timeout":                        lockTimeout,
		"default_transaction_isolation":       "serializable",
		"application_name":                    applicationName,
	} {
		if _, set := cfg.RuntimeParams[k]; !set {
			cfg.RuntimeParams[k] = v
		}
	}
	s.reader = stdlib.OpenDB(*cfg)
	if s.d.name == namePostgres {
		cfg = cfg.Copy()
		for k, v := range pointLookups {
			if _, set := cfg.RuntimeParams[k]; !set {
				cfg.RuntimeParams[k] = v
			}
		}
	}
	s.writer = stdlib.OpenDB(*cfg)
	for db, n := range map[*sql.DB]int{s.writer: 2 * s.cfg.MaxReaders, s.reader: s.cfg.MaxReaders} {
		db.SetMaxOpenConns(n)
		db.SetMaxIdleConns(n)
		db.SetConnMaxLifetime(30 * time.Minute) // follow a database cluster that moves
	}
	return nil
}

// Dialect is "sqlite", "postgres" or "cockroach".
func (s *Store) Dialect() string { return s.d.name }

// Ping asks the database for an answer.
func (s *Store) Ping(ctx context.Context) error {
	return s.read(ctx, "ping", func(t *tx) error {
		var one int
		return t.queryRow("SELECT 1").Scan(&one)
	})
}

// Cut makes what still runs or waits for a shared commit fail, so that Close need not wait for a database that does not
// answer. Whether a commit under way was kept is not known then, as after a crash.
func (s *Store) Cut() { s.cut() }

// Close waits for running transactions and closes the connections. What is called afterwards fails.
func (s *Store) Close() error {
	var err error
	s.close.Do(func() {
		s.batches.stop()
		s.cut()
		if s.lite != nil {
			err = s.lite.close()
			return
		}
		err = errors.Join(s.writer.Close(), s.reader.Close())
	})
	return err
}

// Settings returns what the database says of its session settings; SQLite has none. For tests and support.
func (s *Store) Settings(ctx context.Context, names ...string) ([]string, error) {
	values := make([]string, len(names))
	if s.d.name == nameSQLite {
		return values, nil
	}
	err := s.read(ctx, "settings", func(t *tx) error {
		for i, n := range names {
			if err := t.queryRow("SELECT current_setting($1)", n).Scan(&values[i]); err != nil {
				return err
			}
		}
		return nil
	})
	return values, err
}
