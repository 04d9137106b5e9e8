package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// slowestShown is how many tests the closing list names: enough to see where a budget goes.
const slowestShown = 10

// report gathers the run and prints it. Not safe for concurrent use.
type report struct {
	out    io.Writer
	skips  skipList
	getenv func(string) string

	counts   map[outcome]int
	failures []result
	timed    []result
	// reasons are the allowed skips, by suite.
	reasons map[string]int
}

func newReport(out io.Writer, skips skipList, getenv func(string) string) *report {
	return &report{out: out, skips: skips, getenv: getenv, counts: map[outcome]int{}, reasons: map[string]int{}}
}

// add counts one package. folder maps its import path to its folder below the root.
func (r *report) add(done packageResult, folder func(string) string) {
	var bad []result
	counted := map[outcome]int{}
	for _, one := range done.Results {
		one.Package = folder(one.Package)
		if one.Outcome == skipped {
			if s, err := r.skips.allows(one.Package, one.Test, r.getenv); err != nil {
				one.Outcome = failed
				one.Output += err.Error() + "\n"
			} else {
				r.reasons[s.Suite+": "+s.Reason]++
			}
		}
		counted[one.Outcome]++
		r.counts[one.Outcome]++
		if one.Outcome == failed {
			bad = append(bad, one)
		}
		r.timed = append(r.timed, one)
	}
	switch {
	case len(bad) > 0:
		r.line("FAIL", folder(done.Package), done.Elapsed, counted)
	case len(done.Results) > 0:
		r.line("ok", folder(done.Package), done.Elapsed, counted)
	}
	for _, one := range bad {
		r.printFailure(one)
	}
	r.failures = append(r.failures, bad...)
}

// single counts a check or a whole module as one test.
func (r *report) single(one result) {
	r.counts[one.Outcome]++
	switch one.Outcome {
	case failed:
		r.line("FAIL", one.name(), one.Elapsed, nil)
		r.printFailure(one)
		r.failures = append(r.failures, one)
	case skipped:
		r.line("skip", one.name(), one.Elapsed, nil)
		fmt.Fprintln(r.out, indent(one.Output))
	default:
		r.line("ok", one.name(), one.Elapsed, nil)
	}
}

func (r *report) line(verdict, name string, elapsed time.Duration, counted map[outcome]int) {
	detail := ""
	if counted != nil {
		detail = fmt.Sprintf("  %d passed", counted[passed])
		if counted[failed] > 0 {
			detail += fmt.Sprintf(", %d failed", counted[failed])
		}
		if counted[skipped] > 0 {
			detail += fmt.Sprintf(", %d skipped", counted[skipped])
		}
	}
	fmt.Fprintf(r.out, "%-4s %7.1fs  %s%s\n", verdict, elapsed.Seconds(), name, detail)
}

func (r *report) printFailure(one result) {
	fmt.Fprintf(r.out, "--- %s\n%s\n", one.name(), indent(one.Output))
}

// close prints what the run came to and reports whether it was good.
func (r *report) close(elapsed time.Duration) bool {
	slices.SortStableFunc(r.timed, func(a, b result) int { return cmp.Compare(b.Elapsed, a.Elapsed) })
	fmt.Fprintf(r.out, "\nslowest tests, of %.1fs in all:\n", elapsed.Seconds())
	for _, one := range r.timed[:min(slowestShown, len(r.timed))] {
		fmt.Fprintf(r.out, "  %7.1fs  %s\n", one.Elapsed.Seconds(), one.name())
	}
	if len(r.reasons) > 0 {
		fmt.Fprintln(r.out, "\nskipped, as listed in e2e/testrun/skips.yaml:")
		for _, reason := range sortedKeys(r.reasons) {
			fmt.Fprintf(r.out, "  %d × %s\n", r.reasons[reason], reason)
		}
	}
	if len(r.failures) > 0 {
		fmt.Fprintln(r.out, "\nfailed:")
		for _, one := range r.failures {
			fmt.Fprintf(r.out, "  %s\n", one.name())
		}
	}
	fmt.Fprintf(r.out, "\n%d passed, %d failed, %d skipped\n", r.counts[passed], r.counts[failed], r.counts[skipped])
	return r.counts[failed] == 0
}

func indent(text string) string {
	return "    " + strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "\n    ")
}
