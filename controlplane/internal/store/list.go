package store

import (
	"database/sql"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// where composes the conditions of a list: optional filters are left out, so that every text an engine plans names just
// the columns it is to use an index for.
type where struct {
	terms []string
	args  []any
}

// and adds a condition in which each ? stands for the next of args.
func (w *where) and(term string, args ...any) {
	for _, a := range args {
		term = strings.Replace(term, "?", w.arg(a), 1)
	}
	w.terms = append(w.terms, term)
}

// equal adds a condition unless value is empty.
func (w *where) equal(column, value string) {
	if value != "" {
		w.and(column+" = ?", value)
	}
}

// arg appends a parameter and returns its placeholder.
func (w *where) arg(a any) string {
	w.args = append(w.args, a)
	return "$" + strconv.Itoa(len(w.args))
}

func (w *where) text() string {
	if len(w.terms) == 0 {
		return ""
	}
	return " WHERE " + strings.Join(w.terms, " AND ")
}

// pageQuery is a list without its page.
type pageQuery struct {
	// from is "SELECT … FROM …".
	from  string
	where *where
	// key is the column that the list is ordered by, unique within it; newest orders it downwards.
	key    string
	newest bool
}

// readPage reads one row more than size, by which nextCursor knows that there is a next page.
func readPage[T any](t *tx, q pageQuery, size int, after string, scan func(scanner) (T, error)) ([]T, error) {
	compare, order := " > ?", ""
	if q.newest {
		compare, order = " < ?", " DESC"
	}
	if after != "" {
		q.where.and(q.key+compare, after)
	}
	text := q.from + q.where.text() + " ORDER BY " + q.key + order
	return collect(t, text+" LIMIT "+q.where.arg(size+1), q.where.args, scan)
}

// collect reads all rows of a query.
func collect[T any](t *tx, query string, args []any, scan func(scanner) (T, error)) ([]T, error) {
	var out []T
	err := t.each(query, args, func(row func(...any) error) error {
		item, err := scan(row)
		if err == nil {
			out = append(out, item)
		}
		return err
	})
	return out, err
}

// one reads the only row of a query; missing is the error when there is none.
func one[T any](t *tx, missing error, query string, args []any, scan func(scanner) (T, error)) (T, error) {
	item, err := scan(t.queryRow(query, args...).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return item, missing
	}
	return item, err
}

func scanText(scan scanner) (string, error) {
	var s string
	err := scan(&s)
	return s, err
}

// pageAfter is checkPage for lists whose keys begin with prefix: a cursor of another list is refused, not misread.
func pageAfter(p domain.PageRequest, prefix string) (size int, after string, err error) {
	size, after, err = checkPage(p)
	if err == nil && after != "" && (!storable(after) || !strings.HasPrefix(after, prefix)) {
		return 0, "", errCursor()
	}
	return size, after, err
}

func errCursor() error {
	return fault.InvalidField("page.cursor", "is not a cursor of an earlier answer; begin again without one")
}

// storable reports whether s can be text in every engine: PostgreSQL refuses NUL and broken UTF-8.
func storable(s string) bool { return utf8.ValidString(s) && !strings.ContainsRune(s, 0) }

// checkTexts refuses texts that no engine should see. fields are pairs of a field's path and its value.
func checkTexts(fields ...string) error {
	for i := 0; i+1 < len(fields); i += 2 {
		if !storable(fields[i+1]) {
			return fault.InvalidField(fields[i], "must be UTF-8 text without NUL characters")
		}
	}
	return nil
}

// kind is what an error about a missing or a second thing needs to know.
type kind struct {
	// noun as in "no certificate"; table is also the table's name, prefix that of its ids.
	noun, table, prefix string
	// list and get are the tool's commands that show what there is.
	list, get string
}

func (k kind) missing(key string) error {
	return fault.New(fault.NotFound, "no %s %q; %s shows them", k.noun, key, k.list)
}

func (k kind) taken(name string) error {
	if k.get == "" {
		return fault.New(fault.Conflict, "%s name %q is taken; choose another", k.noun, name)
	}
	return fault.New(fault.Conflict, "%s name %q is taken; choose another or use %s %s", k.noun, name, k.get, name)
}

// second is the error about a new thing whose id, or whatever else identifies it, is there already.
func (k kind) second() error {
	return fault.New(fault.Conflict, "this %s is there already; ask again with a new id", k.noun)
}

// insertError is the error of an INSERT that may have met a unique key.
func (k kind) insertError(err error, name string) error {
	key, unique := isUnique(err)
	switch {
	case !unique:
		return err
	case key == k.table+".name":
		return k.taken(name)
	}
	return k.second()
}

// check refuses what a new thing cannot be called. A name in the form of an id could never be asked for.
func (k kind) check(id, name string) error {
	switch {
	case !strings.HasPrefix(id, k.prefix+"_") || !storable(id):
		return fault.InvalidField("id", "must begin with %s_", k.prefix)
	case name == "":
		return fault.InvalidField("name", "must not be empty")
	case !storable(name):
		return fault.InvalidField("name", "must be UTF-8 text without NUL characters")
	case strings.HasPrefix(name, k.prefix+"_"):
		return fault.InvalidField("name", "must not begin with %s_, which begins ids; choose another", k.prefix)
	}
	return nil
}

// column says whether key is an id or a name.
func (k kind) column(key string) string {
	if strings.HasPrefix(key, k.prefix+"_") {
		return k.table + ".id"
	}
	return k.table + ".name"
}

// find reads the thing that key is the id or the name of. from is "SELECT … FROM …".
func find[T any](t *tx, k kind, from, key string, scan func(scanner) (T, error)) (T, error) {
	if key == "" || !storable(key) {
		var none T
		return none, k.missing(key)
	}
	return one(t, k.missing(key), from+" WHERE "+k.column(key)+" = $1", []any{key}, scan)
}

// idOf resolves a filter that names a thing by its id or name; empty stays empty. An id is taken as it is.
func (t *tx) idOf(k kind, key string) (string, error) {
	if key == "" || strings.HasPrefix(key, k.prefix+"_") && storable(key) {
		return key, nil
	}
	return find(t, k, "SELECT "+k.table+".id FROM "+k.table, key, scanText)
}

// exists reports whether the row with this id is there: after a commit without an answer it says that it was kept.
func (t *tx) exists(table, id string) (bool, error) {
	n, err := t.count("SELECT COUNT(*) FROM "+table+" WHERE id = $1", id)
	return n > 0, err
}

// count reads one number.
func (t *tx) count(query string, args ...any) (int64, error) {
	var n int64
	if err := t.queryRow(query, args...).Scan(&n); err != nil {
		return 0, fmt.Errorf("%s: %w", brief(query), err)
	}
	return n, nil
}
