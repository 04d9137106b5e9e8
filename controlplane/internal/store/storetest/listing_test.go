package storetest

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/protocol/fault"
)

// listCase is a declared list over the big estate.
type listCase struct {
	name string
	domain.Sorted
	// page reads one page; ids are of its rows.
	page func(ctx context.Context, s *store.Store, size int, after string) (ids []string, next string, err error)
	// where and order say the same in plain SQL, without care for indexes; key is what a cursor holds of a row.
	where, order, key string
	table             string
}

// listCases are all declared lists, in both directions where they have two.
func listCases(b big) []listCase {
	var all []listCase
	for _, l := range domain.CertificateListings {
		for _, down := range []string{"", "-"} {
			f := bigCertificates(l)
			f.Sort = down + f.Sort
			c := listCase{name: "certificates/" + l.By() + "/" + f.Sort, table: "certificate", Sorted: domain.Sorted{Listing: l, Descending: down != ""}}
			c.page = func(ctx context.Context, s *store.Store, size int, after string) ([]string, string, error) {
				certs, _, next, err := s.Certificates(ctx, f, domain.PageRequest{Size: size, After: after})
				return ids(certs, func(c domain.Certificate) string { return c.ID }), next, err
			}
			c.where, c.key = certificateWhere(f), map[domain.Order]string{domain.ByCreation: "id", domain.ByName: "name", domain.ByExpiry: "not_after || '/' || id"}[l.Order]
			c.order = map[domain.Order]string{domain.ByCreation: "id", domain.ByName: "name", domain.ByExpiry: "not_after, id"}[l.Order]
			if down != "" {
				c.order = strings.ReplaceAll(c.order, ",", " DESC,") + " DESC"
			}
			all = append(all, c)
		}
	}
	for _, l := range domain.JobListings {
		f := bigJobs(b, l)
		c := listCase{name: "jobs/" + l.By(), table: "job", Sorted: domain.Sorted{Listing: l, Descending: true}, where: jobWhere(f), order: "id DESC", key: "id"}
		c.page = func(ctx context.Context, s *store.Store, size int, after string) ([]string, string, error) {
			jobs, next, err := s.Jobs(ctx, f, domain.PageRequest{Size: size, After: after})
			return ids(jobs, func(j domain.Job) string { return j.ID }), next, err
		}
		all = append(all, c)
	}
	return all
}

func ids[T any](list []T, id func(T) string) []string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = id(v)
	}
	return out
}

func terms(pairs ...string) string {
	out := "TRUE"
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			out += " AND " + strings.ReplaceAll(pairs[i], "?", "'"+pairs[i+1]+"'")
		}
	}
	return out
}

func certificateWhere(f domain.CertificateFilter) string {
	w := terms("status = ?", string(f.Status), "issuer_id = ?", f.IssuerID, "profile_id = ?", f.ProfileID, "owner = ?", f.Owner,
		"id IN (SELECT certificate_id FROM leaf WHERE agent_id = ?)", f.AgentID, "name LIKE ?", strings.TrimSuffix(f.NamePrefix+"%", "%"))
	w = strings.ReplaceAll(w, "name LIKE 'svc-'", "name LIKE 'svc-%'")
	if !f.ExpiresBefore.IsZero() {
		w += fmt.Sprintf(" AND not_after >= %d AND not_after < %d", f.ExpiresAfter.UnixMicro(), f.ExpiresBefore.UnixMicro())
	}
	return w
}

func jobWhere(f domain.JobFilter) string {
	w := terms("state = ?", string(f.State), "certificate_id = ?", f.CertificateID, "agent_id = ?", f.AgentID)
	if f.Open {
		w += " AND finished_at IS NULL"
	}
	return w
}

// column reads one column of texts.
func column(t testing.TB, db *sql.DB, query string) []string {
	t.Helper()
	rows, err := db.QueryContext(t.Context(), query)
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	defer func() { _ = rows.Close() }()
	var out []string
	for rows.Next() {
		var s string
		must(t, rows.Scan(&s))
		out = append(out, s)
	}
	must(t, rows.Err())
	return out
}

// TestListings turns the pages of every declared list, in every direction, and compares them with a plain query; and looks
// at the plan of every statement that they send. The tables are small, so PostgreSQL is told to prefer any index to a scan
// or a sort: what is left of either has no index. SQLite plans by its rules alone.
func TestListings(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		sent := &seen{args: map[string][]any{}}
		w := NewWorld(t, e, func(c *store.Config) { c.Observe = sent.observe })
		b := seedBig(t, w, 400)
		conn, err := b.db.Conn(t.Context())
		must(t, err)
		defer func() { _ = conn.Close() }()
		if !b.lite() {
			for _, s := range []string{"SET enable_seqscan = off", "SET enable_sort = off", "SET enable_bitmapscan = off"} {
				_, err := conn.ExecContext(t.Context(), s)
				must(t, err)
			}
		}
		for _, c := range listCases(b) {
			want := column(t, b.db, "SELECT id FROM "+c.table+" WHERE "+c.where+" ORDER BY "+c.order)
			if len(want) == 0 {
				t.Errorf("%s: no rows to list", c.name)
			}
			for _, size := range []int{1, 7, 1000} {
				sent.clear()
				var got []string
				for after, first := "", true; first || after != ""; first = false {
					page, next, err := c.page(t.Context(), w.S, size, after)
					if err != nil {
						t.Fatalf("%s: %v", c.name, err)
					}
					if next != "" && len(page) != size {
						t.Fatalf("%s: a page of %d, asked for %d", c.name, len(page), size)
					}
					got, after = append(got, page...), next
					if size == 1 && len(got) == 20 {
						break
					}
				}
				if w := want[:min(len(want), len(got))]; !slices.Equal(got, w) || size > 1 && len(got) != len(want) {
					t.Errorf("%s by %d:\n%q\nwant\n%q", c.name, size, got, want)
				}
			}
			planned(t, b, conn, c, sent)
		}
	})
}

