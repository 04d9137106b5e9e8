package main

import (
	"os"
	"strings"
	"testing"
)

const testSkips = `
suites:
  - suite: CockroachDB
    package: controlplane/...
    tests: [TestStore/cockroach]
    env: [DSN]
    reason: no server here
  - suite: grammar
    module: e2e/grammar
    reason: not served
`

func TestReportJudgesSkips(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, pkg, test, dsn string
		good                 bool
		says                 string
	}{
		{"listed", "controlplane/internal/store", "TestStore/cockroach", "", true, "1 × CockroachDB: no server here"},
		{"below a listed one", "controlplane/internal/store", "TestStore/cockroach/fences", "", true, "0 passed, 0 failed, 1 skipped"},
		{"not listed", "controlplane/internal/store", "TestStore/sqlite", "", false, "this skip is not listed"},
		{"above a listed one", "controlplane/internal/store", "TestStore", "", false, "0 passed, 1 failed, 0 skipped"},
		{"another package", "agent", "TestStore/cockroach", "", false, "agent TestStore/cockroach"},
		{"asked for by the environment", "controlplane/internal/store", "TestStore/cockroach", "postgres:", false, "DSN is set"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			skips, err := parseSkips(testSkips)
			if err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			rep := newReport(&out, skips, func(string) string { return test.dsn })
			rep.add(packageResult{Package: modulePath + "/" + test.pkg, Outcome: passed,
				Results: []result{{Package: modulePath + "/" + test.pkg, Test: test.test, Outcome: skipped}}}, folderOf)
			if good := rep.close(0); good != test.good {
				t.Errorf("good = %v, want %v", good, test.good)
			}
			if !strings.Contains(out.String(), test.says) {
				t.Errorf("the report does not say %q:\n%s", test.says, out.String())
			}
		})
	}
}

func TestReportEndsWithTheCounts(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	rep := newReport(&out, skipList{}, os.Getenv)
	rep.single(result{Package: "check", Test: "format", Outcome: passed})
	rep.add(packageResult{Package: "p", Outcome: failed, Results: []result{
		{Package: "p", Test: "TestA", Outcome: passed},
		{Package: "p", Test: "TestB", Outcome: failed, Output: "b_test.go:7: no\n"},
	}}, folderOf)
	if rep.close(0) {
		t.Error("a failed run was called good")
	}
	if text := out.String(); !strings.HasSuffix(text, "\n2 passed, 1 failed, 0 skipped\n") || !strings.Contains(text, "b_test.go:7: no") {
		t.Errorf("unexpected report:\n%s", text)
	}
}

func TestParseSkipsRefuses(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"no reason":       "suites: [{suite: a, package: p, tests: [TestA]}]",
		"a whole package": "suites: [{suite: a, package: p, reason: r}]",
		"both kinds":      "suites: [{suite: a, package: p, tests: [T], module: m, reason: r}]",
		"a bad glob":      "suites: [{suite: a, package: p, tests: ['['], reason: r}]",
		"unknown keys":    "suites: [{suite: a, package: p, test: T, reason: r}]",
		"a path upwards":  "suites: [{suite: a, module: ../m, reason: r}]",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := parseSkips(text); err == nil {
				t.Errorf("accepted %s", text)
			}
		})
	}
}

func TestCheckedInSkipsParse(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("skips.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseSkips(string(text)); err != nil {
		t.Error(err)
	}
}

func TestRefusedIsNotUnreachable(t *testing.T) {
	t.Parallel()
	if !refused("go: m@v1: reading https://proxy.example/m/@v/v1.zip: 403 Forbidden") {
		t.Error("a refusal was not recognised")
	}
	for _, text := range []string{"dial tcp: lookup proxy.example: no such host", "syntax error", "i/o timeout"} {
		if refused(text) {
			t.Errorf("%q was taken for a refusal", text)
		}
	}
}
