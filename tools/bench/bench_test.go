package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

const printed = `goos: linux
goarch: amd64
pkg: example.test/x
cpu: Test Processor
BenchmarkCheckCSR-2        	    1000	     80000 ns/op
BenchmarkPrepare-2         	    1000	    150000 ns/op
BenchmarkSignFromIntent-2  	    1000	    110000 ns/op
BenchmarkIssue/sqlite-2    	   10000	    600000 ns/op	       750.0 cpu-µs/op	      1700 issued/s
BenchmarkIssue/sqlite-2    	   10000	    600000 ns/op	       750.0 cpu-µs/op	      1900 issued/s
PASS
`

func read(t *testing.T, text string) results {
	t.Helper()
	r := newResults()
	if err := r.read(strings.NewReader(text)); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestMarkdownShowsFiguresWithTheirLimits(t *testing.T) {
	r := read(t, printed)
	r.cores = 2
	text := markdown(r, map[string][]string{"Issuance": {"Issue/sqlite"}}, 3*time.Minute, false)
	for _, want := range []string{"Test Processor", "| 1800 issued/s | ≥ 1,500/s | 5882/s with a store that costs nothing", "2667/s with the 750 µs", "| `Issue/sqlite` | 750 cpu-µs/op |"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
	page, err := replaceMarked("a\n"+beginMark+"old"+endMark+"\nz", text)
	if err != nil || strings.Contains(page, "old") || !strings.HasPrefix(page, "a\n") || !strings.HasSuffix(page, endMark+"\nz") {
		t.Errorf("%v: %q", err, page)
	}
	if _, err := replaceMarked("no marks", text); err == nil {
		t.Error("a page without marks was accepted")
	}
}

func TestJudge(t *testing.T) {
	base := read(t, printed)
	for name, c := range map[string]struct {
		now    string
		factor float64
		worse  string
	}{
		"the same":          {printed, 1.5, ""},
		"slower in time":    {strings.ReplaceAll(printed, " 80000 ns", " 320000 ns"), 3, "CheckCSR"},
		"slower in rate":    {strings.NewReplacer("1700 issued", "400 issued", "1900 issued", "401 issued").Replace(printed), 3, "Issue/sqlite"},
		"within the factor": {strings.ReplaceAll(printed, " 80000 ns", " 200000 ns"), 3, ""},
		"faster":            {strings.ReplaceAll(printed, " 80000 ns", " 8000 ns"), 3, ""},
		"nothing in common": {"BenchmarkOther-2 1 5 ns/op\n", 3, "nothing could be compared"},
	} {
		var out bytes.Buffer
		err := judge(base, read(t, c.now), c.factor, &out)
		if c.worse == "" && err != nil || c.worse != "" && (err == nil || !strings.Contains(err.Error(), c.worse)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSuitesAreWhole(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range suites {
		if s.title == "" || s.pkg == "" || s.bench == "" || seen[s.title] || s.minute && s.turns == nil {
			t.Errorf("%+v", s)
		}
		seen[s.title] = true
	}
}

func TestArgumentsAreChecked(t *testing.T) {
	for _, args := range [][]string{nil, {"fly"}, {"compare"}, {"run", "-only", "("}, {"run", "-bogus"}} {
		if err := run(t.Context(), args); err == nil {
			t.Errorf("%q was accepted", args)
		}
	}
}
