package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// liteConn is one connection to an SQLite file with its prepared statements: parsing SQL was 9 % of the pipeline.
type liteConn struct {
	conn  *sql.Conn
	kept  map[string]*liteStmt
	fault bool // a rollback failed: the connection is thrown away
}

// maxKept bounds the prepared statements of one connection; there are about 200 texts, times a few list lengths.
const maxKept = 600

// liteStmt is a statement with its parameters as SQLite binds them fastest.
type liteStmt struct {
	*sql.Stmt
	// order has, for each question mark, the index of its argument.
	order []int
}

var parameter = regexp.MustCompile(`\$[0-9]+`)

// anonymous turns $1 and so on into question marks: SQLite looks up the name of each parameter in a list of all of them,
// which was an eighth of the pipeline at a thousand. No constant of ours holds a dollar sign.
func anonymous(query string) (text string, order []int, err error) {
	text = parameter.ReplaceAllStringFunc(query, func(name string) string {
		n, e := strconv.Atoi(name[1:])
		if e != nil || n == 0 {
			err = fmt.Errorf("the parameter %s is not a number from 1", name)
		}
		order = append(order, n-1)
		return "?"
	})
	return text, order, err
}

// values are the arguments in the order of the question marks.
func (st *liteStmt) values(args []any) ([]any, error) {
	all := make([]any, len(st.order))
	for i, n := range st.order {
		if n >= len(args) {
			return nil, fmt.Errorf("parameter $%d has no argument", n+1)
		}
		all[i] = args[n]
	}
	return all, nil
}

func (c *liteConn) prepared(ctx context.Context, query string) (*liteStmt, error) {
	if st := c.kept[query]; st != nil {
		return st, nil
	}
	if len(c.kept) >= maxKept {
		for text, st := range c.kept {
			_ = st.Close()
			delete(c.kept, text)
		}
	}
	text, order, err := anonymous(query)
	if err != nil {
		return nil, err
	}
	st, err := c.conn.PrepareContext(ctx, text)
	if err != nil {
		return nil, err
	}
	c.kept[query] = &liteStmt{st, order}
	return c.kept[query], nil
}

func (c *liteConn) exec(ctx context.Context, query string, args ...any) (sql.Result, error) {
	st, err := c.prepared(ctx, query)
	if err != nil {
		return nil, err
	}
	all, err := st.values(args)
	if err != nil {
		return nil, err
	}
	return st.ExecContext(ctx, all...)
}

// rollback ends the transaction and returns cause.
func (c *liteConn) rollback(ctx context.Context, cause error) error {
	if _, err := c.exec(ctx, "ROLLBACK"); err != nil && !strings.Contains(err.Error(), "no transaction is active") {
		c.fault = true
		return errors.Join(cause, err)
	}
	return cause
}

func (c *liteConn) close() error {
	for _, st := range c.kept {
		_ = st.Close()
	}
	return c.conn.Close()
}

// liteRunner runs statements prepared. The caller's context is checked between statements, not passed on: watching it
// costs a goroutine a statement.
type liteRunner struct{ c *liteConn }

func (r liteRunner) ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error) {
	return r.c.exec(context.WithoutCancel(ctx), query, args...)
}

func (r liteRunner) QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
	st, err := r.c.prepared(context.WithoutCancel(ctx), query)
	if err != nil {
		return nil, err
	}
	all, err := st.values(args)
	if err != nil {
		return nil, err
	}
	return st.QueryContext(context.WithoutCancel(ctx), all...)
}

// litePool has one writer and a few readers: two readers flat out halve the writer's rate, so their number is bounded.
type litePool struct {
	db      *sql.DB // writer
	rdb     *sql.DB // query_only
	writers chan *liteConn
	readers chan *liteConn
}

// openSQLite opens (and makes, 0600) the file.
func openSQLite(ctx context.Context, path string, readers int) (*litePool, error) {
	if path == "" || strings.HasPrefix(path, ":memory:") {
		return nil, fmt.Errorf("an sqlite DSN names a file: sqlite:/var/lib/certmesh/certmesh.db")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("sqlite file: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("sqlite file: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("sqlite file: %w", err)
	}
	// 16 MiB a connection hold the inner pages of the indexes of a million certificates; the 2 MiB of old do not, and every
	// look-up then reads three pages instead of one. What is not needed is not taken.
	dsn := func(more ...string) string {
		q := url.Values{"_pragma": append([]string{"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)",
			"temp_store(MEMORY)", "cache_size(-16384)"}, more...)}
		return (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: q.Encode()}).String()
	}
	p := &litePool{writers: make(chan *liteConn, 1), readers: make(chan *liteConn, readers)}
	if p.db, err = sql.Open("sqlite", dsn()); err != nil {
		return nil, fmt.Errorf("sqlite: %w", err)
	}
	if p.rdb, err = sql.Open("sqlite", dsn("query_only(1)")); err != nil {
		return nil, errors.Join(fmt.Errorf("sqlite: %w", err), p.db.Close())
	}
	p.writers <- nil
	for range readers {
		p.readers <- nil
	}
	c, err := p.write(ctx) // makes the WAL before any reader looks
	if err != nil {
		return nil, errors.Join(fmt.Errorf("sqlite: %w", err), p.db.Close(), p.rdb.Close())
	}
	p.endWrite(c)
	return p, nil
}

func take(ctx context.Context, db *sql.DB, from chan *liteConn) (*liteConn, error) {
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case c := <-from:
		if c != nil {
			return c, nil
		}
		conn, err := db.Conn(context.WithoutCancel(ctx))
		if err != nil {
			from <- nil
			return nil, err
		}
		return &liteConn{conn: conn, kept: map[string]*liteStmt{}}, nil
	}
}

func give(c *liteConn, to chan *liteConn) {
	if c.fault {
		_ = c.conn.Raw(func(any) error { return errBroken })
		_ = c.close()
		c = nil
	}
	to <- c
}

var errBroken = errors.New("the connection is to be thrown away")

func (p *litePool) write(ctx context.Context) (*liteConn, error) { return take(ctx, p.db, p.writers) }
func (p *litePool) endWrite(c *liteConn)                         { give(c, p.writers) }
func (p *litePool) read(ctx context.Context) (*liteConn, error)  { return take(ctx, p.rdb, p.readers) }
func (p *litePool) endRead(c *liteConn)                          { give(c, p.readers) }

// close waits for what runs.
func (p *litePool) close() error {
	var err error
	for range cap(p.readers) {
		if c := <-p.readers; c != nil {
			err = errors.Join(err, c.close())
		}
	}
	err = errors.Join(err, p.rdb.Close())
	if c := <-p.writers; c != nil {
		err = errors.Join(err, c.close())
	}
	return errors.Join(err, p.db.Close())
}
