package storetest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/protocol/fault"
)

// traffic is write load: several agents' certificates are ordered, issued and deployed at the same time.
type traffic struct {
	made atomic.Int64
	quit chan struct{}
	once sync.Once
	wg   sync.WaitGroup
}

// load runs traffic through s until stop, which the end of the test calls as well.
func load(t *testing.T, w *World, s *store.Store) *traffic {
	t.Helper()
	const sides = 4
	l := &traffic{quit: make(chan struct{})}
	t.Cleanup(l.stop)
	for side := range sides {
		a := w.Agent(t, fmt.Sprintf("host-%d", side))
		l.wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-l.quit:
					return
				default:
				}
				// A target holds one certificate.
				name := fmt.Sprintf("c%d-%d.test", side, n)
				g := domain.Target{ID: id.New(id.Target), Name: name, AgentID: a.ID, Kind: "file", VerifyAddress: "127.0.0.1:443", Enabled: true}
				err := s.CreateTarget(t.Context(), g, w.Op())
				if err == nil {
					err = drive(w, s, t, a, w.order(name, g.ID))
				}
				if err != nil {
					if t.Context().Err() == nil {
						t.Errorf("side %d: %v", side, err)
					}
					return
				}
				l.made.Add(1)
			}
		})
	}
	return l
}

func (l *traffic) stop() {
	l.once.Do(func() { close(l.quit) })
	l.wg.Wait()
}

// more waits until n more certificates have gone through.
func (l *traffic) more(t *testing.T, n int64) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(time.Minute)
	for until := l.made.Load() + n; l.made.Load() < until; {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%d certificates went through and no more", l.made.Load())
		}
		if t.Failed() {
			t.FailNow()
		}
	}
}

// A backup under full write load is one moment of the store: sound, with the schema, and no invariant broken in it.
func TestBackupUnderLoad(t *testing.T) {
	t.Parallel()
	lite := Engines(t)[0]
	w := NewWorld(t, lite)
	l := load(t, w, w.S)
	dir := t.TempDir()
	former := 0
	for n := range 3 {
		l.more(t, 5)
		to := filepath.Join(dir, fmt.Sprintf("backup-%d.db", n))
		made, err := store.Backup(t.Context(), w.DSN, to)
		must(t, err)
		info, err := os.Stat(to)
		must(t, err)
		if info.Mode() != 0o600 || made.Path != to || made.Bytes != info.Size() || made.Bytes == 0 {
			t.Errorf("%+v: %v, %d bytes", made, info.Mode(), info.Size())
		}
		restored := &World{Engine: lite, DSN: "sqlite:" + to, now: w.Now()}
		restored.S = lite.OpenAt(t, restored.DSN)
		must(t, restored.S.CheckSchema(t.Context()))
		restored.Check(t)
		versions := restored.count(t, "SELECT COUNT(*) FROM version")
		if versions < former {
			t.Errorf("%d versions after %d", versions, former)
		}
		former = versions
		// It is a store that can be gone on with.
		restored.Agent(t, "another")
	}
	l.stop()
	if made := l.made.Load(); made < int64(former)-4 || former == 0 {
		t.Errorf("%d certificates were made, %d are in the backup", made, former)
	}
	w.Check(t)
	left, err := filepath.Glob(filepath.Join(dir, "*.partial-*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// What cannot be backed up is told why, and nothing is left under the name.
func TestBackupRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	there, junk := file("there", "x"), file("junk", strings.Repeat("no database ", 1000))
	empty := filepath.Join(dir, "empty.db")
	db, err := sql.Open("sqlite", "file:"+empty)
	must(t, err)
	_, err = db.ExecContext(t.Context(), "CREATE TABLE x (y TEXT)")
	must(t, errors.Join(err, db.Close()))
	good := newSQLite(t)
	for _, c := range []struct{ dsn, to, says string }{
		{"postgres://u:hunter2@db/x", "b", "pg_dump"},
		{"cockroach://u:hunter2@db/x", "b", "BACKUP DATABASE"},
		{"oracle://u:hunter2@db/x", "b", "must begin with"},
		{"sqlite:" + filepath.Join(dir, "none.db"), "b", "there is no database"},
		{"sqlite:" + dir, "b", "is not a file"},
		{"sqlite:" + junk, "b", "not a sound SQLite database"},
		{"sqlite:" + empty, "b", "is not a certmesh store"},
		{good, there, "exists already"},
		{good, filepath.Join(dir, "no", "such"), "directory that exists"},
	} {
		to := c.to
		if to == "b" {
			to = filepath.Join(dir, "b")
		}
		_, err := store.Backup(t.Context(), c.dsn, to)
		if err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", c.dsn, err)
		}
		if !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: class %s", c.dsn, fault.ClassOf(err))
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := store.Backup(ctx, good, filepath.Join(dir, "b")); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "b")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("something was left: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*.partial-*")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}
