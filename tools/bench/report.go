package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"
)

const (
	beginMark = "<!-- bench run: begin; written by `make bench`, not by hand -->"
	endMark   = "<!-- bench run: end -->"
)

// report is a run of all suites.
type report struct {
	root string
	only *regexp.Regexp
	// full measures everything at the promised size, which takes far more than ten minutes.
	full bool
	out  io.Writer
	now  func() time.Time
}

func (p report) run(ctx context.Context) error {
	begun := p.now()
	all := newResults()
	var failed []error
	bySuite := map[string][]string{}
	for _, s := range suites {
		if p.only != nil && !p.only.MatchString(s.title) {
			continue
		}
		fmt.Fprintf(p.out, "== %s\n", s.title)
		before := len(all.names)
		text, err := p.measure(ctx, s)
		if e := all.read(bytes.NewReader(text)); e != nil {
			return e
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", s.title, err))
			continue
		}
		bySuite[s.title] = all.names[before:]
	}
	if p.only == nil && len(failed) == 0 {
		if err := p.write(markdown(all, bySuite, p.now().Sub(begun), p.full)); err != nil {
			return err
		}
	} else {
		fmt.Fprintln(p.out, markdown(all, bySuite, p.now().Sub(begun), p.full))
	}
	return errors.Join(failed...)
}

func (p report) measure(ctx context.Context, s suite) ([]byte, error) {
	args := append([]string{"test", "-run=^$", "-bench=" + s.bench}, s.args...)
	cmd := exec.CommandContext(ctx, "go", append(args, s.pkg)...)
	cmd.Dir = p.root
	if !p.full {
		cmd.Env = append(os.Environ(), s.short...)
	}
	var text bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&text, p.out), p.out
	err := cmd.Run()
	return text.Bytes(), err
}

// write puts the text between the marks of docs/benchmarks.md.
func (p report) write(text string) error {
	path := filepath.Join(p.root, "docs", "benchmarks.md")
	page, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	next, err := replaceMarked(string(page), text)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return os.WriteFile(path, []byte(next), 0o644) //nolint:gosec // documentation
}

func replaceMarked(page, text string) (string, error) {
	head, rest, ok := strings.Cut(page, beginMark)
	_, tail, also := strings.Cut(rest, endMark)
	if !ok || !also {
		return "", fmt.Errorf("the marks are missing: %q and %q", beginMark, endMark)
	}
	return head + beginMark + "\n\n" + text + "\n" + endMark + tail, nil
}

// markdown is the generated part of the page.
func markdown(all results, bySuite map[string][]string, took time.Duration, full bool) string {
	var b strings.Builder
	cpu := all.cpu
	if cpu == "" {
		cpu = runtime.GOARCH
	}
	form := "the short form, in which some suites are smaller than what was promised, as their lines say"
	if full {
		form = "the full form"
	}
	fmt.Fprintf(&b, "Measured in %.0f minutes on %d cores (%s), %s, %s; %s.\n", took.Minutes(), all.cores, strings.TrimSpace(cpu), runtime.GOOS, runtime.Version(), form)
	for _, s := range suites {
		names, ran := bySuite[s.title]
		if !ran {
			continue
		}
		env := ""
		if !full && len(s.short) > 0 {
			env = strings.Join(s.short, " ") + " "
		}
		fmt.Fprintf(&b, "\n### %s\n\n`%sgo test -run='^$' -bench='%s' %s %s`\n\n| what | measured | promised | limit beside it |\n| --- | --- | --- | --- |\n",
			s.title, env, s.bench, strings.Join(s.args, " "), s.pkg)
		shown := map[string]bool{}
		for _, f := range s.figures {
			v, ok := all.median(f.bench, f.unit)
			if !ok {
				continue
			}
			shown[f.bench+" "+f.unit] = true
			beside := ""
			if f.limit != nil {
				if text, ok := f.limit(all); ok {
					beside = text
				}
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", f.what, quantity(v, f.unit), f.bar, beside)
		}
		for _, name := range names {
			for _, unit := range all.units[name] {
				v, _ := all.median(name, unit)
				if shown[name+" "+unit] || v == 0 && unit == "ns/op" {
					continue
				}
				fmt.Fprintf(&b, "| `%s` | %s | | |\n", name, quantity(v, unit))
			}
		}
	}
	return b.String()
}

// quantity writes a value for people.
func quantity(v float64, unit string) string {
	if unit == "ns/op" {
		d := time.Duration(v)
		switch {
		case d >= time.Second:
			d = d.Round(10 * time.Millisecond)
		case d >= time.Millisecond:
			d = d.Round(10 * time.Microsecond)
		default:
			d = d.Round(100 * time.Nanosecond)
		}
		return d.String()
	}
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f %s", v, unit)
	case v >= 10:
		return fmt.Sprintf("%.1f %s", v, unit)
	default:
		return fmt.Sprintf("%.2f %s", v, unit)
	}
}
