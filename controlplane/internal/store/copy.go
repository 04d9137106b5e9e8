package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// copyBatch is how many rows are copied in one transaction, well below what a server lets one take.
const copyBatch = 500

// CopyOptions are those of CopyTo.
type CopyOptions struct {
	Op domain.Op
	// Said is called for each table that was compared; nil: nobody listens.
	Said func(Copied)
	// Batch is how many rows one transaction copies; 0: 500.
	Batch int
}

// While a database is being filled its meta rows say so, under these keys; CheckSchema keeps nodes away from it. There is
// one for the whole, and one a table that is moved in the transaction of each batch.
const (
	metaCopy      = "store_copy"
	metaCopyTable = metaCopy + ":"
)

// copyState is how far one table is.
type copyState struct {
	// Last is the key of the last row that was copied, as JSON; empty: none.
	Last json.RawMessage `json:"last,omitempty"`
	Rows int64           `json:"rows"`
	Done bool            `json:"done"`
}

// Copied says what was copied of one table.
type Copied struct {
	Table string
	// Rows are those of the table, Before how many of them an earlier run had copied.
	Rows, Before int64
	// Copying and Verifying are how long each took.
	Copying, Verifying time.Duration
}

// CopyTo copies all rows of the store into another that is empty, and then compares every row. Neither may be in use (Alone);
// both have the schema of this program. Killed at any moment it goes on where it stopped when it is called again: a batch is
// in the other store with the note of it, or not at all. Nodes refuse a store that is not complete (CheckSchema).
//
// Invalid: a schema is another one. Conflict: the other store holds something else, or this one was changed between two
// runs, which the comparison finds.
func (s *Store) CopyTo(ctx context.Context, to *Store, o CopyOptions) ([]Copied, error) {
	if o.Batch == 0 {
		o.Batch = copyBatch
	}
	tables, err := s.alike(ctx, to)
	if err != nil {
		return nil, err
	}
	source, err := s.copySource(ctx)
	if err != nil {
		return nil, err
	}
	if err := to.beginCopy(ctx, tables, source); err != nil {
		return nil, err
	}
	all := make([]Copied, len(tables))
	for i, x := range tables {
		began := s.cfg.Now()
		all[i].Table = x.name
		if all[i].Rows, all[i].Before, err = s.copyTable(ctx, to, x, o.Batch); err != nil {
			return nil, fmt.Errorf("copy table %s: %w", x.name, err)
		}
		all[i].Copying = s.cfg.Now().Sub(began)
	}
	total := int64(0)
	for i, x := range tables {
		began := s.cfg.Now()
		if err := s.compareTable(ctx, to, x, all[i].Rows); err != nil {
			return nil, err
		}
		all[i].Verifying = s.cfg.Now().Sub(began)
		total += all[i].Rows
		if o.Said != nil {
			o.Said(all[i])
		}
	}
	return all, to.endCopy(ctx, total, o.Op)
}

// alike makes sure that both have the schema of this program, and returns the tables.
func (s *Store) alike(ctx context.Context, to *Store) ([]table, error) {
	for _, side := range []struct {
		name  string
		store *Store
	}{{"the source", s}, {"the target", to}} {
		has, wants, err := side.store.SchemaVersion(ctx)
		if err != nil {
			return nil, err
		}
		if has != wants {
			return nil, fault.New(fault.Invalid, "%s has schema version %d and this program copies version %d; bring it there with the certmeshd of that version (certmeshd migrate up)", side.name, has, wants)
		}
	}
	if half, err := s.copying(ctx); half || err != nil {
		if err == nil {
			err = fault.New(fault.Invalid, "the source is being filled by a copy itself and is not complete; let that come to its end")
		}
		return nil, err
	}
	ours, err := s.tables(ctx)
	if err != nil {
		return nil, err
	}
	theirs, err := to.tables(ctx)
	if err != nil {
		return nil, err
	}
	for i := range max(len(ours), len(theirs)) {
		switch {
		case i >= len(theirs) || i < len(ours) && ours[i].name < theirs[i].name:
			return nil, fault.New(fault.Invalid, "the target has no table %s although its schema version says so", ours[i].name)
		case i >= len(ours) || ours[i].name > theirs[i].name:
			return nil, fault.New(fault.Invalid, "the target has a table %s, which is none of ours; name a database of its own", theirs[i].name)
		case !ours[i].same(theirs[i]):
			return nil, fault.New(fault.Invalid, "table %s has other columns in the target than in the source", ours[i].name)
		}
	}
	return ours, nil
}

