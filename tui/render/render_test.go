package render

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

var now = time.Date(2026, 12, 1, 10, 0, 0, 0, time.UTC)

func TestClean(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"plain":                    "plain",
		"größer 証明書":               "größer 証明書",
		"a\x1b[31mred\x1b[0m":      "a[31mred[0m",
		"title\x1b]0;x\a":          "title]0;x",
		"two\r\nlines\tand tab":    "two  lines and tab",
		"c1 \u009b31m nel \u0085.": "c1 31m nel  .",
		"bidi \u202egnp.exe\u2066": "bidi gnp.exe",
		"zero\u200bwidth\ufeff":    "zerowidth",
		"bad \xff utf":             "bad ? utf",
		"del\x7f":                  "del",
		"line\u2028sep":            "line sep",
		"variation\ufe0f":          "variation",
	} {
		if got := Clean(in); got != want {
			t.Errorf("Clean(%q) = %q, want %q", in, got, want)
		}
	}
}

// TestNothingReachesATerminal: whatever text the server sends, no form of output has a character in it that a terminal
// acts on, other than line breaks.
func TestNothingReachesATerminal(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.OneOf(rapid.String(), rapid.StringOfN(rapid.RuneFrom([]rune("\x1b\x07\x00\u009b\u202e\u2028\U000e0041\\\"a :#-\n\r\t")), 0, 20, -1)).Draw(t, "text")
		a := &operatorpb.Agent{Name: s, Hostname: s, Reason: s, Labels: map[string]string{s: s}, RejectedStates: []string{s, s}}
		var p Page
		p.Agent(a, now)
		p.Agents([]*operatorpb.Agent{a}, now)
		p.Target(&operatorpb.Target{Name: s, SettingsJson: s}, nil, now)
		doc, err := JSON(a)
		if err != nil {
			t.Fatal(err)
		}
		tree, err := YAML(a)
		if err != nil {
			t.Fatal(err)
		}
		for form, text := range map[string]string{"table": p.String(), "json": string(doc), "yaml": string(tree)} {
			if strings.ContainsFunc(text, escaped) {
				t.Fatalf("%s of %q: %q", form, s, text)
			}
		}
		var back operatorpb.Agent
		if err := protojson.Unmarshal(doc, &back); err != nil || !proto.Equal(a, &back) {
			t.Fatalf("JSON does not round-trip %q: %v\n%s", s, err, doc)
		}
		var fromJSON, fromYAML any
		if err := json.Unmarshal(doc, &fromJSON); err != nil {
			t.Fatal(err)
		}
		if err := yaml.Unmarshal(tree, &fromYAML); err != nil {
			t.Fatalf("YAML of %q: %v\n%s", s, err, tree)
		}
		if !reflect.DeepEqual(fromJSON, fromYAML) {
			t.Fatalf("YAML is another tree than JSON for %q:\n%s\n%s", s, doc, tree)
		}
	})
}

