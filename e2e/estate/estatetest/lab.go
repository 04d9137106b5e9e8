// Package estatetest is how end-to-end tests use an estate: it builds the binaries once a test binary, gives each test
// what it needs, and shows the logs of what failed.
package estatetest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/e2e/estate"
)

// bin is where Main built the binaries.
var bin string

// Patience bounds one test. Conditions are waited for, so a healthy run on an idle machine never comes near it; the
// race detector on a machine that does much else is slow.
const Patience = 8 * time.Minute

// Long is Patience for the tool's own time limits.
const Long = "5m"

// AtOnce is how many tests run at the same time, unless -parallel says otherwise: they mostly wait for other processes. A
// package whose tests start many sets it before Main.
var AtOnce = 8

// Main builds the binaries with the race detector into a temporary directory and runs the tests. CERTMESH_TEST_BIN names a
// directory whose binaries are tried instead.
func Main(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f != nil && f.Value.String() == f.DefValue {
		_ = flag.Set("test.parallel", strconv.Itoa(AtOnce)) // a number is always accepted
	}
	if bin = os.Getenv("CERTMESH_TEST_BIN"); bin != "" {
		return m.Run()
	}
	root, err := estate.Root()
	if err != nil {
		return failed(err)
	}
	if bin, err = os.MkdirTemp("", "certmesh-e2e-bin"); err != nil {
		return failed(err)
	}
	defer func() { _ = os.RemoveAll(bin) }() // temporary; what cannot be removed is the system's to clear
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	if err := estate.Build(ctx, root, bin, os.Stderr, "-race"); err != nil {
		return failed(err)
	}
	return m.Run()
}

func failed(err error) int {
	fmt.Fprintln(os.Stderr, "cannot set the tests up:", err)
	return 1
}

// Bin is the directory of the binaries.
func Bin() string { return bin }

// Lab is an estate in the hands of one test.
type Lab struct {
	*estate.Estate
	T   testing.TB
	Ctx context.Context
	// Server is the control plane that runs; Start and Restart set it.
	Server *estate.Process
}

// New makes an estate that ends with the test. Nothing runs yet.
func New(t testing.TB) *Lab {
	t.Helper()
	return NewFor(t, Patience)
}

