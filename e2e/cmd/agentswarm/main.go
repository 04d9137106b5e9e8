// Command agentswarm runs many virtual agents in one process against a running control plane: each is the real agent
// (agent/agentd) with its storage in memory, its own identity, TLS connection and stream, and a target that installs
// nothing. It is for load tests and chaos and is not installed on hosts.
//
//	agentswarm --server 127.0.0.1:8444 --token "$(certmesh agents token create --uses 10000)" --agents 10000
//
// It prints one line a second, or with --json one object: how many have joined, are connected, have acknowledged. With
// --operator (a profile of the certmesh tool) it gives each agent targets (--targets-per-agent) and takes commands on
// standard input, one a line: "order" orders certificates for all targets, "renew [CERTIFICATES]" renews them; the
// outcome is a line of its own that says when the last agent acknowledged. "quit" or end of input ends nothing but the
// commands; SIGTERM, or the end of --hold, ends the swarm.
//
// --bad makes a fraction of the agents misbehave: half-open (connections that say nothing, and streams that fall silent),
// slow-reader (a few bytes a second), never-accept (grants credit and answers no assignment).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"
)

// options are the flags.
type options struct {
	server, token, operator, name, bad string
	agents, targets, joining           int
	fraction                           float64
	hold, every                        time.Duration
	json                               bool
	profile                            string
}

func main() {
	var o options
	flag.StringVar(&o.server, "server", "", "mesh listeners of nodes, `HOST:PORT[,HOST:PORT…]`")
	flag.StringVar(&o.token, "token", "", "join token for as many uses as there are agents; empty: made with --operator")
	flag.StringVar(&o.operator, "operator", "", "profile `FILE` of the certmesh tool, for tokens, targets and orders")
	flag.StringVar(&o.name, "name", "swarm", "agents are called NAME-1, NAME-2, …")
	flag.IntVar(&o.agents, "agents", 100, "how many agents")
	flag.IntVar(&o.targets, "targets-per-agent", 0, "targets that each agent is given once it has joined")
	flag.IntVar(&o.joining, "joining", 24, "how many agents join at the same time")
	flag.StringVar(&o.bad, "bad", "", "how a fraction misbehaves: half-open, slow-reader or never-accept")
	flag.Float64Var(&o.fraction, "bad-fraction", 0.1, "the fraction that misbehaves, above 0 to 1")
	flag.DurationVar(&o.hold, "hold", 0, "how long the agents stay once all are connected; 0: until SIGTERM")
	flag.DurationVar(&o.every, "every", time.Second, "how often the state is printed")
	flag.BoolVar(&o.json, "json", false, "print JSON, one object a line")
	flag.StringVar(&o.profile, "heap-profile", "", "write a heap profile to `FILE` at the end")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "agentswarm:", err)
		os.Exit(1)
	}
}

func (o *options) check() error {
	switch {
	case flag.NArg() > 0:
		return fmt.Errorf("%q is no flag; agentswarm has flags only", flag.Arg(0))
	case o.server == "":
		return errors.New("--server is missing: give the mesh listener's HOST:PORT")
	case o.token == "" && o.operator == "":
		return errors.New("--token is missing: give a join token for as many uses as there are agents, or --operator to have one made")
	case o.agents < 1 || o.agents > maxAgents:
		return fmt.Errorf("--agents %d is not between 1 and %d", o.agents, maxAgents)
	case o.targets < 0 || o.targets > 64:
		return fmt.Errorf("--targets-per-agent %d is not between 0 and 64", o.targets)
	case o.targets > 0 && o.operator == "":
		return errors.New("--targets-per-agent needs --operator")
	case o.joining < 1 || o.every <= 0:
		return errors.New("--joining and --every must be above zero")
	case o.bad != "" && !slices.Contains(badKinds, o.bad):
		return fmt.Errorf("--bad %q is not one of %v", o.bad, badKinds)
	case o.bad != "" && (o.fraction <= 0 || o.fraction > 1):
		return fmt.Errorf("--bad-fraction %v is not above 0 and at most 1", o.fraction)
	}
	return nil
}

func run(ctx context.Context, o options) error {
	if err := o.check(); err != nil {
		return err
	}
	if err := raiseFiles(o.agents + 64); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := newSwarm(o, newPrinter(os.Stdout, o.json))
	if o.operator != "" {
		op, err := newOperator(o.operator)
		if err != nil {
			return err
		}
		defer op.close()
		s.operator = op
		if o.token == "" {
			if s.token, err = op.token(ctx, o.agents); err != nil {
				return err
			}
		}
	}
	s.run(ctx, cancel)
	if o.profile != "" {
		return writeHeap(o.profile)
	}
	return nil
}

// raiseFiles lifts the soft limit of open files to the hard one and says so if that is not enough.
func raiseFiles(need int) error {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return err
	}
	l.Cur = l.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return err
	}
	if l.Max < uint64(need) {
		return fmt.Errorf("a process may open %d files here and %d are needed; raise the limit (ulimit -Hn) or run several swarms", l.Max, need)
	}
	return nil
}
