package store

import (
	"database/sql"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// maxBatch is the most items that share one transaction, and the most rows of one VALUES list.
const maxBatch = 100

// micro is what a column holds for t: microseconds since 1970, 0 for the zero time.
func micro(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

// fromMicro is the reverse of micro.
func fromMicro(us int64) time.Time {
	if us == 0 {
		return time.Time{}
	}
	return time.UnixMicro(us).UTC()
}

// nullMicro is micro with NULL for the zero time, for columns that a partial index leads to.
func nullMicro(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return t.UnixMicro()
}

// fromNull is the reverse of nullMicro.
func fromNull(us sql.NullInt64) time.Time {
	if !us.Valid {
		return time.Time{}
	}
	return fromMicro(us.Int64)
}

// nullText is NULL for the empty string.
func nullText(s string) any {
	if s == "" {
		return nil
	}
	return s
}

// jsonText is v as JSON text; a nil map or slice becomes {} or [] by its type.
func jsonText(v any) (string, error) {
	switch m := v.(type) {
	case map[string]string:
		if m == nil {
			return "{}", nil
		}
	case []string:
		if m == nil {
			return "[]", nil
		}
	}
	b, err := json.Marshal(v)
	if err != nil {
		return "", fmt.Errorf("store: writing a JSON column: %w", err)
	}
	return string(b), nil
}

// fromJSON reads a JSON column.
func fromJSON(text string, v any) error {
	if err := json.Unmarshal([]byte(text), v); err != nil {
		return fmt.Errorf("store: reading a JSON column: %w", err)
	}
	return nil
}

// notFound is the error for a thing that is not there.
func notFound(kind, id string) error {
	return fault.New(fault.NotFound, "there is no %s %s", kind, id)
}

// roundUp rounds a number of list members or rows up to one of few, so that there are few statement texts to prepare.
func roundUp(n int) int {
	for _, size := range []int{1, 2, 4, 8, 16, 32, 64, maxBatch, 250, 500} {
		if n <= size {
			return size
		}
	}
	return (n + domain.MaxPageSize - 1) / domain.MaxPageSize * domain.MaxPageSize
}

// inList writes "($first, …)" for at least one value, the last one repeated up to a round length.
func inList[T ~string](first int, values []T) (text string, args []any) {
	n := roundUp(len(values))
	var b strings.Builder
	for i := range n {
		if i == 0 {
			b.WriteString("(")
		} else {
			b.WriteString(", ")
		}
		b.WriteString("$" + strconv.Itoa(first+i))
		args = append(args, string(values[min(i, len(values)-1)]))
	}
	b.WriteString(")")
	return b.String(), args
}

// valueList builds the rows of a statement as a common table v. On servers each column is one array:
//
//	WITH v(a, b) AS (SELECT a, b FROM unnest(CAST($1 AS TEXT[]), CAST($2 AS BIGINT[])) AS u(a, b))
//
// which is one text for any number of rows, planned once. SQLite has no arrays:
//
//	WITH v(a, b) AS (VALUES (CAST($1 AS TEXT), CAST($2 AS BIGINT)), …)
//
// filled up to a round number of rows with rows of NULL, which match nothing; an INSERT … SELECT leaves them out by
// WHERE <key> IS NOT NULL.
type valueList struct {
	d     *dialect
	names []string
	types []string
	rows  int
	args  []any
}

// values starts a list. columns is "name type, …" with the types text, int, bytes and bool.
func (t *tx) values(columns string) *valueList {
	v := &valueList{d: t.s.d}
	for c := range strings.SplitSeq(columns, ",") {
		name, word, _ := strings.Cut(strings.TrimSpace(c), " ")
		switch word {
		case "text":
			word = "TEXT"
		case "int":
			word = "BIGINT"
		case "bytes":
			word = v.d.bytes
		case "bool":
			word = "BOOLEAN"
		default:
			panic("store: unknown column type " + word + " in " + columns) // a defect in a constant
		}
		v.names, v.types = append(v.names, name), append(v.types, word)
	}
	return v
}

// add appends a row; at most maxBatch of them.
func (v *valueList) add(args ...any) {
	if len(args) != len(v.names) {
		panic(fmt.Sprintf("store: %d values for %d columns", len(args), len(v.names)))
	}
	v.rows++
	v.args = append(v.args, args...)
}

// with returns the clause and fills args; call it once, after the last add and before arg.
func (v *valueList) with() string {
	head := "WITH v(" + strings.Join(v.names, ", ") + ") AS ("
	if v.d.arrays {
		return head + v.unnested() + ")"
	}
	var b strings.Builder
	b.WriteString(head + "VALUES ")
	n := roundUp(v.rows)
	for len(v.args) < n*len(v.names) {
		v.args = append(v.args, nil)
	}
	p := 0
	for i := range n {
		if i > 0 {
			b.WriteString(", ")
		}
		for j, word := range v.types {
			p++
			if j == 0 {
				b.WriteString("(")
			} else {
				b.WriteString(", ")
			}
			b.WriteString("CAST($" + strconv.Itoa(p) + " AS " + word + ")")
		}
		b.WriteString(")")
	}
	b.WriteString(")")
	return b.String()
}

// unnested turns the rows into one array a column.
func (v *valueList) unnested() string {
	columns := make([]any, len(v.names))
	parts := make([]string, len(v.names))
	for c, word := range v.types {
		switch word {
		case "TEXT":
			columns[c] = column[string](v, c)
		case "BIGINT":
			columns[c] = column[int64](v, c)
		case "BOOLEAN":
			columns[c] = column[bool](v, c)
		default:
			columns[c] = column[[]byte](v, c)
		}
		parts[c] = "CAST($" + strconv.Itoa(c+1) + " AS " + word + "[])"
	}
	v.args = columns
	names := strings.Join(v.names, ", ")
	return "SELECT " + names + " FROM unnest(" + strings.Join(parts, ", ") + ") AS u(" + names + ")"
}

// column is column c of the rows: a []T, or a []*T where some are NULL.
func column[T any](v *valueList, c int) any {
	full := make([]T, v.rows)
	nulls := false
	for r := range v.rows {
		switch x := v.args[r*len(v.names)+c].(type) {
		case nil:
			nulls = true
		case T:
			full[r] = x
		case int:
			full[r] = any(int64(x)).(T) //nolint:forcetypeassert // add has checked it
		default:
			panic(fmt.Sprintf("store: a %T in column %s, which is %s", x, v.names[c], v.types[c])) // a defect in a constant
		}
	}
	if !nulls {
		return full
	}
	some := make([]*T, v.rows)
	for r := range v.rows {
		if v.args[r*len(v.names)+c] != nil {
			some[r] = &full[r]
		}
	}
	return some
}

// arg appends a parameter after the list's own and returns its placeholder.
func (v *valueList) arg(a any) string {
	v.args = append(v.args, a)
	return "$" + strconv.Itoa(len(v.args))
}

// chunks calls fn with at most maxBatch items at a time.
func chunks[T any](items []T, fn func([]T) error) error {
	for len(items) > 0 {
		n := min(len(items), maxBatch)
		if err := fn(items[:n]); err != nil {
			return err
		}
		items = items[n:]
	}
	return nil
}

// checkPage returns the page size (50 when none is asked for) and the key after which the page begins.
func checkPage(p domain.PageRequest) (size int, after string, err error) {
	switch {
	case p.Size < 0 || p.Size > domain.MaxPageSize:
		return 0, "", fault.InvalidField("page.size", "must be between 1 and %d; 0 means 50", domain.MaxPageSize)
	case p.Size == 0:
		size = 50
	default:
		size = p.Size
	}
	if p.After == "" {
		return size, "", nil
	}
	b, err := base64.RawURLEncoding.DecodeString(p.After)
	if err != nil || len(b) == 0 || len(b) > 512 {
		return 0, "", fault.InvalidField("page.cursor", "is not a cursor of an earlier answer; begin again without one")
	}
	return size, string(b), nil
}

// nextCursor cuts items, of which one more than size was read, to the page and returns the cursor of the next page,
// empty when this is the last.
func nextCursor[T any](items []T, size int, key func(T) string) (page []T, next string) {
	if len(items) <= size {
		return items, ""
	}
	items = items[:size]
	return items, base64.RawURLEncoding.EncodeToString([]byte(key(items[size-1])))
}
