package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path"
	"strings"
	"syscall"
	"time"
)

// modulePath is the import path of the repository's root; the nested modules are named below it by their folders.
const modulePath = "github.com/certmesh/certmesh"

// settings are the command line.
type settings struct {
	skips   string
	race    bool
	timeout time.Duration
	run     string
	checks  []string
	modules []string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	good, err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testrun:", err)
		stop()
		os.Exit(2)
	}
	if !good {
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (bool, error) {
	set, err := parseArgs(args, stderr)
	if err != nil {
		return false, err
	}
	text, err := os.ReadFile(set.skips)
	if err != nil {
		return false, fmt.Errorf("read the list of skips: %w", err)
	}
	skips, err := parseSkips(string(text))
	if err != nil {
		return false, fmt.Errorf("%s: %w", set.skips, err)
	}
	env, remove, err := scratch()
	if err != nil {
		return false, err
	}
	defer remove()
	start := time.Now()
	rep := newReport(stdout, skips, os.Getenv)
	for _, check := range set.checks {
		name, command, _ := strings.Cut(check, "=")
		rep.single(runCheck(ctx, name, command))
	}
	for _, module := range set.modules {
		if err := runModule(ctx, set, rep, module, env, stdout, stderr); err != nil {
			return false, err
		}
	}
	good := rep.close(time.Since(start))
	return good, ctx.Err()
}

func parseArgs(args []string, stderr io.Writer) (settings, error) {
	var set settings
	flags := flag.NewFlagSet("testrun", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&set.skips, "skips", "e2e/testrun/skips.yaml", "the list of suites that may be missing")
	flags.BoolVar(&set.race, "race", false, "run with the race detector")
	flags.DurationVar(&set.timeout, "timeout", 10*time.Minute, "time limit of one package")
	flags.StringVar(&set.run, "run", "", "run only tests that match (as go test -run)")
	flags.Func("check", "name=command: a shell command that counts as one test; may be repeated", func(value string) error {
		if name, command, ok := strings.Cut(value, "="); !ok || name == "" || command == "" {
			return errors.New("want name=command")
		}
		set.checks = append(set.checks, value)
		return nil
	})
	if err := flags.Parse(args); err != nil {
		return settings{}, fmt.Errorf("parse the command line: %w", err)
	}
	if set.modules = flags.Args(); len(set.modules) == 0 {
		return settings{}, errors.New("name at least one module folder, for example \".\"")
	}
	return set, nil
}

// runCheck runs one command of the Makefile; it is as trusted as the Makefile itself.
func runCheck(ctx context.Context, name, command string) result {
	start := time.Now()
	text, err := exec.CommandContext(ctx, "bash", "-c", command).CombinedOutput()
	one := result{Package: "check", Test: name, Outcome: passed, Elapsed: time.Since(start), Output: string(text)}
	if err != nil {
		one.Outcome = failed
		one.Output += fmt.Sprintf("%s: %v\n", command, err)
	}
	return one
}

// runModule tests one module.
func runModule(ctx context.Context, set settings, rep *report, module string, env []string, stdout, stderr io.Writer) error {
	if s, ok := rep.skips.module(module); ok {
		list := exec.CommandContext(ctx, "go", "list", "-deps", "-test", "./...")
		list.Dir = module
		if text, err := list.CombinedOutput(); err != nil && refused(string(text)) {
			rep.single(result{Package: module, Outcome: skipped,
				Output: s.Reason + "\nthe module proxy answered:\n" + string(text)})
			return nil
		}
	}
	// -count=1: results kept from an earlier run would not notice files outside the module, services, or luck.
	args := []string{"test", "-json", "-count=1", "-timeout=" + set.timeout.String()}
	if set.race {
		// All but the part of SQLite that is C turned into Go and six times slower under the detector. No more than that part: a
		// package that instantiates generics of others, such as the map inside sync.Map, would lend the whole binary its
		// unwatched copies, and the detector would cry wolf.
		args = append(args, "-race", "-gcflags=modernc.org/sqlite/lib=-race=false")
	}
	if set.run != "" {
		args = append(args, "-run="+set.run)
	}
	var complaints bytes.Buffer
	command := exec.CommandContext(ctx, "go", append(args, "./...")...)
	command.Dir, command.Env = module, env
	command.Stderr = io.MultiWriter(stderr, &complaints)
	command.Cancel = func() error { return command.Process.Signal(os.Interrupt) }
	command.WaitDelay = 10 * time.Second
	events, err := command.StdoutPipe()
	if err != nil {
		return fmt.Errorf("start go test in %s: %w", module, err)
	}
	if err := command.Start(); err != nil {
		return fmt.Errorf("start go test in %s: %w", module, err)
	}
	tests, failures := 0, rep.counts[failed]
	c := &collector{stray: stdout, finished: func(done packageResult) {
		tests += len(done.Results)
		rep.add(done, folderOf)
	}}
	if err := c.read(events); err != nil {
		return err
	}
	switch err := command.Wait(); {
	case err != nil && rep.counts[failed] == failures:
		rep.single(result{Package: module, Outcome: failed, Output: fmt.Sprintf("%sgo test: %v\n", complaints.String(), err)})
	case tests == 0 && set.run == "":
		rep.single(result{Package: module, Outcome: failed, Output: "no test ran in this module\n"})
	}
	return nil
}

// refused reports whether go failed because a module is not served, as opposed to not reached.
func refused(text string) bool {
	for _, answer := range []string{"403 Forbidden", "404 Not Found", "410 Gone", "unknown revision"} {
		if strings.Contains(text, answer) {
			return true
		}
	}
	return false
}

// folderOf turns an import path into the folder below the repository's root.
func folderOf(pkg string) string {
	if pkg == modulePath {
		return "."
	}
	return path.Clean(strings.TrimPrefix(pkg, modulePath+"/"))
}
