package storetest

import (
	"context"
	"fmt"
	"io/fs"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/migrations"
	"github.com/certmesh/certmesh/protocol/fault"
)

// futureSteps are what later releases may do: a column with a default on a hot table, a table, an index, an index gone.
var futureSteps = []struct{ up, down string }{
	{`ALTER TABLE job ADD COLUMN future BIGINT NOT NULL DEFAULT 0;
ALTER TABLE leaf ADD COLUMN future TEXT;
CREATE TABLE future (id TEXT NOT NULL PRIMARY KEY);
CREATE INDEX job_future ON job (future, id);
DROP INDEX IF EXISTS version_fingerprint;`,
		`DROP INDEX IF EXISTS job_future; ALTER TABLE job DROP COLUMN future; ALTER TABLE leaf DROP COLUMN future; DROP TABLE future; CREATE INDEX version_fingerprint ON version (fingerprint)`},
	{`CREATE TABLE later (id TEXT NOT NULL PRIMARY KEY);`, `DROP TABLE later`},
}

// newest is the version of this program's schema.
func newest(t testing.TB) int64 {
	t.Helper()
	entries, err := fs.ReadDir(migrations.FS, "sqlite")
	must(t, err)
	number, _, _ := strings.Cut(entries[len(entries)-1].Name(), "_")
	n, err := strconv.ParseInt(number, 10, 64)
	must(t, err)
	return n
}

// future are the schema's steps of a release so many steps ahead.
func future(t testing.TB, ahead int) fs.FS {
	t.Helper()
	all := fstest.MapFS{}
	must(t, fs.WalkDir(migrations.FS, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := fs.ReadFile(migrations.FS, path)
		all[path] = &fstest.MapFile{Data: b}
		return err
	}))
	for i, s := range futureSteps[:ahead] {
		for _, folder := range []string{"cockroach", "sqlite"} {
			all[fmt.Sprintf("%s/%04d_future.sql", folder, newest(t)+int64(i)+1)] = &fstest.MapFile{Data: []byte(s.up)}
		}
	}
	return all
}

// advance brings a database so many steps ahead, as nodes of a later release do, until the test ends.
func (e Engine) advance(t testing.TB, dsn string, ahead int) *store.Store {
	t.Helper()
	n := newest(t)
	t.Cleanup(func() {
		if e.Name == "sqlite" {
			return // it is a file of the test's own
		}
		db, ctx := e.SQL(t, dsn), context.WithoutCancel(t.Context())
		for i := ahead; i > 0; i-- {
			for down := range strings.SplitSeq(futureSteps[i-1].down, ";") {
				if _, err := db.ExecContext(ctx, down); err != nil {
					t.Errorf("%s: %v", down, err)
				}
			}
		}
		if _, err := db.ExecContext(ctx, "DELETE FROM schema_migration WHERE version > $1", n); err != nil {
			t.Error(err)
		}
	})
	return e.OpenAt(t, dsn, func(c *store.Config) { c.Migrations, c.NodeID = future(t, ahead), "n2" })
}

// The whole suite runs on a schema that is one step ahead of the program.
func TestSuiteOneSchemaAhead(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		ahead := e
		ahead.New = func(t testing.TB) string {
			dsn := e.New(t)
			e.advance(t, dsn, 1)
			return dsn
		}
		Exercise(t, ahead)
	})
}

// One step ahead is tolerated in both directions, two and one behind are refused.
func TestSchemaSkew(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		dsn := e.New(t)
		ctx := t.Context()
		old := e.OpenAt(t, dsn)
		must(t, old.CheckSchema(ctx))
		// The newer program before it has migrated.
		early, err := store.Open(ctx, store.Config{DSN: dsn, Migrations: future(t, 1)})
		must(t, err)
		if err := early.CheckSchema(ctx); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "certmeshd migrate up") {
			t.Errorf("a schema that is behind: %v", err)
		}
		must(t, early.Close())
		next := e.advance(t, dsn, 2)
		if err := old.CheckSchema(ctx); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "run a newer certmeshd") {
			t.Errorf("two steps ahead: %v", err)
		}
		middle, err := store.Open(ctx, store.Config{DSN: dsn, Migrations: future(t, 1)})
		must(t, err)
		must(t, middle.Migrate(ctx))
		for _, s := range []*store.Store{middle, next} {
			if err := s.CheckSchema(ctx); err != nil {
				t.Errorf("one step of skew: %v", err)
			}
		}
		must(t, middle.Close())
	})
}

// A node of the next release migrates while one of this release writes as fast as it can, and then both write.
func TestMigrateUnderLoad(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		l := load(t, w, w.S)
		l.more(t, 10)
		next := e.advance(t, w.DSN, 1)
		l.more(t, 10)
		must(t, w.S.CheckSchema(t.Context()))
		must(t, next.CheckSchema(t.Context()))
		a := w.Agent(t, "of-the-next")
		const both = 10
		for n := range both {
			name := fmt.Sprintf("next-%d.test", n)
			must(t, drive(w, next, t, a, w.order(name, w.Target(t, a.ID, name).ID)))
		}
		l.stop()
		w.Check(t)
		if n := int64(w.count(t, "SELECT COUNT(*) FROM version")); n != l.made.Load()+both {
			t.Errorf("%d versions of %d certificates", n, l.made.Load()+both)
		}
		if n := w.count(t, "SELECT COUNT(*) FROM job WHERE future <> 0"); n != 0 {
			t.Errorf("%d jobs lack the default", n)
		}
	})
}

// What a step may not do, because programs of the release before go on to write: take something away that they name, or
// demand a value that they do not know. The first step made everything.
func TestStepsAreTolerable(t *testing.T) {
	t.Parallel()
	forbidden := regexp.MustCompile(`(?i)\bDROP (COLUMN|TABLE)\b|\bRENAME\b|\bSET NOT NULL\b|\bCREATE UNIQUE INDEX\b|\bADD CONSTRAINT\b`)
	column := regexp.MustCompile(`(?i)\bADD COLUMN\b[^;]*`)
	for _, folder := range []string{"cockroach", "sqlite"} {
		entries, err := fs.ReadDir(migrations.FS, folder)
		must(t, err)
		for _, e := range entries[1:] {
			b, err := fs.ReadFile(migrations.FS, folder+"/"+e.Name())
			must(t, err)
			text := regexp.MustCompile(`--[^\n]*`).ReplaceAllString(string(b), "")
			if found := forbidden.FindString(text); found != "" {
				t.Errorf("%s/%s: %s: nodes of the release before still run; do it a release later", folder, e.Name(), found)
			}
			for _, c := range column.FindAllString(text, -1) {
				if strings.Contains(strings.ToUpper(c), "NOT NULL") && !strings.Contains(strings.ToUpper(c), "DEFAULT") {
					t.Errorf("%s/%s: %s: nodes of the release before do not write it; give it a DEFAULT", folder, e.Name(), c)
				}
			}
		}
	}
}
