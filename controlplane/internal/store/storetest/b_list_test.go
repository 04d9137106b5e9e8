package storetest_test

import (
	"encoding/base64"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
	"github.com/certmesh/certmesh/protocol/fault"
)

// names pages through a filter, size rows at a time.
func (x *estate) names(f domain.CertificateFilter, size int) []string {
	x.t.Helper()
	var out []string
	page := domain.PageRequest{Size: size}
	for {
		certs, counts, next, err := x.Certificates(x.ctx, f, page)
		x.must(err)
		if len(certs) > max(size, 1) && size != 0 {
			x.t.Fatalf("a page of %d, asked for %d", len(certs), size)
		}
		for _, c := range certs {
			out = append(out, c.Name)
			if _, ok := counts[c.ID]; !ok {
				x.t.Fatalf("no placement counts of %s", c.Name)
			}
		}
		if next == "" {
			return out
		}
		page.After = next
	}
}

func TestCertificateLists(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		a, b := x.agent("web-1"), x.agent("web-2")
		g, h := x.target(a, "t1"), x.target(b, "t2")
		x.order("")
		x.issuer("other")
		x.profile("client")
		add := func(name, issuer, profile, owner string, at domain.Agent, also ...domain.Target) domain.Certificate {
			n := x.order(name, append(also, x.target(at, "target-"+name))...)
			n.Certificate.IssuerID, n.Certificate.ProfileID, n.Certificate.Owner = issuer, profile, owner
			c, _ := x.create(n)
			return c
		}
		one := add("web", "ca", "server", "red", a, g, h)
		add("web-1", "ca", "client", "red", a)
		add("web_2", "other", "server", "blue", b)
		add("we%b", "other", "client", "blue", a)
		add("Web", "ca", "server", "%", b)
		add("wéb", "ca", "server", "_", b)
		x.issue(one, a.ID, "01", 1, x.now.AddDate(0, 0, 60))
		_, err := x.sql().ExecContext(x.ctx, "UPDATE placement SET state = 'Served', served_generation = 1, installed_generation = 1 WHERE target_id = $1 AND certificate_id = $2", g.ID, one.ID)
		x.must(err)
		_, err = x.sql().ExecContext(x.ctx, "UPDATE certificate SET not_after = $1 WHERE id = $2", x.now.AddDate(0, 0, 60).UnixMicro(), one.ID)
		x.must(err)
		_, _, err = x.RevokeCertificate(x.ctx, "we%b", 0, x.op())
		x.must(err)

		all := []string{"web", "web-1", "web_2", "we%b", "Web", "wéb"}
		for _, c := range []struct {
			filter domain.CertificateFilter
			want   []string
		}{
			{domain.CertificateFilter{}, all},
			{domain.CertificateFilter{Status: domain.CertificateRevoked}, []string{"we%b"}},
			{domain.CertificateFilter{Status: "Nonsense"}, nil},
			{domain.CertificateFilter{IssuerID: "other"}, []string{"web_2", "we%b"}},
			{domain.CertificateFilter{IssuerID: one.IssuerID, Sort: "-created"}, []string{"wéb", "Web", "web-1", "web"}},
			{domain.CertificateFilter{ProfileID: "client"}, []string{"web-1", "we%b"}},
			{domain.CertificateFilter{Owner: "red"}, []string{"web", "web-1"}},
			{domain.CertificateFilter{Owner: "%"}, []string{"Web"}},
			{domain.CertificateFilter{AgentID: "web-1"}, []string{"web", "web-1", "we%b"}},
			{domain.CertificateFilter{Owner: "blue", Status: domain.CertificateRevoked}, []string{"we%b"}},
			{domain.CertificateFilter{Sort: "-name"}, []string{"wéb", "web_2", "web-1", "web", "we%b", "Web"}},
			{domain.CertificateFilter{Sort: "-not_after"}, []string{"web", "wéb", "Web", "we%b", "web_2", "web-1"}},
			{domain.CertificateFilter{Status: domain.CertificateActive, ExpiresBefore: x.now.AddDate(0, 0, 61)}, nil},
			{domain.CertificateFilter{ExpiresBefore: x.now.AddDate(0, 0, 61)}, []string{"web"}},
			{domain.CertificateFilter{ExpiresBefore: x.now.AddDate(0, 0, 60)}, nil},
			{domain.CertificateFilter{ExpiresAfter: x.now.AddDate(0, 0, 60)}, []string{"web"}},
			{domain.CertificateFilter{ExpiresAfter: time.Unix(-1, 0)}, []string{"web"}},
			{domain.CertificateFilter{AgentID: "agt_none"}, nil},
			// Ordered by name, in byte order on these engines.
			{domain.CertificateFilter{NamePrefix: "web"}, []string{"web", "web-1", "web_2"}},
			{domain.CertificateFilter{NamePrefix: "we%"}, []string{"we%b"}},
			{domain.CertificateFilter{NamePrefix: "web_"}, []string{"web_2"}},
			{domain.CertificateFilter{NamePrefix: "w"}, []string{"we%b", "web", "web-1", "web_2", "wéb"}},
			{domain.CertificateFilter{NamePrefix: "wé"}, []string{"wéb"}},
			{domain.CertificateFilter{NamePrefix: "%"}, nil},
			{domain.CertificateFilter{NamePrefix: `\`}, nil},
			{domain.CertificateFilter{NamePrefix: "\U0010FFFF"}, nil},
			{domain.CertificateFilter{NamePrefix: "web", Sort: "-name"}, []string{"web_2", "web-1", "web"}},
		} {
			for _, size := range []int{1, 2, 0} {
				got := x.names(c.filter, size)
				if !slices.Equal(got, c.want) {
					t.Errorf("%+v by %d: %q, want %q", c.filter, size, got, c.want)
				}
			}
		}
		certs, counts, _, err := x.Certificates(x.ctx, domain.CertificateFilter{NamePrefix: "web"}, domain.PageRequest{Size: 1})
		x.must(err)
		same(t, "counts", counts[one.ID], domain.PlacementCounts{Current: 1, Total: 3})
		view, err := x.CertificateView(x.ctx, "web")
		x.must(err)
		same(t, "certificate in a list", certs[0], view.Certificate)
		for _, f := range []domain.CertificateFilter{{IssuerID: "none"}, {ProfileID: "none"}, {AgentID: "none"}} {
			_, _, _, err := x.Certificates(x.ctx, f, domain.PageRequest{})
			refused(t, err, fault.NotFound, `"none"`)
		}
	})
}

func TestHostilePages(t *testing.T) {
	t.Parallel()
	storetest.Each(t, func(t *testing.T, e storetest.Engine) {
		x := newEstate(t, e)
		x.create(x.order("web", x.target(x.agent("a"), "t")))
		lists := map[string]func(domain.PageRequest) error{
			"profiles": func(p domain.PageRequest) error { _, _, err := x.Profiles(x.ctx, p); return err },
			"issuers":  func(p domain.PageRequest) error { _, _, err := x.Issuers(x.ctx, p); return err },
			"targets":  func(p domain.PageRequest) error { _, _, err := x.Targets(x.ctx, "", p); return err },
			"agents":   func(p domain.PageRequest) error { _, _, err := x.Agents(x.ctx, "", p); return err },
			"certificates": func(p domain.PageRequest) error {
				_, _, _, err := x.Certificates(x.ctx, domain.CertificateFilter{}, p)
				return err
			},
			"names": func(p domain.PageRequest) error {
				_, _, _, err := x.Certificates(x.ctx, domain.CertificateFilter{NamePrefix: "w"}, p)
				return err
			},
			"jobs":     func(p domain.PageRequest) error { _, _, err := x.Jobs(x.ctx, domain.JobFilter{}, p); return err },
			"versions": func(p domain.PageRequest) error { _, _, err := x.Versions(x.ctx, "web", p); return err },
			"audit":    func(p domain.PageRequest) error { _, _, err := x.AuditEvents(x.ctx, "", p); return err },
		}
		b64 := base64.RawURLEncoding.EncodeToString
		for name, list := range lists {
			for _, p := range []domain.PageRequest{{Size: 1001}, {Size: -1}, {Size: 1 << 40}} {
				if err := list(p); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "page.size") {
					t.Errorf("%s of size %d: %v", name, p.Size, err)
				}
			}
			for _, after := range []string{"garbage!", "x", b64(nil) + "=", b64([]byte("zzz")), b64([]byte{0}), b64([]byte("cert_\x00")), b64([]byte("agt_\xff")),
				b64([]byte("agt_1/x")), b64([]byte("' OR 1=1 --")), b64([]byte(strings.Repeat("x", 600))), strings.Repeat("A", 1<<20)} {
				if name == "agents" && after == b64([]byte("agt_1/x")) {
					continue // it could be an agent's id
				}
				if err := list(domain.PageRequest{After: after}); !fault.Is(err, fault.Invalid) {
					t.Errorf("%s after %.30q: %v", name, after, err)
				}
			}
			if err := list(domain.PageRequest{Size: 1000}); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		for _, f := range []domain.CertificateFilter{{Owner: "a\x00"}, {NamePrefix: "\xff"}, {Status: "\x00"}} {
			_, _, _, err := x.Certificates(x.ctx, f, domain.PageRequest{})
			refused(t, err, fault.Invalid, "UTF-8")
		}
		_, _, err := x.Jobs(x.ctx, domain.JobFilter{State: "\x00"}, domain.PageRequest{})
		refused(t, err, fault.Invalid)
		_, _, err = x.AuditEvents(x.ctx, "\x00", domain.PageRequest{})
		refused(t, err, fault.Invalid)
		_, _, err = x.Agents(x.ctx, "\xff", domain.PageRequest{})
		refused(t, err, fault.Invalid)
	})
}

// A database with a language's collation orders "web-1" between "web" and "web2" or not at all where its bytes do; the
// prefix must be what is listed all the same, page by page.
func TestNamePrefixInALanguage(t *testing.T) {
	t.Parallel()
	for _, e := range storetest.Engines(t) {
		if e.Name != "postgres" {
			continue
		}
		dsn := e.New(t)
		admin := e.SQL(t, dsn)
		u, err := url.Parse(dsn)
		if err != nil {
			t.Fatal(err)
		}
		language := strings.TrimPrefix(u.Path, "/") + "_de"
		if _, err := admin.Exec("CREATE DATABASE " + language + " TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'de-DE' LOCALE 'C' ENCODING UTF8"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if _, err := admin.Exec("DROP DATABASE " + language + " WITH (FORCE)"); err != nil {
				t.Error(err)
			}
		})
		other := e
		u.Path = "/" + language
		other.New = func(testing.TB) string { return u.String() }
		x := newEstate(t, other)
		a := x.agent("a")
		names := []string{"a-b", "a-c", "A-d", "ab", "a-", "a", "aa", "a-ü", "a-zz", "b", "äb"}
		for i, n := range names {
			x.create(x.order(n, x.target(a, fmt.Sprintf("t%d", i))))
		}
		for _, prefix := range []string{"a", "a-", "A", "ab", "ä", "a-z"} {
			var want []string
			for _, n := range names {
				if strings.HasPrefix(n, prefix) {
					want = append(want, n)
				}
			}
			slices.Sort(want)
			for _, size := range []int{1, 3, 0} {
				got := x.names(domain.CertificateFilter{NamePrefix: prefix}, size)
				slices.Sort(got)
				if !slices.Equal(got, want) {
					t.Errorf("prefix %q by %d: %q, want %q", prefix, size, got, want)
				}
			}
		}
	}
}

// TestLesson10ListsAreLedByIndexes explains every statement that the other lists send (certificates and jobs have TestListings), with its arguments. The planners are told to
// prefer any index to a scan and to a sort, so that what is left of either is what no index serves.
func TestLesson10ListsAreLedByIndexes(t *testing.T) {
	t.Parallel()
	type sent struct {
		text string
		args []any
	}
	storetest.Each(t, func(t *testing.T, e storetest.Engine) {
		var mu sync.Mutex
		var log []sent
		x := newEstate(t, e, func(c *store.Config) {
			c.Observe = func(text string, args []any) {
				mu.Lock()
				log = append(log, sent{text, slices.Clone(args)})
				mu.Unlock()
			}
		})
		a := x.agent("web")
		for i := range 3 {
			x.create(x.order(fmt.Sprintf("web-%d", i), x.target(a, fmt.Sprintf("t%d", i))))
		}
		conn, err := x.sql().Conn(x.ctx)
		x.must(err)
		defer func() { _ = conn.Close() }()
		prefix := "EXPLAIN QUERY PLAN "
		if e.Name != "sqlite" {
			prefix = "EXPLAIN "
			for _, q := range []string{"SET enable_seqscan = off", "SET enable_sort = off", "SET enable_bitmapscan = off"} {
				_, err := conn.ExecContext(x.ctx, q)
				x.must(err)
			}
		}
		explain := func(s sent) string {
			rows, err := conn.QueryContext(x.ctx, prefix+s.text, s.args...)
			if err != nil {
				t.Fatalf("%s: %v", s.text, err)
			}
			defer func() { _ = rows.Close() }()
			var plan []string
			for rows.Next() {
				var line string
				var skip any
				dest := []any{&line}
				if e.Name == "sqlite" {
					dest = []any{&skip, &skip, &skip, &line}
				}
				x.must(rows.Scan(dest...))
				plan = append(plan, line)
			}
			x.must(rows.Err())
			return strings.Join(plan, "\n")
		}
		cert, _, err := x.RevokeCertificate(x.ctx, "web-0", 0, x.op())
		x.must(err)
		page := domain.PageRequest{Size: 1}
		for name, c := range map[string]struct {
			call   func() error
			sorted bool // a sort of what one owner has is accepted
		}{
			"view":                 {func() error { _, err := x.CertificateView(x.ctx, "web-1"); return err }, false},
			"versions":             {func() error { _, _, err := x.Versions(x.ctx, cert.ID, page); return err }, false},
			"audit":                {func() error { _, _, err := x.AuditEvents(x.ctx, "", page); return err }, false},
			"audit of a resource":  {func() error { _, _, err := x.AuditEvents(x.ctx, "agent/"+a.ID, page); return err }, false},
			"agents by state":      {func() error { _, _, err := x.Agents(x.ctx, domain.AgentOffline, page); return err }, false},
			"targets of an agent":  {func() error { _, _, err := x.Targets(x.ctx, "web", page); return err }, false},
			"targets to be pushed": {func() error { _, err := x.TargetsOfAgent(x.ctx, a.ID); return err }, false},
			"revoked":              {func() error { _, err := x.Revoked(x.ctx, cert.IssuerID, x.now); return err }, true},
			"key by hash":          {func() error { _, _ = x.APIKeyByHash(x.ctx, digest("x")); return nil }, false},
			"counts":               {func() error { _, err := x.Counts(x.ctx); return err }, true},
		} {
			log = nil
			if err := c.call(); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			for _, s := range log {
				plan := explain(s)
				for line := range strings.SplitSeq(plan, "\n") {
					bad := strings.Contains(line, "Seq Scan") ||
						strings.HasPrefix(line, "SCAN ") && !strings.Contains(line, "USING") && line != "SCAN CONSTANT ROW"
					sort := strings.Contains(line, "Sort  (") || strings.Contains(line, "USE TEMP B-TREE FOR ORDER BY") ||
						strings.Contains(line, "USE TEMP B-TREE FOR LAST TERM")
					if bad || sort && !c.sorted {
						t.Errorf("%s: %s\nof %s\nin\n%s", name, line, s.text, plan)
					}
				}
			}
		}
	})
}
