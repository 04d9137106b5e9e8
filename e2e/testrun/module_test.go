package main

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestModuleThatIsNotServed runs a module whose dependency a module proxy refuses, or fails to serve. It sets the
// environment, so neither it nor its subtests run in parallel.
func TestModuleThatIsNotServed(t *testing.T) {
	folder := t.TempDir()
	write(t, folder, "go.mod", "module example.com/a\n\ngo 1.26.0\n\nrequire example.com/b v1.0.0\n")
	write(t, folder, "go.sum", "example.com/b v1.0.0 h1:0000000000000000000000000000000000000000000=\n"+
		"example.com/b v1.0.0/go.mod h1:0000000000000000000000000000000000000000000=\n")
	write(t, folder, "a_test.go", "package a\n\nimport (\n\t_ \"example.com/b\"\n\t\"testing\"\n)\n\nfunc TestA(t *testing.T) {}\n")
	for _, test := range []struct {
		name   string
		status int
		listed bool
		want   string
	}{
		{"refused and listed", http.StatusForbidden, true, "0 passed, 0 failed, 1 skipped"},
		{"gone and listed", http.StatusGone, true, "0 passed, 0 failed, 1 skipped"},
		{"refused and not listed", http.StatusForbidden, false, "0 passed, 1 failed, 0 skipped"},
		{"out of order and listed", http.StatusBadGateway, true, "0 passed, 1 failed, 0 skipped"},
	} {
		t.Run(test.name, func(t *testing.T) {
			proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(test.status) }))
			defer proxy.Close()
			for name, value := range map[string]string{
				"GOPROXY": proxy.URL, "GOMODCACHE": t.TempDir(), "GOSUMDB": "off", "GOFLAGS": "-modcacherw", "GONOPROXY": "none", "GOPRIVATE": "", "GOWORK": "off",
			} {
				t.Setenv(name, value)
			}
			var out strings.Builder
			skips := skipList{}
			if test.listed {
				skips.Suites = []suite{{Suite: "a", Module: folder, Reason: "may not be served"}}
			}
			rep := newReport(&out, skips, os.Getenv)
			if err := runModule(t.Context(), settings{timeout: 0}, rep, folder, nil, io.Discard, io.Discard); err != nil {
				t.Fatal(err)
			}
			rep.close(0)
			if !strings.HasSuffix(out.String(), "\n"+test.want+"\n") {
				t.Errorf("want %q at the end of:\n%s", test.want, out.String())
			}
		})
	}
}

func TestModuleWithoutTestsFails(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	write(t, folder, "go.mod", "module example.com/a\n\ngo 1.26.0\n")
	write(t, folder, "a.go", "package a\n")
	var out strings.Builder
	rep := newReport(&out, skipList{}, os.Getenv)
	if err := runModule(t.Context(), settings{}, rep, folder, nil, io.Discard, io.Discard); err != nil {
		t.Fatal(err)
	}
	if rep.close(0) || !strings.Contains(out.String(), "no test ran in this module") {
		t.Errorf("unexpected report:\n%s", out.String())
	}
}

func TestChecksCount(t *testing.T) {
	t.Parallel()
	if good := runCheck(t.Context(), "good", "true"); good.Outcome != passed {
		t.Errorf("true: %+v", good)
	}
	bad := runCheck(t.Context(), "bad", "echo why; false")
	if bad.Outcome != failed || !strings.HasPrefix(bad.Output, "why\n") {
		t.Errorf("false: %+v", bad)
	}
}

func write(t *testing.T, folder, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(folder, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
