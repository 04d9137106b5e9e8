package sqlgrammar

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cockroachdb/cockroachdb-parser/pkg/sql/parser"
	// Without it the parser panics on procedure bodies.
	_ "github.com/cockroachdb/cockroachdb-parser/pkg/sql/plpgsql/parser"
)

// root of the repository, seen from this package.
const root = "../.."

// text is what e2e/sqltext prints.
type text struct {
	Source    string   `json:"source"`
	Kind      string   `json:"kind"`
	SQL       string   `json:"sql"`
	Forbidden []string `json:"forbidden"`
}

// parse parses one statement; a panic of the parser is an error.
func parse(sql string) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the parser panicked: %v", p)
		}
	}()
	if _, err := parser.ParseOne(sql); err != nil {
		return fmt.Errorf("CockroachDB's grammar: %w", err)
	}
	return nil
}

// texts runs e2e/sqltext in the product's module.
func texts(t *testing.T) []text {
	t.Helper()
	args := []string{"run", "./e2e/sqltext"}
	dump := os.Getenv("CERTMESH_SQL_DUMP")
	if dump != "" {
		if _, err := os.Stat(dump); err == nil {
			absolute, err := filepath.Abs(dump)
			if err != nil {
				t.Fatal(err)
			}
			args = append(args, "-dump", absolute)
		} else {
			t.Errorf("CERTMESH_SQL_DUMP: %v: run the store's suite with the same variable first", err)
		}
	}
	var stdout, stderr bytes.Buffer
	command := exec.CommandContext(t.Context(), "go", args...)
	command.Dir, command.Stdout, command.Stderr = root, &stdout, &stderr
	if err := command.Run(); err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	var all []text
	decoder := json.NewDecoder(&stdout)
	for {
		var x text
		if err := decoder.Decode(&x); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatalf("decode what sqltext printed: %v", err)
		}
		all = append(all, x)
	}
}

func TestStatementsParse(t *testing.T) {
	t.Parallel()
	counts := map[string]int{}
	for _, x := range texts(t) {
		counts[x.Kind]++
		for _, reason := range x.Forbidden {
			t.Errorf("%s: %s\n%s", x.Source, reason, x.SQL)
		}
		switch x.Kind {
		case "sqlite migration", "fragment":
			// Another dialect; or a part, whose whole is in the dump.
			continue
		case "executed", "constant":
			// What one engine alone understands is executed on that engine alone.
			if engineOnly(x.SQL) {
				continue
			}
		}
		if err := parse(x.SQL); err != nil {
			t.Errorf("%s: %v\n%s", x.Source, err, x.SQL)
		}
	}
	t.Logf("parsed, by kind: %v", counts)
	if counts["migration"] == 0 {
		t.Error("no migration was parsed")
	}
}

// engineOnly recognises SQLite's settings, transaction words and catalog.
func engineOnly(sql string) bool {
	if strings.Contains(sql, " FROM sqlite_master AS m JOIN pragma_table_info(m.name) AS p") {
		return true
	}
	words := strings.Fields(strings.ToUpper(sql))
	return len(words) > 0 && (words[0] == "PRAGMA" || len(words) > 1 && words[0] == "BEGIN" && words[1] == "IMMEDIATE")
}

// TestParserIsCockroachDBs guards the suite itself: a grammar that takes everything proves nothing.
func TestParserIsCockroachDBs(t *testing.T) {
	t.Parallel()
	for _, sql := range []string{
		"INSERT INTO job (id, attempt) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET attempt = excluded.attempt RETURNING id",
		"WITH v(id, attempt) AS (VALUES (CAST($1 AS TEXT), CAST($2 AS BIGINT))) UPDATE job SET attempt = v.attempt FROM v WHERE job.id = v.id RETURNING job.id",
		"SELECT labels->>'room' FROM agent WHERE id IN ($1, $2)",
	} {
		if err := parse(sql); err != nil {
			t.Errorf("%s: %v", sql, err)
		}
	}
	for _, sql := range []string{
		"LISTEN jobs", "LOCK TABLE job", "CREATE RULE r AS ON INSERT TO job DO NOTHING", "SELECT FROM WHERE", "INSERT OR IGNORE INTO job (id) VALUES ($1)",
		"SELECT id FROM job; SELECT id FROM job",
	} {
		if parse(sql) == nil {
			t.Errorf("accepted %s", sql)
		}
	}
}
