package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/certmesh/certmesh/protocol/fault"
)

// table is what the engine's catalog says of one, for those who treat all tables alike.
type table struct {
	name    string
	columns []tableColumn // in the order of their names
	key     []int         // the primary key's columns in its order, as indexes of columns
}

// tableColumn has a type in the words of valueList: text, int, bytes or bool.
type tableColumn struct{ name, kind string }

// migrationTable is the one that every database has of its own.
const migrationTable = "schema_migration"

var (
	plainName   = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)
	columnKinds = map[string]string{"TEXT": "text", "BIGINT": "int", "BLOB": "bytes", "BYTEA": "bytes", "BOOLEAN": "bool"}
)

// tables reads the catalog: every table but that of the schema's steps, by name.
func (s *Store) tables(ctx context.Context) ([]table, error) {
	type line struct {
		table, column, kind string
		key                 int // place in the primary key, from 1; 0: none
	}
	var lines []line
	err := s.read(ctx, "catalog", func(t *tx) error {
		lines = nil
		return t.each(s.d.catalog(), []any{migrationTable}, func(scan func(...any) error) error {
			var l line
			var word string
			if err := scan(&l.table, &l.column, &word, &l.key); err != nil {
				return err
			}
			kind, ok := columnKinds[strings.ToUpper(word)]
			if !ok || !plainName.MatchString(l.table) || !plainName.MatchString(l.column) {
				return fmt.Errorf("store: column %q of table %q has the type %q, which is not one of ours", l.column, l.table, word)
			}
			l.kind = kind
			lines = append(lines, l)
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	// Sorted here: each engine has its own order of text.
	slices.SortFunc(lines, func(a, b line) int { return cmpStrings(a.table, b.table, a.column, b.column) })
	var all []table
	for _, l := range lines {
		if len(all) == 0 || all[len(all)-1].name != l.table {
			all = append(all, table{name: l.table})
		}
		x := &all[len(all)-1]
		if l.key > 0 {
			for len(x.key) < l.key {
				x.key = append(x.key, -1)
			}
			x.key[l.key-1] = len(x.columns)
		}
		x.columns = append(x.columns, tableColumn{l.column, l.kind})
	}
	for _, x := range all {
		if len(x.key) == 0 || slices.Contains(x.key, -1) {
			return nil, fault.New(fault.Internal, "store: table %s has no primary key", x.name)
		}
	}
	return all, nil
}

// catalog lists table, column, type and place in the primary key (0: none).
func (d *dialect) catalog() string {
	if d.name == nameSQLite {
		return `SELECT m.name, p.name, p.type, p.pk FROM sqlite_master AS m JOIN pragma_table_info(m.name) AS p
WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite_%' AND m.name <> $1`
	}
	return `SELECT c.table_name, c.column_name, c.data_type, COALESCE(k.ordinal_position, 0)
FROM information_schema.tables AS m
JOIN information_schema.columns AS c ON c.table_schema = m.table_schema AND c.table_name = m.table_name
LEFT JOIN information_schema.table_constraints AS p ON p.table_schema = m.table_schema AND p.table_name = m.table_name AND p.constraint_type = 'PRIMARY KEY'
LEFT JOIN information_schema.key_column_usage AS k ON k.table_schema = p.table_schema AND k.constraint_name = p.constraint_name
 AND k.table_name = c.table_name AND k.column_name = c.column_name
WHERE m.table_schema = current_schema() AND m.table_type = 'BASE TABLE' AND m.table_name <> $1`
}

// same reports whether two databases have the table alike.
func (x table) same(y table) bool {
	return x.name == y.name && slices.Equal(x.columns, y.columns) && slices.Equal(x.key, y.key)
}

// names lists the columns for a statement, each after prefix.
func (x table) names(prefix string) string {
	all := make([]string, len(x.columns))
	for i, c := range x.columns {
		all[i] = prefix + c.name
	}
	return strings.Join(all, ", ")
}

// keyNames are the primary key's columns.
func (x table) keyNames() []string {
	all := make([]string, len(x.key))
	for i, c := range x.key {
		all[i] = x.columns[c].name
	}
	return all
}

// list begins a valueList of the columns, each named by prefix and its name.
func (x table) list(t *tx, columns []int, prefix string) *valueList {
	all := make([]string, len(columns))
	for i, c := range columns {
		all[i] = prefix + x.columns[c].name + " " + x.columns[c].kind
	}
	return t.values(strings.Join(all, ", "))
}

// record is one row: a string, int64, []byte, bool or nil per column.
type record []any

// key is the primary key of a row.
func (x table) keyOf(r record) record {
	key := make(record, len(x.key))
	for i, c := range x.key {
		key[i] = r[c]
	}
	return key
}

// scan reads one row of all columns.
func (x table) scan(scan func(...any) error) (record, error) {
	dest := make([]any, len(x.columns))
	for i, c := range x.columns {
		switch c.kind {
		case "text":
			dest[i] = new(sql.Null[string])
		case "int":
			dest[i] = new(sql.Null[int64])
		case "bool":
			dest[i] = new(sql.Null[bool])
		default:
			dest[i] = new(sql.Null[[]byte])
		}
	}
	if err := scan(dest...); err != nil {
		return nil, err
	}
	r := make(record, len(dest))
	for i, d := range dest {
		switch v := d.(type) {
		case *sql.Null[string]:
			if v.Valid {
				r[i] = v.V
			}
		case *sql.Null[int64]:
			if v.Valid {
				r[i] = v.V
			}
		case *sql.Null[bool]:
			if v.Valid {
				r[i] = v.V
			}
		case *sql.Null[[]byte]:
			if v.Valid {
				r[i] = append([]byte{}, v.V...)
			}
		}
	}
	return r, nil
}

// after reads at most limit rows whose key comes after the given one (nil: from the beginning), in the engine's own order.
func (x table) after(t *tx, key record, limit int) ([]record, error) {
	names := x.keyNames()
	where := ""
	if key != nil {
		places := make([]string, len(key))
		for i := range places {
			places[i] = "$" + strconv.Itoa(i+1)
		}
		where = " WHERE (" + strings.Join(names, ", ") + ") > (" + strings.Join(places, ", ") + ")"
	}
	var rows []record
	err := t.each("SELECT "+x.names("")+" FROM "+x.name+where+" ORDER BY "+strings.Join(names, ", ")+" LIMIT "+strconv.Itoa(limit), key,
		func(scan func(...any) error) error {
			r, err := x.scan(scan)
			rows = append(rows, r)
			return err
		})
	return rows, err
}

// sum hashes a row: each value with its type and length before it, NULL being no value.
func (r record) sum() [sha256.Size]byte {
	h := sha256.New()
	var head [9]byte
	put := func(kind byte, b []byte) {
		head[0] = kind
		binary.BigEndian.PutUint64(head[1:], uint64(len(b)))
		h.Write(head[:])
		h.Write(b)
	}
	for _, v := range r {
		switch v := v.(type) {
		case string:
			put('t', []byte(v))
		case int64:
			put('i', binary.BigEndian.AppendUint64(nil, uint64(v))) //nolint:gosec // the same bits on both sides
		case bool:
			put('b', []byte(strconv.FormatBool(v)))
		case []byte:
			put('x', v)
		default:
			put('n', nil)
		}
	}
	return [sha256.Size]byte(h.Sum(nil))
}
