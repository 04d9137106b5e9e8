package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestNoForbiddenSQL checks the repository itself.
func TestNoForbiddenSQL(t *testing.T) {
	t.Parallel()
	texts, err := collect("../..")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(texts, func(x text) bool { return x.Kind == migration }) {
		t.Error("no migration was found: is the folder still migrations/cockroach?")
	}
	for _, x := range texts {
		for _, reason := range forbidden(x.SQL) {
			t.Errorf("%s: %s", x.Source, reason)
		}
	}
}

func TestForbidden(t *testing.T) {
	t.Parallel()
	for _, sql := range []string{
		"SELECT pg_advisory_xact_lock($1)",
		"SELECT pg_try_advisory_lock(1)",
		"LISTEN jobs", "SELECT pg_notify('a', 'b')",
		"LOCK TABLE job", "lock job",
		"CREATE TRIGGER x BEFORE INSERT ON job",
		"DO $$ BEGIN END $$",
		"CREATE RULE r AS ON INSERT TO job DO NOTHING",
		"SELECT ctid FROM job", "SELECT id FROM job WHERE xmin = $1",
		"CREATE TABLE t (id BIGSERIAL PRIMARY KEY)", "CREATE TABLE t (a TEXT, id serial PRIMARY KEY)", "ALTER TABLE t ADD COLUMN n SERIAL", "CREATE SEQUENCE s", "CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT)",
		"CREATE TABLE t (id BIGINT GENERATED ALWAYS AS IDENTITY)",
		"CREATE TEMP TABLE t (id TEXT)",
		"SELECT id FROM job FOR UPDATE SKIP LOCKED", "SELECT id FROM job FOR UPDATE",
		"SELECT * FROM job", "SELECT j.* FROM job j", "SELECT id, j.* FROM job j", "DELETE FROM job RETURNING *", "SELECT DISTINCT * FROM job",
		"ALTER TABLE t ADD CONSTRAINT c UNIQUE (a) DEFERRABLE",
		"ALTER TABLE t ALTER COLUMN a TYPE BIGINT", "ALTER TABLE t ALTER a SET DATA TYPE BIGINT",
		"CREATE INDEX i ON t (a) USING HASH",
		"UPDATE job SET at = now()", "SELECT CURRENT_TIMESTAMP", "INSERT INTO t (id) VALUES (gen_random_uuid())",
		"CREATE TABLE t (a TEXT, at TIMESTAMPTZ NOT NULL)",
		"INSERT OR IGNORE INTO t (a) VALUES ($1)", "COPY t FROM STDIN",
		"SELECT id -- harmless\nFROM job /* and */ FOR\tUPDATE",
	} {
		if len(forbidden(sql)) == 0 {
			t.Errorf("accepted %s", sql)
		}
	}
	for _, sql := range []string{
		"SELECT COUNT(*) FROM job", "SELECT id, COUNT(*) FROM job GROUP BY id", "SELECT a * b FROM t",
		"INSERT INTO t (a) VALUES ($1) ON CONFLICT (a) DO NOTHING",
		"INSERT INTO t (a) VALUES ($1) ON CONFLICT (a) DO UPDATE SET a = excluded.a",
		"UPDATE duty_fence SET epoch = epoch WHERE duty = $1 AND epoch = $2 RETURNING epoch",
		"SELECT id FROM t WHERE kind = 'trigger' -- LOCK TABLE\n",
		"ALTER TABLE t ADD COLUMN type TEXT", "SELECT locked, listen FROM t",
		"CREATE TABLE t (id TEXT, serial TEXT NOT NULL, UNIQUE (id, serial))", "SELECT serial FROM t WHERE serial = $1",
	} {
		if reasons := forbidden(sql); len(reasons) > 0 {
			t.Errorf("refused %s: %q", sql, reasons)
		}
	}
}

func TestSplit(t *testing.T) {
	t.Parallel()
	got := split("-- a; comment\nCREATE TABLE a (b TEXT DEFAULT ';');\n\n/* ; */\nCREATE INDEX i ON a (\";\"); -- end\n;\n")
	if len(got) != 2 || !strings.Contains(got[0].sql, "DEFAULT ';'") || got[0].line != 1 || got[1].line != 4 {
		t.Errorf("split into %+v", got)
	}
}

func TestGoTexts(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	source := `package store
const columns = "id, " + "state"
const get = "SELECT " + columns + " FROM job WHERE id = $1"
var list = "SELECT " + columns + " FROM job" + where()
func f(b *strings.Builder) {
	b.WriteString("DELETE FROM job WHERE ")
	fmt.Sprintf("UPDATE job SET state = %s", x)
	exec(` + "`\n\tINSERT INTO job (id)\n\tVALUES ($1)`" + `)
	say("select is a word", 'x', "Selected")
}
`
	if err := os.WriteFile(filepath.Join(folder, "a.go"), []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, "a_test.go"), []byte("package store\nconst x = \"SELECT * FROM t\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	texts, err := goTexts(folder, "store")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, x := range texts {
		got = append(got, string(x.Kind)+" "+plain(x.SQL))
	}
	want := []string{
		"constant SELECT id, state FROM job WHERE id = $1",
		"fragment SELECT id, state FROM job",
		"fragment DELETE FROM job WHERE",
		"fragment UPDATE job SET state = %s",
		"constant INSERT INTO job (id) VALUES ($1)",
	}
	if !slices.Equal(got, want) {
		t.Errorf("collected\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestRunPrintsTheDumpOnce(t *testing.T) {
	t.Parallel()
	dump := filepath.Join(t.TempDir(), "dump.jsonl")
	if err := os.WriteFile(dump, []byte("\"SELECT 1\"\n\"SELECT * FROM t\"\n\"SELECT 1\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := run([]string{"-root", t.TempDir(), "-dump", dump}, &out); err != nil {
		t.Fatal(err)
	}
	var texts []text
	for line := range strings.Lines(out.String()) {
		var x text
		if err := json.Unmarshal([]byte(line), &x); err != nil {
			t.Fatal(err)
		}
		texts = append(texts, x)
	}
	if len(texts) != 2 || texts[0].Kind != executed || len(texts[0].Forbidden) != 0 || len(texts[1].Forbidden) != 1 {
		t.Errorf("printed %+v", texts)
	}
	if err := run([]string{"-root", t.TempDir(), "-dump", filepath.Join(t.TempDir(), "none")}, &out); err == nil {
		t.Error("a missing dump was accepted")
	}
}
