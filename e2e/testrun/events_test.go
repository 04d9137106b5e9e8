package main

import (
	"io"
	"slices"
	"strings"
	"testing"
)

// collect runs the collector over events and returns the packages in the order in which they ended.
func collect(t *testing.T, events string) []packageResult {
	t.Helper()
	var all []packageResult
	c := &collector{stray: io.Discard, finished: func(p packageResult) { all = append(all, p) }}
	if err := c.read(strings.NewReader(events)); err != nil {
		t.Fatal(err)
	}
	return all
}

// outcomes renders results as "name outcome", sorted.
func outcomes(p packageResult) []string {
	var all []string
	for _, r := range p.Results {
		all = append(all, r.name()+" "+string(r.Outcome))
	}
	slices.Sort(all)
	return all
}

func TestCollectorCountsWhatCounts(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, events string
		want         []string
		outcome      outcome
		output       string
	}{
		{
			name: "a test with subtests is counted by its subtests",
			events: `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"run","Package":"p","Test":"TestA/x"}
{"Action":"run","Package":"p","Test":"TestA/y"}
{"Action":"pass","Package":"p","Test":"TestA/x"}
{"Action":"skip","Package":"p","Test":"TestA/y"}
{"Action":"pass","Package":"p","Test":"TestA","Elapsed":1.5}
{"Action":"pass","Package":"p"}`,
			want: []string{"p TestA/x passed", "p TestA/y skipped"}, outcome: passed,
		},
		{
			name: "a failed subtest fails once, not again with its parents",
			events: `{"Action":"fail","Package":"p","Test":"TestA/x/deep"}
{"Action":"fail","Package":"p","Test":"TestA/x"}
{"Action":"fail","Package":"p","Test":"TestA"}
{"Action":"fail","Package":"p"}`,
			want: []string{"p TestA/x/deep failed"}, outcome: failed,
		},
		{
			name: "a parent that fails on its own counts",
			events: `{"Action":"pass","Package":"p","Test":"TestA/x"}
{"Action":"output","Package":"p","Test":"TestA","Output":"cleanup went wrong\n"}
{"Action":"fail","Package":"p","Test":"TestA"}
{"Action":"fail","Package":"p"}`,
			want: []string{"p TestA failed", "p TestA/x passed"}, outcome: failed, output: "cleanup went wrong",
		},
		{
			name: "a broken build is a failure of the package, with the compiler's words",
			events: `{"ImportPath":"p [p.test]","Action":"build-output","Output":"a.go:1: undefined: x\n"}
{"ImportPath":"p [p.test]","Action":"build-fail"}
{"Action":"start","Package":"p"}
{"Action":"output","Package":"p","Output":"FAIL p [build failed]\n"}
{"Action":"fail","Package":"p","FailedBuild":"p [p.test]"}`,
			want: []string{"p failed"}, outcome: failed, output: "undefined: x",
		},
		{
			name: "a package that dies takes its running test with it",
			events: `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Output":"panic: boom\n"}
{"Action":"fail","Package":"p"}`,
			want: []string{"p TestA failed"}, outcome: failed, output: "panic: boom",
		},
		{
			name:   "a stream that ends early is a failure",
			events: `{"Action":"pass","Package":"p","Test":"TestA"}`,
			want:   []string{"p TestA passed", "p failed"}, outcome: failed, output: "never reported its end",
		},
		{
			name:   "a package without tests counts nothing",
			events: `{"Action":"output","Package":"p","Output":"? p [no test files]\n"}` + "\n" + `{"Action":"skip","Package":"p"}`,
			want:   nil, outcome: passed,
		},
		{
			name:   "lines that are no events are ignored",
			events: "warning: {\n{not json\n" + `{"Action":"pass","Package":"p","Test":"TestA"}` + "\n" + `{"Action":"pass","Package":"p"}`,
			want:   []string{"p TestA passed"}, outcome: passed,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			packages := collect(t, test.events)
			if len(packages) != 1 {
				t.Fatalf("%d packages ended, want 1", len(packages))
			}
			if got := outcomes(packages[0]); !slices.Equal(got, test.want) {
				t.Errorf("counted %q, want %q", got, test.want)
			}
			if packages[0].Outcome != test.outcome {
				t.Errorf("the package %s, want %s", packages[0].Outcome, test.outcome)
			}
			var text strings.Builder
			for _, r := range packages[0].Results {
				text.WriteString(r.Output)
			}
			if !strings.Contains(text.String(), test.output) {
				t.Errorf("output %q does not contain %q", text.String(), test.output)
			}
		})
	}
}

func TestOutputIsBounded(t *testing.T) {
	t.Parallel()
	var o output
	o.add("first\n")
	for range 100 {
		o.add(strings.Repeat("x", maxOutput/20))
	}
	o.add("last\n")
	text := o.String()
	if len(text) > 2*maxOutput || !strings.HasPrefix(text, "first\n") || !strings.HasSuffix(text, "last\n") {
		t.Errorf("kept %d bytes, beginning %q", len(text), text[:10])
	}
}