// NewFor is New for a test that may take longer than others.
func NewFor(t testing.TB, patience time.Duration) *Lab {
	t.Helper()
	dir, err := os.MkdirTemp("", "certmesh-e2e")
	if err != nil {
		t.Fatal(err)
	}
	// A program with the race detector sleeps a second when it ends, unless it is told not to; the tool ends often.
	e, err := estate.New(estate.Config{Dir: dir, Bin: bin, Env: []string{"GORACE=atexit_sleep_ms=0"}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(func() {
		cancel()
		e.Close()
		if t.Failed() {
			showLogs(t, dir)
		}
		reportRaces(t, dir)
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove the estate: %v", err)
		}
	})
	return &Lab{Estate: e, T: t, Ctx: ctx}
}

// Start makes an estate and runs `certmeshd dev` in it.
func Start(t testing.TB, env ...string) *Lab {
	t.Helper()
	l := New(t)
	l.StartServer(env...)
	return l
}

// With is the same lab for a subtest.
func (l *Lab) With(t testing.TB) *Lab {
	c := *l
	c.T = t
	return &c
}

// StartServer runs `certmeshd dev` until the test ends.
func (l *Lab) StartServer(env ...string) {
	l.T.Helper()
	p, err := l.Estate.StartServer(l.Ctx, env...)
	l.OK(err)
	l.Server = p
}

// tailLines is enough to see what led to a failure.
const tailLines = 60

func showLogs(t testing.TB, dir string) {
	logs, _ := filepath.Glob(filepath.Join(dir, "*.log")) // the pattern is well-formed
	for _, l := range logs {
		b, err := os.ReadFile(l)
		if err != nil {
			t.Log(err)
			continue
		}
		lines := slices.DeleteFunc(strings.Split(strings.TrimRight(string(b), "\n"), "\n"), func(line string) bool {
			// Calls that were answered are in the way of what went wrong.
			return strings.Contains(line, `"api call"`) && strings.Contains(line, `"code":"OK"`)
		})
		t.Logf("the end of %s:\n%s", filepath.Base(l), strings.Join(lines[max(0, len(lines)-tailLines):], "\n"))
	}
}

// reportRaces fails the test for what the race detector or a panic left in a log: the binary's own exit status would
// not always reach the test.
func reportRaces(t testing.TB, dir string) {
	logs, _ := filepath.Glob(filepath.Join(dir, "*.log")) // the pattern is well-formed
	for _, l := range logs {
		b, err := os.ReadFile(l)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, sign := range []string{"WARNING: DATA RACE", "\npanic: ", "fatal error: "} {
			if i := strings.Index(string(b), sign); i >= 0 {
				t.Errorf("%s contains %q:\n%s", filepath.Base(l), strings.TrimSpace(sign), string(b[i:min(len(b), i+4000)]))
			}
		}
	}
}

// OK ends the test unless err is nil.
func (l *Lab) OK(err error) {
	l.T.Helper()
	if err != nil {
		l.T.Fatal(err)
	}
}

// Do runs `certmesh args…` and returns what it printed.
func (l *Lab) Do(args ...string) string {
	l.T.Helper()
	out, err := l.CLI(l.Ctx, args...)
	l.OK(err)
	return string(out)
}

// Get runs `certmesh args… --format json` and decodes the answer.
func (l *Lab) Get(out any, args ...string) {
	l.T.Helper()
	l.OK(l.JSON(l.Ctx, out, args...))
}

// Refused runs `certmesh args…`, which must end with status code and one line that contains all of words; it returns
// the line.
func (l *Lab) Refused(code int, words []string, args ...string) string {
	l.T.Helper()
	_, err := l.CLI(l.Ctx, args...)
	return l.IsRefusal(err, code, words...)
}

// IsRefusal ends the test unless err is a command's failure with status code and one line that contains all of words.
func (l *Lab) IsRefusal(err error, code int, words ...string) string {
	l.T.Helper()
	var ce *estate.CLIError
	if !errors.As(err, &ce) {
		l.T.Fatalf("the command was not refused: %v", err)
	}
	line := strings.TrimSuffix(ce.Stderr, "\n")
	if ce.Code != code {
		l.T.Errorf("%s ended with status %d, not %d: %s", strings.Join(ce.Args, " "), ce.Code, code, line)
	}
	if strings.Contains(line, "\n") || !strings.HasPrefix(line, ce.Program+": ") {
		l.T.Errorf("the error is not one line that begins with %q:\n%s", ce.Program+": ", line)
	}
	for _, w := range words {
		if !strings.Contains(strings.ToLower(line), strings.ToLower(w)) {
			l.T.Errorf("the error does not mention %q: %s", w, line)
		}
	}
	return line
}

// Until waits for a condition.
func (l *Lab) Until(what string, check func() error) {
	l.T.Helper()
	l.OK(estate.Wait(l.Ctx, what, func(context.Context) error { return check() }))
}

// Join adds an agent and waits until it is online.
func (l *Lab) Join(o estate.AgentOptions) (*estate.Process, estate.Agent) {
	l.T.Helper()
	p, a, err := l.Estate.Join(l.Ctx, o)
	l.OK(err)
	return p, a
}

// Issuer makes a local CA; args are further flags.
func (l *Lab) Issuer(name string, args ...string) estate.Issuer {
	l.T.Helper()
	var out estate.Issuer
	l.Get(&out, append([]string{"issuers", "create", name}, args...)...)
	return out
}

// Certificate reads one.
func (l *Lab) Certificate(name string) estate.Certificate {
	l.T.Helper()
	c, err := l.Estate.Certificate(l.Ctx, name)
	l.OK(err)
	return c
}

// Versions reads what was signed for a certificate.
func (l *Lab) Versions(name string) []estate.Version {
	l.T.Helper()
	v, err := l.Estate.Versions(l.Ctx, name)
	l.OK(err)
	return v
}

// Current waits until every placement of a certificate holds what is wanted.
func (l *Lab) Current(name string) estate.Certificate {
	l.T.Helper()
	var c estate.Certificate
	l.Until("every placement of "+name+" to be current", func() error {
		c = l.Certificate(name)
		if c.PlacementsCurrent != c.PlacementsTotal || c.PlacementsTotal == 0 {
			return fmt.Errorf("%s: %d of %d placements are current; %+v", c.Status, c.PlacementsCurrent, c.PlacementsTotal, c.Placements)
		}
		return nil
	})
	return c
}

// LastSerial is the serial of the newest version that an agent holds of a certificate.
func (l *Lab) LastSerial(name, agentID string) string {
	l.T.Helper()
	for _, leaf := range l.Certificate(name).Leaves {
		if leaf.AgentID == agentID {
			return leaf.Serial
		}
	}
	l.T.Fatalf("%s has no leaf at %s", name, agentID)
	return ""
}

// Serves checks that a site serves serial under a chain to roots.
func (l *Lab) Serves(s *estate.Site, serial, roots string) {
	l.T.Helper()
	c, err := estate.Trusted(l.Ctx, s.Addr, s.Host, roots)
	l.OK(err)
	if got := estate.Serial(c); got != serial {
		l.T.Fatalf("%s serves %s, not %s", s.Addr, got, serial)
	}
}

// Keys checks how many private keys an agent keeps for a certificate; it waits, since the former key is retired after
// the new one is served.
func (l *Lab) Keys(agent, certificateID string, want int) {
	l.T.Helper()
	l.Until(fmt.Sprintf("%s to keep %d keys of %s", agent, want, certificateID), func() error {
		if got := l.KeyFiles(agent, certificateID); len(got) != want {
			return fmt.Errorf("it keeps %d: %v", len(got), got)
		}
		return nil
	})
}

// Quiet waits until no job is open.
func (l *Lab) Quiet(args ...string) {
	l.T.Helper()
	l.Until("no job to be open", func() error {
		jobs, err := l.Jobs(l.Ctx, append([]string{"--open"}, args...)...)
		if err != nil {
			return err
		}
		if len(jobs) > 0 {
			return fmt.Errorf("%d are, the first: %+v", len(jobs), jobs[0])
		}
		return nil
	})
}

// Audited checks that the trail has a row with each action and outcome "action=outcome"; it waits, since some rows are
// written by what goes on behind an answer.
func (l *Lab) Audited(want ...string) []estate.AuditEvent {
	l.T.Helper()
	var events []estate.AuditEvent
	l.Until("the trail to tell of "+strings.Join(want, ", "), func() error {
		var err error
		if events, err = l.Audit(l.Ctx); err != nil {
			return err
		}
		seen := map[string]bool{}
		for _, e := range events {
			seen[e.Action+"="+e.Outcome] = true
		}
		var missing []string
		for _, w := range want {
			if !seen[w] {
				missing = append(missing, w)
			}
		}
		if len(missing) > 0 {
			return fmt.Errorf("it lacks %v; it has %v", missing, seen)
		}
		return nil
	})
	return events
}

// Tool runs a program that the tests need, and ends the test if it is missing or fails.
func (l *Lab) Tool(name string, args ...string) string {
	l.T.Helper()
	out, err := tool(l.Ctx, name, args...)
	if err != nil {
		l.T.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// File writes a file into the estate and returns its path.
func (l *Lab) File(name, text string) string {
	l.T.Helper()
	path := l.Path(name)
	l.OK(os.MkdirAll(filepath.Dir(path), 0o700))
	l.OK(os.WriteFile(path, []byte(text), 0o600))
	return path
}