func TestDocumentsAreStable(t *testing.T) {
	t.Parallel()
	r := &operatorpb.ListJobsResponse{Jobs: []*operatorpb.Job{{Id: "job_1", Generation: 1 << 60, CreatedAt: timestamppb.New(now)}}}
	first, err := JSON(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"generation": "1152921504606846976"`, `"next_cursor": ""`, `"tries": 0`, `"finished_at": null`, `"created_at": "2026-12-01T10:00:00Z"`} {
		if !strings.Contains(string(first), want) {
			t.Errorf("no %s in\n%s", want, first)
		}
	}
	tree, err := YAML(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`generation: "1152921504606846976"`, `next_cursor: ""`, "tries: 0", "finished_at: null"} {
		if !strings.Contains(string(tree), want) {
			t.Errorf("no %s in\n%s", want, tree)
		}
	}
	empty, err := YAML(&operatorpb.ListJobsResponse{})
	if err != nil || string(empty) != "jobs: []\nnext_cursor: \"\"\n" {
		t.Errorf("empty list: %q, %v", empty, err)
	}
}

func TestTimes(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		0: "now", 500 * time.Millisecond: "now", -500 * time.Millisecond: "now", time.Second: "in 1s", -59 * time.Second: "59s ago", time.Minute: "in 1m",
		-119 * time.Minute: "1h ago", 47 * time.Hour: "in 47h", 48 * time.Hour: "in 2d", -12*day - time.Hour: "12d ago", 397 * day: "in 397d", 3650 * day: "in 10y",
	} {
		if got := Relative(timestamppb.New(now.Add(d)), now); got != want {
			t.Errorf("Relative(%s) = %q, want %q", d, got, want)
		}
	}
	if got := Time(timestamppb.New(now.Add(12*day)), now); got != "2026-12-13 10:00 UTC (in 12d)" {
		t.Errorf("Time = %q", got)
	}
	if Time(nil, now) != "" || Relative(nil, now) != "" || Exact(nil) != "" {
		t.Error("what has not happened has a time")
	}
	for d, want := range map[time.Duration]string{90 * day: "90d", 36 * time.Hour: "1d 12h", 90 * time.Minute: "1h 30m", 45 * time.Second: "45s", 0: "0s", 250 * time.Millisecond: "250ms"} {
		if got := Exact(durationpb.New(d)); got != want {
			t.Errorf("Exact(%s) = %q, want %q", d, got, want)
		}
	}
}

func TestTable(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		colour bool
		rows   [][]string
		want   string
	}{
		{"aligned", false, [][]string{{"a", "Active", "x"}, {"longer", "Failed", ""}}, "A       B       C\na       Active  x\nlonger  Failed\n"},
		{"an empty column is left out", false, [][]string{{"a", "", "x"}, {"b", "", "y"}}, "A  C\na  x\nb  y\n"},
		{"wide characters take two columns", false, [][]string{{"証明", "x", "1"}, {"abcd", "y", "2"}}, "A     B  C\n証明  x  1\nabcd  y  2\n"},
		{"combining marks take none", false, [][]string{{"e\u0301", "x", "1"}, {"e", "y", "2"}}, "A  B  C\ne\u0301  x  1\ne  y  2\n"},
		{"painted without moving", true, [][]string{{"a", "Active", "x"}}, "A  B       C\na  \x1b[32mActive\x1b[0m  x\n"},
		{"only whole words are painted", true, [][]string{{"a", "Active\x1b[5m", "x"}}, "A  B          C\na  Active[5m  x\n"},
		{"no rows", false, nil, "A  B  C\n"},
	} {
		p := Page{Colour: c.colour}
		p.Table([]string{"A", "B", "C"}, c.rows)
		if got := p.String(); got != c.want {
			t.Errorf("%s:\n%q, want\n%q", c.name, got, c.want)
		}
	}
}

func TestShort(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		in   string
		n    int
		want string
	}{{"abc", 3, "abc"}, {"abcd", 3, "ab…"}, {"証明書", 4, "証…"}, {"", 1, ""}} {
		if got := short(c.in, c.n); got != c.want || !utf8.ValidString(got) {
			t.Errorf("short(%q, %d) = %q, want %q", c.in, c.n, got, c.want)
		}
	}
}

func TestWhy(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		in   *operatorpb.ExplainCertificateResponse
		want string
	}{
		{
			"pending", &operatorpb.ExplainCertificateResponse{
				Certificate: &operatorpb.Certificate{Name: "db", Status: "Pending", PlacementsTotal: 1},
				Leaves:      []*operatorpb.LeafExplanation{{AgentId: "agt_1", Due: true, Reason: "nothing is issued yet"}},
				Placements:  []*operatorpb.PlacementExplanation{{TargetId: "tgt_1", WaitsFor: "the first certificate"}},
			},
			"db is Pending.\nWhat is wanted is in place at 0 of 1 placements.\n\nOn agent web-1 it is due: nothing is issued yet.\n\nTarget tgt_1 does not have what is wanted; it waits for: the first certificate.\n",
		},
		{
			"expired, placed nowhere", &operatorpb.ExplainCertificateResponse{
				Certificate: &operatorpb.Certificate{Name: "old", Status: "Expired", NotAfter: timestamppb.New(now.Add(-day))},
			},
			"old is Expired and expired 2026-11-30 10:00 UTC (24h ago).\nIt is placed on no target.\n",
		},
		{
			"a time that the reason tells is not told twice", &operatorpb.ExplainCertificateResponse{
				Certificate: &operatorpb.Certificate{Name: "web", Status: "Active", PlacementsTotal: 1, PlacementsCurrent: 1},
				Leaves:      []*operatorpb.LeafExplanation{{AgentId: "agt_1", Reason: "it renews on 2027-01-30 10:00 UTC", DueAt: timestamppb.New(now.Add(60 * day))}},
			},
			"web is Active.\nWhat is wanted is in place at every placement (1 of 1).\n\nOn agent web-1 it is not due: it renews on 2027-01-30 10:00 UTC (in 60d).\n",
		},
		{
			"all is well", &operatorpb.ExplainCertificateResponse{
				Certificate: &operatorpb.Certificate{Name: "web", Status: "Active", NotAfter: timestamppb.New(now.Add(90 * day)), PlacementsTotal: 1, PlacementsCurrent: 1},
				Leaves:      []*operatorpb.LeafExplanation{{AgentId: "agt_1", Reason: "it is young.", DueAt: timestamppb.New(now.Add(60 * day))}},
				Placements:  []*operatorpb.PlacementExplanation{{TargetName: "site", Current: true}},
			},
			"web is Active and expires 2027-03-01 10:00 UTC (in 90d).\nWhat is wanted is in place at every placement (1 of 1).\n\n" +
				"On agent web-1 it is not due: it is young. It will be due 2027-01-30 10:00 UTC (in 60d).\n\nTarget site has what is wanted.\n",
		},
	} {
		var p Page
		p.Why(c.in, Names{"agt_1": "web-1"}, now)
		if got := p.String(); got != c.want {
			t.Errorf("%s:\n%s\nwant\n%s", c.name, got, c.want)
		}
	}
}

func TestPolicy(t *testing.T) {
	t.Parallel()
	for want, in := range map[string]*operatorpb.RenewalPolicy{
		"after 2/3 of the lifetime":         nil,
		"after 0.5 of the lifetime":         {Fraction: 0.5},
		"off":                               {Disabled: true, Fraction: 0.5},
		"off, each approved by an operator": {Disabled: true, RequireApproval: true},
		"after 2/3 of the lifetime, each approved by an operator":   {RequireApproval: true},
		"after 2/3 of the lifetime, within Sat,Sun 22:00-04:30 UTC": {Windows: []*operatorpb.RenewalWindow{{Days: []int32{6, 0, 9}, StartMinute: 1320, EndMinute: 270}}},
	} {
		if got := policy(in); got != want {
			t.Errorf("policy(%v) = %q, want %q", in, got, want)
		}
	}
}
