package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/protocol/fault"
)

// estate is a store with rows in most tables: several agents, certificates in all states, things that were revoked.
func (w *World) estate(t *testing.T, certificates int) domain.Agent {
	t.Helper()
	ctx := t.Context()
	a := w.Agent(t, "web1")
	w.Duty(t, "d")
	for n := range certificates {
		name := fmt.Sprintf("c%d.test", n)
		must(t, drive(w, w.S, t, a, w.order(name, w.Target(t, a.ID, name).ID)))
	}
	revoked, _ := w.Order(t, "é'\\ revoked", domain.Policy{}, w.Target(t, a.ID, "r").ID)
	_, _, err := w.S.RevokeCertificate(ctx, revoked.ID, 1, w.Op())
	must(t, err)
	w.Order(t, "open.test", domain.Policy{RequireApproval: true}, w.Target(t, a.ID, "o").ID)
	must(t, w.S.SaveCRL(ctx, w.Duty(t, "crl"), domain.CRL{IssuerID: w.Issuer, Number: 1 << 42, DER: bytes.Repeat([]byte{0, 0xff}, 1<<16), ThisUpdate: w.Now(), NextUpdate: w.Now()}))
	must(t, w.S.RecordRejection(ctx, domain.StateRejection{AgentID: a.ID, Kind: "target", Name: "x", Version: 3, Reason: "because", At: w.Now()}))
	return a
}

// at is the world on another database.
func (w *World) at(t *testing.T, e Engine, dsn string, change ...func(*store.Config)) *World {
	t.Helper()
	x := &World{Engine: e, DSN: dsn, Issuer: w.Issuer, Profile: w.Profile, now: w.Now(), serial: w.serial + 1000}
	x.S = e.OpenAt(t, dsn, change...)
	return x
}

// copyAll copies in batches so small that every table of some size has several.
func copyAll(ctx context.Context, from, to *store.Store, op domain.Op) (int64, error) {
	var rows int64
	_, err := from.CopyTo(ctx, to, store.CopyOptions{Op: op, Said: func(c store.Copied) { rows += c.Rows }, Batch: 10})
	return rows, err
}

// From every engine to every other, and the copy is gone on with.
func TestCopy(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, from Engine) {
		w := NewWorld(t, from)
		a := w.estate(t, 15)
		for _, e := range Engines(t) {
			x := w.at(t, e, e.New(t))
			rows, err := copyAll(t.Context(), w.S, x.S, w.Op())
			must(t, err)
			if rows < 250 {
				t.Errorf("%d rows", rows)
			}
			must(t, x.S.CheckSchema(t.Context()))
			x.Check(t)
			for _, query := range []string{"SELECT COUNT(*) FROM version", "SELECT COUNT(*) FROM job", "SELECT COUNT(*) FROM meta", "SELECT SUM(epoch) FROM duty_fence"} {
				if was, is := w.count(t, query), x.count(t, query); was != is {
					t.Errorf("%s: %d, was %d", query, is, was)
				}
			}
			if n := x.count(t, "SELECT COUNT(*) FROM audit WHERE action = 'store.copied'"); n != 1 {
				t.Errorf("%d audit rows of the copy", n)
			}
			must(t, drive(x, x.S, t, a, x.order("after.test", x.Target(t, a.ID, "after").ID)))
			x.Check(t)
			// It is not copied over.
			if _, err := copyAll(t.Context(), w.S, x.S, w.Op()); !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "not empty") {
				t.Errorf("a second copy: %v", err)
			}
		}
	})
}

