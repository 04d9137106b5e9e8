package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/certmesh/certmesh/protocol/fault"
)

// Migration is one numbered step of the schema.
type Migration struct {
	Version int64
	Name    string
	// AppliedAt is zero while the step is outstanding.
	AppliedAt time.Time
}

const createMigrationTable = `CREATE TABLE IF NOT EXISTS schema_migration (
    version    BIGINT NOT NULL PRIMARY KEY,
    name       TEXT   NOT NULL,
    applied_at BIGINT NOT NULL
)`

type step struct {
	Migration
	text string
}

// steps are the migrations of this dialect in order.
func (s *Store) steps() ([]step, error) {
	entries, err := fs.ReadDir(s.cfg.Migrations, s.d.folder)
	if err != nil {
		return nil, fmt.Errorf("store: migrations: %w", err)
	}
	var out []step
	for _, e := range entries {
		number, name, ok := strings.Cut(strings.TrimSuffix(e.Name(), ".sql"), "_")
		v, err := strconv.ParseInt(number, 10, 64)
		if !ok || err != nil {
			return nil, fmt.Errorf("store: migration %s is not called NNNN_name.sql", e.Name())
		}
		b, err := fs.ReadFile(s.cfg.Migrations, s.d.folder+"/"+e.Name())
		if err != nil {
			return nil, fmt.Errorf("store: migrations: %w", err)
		}
		out = append(out, step{Migration: Migration{Version: v, Name: name}, text: string(b)})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Version < out[j].Version })
	return out, nil
}

// Migrate applies the outstanding steps, each once however many nodes call it at the same time.
func (s *Store) Migrate(ctx context.Context) error {
	steps, err := s.steps()
	if err != nil {
		return err
	}
	for _, st := range steps {
		done, err := s.applied(ctx)
		if err != nil {
			return err
		}
		if _, ok := done[st.Version]; ok {
			continue
		}
		if err := s.apply(ctx, st); err != nil {
			return err
		}
		s.log.InfoContext(ctx, "schema step applied", "version", st.Version, "name", st.Name)
	}
	return nil
}

func (s *Store) apply(ctx context.Context, st step) error {
	record := func(t *tx) error {
		_, err := t.exec("INSERT INTO schema_migration (version, name, applied_at) VALUES ($1, $2, $3)",
			st.Version, st.Name, micro(s.cfg.Now()))
		return err
	}
	var err error
	if s.d.ddlInTx {
		err = s.settled(ctx, "migrate", func(t *tx) error {
			// The row first: another node that is at the same step waits here, then finds it done; so does this one when
			// its commit was kept and gave no answer.
			if err := record(t); err != nil {
				return err
			}
			for _, text := range statements(st.text) {
				if _, err := t.exec(text); err != nil {
					return err
				}
			}
			return nil
		})
	} else {
		// CockroachDB changes schemas outside transactions; a step that was cut off is taken up where it stopped.
		for _, text := range statements(st.text) {
			if _, err = s.writer.ExecContext(ctx, text); err != nil && stateOf(err) != "42P07" {
				return classify("migrate", fmt.Errorf("%s: %w", brief(text), err))
			}
		}
		err = s.settled(ctx, "migrate", record)
	}
	if err == nil {
		return nil
	}
	done, readErr := s.applied(ctx)
	if readErr != nil {
		return errors.Join(err, readErr)
	}
	if _, ok := done[st.Version]; ok {
		return nil // another node was first
	}
	return fmt.Errorf("schema step %04d %s: %w", st.Version, st.Name, err)
}

// applied reads what was done, and makes the table for it at the first call.
func (s *Store) applied(ctx context.Context) (map[int64]time.Time, error) {
	done := map[int64]time.Time{}
	missing := false
	list := func(t *tx) error {
		clear(done)
		// Asked first, because to read a table that is not there counts as a failure, and every first start would have one.
		there, err := t.count(t.s.d.hasMigrationTable())
		if missing = there == 0; err != nil || missing {
			return err
		}
		return t.each("SELECT version, applied_at FROM schema_migration", nil, func(scan func(...any) error) error {
			var v, at int64
			if err := scan(&v, &at); err != nil {
				return err
			}
			done[v] = fromMicro(at)
			return nil
		})
	}
	var failed error
	// Two nodes that create the table at once: on PostgreSQL one of them fails although it said IF NOT EXISTS.
	for range 3 {
		if failed = s.read(ctx, "migrate.list", list); failed == nil && !missing {
			return done, nil
		}
		err := s.settled(ctx, "migrate.table", func(t *tx) error {
			_, err := t.exec(createMigrationTable)
			return err
		})
		if err != nil {
			failed = err
		}
		if fault.Is(err, fault.Retryable) {
			break
		}
	}
	if failed == nil {
		failed = errors.New("store: the table of schema steps was made and is missing")
	}
	return nil, failed
}

// hasMigrationTable counts it, where an unqualified name finds it.
func (d *dialect) hasMigrationTable() string {
	if d.name == nameSQLite {
		return "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name = 'schema_migration'"
	}
	return "SELECT CASE WHEN to_regclass('schema_migration') IS NULL THEN 0 ELSE 1 END"
}

// MigrationStatus lists the known steps, applied or not.
func (s *Store) MigrationStatus(ctx context.Context) ([]Migration, error) {
	steps, err := s.steps()
	if err != nil {
		return nil, err
	}
	done, err := s.applied(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]Migration, 0, len(steps))
	for _, st := range steps {
		m := st.Migration
		m.AppliedAt = done[m.Version]
		out = append(out, m)
	}
	return out, nil
}

// SchemaVersion returns the version the database has and the one this binary was built for.
func (s *Store) SchemaVersion(ctx context.Context) (has, wants int64, err error) {
	steps, err := s.steps()
	if err != nil {
		return 0, 0, err
	}
	done, err := s.applied(ctx)
	if err != nil {
		return 0, 0, err
	}
	for v := range done {
		has = max(has, v)
	}
	return has, steps[len(steps)-1].Version, nil
}

// CheckSchema refuses a database that is behind this binary or more than one version ahead of it: one ahead is what a
// node meets while others are rolled forward. One that is being filled by a copy is refused as well.
func (s *Store) CheckSchema(ctx context.Context) error {
	has, wants, err := s.SchemaVersion(ctx)
	switch {
	case err != nil:
		return err
	case has < wants:
		return fault.New(fault.Invalid, "the database has schema version %d and this program needs %d; run certmeshd migrate up", has, wants)
	case has > wants+1:
		return fault.New(fault.Invalid, "the database has schema version %d and this program knows %d; run a newer certmeshd", has, wants)
	}
	half, err := s.copying(ctx)
	if half {
		return fault.New(fault.Invalid, "the database is being filled by certmeshd store copy and is not complete; let that come to its end")
	}
	return err
}

// statements splits a migration at the semicolons that end lines. Migrations hold plain DDL: no bodies, no semicolons in
// strings at the end of a line.
func statements(text string) []string {
	var out []string
	var b strings.Builder
	for line := range strings.Lines(text) {
		code, _, _ := strings.Cut(line, "--")
		code = strings.TrimRight(code, " \t\r\n")
		b.WriteString(code + "\n")
		if strings.HasSuffix(code, ";") {
			if sql := strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(b.String()), ";")); sql != "" {
				out = append(out, sql)
			}
			b.Reset()
		}
	}
	if rest := strings.TrimSpace(b.String()); rest != "" {
		out = append(out, rest)
	}
	return out
}
