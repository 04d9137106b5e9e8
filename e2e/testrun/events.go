package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// maxOutput bounds what is kept of one test's output, in bytes; its beginning and its end are kept.
const maxOutput = 256 << 10

// event is one line of `go test -json` (see `go doc test2json`, and cmd/go's build events).
type event struct {
	Action      string
	Package     string
	ImportPath  string
	Test        string
	Elapsed     float64
	Output      string
	FailedBuild string
}

// outcome is how a test ended.
type outcome string

const (
	running outcome = "running"
	passed  outcome = "passed"
	failed  outcome = "failed"
	skipped outcome = "skipped"
)

// result is one test, subtest, package or check that counts.
type result struct {
	Package string
	// Test is empty for a failure of the package itself: its build, its TestMain, a panic, its time limit.
	Test    string
	Outcome outcome
	Elapsed time.Duration
	Output  string
}

func (r result) name() string {
	if r.Test == "" {
		return r.Package
	}
	return r.Package + " " + r.Test
}

// packageResult is a finished package.
type packageResult struct {
	Package string
	Outcome outcome
	Elapsed time.Duration
	// Results are the counted tests, by name; empty for a package without tests.
	Results []result
}

// output is a bounded text: the first and the last half of maxOutput.
type output struct {
	head, tail strings.Builder
	cut        bool
}

func (o *output) add(text string) {
	if o.head.Len()+len(text) <= maxOutput/2 && o.tail.Len() == 0 {
		o.head.WriteString(text)
		return
	}
	o.tail.WriteString(text)
	if o.tail.Len() > maxOutput {
		kept := o.tail.String()[o.tail.Len()-maxOutput/2:]
		o.tail.Reset()
		o.tail.WriteString(kept)
		o.cut = true
	}
}

func (o *output) String() string {
	if o.cut {
		return o.head.String() + "\n… (output left out) …\n" + o.tail.String()
	}
	return o.head.String() + o.tail.String()
}

type testState struct {
	outcome outcome
	elapsed time.Duration
	output  output
}

type packageState struct {
	tests  map[string]*testState
	output output
}

// collector turns the events of one `go test -json` into packages. Not safe for concurrent use.
type collector struct {
	// finished is called once for each package, when it ends.
	finished func(packageResult)
	// stray is given the lines that are not events.
	stray io.Writer

	packages map[string]*packageState
	builds   map[string]*output
}

// read consumes events until the stream ends. Packages that never ended are reported as failed.
func (c *collector) read(stream io.Reader) error {
	c.packages, c.builds = map[string]*packageState{}, map[string]*output{}
	lines := bufio.NewReader(stream)
	for {
		line, err := lines.ReadString('\n')
		if strings.TrimSpace(line) != "" {
			c.line(line)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read the events of go test: %w", err)
		}
	}
	for _, name := range sortedKeys(c.packages) {
		c.packages[name].output.add("the package never reported its end\n")
		c.end(event{Action: "fail", Package: name})
	}
	return nil
}

func (c *collector) line(line string) {
	var e event
	if !strings.HasPrefix(line, "{") || json.Unmarshal([]byte(line), &e) != nil || e.Action == "" {
		fmt.Fprint(c.stray, line)
		return
	}
	switch {
	case e.Action == "build-output":
		build, ok := c.builds[e.ImportPath]
		if !ok {
			build = new(output)
			c.builds[e.ImportPath] = build
		}
		build.add(e.Output)
	case e.Action == "build-fail" || e.Package == "":
		// The package's own "fail" event names the build; nothing to add.
	case e.Test == "" && slices.Contains([]string{"pass", "fail", "skip"}, e.Action):
		c.end(e)
	case e.Test == "":
		if e.Action == "output" {
			c.of(e.Package).output.add(e.Output)
		}
	default:
		c.test(e)
	}
}

func (c *collector) of(name string) *packageState {
	state, ok := c.packages[name]
	if !ok {
		state = &packageState{tests: map[string]*testState{}}
		c.packages[name] = state
	}
	return state
}

func (c *collector) test(e event) {
	tests := c.of(e.Package).tests
	test, ok := tests[e.Test]
	if !ok {
		test = &testState{outcome: running}
		tests[e.Test] = test
	}
	switch e.Action {
	case "output":
		test.output.add(e.Output)
	case "pass":
		test.outcome = passed
	case "fail":
		test.outcome = failed
	case "skip":
		test.outcome = skipped
	default:
		return
	}
	test.elapsed = seconds(e.Elapsed)
}

// end settles a package: which of its tests count, and whether it failed on its own.
func (c *collector) end(e event) {
	state := c.of(e.Package)
	delete(c.packages, e.Package)
	done := packageResult{Package: e.Package, Outcome: passed, Elapsed: seconds(e.Elapsed)}
	parents, failedBelow := map[string]bool{}, map[string]bool{}
	names := sortedKeys(state.tests)
	for _, name := range names {
		test := state.tests[name]
		if test.outcome == running {
			test.outcome = failed
			test.output.add("the test never reported its end\n")
		}
		for at := strings.LastIndexByte(name, '/'); at > 0; at = strings.LastIndexByte(name[:at], '/') {
			parents[name[:at]] = true
			if test.outcome == failed {
				failedBelow[name[:at]] = true
			}
		}
	}
	anyFailed := false
	for _, name := range names {
		test := state.tests[name]
		// A parent repeats its subtests' outcome; it counts only for a failure or a skip of its own.
		if parents[name] && (test.outcome == passed || failedBelow[name]) {
			continue
		}
		anyFailed = anyFailed || test.outcome == failed
		done.Results = append(done.Results, result{e.Package, name, test.outcome, test.elapsed, test.output.String()})
	}
	if e.Action == "fail" {
		done.Outcome = failed
		if !anyFailed {
			text := state.output.String()
			if build := c.builds[e.FailedBuild]; build != nil {
				text += build.String()
			}
			done.Results = append(done.Results, result{e.Package, "", failed, done.Elapsed, text})
		} else if last := &done.Results[slices.IndexFunc(done.Results, isFailed)]; state.output.head.Len() > 0 {
			// A panic or a race report may be printed outside any test: show it with the first failure.
			last.Output += state.output.String()
		}
	}
	c.finished(done)
}

func isFailed(r result) bool { return r.Outcome == failed }

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func sortedKeys[V any](m map[string]V) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