// A copy is cut at events all over it; nodes refuse what is there, and the next run ends it.
func TestCopyCutAnywhere(t *testing.T) {
	t.Parallel()
	w := NewWorld(t, Engines(t)[0])
	w.estate(t, 2)
	w.DB(t) // it serves the subtests
	Each(t, func(t *testing.T, e Engine) {
		// A prime number, so that every kind of event is met. On a server each costs a database; the code is the same.
		step := 11
		if e.Name != "sqlite" {
			step = 43
		}
		dsn := e.New(t)
		cut := &Cutter{}
		x := w.at(t, e, dsn, func(c *store.Config) { c.Faults = cut })
		at, cuts := 0, 0
		for done := false; !done; {
			at += step
			cut.Arm(at)
			_, err := copyAll(t.Context(), w.S, x.S, w.Op())
			done = !cut.Dead()
			if err != nil && (done || !errors.Is(err, store.ErrCut)) {
				t.Fatalf("cut at %d: %v", at, err)
			}
			cut.Arm(0)
			if !done {
				cuts++
			}
			if x.count(t, "SELECT COUNT(*) FROM meta WHERE key = 'store_copy'") == 1 {
				if err := x.S.CheckSchema(t.Context()); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "not complete") {
					t.Fatalf("cut at %d, a node would take it: %v", at, err)
				}
				_, err = copyAll(t.Context(), w.S, x.S, w.Op())
				must(t, err)
			}
			must(t, x.S.CheckSchema(t.Context()))
			if x.count(t, "SELECT COUNT(*) FROM version") > 0 {
				x.Check(t)
				if n := x.count(t, "SELECT COUNT(*) FROM audit"); n != w.count(t, "SELECT COUNT(*) FROM audit")+1 {
					t.Fatalf("cut at %d: %d audit rows", at, n)
				}
			}
			if e.Name == "sqlite" {
				x = w.at(t, e, e.New(t), func(c *store.Config) { c.Faults = cut })
				continue
			}
			must(t, empty(t.Context(), dsn))
		}
		if cuts < 8 {
			t.Errorf("the copy was cut %d times only", cuts)
		}
		t.Logf("cut at %d of %d events", cuts, at)
	})
}

// What must not be copied, or not go on, is told why.
func TestCopyRefused(t *testing.T) {
	t.Parallel()
	lite := Engines(t)[0]
	w := NewWorld(t, lite)
	a := w.estate(t, 1)
	ctx := t.Context()
	fresh := func() (*World, *Cutter) {
		cut := &Cutter{}
		return w.at(t, lite, lite.New(t), func(c *store.Config) { c.Faults = cut }), cut
	}
	refused := func(err error, class fault.Class, says string) {
		t.Helper()
		if !fault.Is(err, class) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want %s: %s", err, class, says)
		}
	}
	half := func() (*World, *Cutter) {
		x, cut := fresh()
		cut.Arm(400)
		if _, err := copyAll(ctx, w.S, x.S, w.Op()); !errors.Is(err, store.ErrCut) {
			t.Fatalf("%v", err)
		}
		cut.Arm(0)
		return x, cut
	}
	// Another store's copy.
	x, _ := half()
	other := NewWorld(t, lite)
	_, err := copyAll(ctx, other.S, x.S, w.Op())
	refused(err, fault.Conflict, "from another store")
	// The source is one that is being filled.
	y, _ := fresh()
	_, err = copyAll(ctx, x.S, y.S, w.Op())
	refused(err, fault.Invalid, "the source is being filled")
	// The source goes on in between.
	w.Pass(time.Hour)
	w.Open(t, a.ID, "n1")
	_, err = copyAll(ctx, w.S, x.S, w.Op())
	refused(err, fault.Conflict, "the source was changed")
	// Schemas.
	for _, side := range []string{"source", "target"} {
		from, to := w.at(t, lite, lite.New(t)), w.at(t, lite, lite.New(t))
		changed := from
		if side == "target" {
			changed = to
		}
		changed.change(t, "DELETE FROM schema_migration WHERE version = (SELECT MAX(version) FROM schema_migration)")
		_, err = copyAll(ctx, from.S, to.S, w.Op())
		refused(err, fault.Invalid, "the "+side+" has schema version")
	}
	for _, c := range []struct{ change, says string }{
		{"CREATE TABLE theirs (id TEXT NOT NULL PRIMARY KEY)", "has a table theirs"},
		{"DROP TABLE crl", "has no table crl"},
		{"ALTER TABLE crl ADD COLUMN more BIGINT", "table crl has other columns"},
	} {
		x, _ := fresh()
		x.change(t, c.change)
		_, err = copyAll(ctx, w.S, x.S, w.Op())
		refused(err, fault.Invalid, c.says)
	}
}
