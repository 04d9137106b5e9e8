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
	"strings"
)

// comparison is a run of compare.
type comparison struct {
	root, base string
	minute     bool
	turns      int
	factor     float64
	out        io.Writer
}

// run measures both revisions in turns and reports what got worse by more than the factor.
func (c comparison) run(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "certmesh-bench")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	tree := filepath.Join(dir, "base")
	if err := c.git(ctx, "worktree", "add", "--detach", "--quiet", tree, c.base); err != nil {
		return fmt.Errorf("check out %s: %w", c.base, err)
	}
	defer func() { _ = c.git(context.WithoutCancel(ctx), "worktree", "remove", "--force", tree) }()

	revisions := []*revision{{name: "base", tree: tree}, {name: "new", tree: c.root}}
	for _, r := range revisions {
		r.results = newResults()
	}
	for i, s := range suites {
		if s.turns == nil || c.minute && !s.minute {
			continue
		}
		for _, r := range revisions {
			if err := r.build(ctx, s, filepath.Join(dir, fmt.Sprintf("%s-%d.test", r.name, i)), c.out); err != nil {
				return err
			}
		}
		for turn := range c.turns {
			// In the other order every second time: what warms up with the first must not favour one of them.
			for n := range revisions {
				r := revisions[(n+turn)%2]
				if err := r.measure(ctx, s, c.out); err != nil {
					return err
				}
			}
		}
	}
	if err := c.benchstat(ctx, dir, revisions); err != nil {
		return err
	}
	return judge(revisions[0].results, revisions[1].results, c.factor, c.out)
}

func (c comparison) git(ctx context.Context, args ...string) error {
	text, err := exec.CommandContext(ctx, "git", append([]string{"-c", "safe.directory=*", "-C", c.root}, args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("git %s: %w\n%s", strings.Join(args, " "), err, text)
	}
	return nil
}

func (c comparison) benchstat(ctx context.Context, dir string, revisions []*revision) error {
	args := []string{"run", "golang.org/x/perf/cmd/benchstat"}
	for _, r := range revisions {
		path := filepath.Join(dir, r.name+".txt")
		if err := os.WriteFile(path, r.text.Bytes(), 0o600); err != nil {
			return err
		}
		args = append(args, r.name+"="+path)
	}
	stat := exec.CommandContext(ctx, "go", args...)
	stat.Dir = filepath.Join(c.root, "tools")
	stat.Stdout, stat.Stderr = c.out, c.out
	return stat.Run()
}

// revision is one of the two trees.
type revision struct {
	name, tree string
	binary     string // of the suite that is measured, empty where the tree has none
	text       bytes.Buffer
	results    results
}

// build compiles a suite's test binary. A base that does not have the suite yet has nothing to compare with.
func (r *revision) build(ctx context.Context, s suite, binary string, out io.Writer) error {
	r.binary = ""
	if _, err := os.Stat(filepath.Join(r.tree, s.pkg)); err != nil {
		fmt.Fprintf(out, "%s has no %s\n", r.name, s.pkg)
		return nil
	}
	build := exec.CommandContext(ctx, "go", "test", "-c", "-o", binary, s.pkg)
	build.Dir = r.tree
	if text, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s of %s: %w\n%s", s.pkg, r.name, err, text)
	}
	r.binary = binary
	return nil
}

func (r *revision) measure(ctx context.Context, s suite, out io.Writer) error {
	if r.binary == "" {
		return nil
	}
	args := []string{"-test.run=^$", "-test.bench=" + s.bench, "-test.timeout=10m"}
	for _, a := range s.turns {
		args = append(args, "-test."+strings.TrimPrefix(a, "-"))
	}
	test := exec.CommandContext(ctx, r.binary, args...)
	test.Dir = filepath.Join(r.tree, s.pkg)
	test.Stderr = out
	text, err := test.Output()
	if err != nil {
		return fmt.Errorf("%s of %s: %w\n%s", s.pkg, r.name, err, text)
	}
	r.text.Write(text)
	return r.results.read(bytes.NewReader(text))
}

// judge returns an error that names each figure that is worse than at the base by more than the factor.
func judge(base, now results, factor float64, out io.Writer) error {
	compared := 0
	var worse []error
	for _, name := range base.names {
		for _, unit := range base.units[name] {
			was, _ := base.median(name, unit)
			is, ok := now.median(name, unit)
			if !ok || was <= 0 || is <= 0 {
				continue
			}
			compared++
			ratio := is / was
			if more(unit) {
				ratio = was / is
			}
			if ratio > factor {
				worse = append(worse, fmt.Errorf("%s: %.4g %s, and %.4g at the base: worse by a factor of %.2f", name, is, unit, was, ratio))
			}
		}
	}
	if compared == 0 {
		return errors.New("nothing could be compared: the base has none of these benchmarks")
	}
	if len(worse) == 0 {
		fmt.Fprintf(out, "%d figures compared, none worse by more than a factor of %.1f\n", compared, factor)
	}
	return errors.Join(worse...)
}
