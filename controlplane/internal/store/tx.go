package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"github.com/cockroachdb/cockroach-go/v2/crdb"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
)

// maxTries bounds how often one transaction is run again after a conflict with another.
const maxTries = 10

// errAmbiguous: COMMIT gave no answer. Whether the transaction was kept is found out by the natural key of what it wrote.
var errAmbiguous = errors.New("the outcome of the commit is unknown")

// tx is one running transaction. It is used by one goroutine, and a query's rows are closed before the next statement.
type tx struct {
	ctx  context.Context
	s    *Store
	name string
	run  runner
	// again: an earlier run of this function may have been kept. What it would have written is looked for first.
	again      bool
	statements int
	trail      []domain.AuditEvent
}

// runner executes statements on the connection of a transaction.
type runner interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

type rows = sql.Rows

// row is the only or first row of a query.
type row struct {
	rows *sql.Rows
	err  error
}

// Scan reads the row; sql.ErrNoRows when there is none.
func (r row) Scan(dest ...any) error {
	if r.err != nil {
		return r.err
	}
	defer func() { _ = r.rows.Close() }()
	if !r.rows.Next() {
		if err := r.rows.Err(); err != nil {
			return err
		}
		return sql.ErrNoRows
	}
	if err := r.rows.Scan(dest...); err != nil {
		return err
	}
	// Close before Err: on PostgreSQL an error may follow the row.
	if err := r.rows.Close(); err != nil {
		return err
	}
	return r.rows.Err()
}

func (t *tx) before(query string, args []any) error {
	if err := t.ctx.Err(); err != nil {
		return err
	}
	t.statements++
	if t.s.cfg.Observe != nil {
		t.s.cfg.Observe(query, args)
	}
	if t.s.cfg.Faults != nil {
		return t.s.cfg.Faults.Before(t.name, t.statements)
	}
	return nil
}

// exec runs a statement and returns the number of rows it changed.
func (t *tx) exec(query string, args ...any) (int64, error) {
	if err := t.before(query, args); err != nil {
		return 0, err
	}
	res, err := t.run.ExecContext(t.ctx, query, args...)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", brief(query), err)
	}
	return res.RowsAffected()
}

// query runs a statement that returns rows. Close them (or read to the end with each) before the next statement.
func (t *tx) query(query string, args ...any) (*rows, error) {
	if err := t.before(query, args); err != nil {
		return nil, err
	}
	r, err := t.run.QueryContext(t.ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", brief(query), err)
	}
	return r, nil
}

// queryRow runs a statement of which the first row counts.
func (t *tx) queryRow(query string, args ...any) row {
	r, err := t.query(query, args...)
	return row{rows: r, err: err}
}

// each runs a query and calls fn once a row with the row's Scan.
func (t *tx) each(query string, args []any, fn func(scan func(dest ...any) error) error) error {
	r, err := t.query(query, args...)
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	for r.Next() {
		if err := fn(r.Scan); err != nil {
			return err
		}
	}
	if err := r.Err(); err != nil {
		return fmt.Errorf("%s: %w", brief(query), err)
	}
	return r.Close()
}

// audit adds a row to the trail; all of a transaction's rows are written together at its end. An empty Outcome means
// "ok". The id is the store's.
func (t *tx) audit(e domain.AuditEvent) error {
	if e.Action == "" || e.Resource == "" || e.Actor == "" || e.At.IsZero() {
		return fmt.Errorf("store: an audit event of %s lacks its actor, action, resource or time", t.name)
	}
	if e.Outcome == "" {
		e.Outcome = "ok"
	}
	t.trail = append(t.trail, e)
	return nil
}

// auditOp is audit with the fields of op.
func (t *tx) auditOp(op domain.Op, action, resource string, detail map[string]string) error {
	return t.audit(domain.AuditEvent{At: op.At, Actor: op.Actor, RequestID: op.RequestID, RemoteAddr: op.RemoteAddr,
		Action: action, Resource: resource, Detail: detail})
}

func (t *tx) flushTrail() error {
	for len(t.trail) > 0 {
		n := min(len(t.trail), maxBatch)
		v := t.values("id text, at int, actor text, action text, resource text, outcome text, request_id text, remote_addr text, detail text")
		for _, e := range t.trail[:n] {
			detail, err := jsonText(e.Detail)
			if err != nil {
				return err
			}
			v.add(t.s.newID(id.Audit), micro(e.At), e.Actor, e.Action, e.Resource, e.Outcome, e.RequestID, e.RemoteAddr, detail)
		}
		if _, err := t.exec(v.with()+`
INSERT INTO audit (id, at, actor, action, resource, outcome, request_id, remote_addr, detail)
SELECT id, at, actor, action, resource, outcome, request_id, remote_addr, detail FROM v WHERE id IS NOT NULL`, v.args...); err != nil {
			return err
		}
		t.trail = t.trail[n:]
	}
	return nil
}

