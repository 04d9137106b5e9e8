// Command demo shows the main job on this machine: a certificate ordered, issued through an agent, served, verified and
// renewed, with what each step took. It uses what a user has: the three binaries and TLS handshakes. Everything lives in
// a temporary directory and on free loopback ports, and is gone when it ends.
//
// KEEP=1 in the environment leaves it running until Ctrl-C and says how to look around. -bin DIR shows the binaries in
// DIR instead of building them. -cluster shows three nodes on one PostgreSQL instead, of which the leader dies in the middle
// of 200 renewals.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/certmesh/certmesh/e2e/estate"
)

func main() {
	bin := flag.String("bin", "", "show the binaries in this directory instead of building them")
	cluster := flag.Bool("cluster", false, "show three nodes of which the leader dies in the middle of 200 renewals")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	keep := os.Getenv("KEEP")
	os.Exit(run(ctx, newPage(os.Stdout), *bin, *cluster, keep != "" && keep != "0"))
}

// patience is for all steps together; they take some seconds.
const patience = 2 * time.Minute

func run(ctx context.Context, out *page, bin string, cluster, keep bool) int {
	dir, err := os.MkdirTemp("", "certmesh-demo")
	if err != nil {
		out.fail("prepare", err, "")
		return 1
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil {
			out.line("could not remove %s: %v", dir, err)
		}
	}()
	if bin != "" {
		if bin, err = filepath.Abs(bin); err != nil {
			out.fail("prepare", err, "")
			return 1
		}
	}
	d := &demo{out: out, dir: dir, bin: bin}
	defer d.close()
	play := d.play
	if cluster {
		out.title("certmesh: three nodes, and the leader dies, on this machine")
		play, keep = d.playCluster, false
	} else {
		out.title("certmesh: a certificate from order to renewal, on this machine")
	}
	if d.bin == "" {
		err = d.build(ctx)
	}
	if err == nil {
		err = play(ctx)
	}
	var failed *stepError
	switch {
	case ctx.Err() != nil:
		out.line("")
		out.line("stopped; everything the demonstration started is gone")
		return 130
	case errors.As(err, &failed):
		out.fail(failed.step, failed.err, d.logs())
		return 1
	case err != nil:
		out.fail("demonstration", err, d.logs())
		return 1
	}
	if keep {
		d.invite()
		<-ctx.Done()
		out.line("")
		out.line("stopping …")
	}
	return 0
}

// stepError says in which step something went wrong.
type stepError struct {
	step string
	err  error
}

func (s *stepError) Error() string { return s.step + ": " + s.err.Error() }
func (s *stepError) Unwrap() error { return s.err }

type demo struct {
	out *page
	// dir holds everything; bin the binaries, empty until they are built.
	dir, bin string

	estate        *estate.Estate
	cluster       *estate.Cluster // nil: one node
	server, agent *estate.Process
	site          *estate.Site
	host          estate.Agent
	issuer        estate.Issuer
	// before and after are what the site serves before and after the renewal.
	before, after seen
	began         time.Time
}

func (d *demo) close() {
	if d.site != nil {
		d.site.Stop()
	}
	if d.estate != nil {
		d.estate.Close()
	}
}

// logs is what the processes said last.
func (d *demo) logs() string {
	var text strings.Builder
	all := []*estate.Process{d.server, d.agent}
	if d.cluster != nil {
		for _, m := range d.cluster.Nodes {
			all = append(all, m.Process)
		}
	}
	for _, p := range all {
		if p != nil {
			fmt.Fprintf(&text, "the end of %s's log:\n%s\n", p.Name, p.Tail(15))
		}
	}
	return text.String()
}

// step runs one step and prints what it says of itself.
func (d *demo) step(ctx context.Context, name string, do func(context.Context) (string, error)) error {
	d.out.begin(name)
	began := time.Now()
	what, err := do(ctx)
	if err != nil {
		return &stepError{name, err}
	}
	d.out.end(what, time.Since(began))
	return nil
}

func (d *demo) build(ctx context.Context) error {
	err := d.step(ctx, "build", func(ctx context.Context) (string, error) {
		root, err := estate.Root()
		if err != nil {
			return "", err
		}
		d.bin = filepath.Join(d.dir, "bin")
		if err := os.Mkdir(d.bin, 0o700); err != nil {
			return "", err
		}
		// As make build does, so that they share what is compiled.
		return "certmeshd, certmesh-agent, certmesh", estate.Build(ctx, root, d.bin, os.Stderr, "-trimpath")
	})
	d.out.gap()
	return err
}