// copySource tells one store from another, by its CAs: a copy that was begun goes on from the same one only.
func (s *Store) copySource(ctx context.Context) (string, error) {
	var source string
	err := s.read(ctx, "copy.source", func(t *tx) error {
		h := sha256.New()
		err := t.each("SELECT id, created_at FROM ca ORDER BY created_at, id", nil, func(scan func(...any) error) error {
			var id string
			var at int64
			err := scan(&id, &at)
			fmt.Fprintln(h, id, at)
			return err
		})
		source = hex.EncodeToString(h.Sum(nil))
		return err
	})
	return source, err
}

// beginCopy notes that the store is being filled from source. Conflict: it is from another, or holds something already.
func (s *Store) beginCopy(ctx context.Context, tables []table, source string) error {
	return s.settled(ctx, "copy.begin", func(t *tx) error {
		from, err := t.meta(metaCopy)
		switch {
		case fault.Is(err, fault.NotFound):
		case err != nil:
			return err
		case from != source:
			return fault.New(fault.Conflict, "the target is being filled from another store; go on from that one, or name an empty database")
		default:
			return nil
		}
		for _, x := range tables {
			n, err := t.count("SELECT COUNT(*) FROM (SELECT 1 FROM " + x.name + " LIMIT 1) AS seen")
			if err != nil {
				return err
			}
			if n > 0 {
				return fault.New(fault.Conflict, "the target is not empty (table %s has rows); name an empty database, nothing is written over another store", x.name)
			}
		}
		return t.setMeta(metaCopy, source)
	})
}

func (t *tx) setMeta(key, value string) error {
	_, err := t.exec("INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value", key, value)
	return err
}

// copied reads how far a table is.
func (t *tx) copied(x table) (copyState, record, error) {
	var at copyState
	text, err := t.meta(metaCopyTable + x.name)
	if fault.Is(err, fault.NotFound) {
		return at, nil, nil
	}
	if err != nil {
		return at, nil, err
	}
	if err := fromJSON(text, &at); err != nil || at.Last == nil {
		return at, nil, err
	}
	var values []string
	if err := json.Unmarshal(at.Last, &values); err != nil || len(values) != len(x.key) {
		return at, nil, errors.New("store: the note of a copy cannot be read")
	}
	key := make(record, len(values))
	for i, c := range x.key {
		switch x.columns[c].kind {
		case "text":
			key[i] = values[i]
		case "int":
			n, err := strconv.ParseInt(values[i], 10, 64)
			if err != nil {
				return at, nil, fmt.Errorf("store: the note of a copy: %w", err)
			}
			key[i] = n
		default:
			return at, nil, fmt.Errorf("store: a key of type %s", x.columns[c].kind)
		}
	}
	return at, key, nil
}

// keyText is a key as copied reads it.
func keyText(key record) json.RawMessage {
	values := make([]string, len(key))
	for i, v := range key {
		values[i] = fmt.Sprint(v)
	}
	text, _ := json.Marshal(values) // strings always can
	return text
}

// copyTable copies what is missing of a table, and returns how many rows there are and how many there were.
func (s *Store) copyTable(ctx context.Context, to *Store, x table, size int) (rows, before int64, err error) {
	var at copyState
	var last record
	err = to.read(ctx, "copy.at", func(t *tx) error {
		var err error
		at, last, err = t.copied(x)
		return err
	})
	before = at.Rows
	for err == nil && !at.Done {
		var batch []record
		err = s.read(ctx, "copy.read", func(t *tx) error {
			var err error
			batch, err = x.after(t, last, size)
			return err
		})
		if err != nil {
			break
		}
		next := copyState{Last: at.Last, Rows: at.Rows + int64(len(batch)), Done: len(batch) < size}
		if len(batch) > 0 {
			last = x.keyOf(batch[len(batch)-1])
			next.Last = keyText(last)
		}
		if err = to.putBatch(ctx, x, batch, at, next); err == nil {
			at = next
		}
	}
	return at.Rows, before, err
}

