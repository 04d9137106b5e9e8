// Package storetest runs the store's suite on every engine that is to be had: SQLite always, a PostgreSQL server that is
// started once per test binary, CockroachDB when COCKROACH_URL names a server or COCKROACH_BINARY an executable. Other packages use Engines to test against a
// real store instead of a fake.
//
// A package that uses it has
//
//	func TestMain(m *testing.M) { storetest.Main(m) }
//
// so that the server is stopped. CERTMESH_TEST_POSTGRES names a server to use instead of starting one; its user must be
// allowed to create databases. CERTMESH_SQL_DUMP names a file to which every distinct statement is appended as a line of
// JSON.
package storetest

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	// The driver by the name "pgx".
	_ "github.com/jackc/pgx/v5/stdlib"

	"github.com/certmesh/certmesh/controlplane/internal/store"
)

// Engine is one database system.
type Engine struct {
	// Name is what Store.Dialect says.
	Name string
	// New returns the DSN of a fresh, empty database that is nobody else's until the test ends.
	New func(t testing.TB) string
	// Driver and Source open the database past the store, for looking at it.
	Driver string
	Source func(dsn string) string
}

// Engines returns what this machine has. PostgreSQL is never left out: without its programs the test fails.
func Engines(t testing.TB) []Engine {
	t.Helper()
	list := []Engine{{Name: "sqlite", Driver: "sqlite", New: newSQLite,
		Source: func(dsn string) string { return "file:" + strings.TrimPrefix(dsn, "sqlite:") }}}
	list = append(list, Engine{Name: "postgres", Driver: "pgx", New: newPostgres, Source: func(dsn string) string { return dsn }})
	if base := cockroachURL(t); base != "" {
		list = append(list, Engine{Name: "cockroach", Driver: "pgx",
			New:    func(t testing.TB) string { return newCockroach(t, base) },
			Source: func(dsn string) string { return "postgres" + strings.TrimPrefix(dsn, "cockroach") }})
	}
	return list
}

// Each runs fn on every engine as a parallel subtest.
func Each(t *testing.T, fn func(t *testing.T, e Engine)) {
	for _, e := range Engines(t) {
		t.Run(e.Name, func(t *testing.T) {
			t.Parallel()
			fn(t, e)
		})
	}
}

// Open opens a migrated store on a fresh database; change may alter the configuration.
func (e Engine) Open(t testing.TB, change ...func(*store.Config)) *store.Store {
	t.Helper()
	return e.OpenAt(t, e.New(t), change...)
}

// OpenAt opens a further store, as another node would, on the database of dsn.
func (e Engine) OpenAt(t testing.TB, dsn string, change ...func(*store.Config)) *store.Store {
	t.Helper()
	cfg := store.Config{DSN: dsn, NodeID: "n1", MaxReaders: 2, Observe: observe}
	for _, c := range change {
		c(&cfg)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s, err := store.Open(ctx, cfg)
	if err != nil {
		t.Fatalf("open %s: %v", e.Name, err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close %s: %v", e.Name, err)
		}
	})
	if err := s.Migrate(ctx); err != nil {
		t.Fatalf("migrate %s: %v", e.Name, err)
	}
	return s
}

// SQL opens the database of dsn past the store.
func (e Engine) SQL(t testing.TB, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open(e.Driver, e.Source(dsn))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

// lite is a migrated SQLite file, of which each test gets a copy: applying the schema costs more than most tests do.
var lite struct {
	sync.Once
	data []byte
	err  error
}

func newSQLite(t testing.TB) string {
	t.Helper()
	lite.Do(func() { lite.data, lite.err = migratedSQLite(t) })
	if lite.err != nil {
		t.Fatalf("no SQLite file to copy: %v", lite.err)
	}
	path := filepath.Join(t.TempDir(), "store.db")
	if err := os.WriteFile(path, lite.data, 0o600); err != nil {
		t.Fatal(err)
	}
	return "sqlite:" + path
}

func migratedSQLite(t testing.TB) ([]byte, error) {
	path := filepath.Join(t.TempDir(), "template.db")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	s, err := store.Open(ctx, store.Config{DSN: "sqlite:" + path, Observe: observe})
	if err != nil {
		return nil, err
	}
	// The last connection to close moves the write-ahead log into the file.
	if err := errors.Join(s.Migrate(ctx), s.Close()); err != nil {
		return nil, err
	}
	if _, err := os.Stat(path + "-wal"); !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s-wal is still there", path)
	}
	return os.ReadFile(path)
}

// newDatabase creates a database on the server of base, from a template if one is named, and returns its URL and name.
func newDatabase(t testing.TB, base, template string) (dsn, name string) {
	t.Helper()
	var b [6]byte
	_, _ = rand.Read(b[:])
	name = "t" + hex.EncodeToString(b[:])
	statement := "CREATE DATABASE " + name
	if template != "" {
		statement += " TEMPLATE " + template
	}
	if err := administer(t.Context(), base, statement); err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	u.Path, u.Scheme = "/"+name, "postgres"
	return u.String(), name
}

func dropDatabase(ctx context.Context, base, name string) error {
	return administer(ctx, base, "DROP DATABASE "+name)
}

func administer(ctx context.Context, base, statement string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	admin, err := sql.Open("pgx", base)
	if err != nil {
		return err
	}
	defer func() { _ = admin.Close() }()
	if _, err := admin.ExecContext(ctx, statement); err != nil {
		return fmt.Errorf("%s: %w", statement, err)
	}
	return nil
}

// dump collects the statements that were run, once each.
var dump struct {
	sync.Mutex
	seen map[string]bool
	file *os.File
}

func observe(statement string, _ []any) {
	path := os.Getenv("CERTMESH_SQL_DUMP")
	if path == "" {
		return
	}
	dump.Lock()
	defer dump.Unlock()
	if dump.seen[statement] {
		return
	}
	if dump.seen == nil {
		dump.seen = map[string]bool{}
	}
	dump.seen[statement] = true
	if dump.file == nil {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			panic(fmt.Sprintf("CERTMESH_SQL_DUMP: %v", err))
		}
		dump.file = f
	}
	line, err := json.Marshal(statement)
	if err != nil {
		panic(err)
	}
	if _, err := dump.file.Write(append(line, '\n')); err != nil {
		panic(fmt.Sprintf("CERTMESH_SQL_DUMP: %v", err))
	}
}