// do runs fn and what follows it inside the transaction.
func (t *tx) do(fn func(*tx) error) error {
	t.statements, t.trail = 0, nil
	if t.s.cfg.Faults != nil {
		if err := t.s.cfg.Faults.Before(t.name, 0); err != nil {
			return err
		}
	}
	if err := fn(t); err != nil {
		return err
	}
	return t.flushTrail()
}

// settled runs fn in a SERIALIZABLE transaction, again as a whole when it met another one (40001, 40P01, SQLITE_BUSY), at
// most maxTries times and until ctx ends. After a commit without an answer fn runs once more with again set, and answers
// from the natural key of what it would have written when that is there.
func (s *Store) settled(ctx context.Context, name string, fn func(t *tx) error) error {
	return s.settledAt(ctx, name, sql.LevelSerializable, fn)
}

// settledAt is settled at a lower isolation. Who uses it says why unique keys and compare-and-set are enough.
func (s *Store) settledAt(ctx context.Context, name string, level sql.IsolationLevel, fn func(t *tx) error) error {
	err := s.write(ctx, name, level, false, fn)
	for tries := 1; errors.Is(err, errAmbiguous) && tries < maxTries; tries++ {
		s.metrics.ambiguous.WithLabelValues(name).Inc()
		if pause(ctx, tries) != nil {
			break
		}
		// A caller that has gone must not leave the question open half way: its context still bounds the new run.
		next := s.write(ctx, name, level, true, fn)
		if next != nil && (mayRepeat(next) || gone(next)) {
			continue
		}
		err = next
	}
	return classify(name, err)
}

func (s *Store) write(ctx context.Context, name string, level sql.IsolationLevel, again bool, fn func(t *tx) error) error {
	begun := s.cfg.Now()
	t := &tx{ctx: ctx, s: s, name: name, again: again}
	var err error
	tries := 0
	if s.d.name == nameCockroach {
		err = s.writeCockroach(ctx, t, &tries, level, fn)
	} else {
		for tries = 1; ; tries++ {
			if s.d.name == nameSQLite {
				err = s.writeSQLite(ctx, t, fn)
			} else {
				err = s.writePostgres(ctx, t, level, fn)
			}
			if err == nil || !mayRepeat(err) || tries == maxTries {
				break
			}
			if e := pause(ctx, tries); e != nil {
				err = errors.Join(e, err)
				break
			}
		}
	}
	s.metrics.done(name, err, tries, s.cfg.Now().Sub(begun))
	return err
}

// writePostgres runs one try. It never uses crdb.ExecuteTx: that takes RELEASE SAVEPOINT for the commit and drops the
// error of COMMIT, which on PostgreSQL is where serialization failures appear.
func (s *Store) writePostgres(ctx context.Context, t *tx, level sql.IsolationLevel, fn func(*tx) error) error {
	x, err := s.writer.BeginTx(ctx, &sql.TxOptions{Isolation: level})
	if err != nil {
		return err
	}
	t.run = x
	if err := t.do(fn); err != nil {
		_ = x.Rollback()
		if gone(err) && ctx.Err() == nil {
			return cutOff{err}
		}
		return err
	}
	keep, after := s.commitFault(t)
	if !keep {
		_ = x.Rollback()
		return after
	}
	if err := x.Commit(); err != nil {
		if errors.Is(err, sql.ErrTxDone) && ctx.Err() != nil {
			return ctx.Err() // rolled back by database/sql when ctx ended, before COMMIT was sent
		}
		if lostInCommit(err) {
			return errors.Join(errAmbiguous, err)
		}
		return err
	}
	return after
}

// cutOff: the connection was lost before COMMIT was sent, perhaps because this process stood still in the transaction.
// Nothing was kept.
type cutOff struct{ error }

func (c cutOff) Unwrap() error { return c.error }

