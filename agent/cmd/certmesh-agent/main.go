// Command certmesh-agent is the agent on a host: it keeps one stream to the control plane, makes keys and installs
// certificates.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/certmesh/certmesh/agent/agentd"
	"github.com/certmesh/certmesh/protocol/fault"
)

// version is set by the linker (-X main.version=…).
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr, os.LookupEnv))
}

// run is main without the process: exit status 0 for success, 1 for failure, 2 for bad usage or configuration.
func run(ctx context.Context, args []string, stdout, stderr io.Writer, getenv func(string) (string, bool)) int {
	c := &command{stdout: stdout, stderr: stderr, getenv: getenv}
	root := c.root()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	// One line, whatever is in it: the first thing an operator sees, and what a service manager keeps.
	fmt.Fprintln(stderr, "certmesh-agent:", strings.Join(strings.Fields(err.Error()), " "))
	var usage usageError
	if errors.As(err, &usage) || fault.Is(err, fault.Invalid) {
		return 2
	}
	return 1
}

type usageError struct{ error }

func (u usageError) Unwrap() error { return u.error }

type command struct {
	stdout, stderr io.Writer
	getenv         func(string) (string, bool)
	flags          flags
}

func (c *command) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "certmesh-agent",
		Short:         "The certmesh agent of a host",
		SilenceErrors: true, SilenceUsage: true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("unknown command %q; see certmesh-agent --help", args[0])}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())}
	})
	root.AddCommand(c.run(), c.enroll(), c.status(), &cobra.Command{
		Use: "version", Short: "Print the version", Args: noArgs,
		Run: func(*cobra.Command, []string) { fmt.Fprintln(c.stdout, version) },
	})
	return root
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("%s takes no arguments; see %s --help", cmd.CommandPath(), cmd.CommandPath())}
	}
	return nil
}

func (c *command) run() *cobra.Command {
	cmd := &cobra.Command{
		Use: "run", Short: "Run the agent until it is told to stop", Args: noArgs,
		Long: "Run the agent: join with the token if it has not joined yet, then keep a stream to the control plane.\n\n" + environment,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := c.config(cmd)
			if err != nil {
				return err
			}
			cfg.Log.Info("starting", "version", version, "servers", strings.Join(cfg.Servers, ","), "data_dir", cfg.DataDir)
			if err := agentd.Run(cmd.Context(), cfg); err != nil {
				return err
			}
			cfg.Log.Info("stopped")
			return nil
		},
	}
	c.flags.add(cmd)
	return cmd
}

func (c *command) enroll() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "enroll", Short: "Join the mesh and end; does nothing if this agent has joined", Args: noArgs,
		Long: "Join the mesh with a token, store the identity, and end.\n\n" + environment,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := c.config(cmd)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			if err := agentd.Enroll(ctx, cfg); err != nil {
				return err
			}
			r, err := agentd.Status(cfg)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.stdout, "%s, identity valid until %s\n", r.Identity.AgentID, r.Identity.NotAfter.UTC().Format(time.RFC3339))
			return nil
		},
	}
	c.flags.add(cmd)
	cmd.Flags().DurationVar(&timeout, "timeout", 30*time.Second, "how long to try")
	return cmd
}

func (c *command) status() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use: "status", Short: "Show what this agent holds; asks no server", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != "table" && format != "json" {
				return usageError{fmt.Errorf("--format %q: use table or json", format)}
			}
			cfg, err := c.places(cmd)
			if err != nil {
				return err
			}
			r, err := agentd.Status(cfg)
			if err != nil {
				return err
			}
			if format == "json" {
				e := json.NewEncoder(c.stdout)
				e.SetIndent("", "  ")
				return e.Encode(r)
			}
			return show(c.stdout, cfg, r)
		},
	}
	c.flags.addPlaces(cmd)
	cmd.Flags().StringVar(&format, "format", "table", "table or json")
	return cmd
}

func show(out io.Writer, cfg agentd.Config, r agentd.Report) error {
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	running := "no"
	if r.Running {
		running = "yes"
	}
	fmt.Fprintf(w, "data directory\t%s\nrunning\t%s\n", cfg.DataDir, running)
	if i := r.Identity; i == nil {
		fmt.Fprintln(w, "identity\tnone; this agent has not joined")
	} else {
		fmt.Fprintf(w, "agent\t%s\ntrust domain\t%s\nidentity\t%s, valid until %s, renewed from %s\n", i.AgentID, i.TrustDomain,
			i.Standing, i.NotAfter.UTC().Format(time.RFC3339), i.RenewAt.UTC().Format(time.RFC3339))
	}
	for _, k := range r.Keys {
		leaf := "not deployed"
		if k.NotAfter != nil {
			leaf = "deployed, leaf valid until " + k.NotAfter.UTC().Format(time.RFC3339)
		}
		fmt.Fprintf(w, "key\t%s generation %d, %s, %s\n", k.CertificateID, k.Generation, k.Algorithm, leaf)
	}
	for _, o := range r.Open {
		fmt.Fprintf(w, "open\t%s attempt %d, %s, %s\n", o.ID, o.Attempt, o.Class, o.Phase)
	}
	return w.Flush()
}

func logger(out io.Writer, level, format string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fault.InvalidField("log_level", "%q is not a level; use debug, info, warn or error", level)
	}
	o := &slog.HandlerOptions{Level: l}
	switch format {
	case "json":
		return slog.New(slog.NewJSONHandler(out, o)), nil
	case "text":
		return slog.New(slog.NewTextHandler(out, o)), nil
	default:
		return nil, fault.InvalidField("log_format", "%q is not a format; use json or text", format)
	}
}