func (s *seen) clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.args)
}

// planned checks that the statements of a list read its index and nothing else from end to end, and sort nothing but the
// heads of what is merged.
func planned(t *testing.T, b big, conn *sql.Conn, c listCase, sent *seen) {
	t.Helper()
	used := map[string]bool{}
	for statement, args := range sent.args {
		plan := planOf(t, b, conn, statement, args)
		for line := range strings.SplitSeq(plan, "\n") {
			line = strings.TrimSpace(line)
			// A list of all begins at an end of its index and stops after a page: to SQLite that is a scan of the index.
			walk := c.Filters == nil && line == "SCAN "+c.table+" USING INDEX "+b.indexName(c.Index)
			scan := strings.Contains(line, "Seq Scan") || b.lite() && strings.HasPrefix(line, "SCAN ") && !ofPage(line) && !walk
			sort := strings.Contains(line, "Sort  (") || strings.Contains(line, "USE TEMP B-TREE")
			if scan || sort && (!c.Merged || !strings.Contains(statement, "UNION ALL")) && !strings.Contains(statement, "GROUP BY") {
				t.Errorf("%s: %s\nof %s\nin\n%s", c.name, line, statement, plan)
			}
		}
		for index := range strings.SplitSeq(c.Index, ", ") {
			used[index] = used[index] || slices.Contains(strings.Fields(plan), b.indexName(index))
		}
	}
	for index, ok := range used {
		if !ok {
			t.Errorf("%s: no statement uses %s", c.name, index)
		}
	}
}

// ofPage reports whether a line of SQLite's plan reads what an inner query has limited to a page.
func ofPage(line string) bool {
	return line == "SCAN page" || line == "SCAN heads" || strings.HasPrefix(line, "SCAN h") && len(line) <= len("SCAN h10") || strings.HasPrefix(line, "SCAN CONSTANT ROW")
}

// indexName is what SQLite calls the index of a key.
func (b big) indexName(index string) string {
	if !b.lite() {
		return index
	}
	for key, number := range map[string]int{"_pkey": 1, "_name_key": 2, "_open_key_key": 2} {
		if table, ok := strings.CutSuffix(index, key); ok {
			return fmt.Sprintf("sqlite_autoindex_%s_%d", table, number)
		}
	}
	return index
}

func planOf(t *testing.T, b big, conn *sql.Conn, statement string, args []any) string {
	t.Helper()
	explain := "EXPLAIN "
	if b.lite() {
		explain = "EXPLAIN QUERY PLAN "
	}
	rows, err := conn.QueryContext(t.Context(), explain+statement, args...)
	if err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
	defer func() { _ = rows.Close() }()
	var plan []string
	for rows.Next() {
		var line string
		var skip any
		dest := []any{&line}
		if b.lite() {
			dest = []any{&skip, &skip, &skip, &line}
		}
		must(t, rows.Scan(dest...))
		plan = append(plan, line)
	}
	must(t, rows.Err())
	return strings.Join(plan, "\n")
}

// Every index of the tables that lists read is either declared by a list or known to serve something else: one that
// serves nothing costs every issuance.
func TestIndexesAreUsed(t *testing.T) {
	t.Parallel()
	elsewhere := []string{"certificate_status_at", "job_finished", "job_lane", "leaf_due"}
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		b := big{e: e, db: w.DB(t)}
		var declared []string
		for _, l := range slices.Concat(domain.CertificateListings, domain.JobListings) {
			declared = append(declared, strings.Split(l.Index, ", ")...)
		}
		for name := range b.indexes(t) {
			table, _, _ := strings.Cut(name, "_")
			if slices.Contains([]string{"certificate", "job", "leaf"}, table) && !slices.Contains(declared, name) &&
				!slices.Contains(elsewhere, name) && !strings.HasPrefix(name, "certificate_san") {
				t.Errorf("no list is served by %s; drop it or say here what is", name)
			}
		}
	})
}

// A cursor is of the list that it came from: of another it is refused by name, not read as if it were a place there.
func TestCursorOfAnotherList(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		cases := listCases(seedBig(t, w, 400))
		next := make([]string, len(cases))
		for i, c := range cases {
			_, cursor, err := c.page(t.Context(), w.S, 1, "")
			must(t, err)
			next[i] = cursor
		}
		var wg sync.WaitGroup
		for i, c := range cases {
			wg.Go(func() {
				for j, cursor := range next {
					_, _, err := c.page(t.Context(), w.S, 1, cursor)
					switch {
					case cursor == "":
					case i == j && err != nil:
						t.Errorf("%s refuses its own cursor: %v", c.name, err)
					case i != j && (!fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "another list")):
						t.Errorf("%s with the cursor of %s: %v", c.name, cases[j].name, err)
					}
				}
			})
		}
		wg.Wait()
	})
}