func (s *Store) writeCockroach(ctx context.Context, t *tx, tries *int, level sql.IsolationLevel, fn func(*tx) error) error {
	var after error
	err := crdb.ExecuteTx(crdb.WithMaxRetries(ctx, maxTries-1), s.writer, &sql.TxOptions{Isolation: level}, func(x *sql.Tx) error {
		*tries++
		if *tries > 1 {
			if err := pause(ctx, *tries-1); err != nil {
				return err
			}
		}
		t.run = x
		if err := t.do(fn); err != nil {
			return err
		}
		keep, e := s.commitFault(t)
		after = e
		if !keep {
			return e
		}
		return nil
	})
	if _, ok := errors.AsType[*crdb.AmbiguousCommitError](err); ok {
		return errors.Join(errAmbiguous, err)
	}
	if err != nil {
		return err
	}
	return after
}

func (s *Store) writeSQLite(ctx context.Context, t *tx, fn func(*tx) error) error {
	c, err := s.lite.write(ctx)
	if err != nil {
		return err
	}
	defer s.lite.endWrite(c)
	// The statements of the one writer are short and local: they run to their end, so that an interrupted one never
	// leaves the connection in an unknown state. A cancelled caller is noticed between statements (tx.before).
	quiet := context.WithoutCancel(ctx)
	t.run = liteRunner{c}
	if _, err := c.exec(quiet, "BEGIN IMMEDIATE"); err != nil {
		return err
	}
	if err := t.do(fn); err != nil {
		return c.rollback(quiet, err)
	}
	keep, after := s.commitFault(t)
	if !keep {
		return c.rollback(quiet, after)
	}
	if _, err := c.exec(quiet, "COMMIT"); err != nil {
		// SQLite's COMMIT is local: an error means it was not kept, and the transaction is still open (BUSY) or gone.
		return c.rollback(quiet, err)
	}
	return after
}

// commitFault asks the test seam. keep: commit for real; err is then returned after the commit.
func (s *Store) commitFault(t *tx) (keep bool, err error) {
	if s.cfg.Faults == nil {
		return true, nil
	}
	switch err := s.cfg.Faults.Commit(t.name); {
	case err == nil:
		return true, nil
	case errors.Is(err, ErrCommitKept):
		return true, errAmbiguous
	case errors.Is(err, ErrCommitLost):
		return false, errAmbiguous
	case errors.Is(err, ErrCutAfterCommit):
		return true, ErrCut
	default:
		return false, err
	}
}

// read runs fn on a read-only snapshot from the reader pool. It may run more than once.
func (s *Store) read(ctx context.Context, name string, fn func(t *tx) error) error {
	begun := s.cfg.Now()
	t := &tx{ctx: ctx, s: s, name: name}
	var err error
	tries := 1
	for ; ; tries++ {
		if s.d.name == nameSQLite {
			err = s.readSQLite(ctx, t, fn)
		} else {
			err = s.readServer(ctx, t, fn)
		}
		if err == nil || !mayRepeat(err) || tries == maxTries {
			break
		}
		if e := pause(ctx, tries); e != nil {
			err = errors.Join(e, err)
			break
		}
	}
	s.metrics.done(name, err, tries, s.cfg.Now().Sub(begun))
	return classify(name, err)
}

func (s *Store) readServer(ctx context.Context, t *tx, fn func(*tx) error) error {
	// On PostgreSQL REPEATABLE READ is one snapshot without the bookkeeping of SERIALIZABLE; a reader that writes
	// nothing and whose answer is stale the moment it is given needs no more. CockroachDB gives SERIALIZABLE for both.
	level := sql.LevelRepeatableRead
	if s.d.name == nameCockroach {
		level = sql.LevelSerializable
	}
	x, err := s.reader.BeginTx(ctx, &sql.TxOptions{Isolation: level, ReadOnly: true})
	if err != nil {
		return err
	}
	defer func() { _ = x.Rollback() }()
	t.run = x
	return t.do(fn)
}

func (s *Store) readSQLite(ctx context.Context, t *tx, fn func(*tx) error) error {
	c, err := s.lite.read(ctx)
	if err != nil {
		return err
	}
	defer s.lite.endRead(c)
	quiet := context.WithoutCancel(ctx)
	if _, err := c.exec(quiet, "BEGIN"); err != nil {
		return err
	}
	t.run = liteRunner{c}
	return c.rollback(quiet, t.do(fn))
}

// pause waits a random while that grows with the number of tries: 1 ms doubling to 128 ms, times [0.5, 1.5).
func pause(ctx context.Context, tries int) error {
	d := time.Millisecond << min(tries-1, 7)
	timer := time.NewTimer(time.Duration(float64(d) * (0.5 + rand.Float64()))) //nolint:gosec // spreading, not secrecy
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

func isEOF(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

// brief is the beginning of a statement, for errors.
func brief(query string) string {
	const most = 60
	if len(query) > most {
		return query[:most] + "…"
	}
	return query
}