// putBatch writes rows with the note of them.
func (s *Store) putBatch(ctx context.Context, x table, batch []record, was, next copyState) error {
	note, err := json.Marshal(next)
	if err != nil {
		return err
	}
	every := make([]int, len(x.columns))
	for i := range every {
		every[i] = i
	}
	// Nobody else writes: what is kept is decided by the note alone.
	return s.settled(ctx, "copy.write", func(t *tx) error {
		at, _, err := t.copied(x)
		switch {
		case err != nil:
			return err
		case t.again && at.Rows == next.Rows && at.Done == next.Done:
			return nil
		case at.Rows != was.Rows:
			return fault.New(fault.Conflict, "another copy into the target runs; wait for its end")
		}
		err = chunks(batch, func(some []record) error {
			v := x.list(t, every, "")
			for _, r := range some {
				v.add(r...)
			}
			_, err := t.exec(v.with()+" INSERT INTO "+x.name+" ("+x.names("")+") SELECT "+x.names("v.")+" FROM v WHERE v."+x.keyNames()[0]+" IS NOT NULL", v.args...)
			return err
		})
		if err != nil {
			return err
		}
		return t.setMeta(metaCopyTable+x.name, string(note))
	})
}

// compareTable compares every row of a table with the one of its key in the other store, and the numbers of rows.
func (s *Store) compareTable(ctx context.Context, to *Store, x table, rows int64) error {
	differs := func(key record) error {
		return fault.New(fault.Conflict, "table %s: the row %s is not the same in source and target; the source was changed after the copy was begun. Empty the target and begin anew", x.name, keyText(key))
	}
	var last record
	var seen int64
	for {
		var batch []record
		err := s.read(ctx, "copy.read", func(t *tx) error {
			var err error
			batch, err = x.after(t, last, copyBatch)
			return err
		})
		if err != nil {
			return err
		}
		if len(batch) == 0 {
			break
		}
		last = x.keyOf(batch[len(batch)-1])
		seen += int64(len(batch))
		if err := to.compareBatch(ctx, x, batch, differs); err != nil {
			return err
		}
	}
	var there int64
	err := to.read(ctx, "copy.count", func(t *tx) error {
		query, args := "SELECT COUNT(*) FROM "+x.name, []any(nil)
		if x.name == "meta" {
			query, args = query+" WHERE key <> $1 AND key NOT LIKE $2", []any{metaCopy, metaCopyTable + "%"}
		}
		var err error
		there, err = t.count(query, args...)
		return err
	})
	if err == nil && (seen != rows || there != rows) {
		err = fault.New(fault.Conflict, "table %s has %d rows in the source and %d in the target, %d were copied; the source was changed after the copy was begun. Empty the target and begin anew", x.name, seen, there, rows)
	}
	return err
}

// compareBatch reads the rows of the batch's keys and compares their hashes. It runs where statements are planned by keys.
func (s *Store) compareBatch(ctx context.Context, x table, batch []record, differs func(record) error) error {
	names := x.keyNames()
	on := make([]string, len(names))
	for i, n := range names {
		on[i] = x.name + "." + n + " = v.key_" + n
	}
	return s.settled(ctx, "copy.compare", func(t *tx) error {
		return chunks(batch, func(some []record) error {
			v := x.list(t, x.key, "key_")
			for _, r := range some {
				v.add(x.keyOf(r)...)
			}
			found := make(map[string][sha256.Size]byte, len(some))
			err := t.each(v.with()+" SELECT "+x.names(x.name+".")+" FROM v JOIN "+x.name+" ON "+strings.Join(on, " AND "), v.args, func(scan func(...any) error) error {
				r, err := x.scan(scan)
				if err == nil {
					found[string(keyText(x.keyOf(r)))] = r.sum()
				}
				return err
			})
			if err != nil {
				return err
			}
			for _, r := range some {
				if sum, ok := found[string(keyText(x.keyOf(r)))]; !ok || sum != r.sum() {
					return differs(x.keyOf(r))
				}
			}
			return nil
		})
	})
}

// endCopy makes the store one that nodes may use.
func (s *Store) endCopy(ctx context.Context, rows int64, op domain.Op) error {
	return s.settled(ctx, "copy.end", func(t *tx) error {
		n, err := t.exec("DELETE FROM meta WHERE key = $1 OR key LIKE $2", metaCopy, metaCopyTable+"%")
		if err != nil || n == 0 {
			return err // it is the run before, whose commit gave no answer
		}
		return t.auditOp(op, "store.copied", "store", map[string]string{"rows": strconv.FormatInt(rows, 10)})
	})
}

// copying reports whether the store is being filled.
func (s *Store) copying(ctx context.Context) (bool, error) {
	_, err := s.Meta(ctx, metaCopy)
	if fault.Is(err, fault.NotFound) {
		return false, nil
	}
	return err == nil, err
}
