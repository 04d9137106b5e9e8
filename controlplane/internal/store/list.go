package store

import (
	"database/sql"
	"errors"
	"fmt"
	"slices"
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

// pageQuery is a list without its page: the rows of one stretch of an index, in its order.
//
// The first column that the index begins with is ordered by although it has one value, and on servers compared as an array of
// one, a = ANY($1): only then is that index the only way to the order. A planner that knows a column to be constant may as
// well walk the primary key until enough rows have the value, and where those with it lie at the other end that is the
// whole table. Nor does a stretch end at a row comparison: PostgreSQL does not stop at one that a later column decides.
type pageQuery struct {
	// columns are what is selected of the table from.
	columns, from string
	where         *where
	// lead are the columns that the index begins with.
	lead []pin
	// by is what orders the list before the key; empty: the key alone.
	by string
	// low, where not nil, is the least by (or key) and high the first beyond.
	low, high any
	// key is unique among the rows; newest orders downwards.
	key    string
	newest bool
	// branches, if any, are stretches of which each is read for as much as the page may need, and the pages then merged.
	branches []branch
}

// pin is a column and its value.
type pin struct{ column, value string }

// branch is one of several stretches: what it adds to the query.
type branch struct {
	// from, unless empty, stands for that of the query; term, unless empty, is a further condition.
	from, term string
	args       []any
	lead       []pin
	// few: the stretch is short and read whole, in no order.
	few bool
}

// readPage reads one row more than size, by which nextCursor knows that there is a next page. after is the last row of the
// page before: its key, with what orders the list before that.
func readPage[T any](t *tx, q pageQuery, size int, after []any, scan func(scanner) (T, error)) ([]T, error) {
	w := q.where
	if w == nil {
		w = &where{}
	}
	if len(q.branches) > 0 {
		return collect(t, q.merged(w, size, after, t.s.d), w.args, scan)
	}
	q.stretch(w, after, t.s.d)
	return collect(t, "SELECT "+q.columns+" FROM "+q.from+w.text()+q.order(true)+" LIMIT "+w.arg(size+1), w.args, scan)
}

// merged composes the keys of all branches, of which the first are taken, and reads the rows of those alone.
func (q pageQuery) merged(w *where, size int, after []any, d *dialect) string {
	table, _, _ := strings.Cut(q.key, ".")
	sorted := q.by
	if sorted == "" {
		sorted = q.key
	}
	common := w.terms
	var heads []string
	for i, b := range q.branches {
		part := q
		part.lead = slices.Concat(q.lead, b.lead)
		if b.from != "" {
			part.from = b.from
		}
		w.terms = slices.Clone(common)
		if b.term != "" {
			w.and(b.term, b.args...)
		}
		part.stretch(w, after, d)
		name := "h" + strconv.Itoa(i)
		head := "SELECT " + name + ".k, " + name + ".s FROM (SELECT " + q.key + " AS k, " + sorted + " AS s FROM " + part.from + w.text()
		if !b.few {
			head += part.order(true) + " LIMIT " + w.arg(size+1)
		}
		heads = append(heads, head+") AS "+name)
	}
	down := direction(q.newest)
	// CROSS keeps SQLite from beginning with the table; to the others it is an inner join.
	return "SELECT " + q.columns + " FROM (SELECT heads.k FROM (" + strings.Join(heads, " UNION ALL ") + ") AS heads ORDER BY heads.s" +
		down + ", heads.k" + down + " LIMIT " + w.arg(size+1) + ") AS page CROSS JOIN " + table + " WHERE " + q.key + " = page.k" + q.order(false)
}

// stretch adds the conditions that bound the index's columns.
func (q pageQuery) stretch(w *where, after []any, d *dialect) {
	for i, p := range q.lead {
		if i == 0 && d.arrays {
			w.and(p.column+" = ANY(?)", []string{p.value})
			continue
		}
		w.and(p.column+" = ?", p.value)
	}
	low, high, keys := q.low, q.high, []string{q.key}
	if q.by != "" {
		keys = []string{q.by, q.key}
	}
	switch {
	case after != nil && q.newest:
		w.tuple(keys, " < ", after)
		high = nil
	case after != nil:
		w.tuple(keys, " > ", after)
		low = nil
	}
	if low != nil {
		w.and(keys[0]+" >= ?", low)
	}
	if high != nil {
		w.and(keys[0]+" < ?", high)
	}
}

// tuple compares columns with as many values.
func (w *where) tuple(columns []string, compare string, values []any) {
	marks := make([]string, len(values))
	for i, v := range values {
		marks[i] = w.arg(v)
	}
	if len(columns) == 1 {
		w.terms = append(w.terms, columns[0]+compare+marks[0])
		return
	}
	w.terms = append(w.terms, "("+strings.Join(columns, ", ")+")"+compare+"("+strings.Join(marks, ", ")+")")
}

// order is the ORDER BY, with the columns that the index begins with or, for rows that are found already, without.
func (q pageQuery) order(lead bool) string {
	var columns []string
	if lead {
		for _, p := range q.lead {
			columns = append(columns, p.column)
		}
	}
	if q.by != "" {
		columns = append(columns, q.by)
	}
	down := direction(q.newest)
	return " ORDER BY " + strings.Join(append(columns, q.key), down+", ") + down
}

func direction(newest bool) string {
	if newest {
		return " DESC"
	}
	return ""
}

// position is the place after the row whose key is cursor; empty: the beginning.
func position(cursor string) []any {
	if cursor == "" {
		return nil
	}
	return []any{cursor}
}

// pins is the one column that a list may be narrowed by; none when value is empty.
func pins(column, value string) []pin {
	if value == "" {
		return nil
	}
	return []pin{{column, value}}
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

// listCursor is checkPage for the lists of which there are several forms. Their cursors say which they are of: position
// is the rest, in as many parts as were put in.
func listCursor(p domain.PageRequest, list string, of domain.Sorted, parts int) (size int, position []string, err error) {
	size, after, err := checkPage(p)
	if err != nil || after == "" {
		return size, nil, err
	}
	const head = 3
	all := strings.SplitN(after, "/", head+parts)
	switch {
	case !storable(after) || len(all) < head+1:
		return 0, nil, errCursor()
	case all[0] != list || all[1] != of.By() || all[2] != of.Sort():
		return 0, nil, fault.InvalidField("page.cursor", "is of another list than this one, %s of %ss by %s; begin again without a cursor", of.By(), list, of.Sort())
	case len(all) != head+parts:
		return 0, nil, errCursor()
	}
	return size, all[head:], nil
}

// listPosition is what listCursor reads.
func listPosition(list string, of domain.Sorted, position ...string) string {
	return strings.Join(append([]string{list, of.By(), of.Sort()}, position...), "/")
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
