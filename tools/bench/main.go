package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("say run or compare")
	}
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	root := flags.String("root", ".", "the repository")
	switch args[0] {
	case "run":
		only := flags.String("only", "", "only suites whose title matches; nothing is written then")
		full := flags.Bool("full", os.Getenv("CERTMESH_BENCH_FULL") != "", "everything at the promised size, which takes far more than ten minutes")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		dir, err := filepath.Abs(*root)
		if err != nil {
			return err
		}
		p := report{root: dir, out: os.Stdout, now: time.Now, full: *full}
		if *only != "" {
			if p.only, err = regexp.Compile(*only); err != nil {
				return err
			}
		}
		return p.run(ctx)
	case "compare":
		base := flags.String("base", "", "the revision to compare with")
		minute := flags.Bool("minute", false, "the short suites alone")
		factor := flags.Float64("factor", 3, "fail when a figure is worse by more than this")
		turns := flags.Int("turns", 5, "how often each revision is measured")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		if *base == "" {
			return errors.New("-base names the revision to compare with: make bench-compare BASE=v1.2.0")
		}
		dir, err := filepath.Abs(*root)
		if err != nil {
			return err
		}
		return comparison{root: dir, base: *base, minute: *minute, factor: *factor, turns: *turns, out: os.Stdout}.run(ctx)
	default:
		return fmt.Errorf("%q is neither run nor compare", args[0])
	}
}
