package storetest

import (
	"context"
	"encoding/base64"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/store"
)

const (
	// bigRows is how many certificates BenchmarkBigTables makes unless CERTMESH_BIG_ROWS says otherwise; smallRows is what
	// it compares them with in the same run.
	bigRows, smallRows = 1_000_000, 1_000
	bigPage            = 50
	deepPage           = 10_000
	samples            = 100
)

// BenchmarkBigTables measures what an operator and the duties wait for when the tables are large: the first and the
// ten-thousandth page of each declared list (of a shorter list, the page at its middle) and its last rows, a batch of 1,000 due renewals, and
// the counts of the estate, at a thousand certificates and at a million with three jobs of history for each. Of each 100
// are measured, one at a time. Every deep page is first compared with a plain query. It ends with a table in Markdown.
func BenchmarkBigTables(b *testing.B) {
	rows := bigRows
	if s := os.Getenv("CERTMESH_BIG_ROWS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < smallRows {
			b.Fatalf("CERTMESH_BIG_ROWS is %q and must be a number from %d", s, smallRows)
		}
		rows = n
	}
	for _, e := range Engines(b) {
		b.Run(e.Name, func(b *testing.B) {
			small := map[string]measured{}
			measureBig(b, e, smallRows, func(m measured) { small[m.what] = m })
			b.ReportMetric(0, "ns/op")
			// Not b.Log, which cuts what is long.
			fmt.Fprintf(os.Stdout, "\n%s: milliseconds, p50 / p99 of %d\n\n| what | at %d | at %d | ratio of p50 |\n| --- | --- | --- | --- |\n", e.Name, samples, smallRows, rows)
			worst50, worst99, ratios := time.Duration(0), time.Duration(0), []float64{}
			measureBig(b, e, rows, func(m measured) {
				s, ok := small[m.what]
				ratio := fmt.Sprintf("%.1f", float64(m.p50)/float64(s.p50))
				if !ok {
					ratio = "" // a thousand certificates have no such page
				} else if m.list {
					ratios = append(ratios, float64(m.p50)/float64(s.p50))
				}
				fmt.Fprintf(os.Stdout, "| %s%s | %s | %s | %s |\n", m.what, m.note, s, m, ratio)
				if m.list {
					worst50, worst99 = max(worst50, m.p50), max(worst99, m.p99)
				} else {
					name, _, _ := strings.Cut(m.what, ":")
					b.ReportMetric(float64(m.p50.Microseconds())/1000, name+"-p50-ms")
				}
			})
			b.ReportMetric(float64(worst50.Microseconds())/1000, "list-worst-p50-ms")
			b.ReportMetric(float64(worst99.Microseconds())/1000, "list-worst-p99-ms")
			slices.Sort(ratios)
			b.ReportMetric(ratios[len(ratios)/2], "list-median-ratio")
		})
	}
}

// measured is what one call takes.
type measured struct {
	what, note string
	list       bool
	p50, p99   time.Duration
}

func (m measured) String() string {
	if m.p50 == 0 {
		return ""
	}
	ms := func(d time.Duration) string { return fmt.Sprintf("%.2f", float64(d.Microseconds())/1000) }
	return ms(m.p50) + " / " + ms(m.p99)
}

func measureBig(b *testing.B, e Engine, rows int, report func(measured)) {
	b.Helper()
	w := NewWorld(b, e)
	begun := time.Now()
	big := seedBig(b, w, rows)
	b.Logf("%s: %d certificates and %d jobs made in %.0f s", e.Name, rows, jobsEach*rows, time.Since(begun).Seconds())
	ctx := b.Context()
	now := Start.Add(-13 * 24 * time.Hour)
	const batch = 1000
	due := timed(b, func() error {
		got, err := w.S.DueLeaves(ctx, 3, now, batch)
		if err == nil && rows > 500_000 && len(got) != batch {
			err = fmt.Errorf("%d are due in a shard, not %d", len(got), batch)
		}
		return err
	})
	due.what = "due: a batch of 1,000 renewals"
	next := timed(b, func() error { _, err := w.S.NextDue(ctx); return err })
	next.what = "next-due: when the duties look again"
	counts := timed(b, func() error { _, err := w.S.Counts(ctx); return err })
	counts.what = "counts: sizes of the estate"
	report(due)
	report(next)
	report(counts)
	for _, c := range listCases(big) {
		cursor, last, note := big.deep(b, w.S, c)
		for i, after := range []string{"", cursor, last} {
			if after == "" && i > 0 {
				break
			}
			m := timed(b, func() error {
				_, _, err := c.page(ctx, w.S, bigPage, after)
				return err
			})
			m.what, m.list = c.name+", "+[]string{"first", "deep", "last"}[i], true
			if i == 1 {
				m.note = note
			}
			report(m)
		}
	}
}

// timed calls fn some times to warm up and then measures it. What takes long is measured less often.
func timed(b *testing.B, fn func() error) measured {
	b.Helper()
	const warm, patience = 10, 5 * time.Second
	var took []time.Duration
	for i, begun := 0, time.Now(); i < warm+samples && (time.Since(begun) < patience || len(took) < warm); i++ {
		at := time.Now()
		if err := fn(); err != nil {
			b.Fatal(err)
		}
		if i >= warm || time.Since(begun) > patience/2 {
			took = append(took, time.Since(at))
		}
	}
	slices.Sort(took)
	return measured{p50: took[len(took)/2], p99: took[len(took)*99/100]}
}

// deep is the cursor of the deepest page that is looked at, with a note where that is not the ten-thousandth, and last that of
// the last rows, which are fewer than a page, so that the end of the list is read as well. Both are compared with what a
// plain query finds there. A list without a second page has neither.
func (g big) deep(b *testing.B, s *store.Store, c listCase) (deep, last, note string) {
	b.Helper()
	all := g.one(b, "SELECT COUNT(*) FROM "+c.table+" WHERE "+c.where)
	page := deepPage
	if all <= deepPage*bigPage {
		page = max(all/2/bigPage, 1)
		note = fmt.Sprintf(" (%d)", page)
	}
	if page == 1 {
		return "", "", note
	}
	return g.cursor(b, s, c, (page-1)*bigPage), g.cursor(b, s, c, all-bigPage/2), note
}

// cursor is what leads to the rows after the first n of a list.
func (g big) cursor(b *testing.B, s *store.Store, c listCase, n int) string {
	b.Helper()
	want := column(b, g.db, fmt.Sprintf("SELECT %s || ' ' || id FROM %s WHERE %s ORDER BY %s LIMIT %d OFFSET %d", c.key, c.table, c.where, c.order, bigPage+1, n-1))
	key, _, _ := strings.Cut(want[0], " ")
	want = want[1:]
	for i := range want {
		_, want[i], _ = strings.Cut(want[i], " ")
	}
	cursor := base64.RawURLEncoding.EncodeToString([]byte(c.table + "/" + c.By() + "/" + c.Sort() + "/" + key))
	got, _, err := c.page(context.WithoutCancel(b.Context()), s, bigPage, cursor)
	if err != nil {
		b.Fatalf("%s: %v", c.name, err)
	}
	if !slices.Equal(got, want) {
		b.Fatalf("%s: after %d rows there are %q and not %q", c.name, n, got, want)
	}
	return cursor
}
