// Command certmesh is the operators' tool.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/jonboulle/clockwork"

	"github.com/certmesh/certmesh/tui/cli"
)

// version is set by the linker.
var version = "dev"

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	app := &cli.App{
		In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Env: os.Getenv, Clock: clockwork.NewRealClock(), Version: version,
		Terminal: cli.IsTerminal(os.Stdout),
	}
	if cli.IsTerminal(os.Stdin) {
		app.ReadSecret = func(prompt func()) (string, error) { return cli.ReadSecret(ctx, os.Stdin, prompt) }
	}
	return app.Run(ctx, os.Args[1:])
}
