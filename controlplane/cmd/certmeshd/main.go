// Command certmeshd is a node of the control plane.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/certmesh/certmesh/controlplane/node"
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
	for line := range strings.SplitSeq(err.Error(), "\n") {
		fmt.Fprintln(stderr, "certmeshd:", line)
	}
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
	file           string
	set            []string
}

func (c *command) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "certmeshd",
		Short:         "A node of the certmesh control plane",
		Args:          noArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceErrors: true, SilenceUsage: true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())}
	})
	root.PersistentFlags().StringVar(&c.file, "config", "", "configuration file (YAML); every setting: certmeshd config")
	root.PersistentFlags().StringArrayVar(&c.set, "set", nil, "one setting as key=value, e.g. --set listen.grpc=127.0.0.1:8442")
	root.AddCommand(c.serve(), c.dev(), c.cluster(), c.migrate(), c.config(), c.apikey(), c.mesh(), c.store(), c.recover(), &cobra.Command{
		Use: "version", Short: "Print the version", Args: noArgs,
		Run: func(*cobra.Command, []string) { fmt.Fprintln(c.stdout, version) },
	})
	return root
}

// load reads the configuration; mode is node.Serve or node.Dev, whose defaults differ.
func (c *command) load(mode node.Mode) (*node.Configuration, error) {
	flags := map[string]string{}
	for _, kv := range c.set {
		k, v, ok := strings.Cut(kv, "=")
		if !ok {
			return nil, usageError{fmt.Errorf("--set %q: use key=value", kv)}
		}
		flags[k] = v
	}
	return node.LoadConfiguration(mode, c.file, c.getenv, flags)
}

func (c *command) serve() *cobra.Command {
	return &cobra.Command{
		Use: "serve", Short: "Run a node", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.runNode(cmd.Context(), node.Serve, nil) },
	}
}

func (c *command) dev() *cobra.Command {
	return &cobra.Command{
		Use: "dev", Short: "Run one node on the embedded store, with everything it needs made on first start", Args: noArgs,
		Long: `Run one node for trying things out: SQLite and a key-encryption key in the data directory, listeners on
loopback, an admin key and a client profile for certmesh. The data directory is ./certmesh-data unless
CERTMESH_DATA_DIR or --set node.data_dir=… says otherwise.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.runNode(cmd.Context(), node.Dev, func(n *node.Node) {
				fmt.Fprintf(c.stdout, `certmesh %s is ready.

  operators    export CERTMESH_CONFIG=%s
               certmesh status
  a host       certmesh agents token create
               CERTMESH_SERVER_URL=%s CERTMESH_JOIN_TOKEN=<token> certmesh-agent run

`, version, n.ClientProfile(), n.Addresses().Mesh)
			})
		},
	}
}

func (c *command) runNode(ctx context.Context, mode node.Mode, ready func(*node.Node)) error {
	cfg, err := c.load(mode)
	if err != nil {
		return err
	}
	log, err := cfg.Logger(c.stderr)
	if err != nil {
		return err
	}
	n, err := node.Start(ctx, node.Options{Configuration: cfg, Mode: mode, Version: version, Log: log})
	if err != nil {
		return err
	}
	if ready != nil {
		ready(n)
	}
	var failed error
	select {
	case <-ctx.Done():
	case failed = <-n.Failed():
	}
	stopCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.ShutdownTimeout())
	defer cancel()
	return errors.Join(failed, n.Stop(stopCtx))
}

func (c *command) migrate() *cobra.Command {
	cmd := &cobra.Command{Use: "migrate", Short: "Look after the schema of the store", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(&cobra.Command{
		Use: "up", Short: "Bring the schema up to date", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			steps, err := node.MigrateUp(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			c.migrations(steps)
			return nil
		},
	}, &cobra.Command{
		Use: "status", Short: "Show which steps are applied", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			steps, err := node.MigrationStatus(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			c.migrations(steps)
			return nil
		},
	})
	return cmd
}

func (c *command) migrations(steps []node.MigrationStep) {
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "VERSION\tNAME\tAPPLIED")
	for _, s := range steps {
		applied := "no"
		if !s.AppliedAt.IsZero() {
			applied = s.AppliedAt.Format(time.RFC3339)
		}
		fmt.Fprintf(w, "%d\t%s\t%s\n", s.Version, s.Name, applied)
	}
	_ = w.Flush() // standard output is gone; there is nobody to tell
}

func (c *command) config() *cobra.Command {
	var format, mode string
	cmd := &cobra.Command{
		Use: "config", Short: "Print the effective configuration and where each value came from", Args: noArgs,
		Long: `Print the effective configuration and where each value came from. serve and dev differ in defaults, and serve
demands settings that others do without: --mode says for which of them to print, and fails as that one would.`,
		RunE: func(*cobra.Command, []string) error {
			switch format {
			case "table", "markdown":
			default:
				return usageError{fmt.Errorf("--format %q: use table or markdown", format)}
			}
			if format == "markdown" {
				fmt.Fprint(c.stdout, node.ConfigurationReference())
				return nil
			}
			switch node.Mode(mode) {
			case node.Serve, node.Dev, node.Admin:
			default:
				return usageError{fmt.Errorf("--mode %q: use serve, dev or admin", mode)}
			}
			cfg, err := c.load(node.Mode(mode))
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "SETTING\tVALUE\tFROM\tENVIRONMENT")
			for _, v := range cfg.Values() {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", v.Key, v.Text, v.Origin, v.Env)
			}
			return w.Flush()
		},
	}
	cmd.Flags().StringVar(&mode, "mode", string(node.Admin), "for serve, dev, or admin: the commands that only touch the store")
	cmd.Flags().StringVar(&format, "format", "table", "table, or markdown for the reference page of all settings")
	return cmd
}

func (c *command) apikey() *cobra.Command {
	cmd := &cobra.Command{Use: "apikey", Short: "Operators' keys, made next to the store", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	var name, role string
	var ttl time.Duration
	create := &cobra.Command{
		Use: "create", Short: "Make an API key and print it once", Args: noArgs,
		Long: `Make an API key and print it once, alone on standard output; how to log in with it is on standard error. Roles: admin
does everything; operator orders, renews, deploys and revokes certificates, keeps targets and cancels jobs; approver
approves and rejects jobs; viewer reads. Make one key a person: the trail knows people by its name, and who orders a
certificate cannot approve it.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if name == "" {
				return usageError{errors.New("--name is needed: who will use the key")}
			}
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			key, err := node.CreateAPIKey(cmd.Context(), cfg, name, role, ttl)
			if err != nil {
				return err
			}
			fmt.Fprintln(c.stdout, key)
			fingerprint, err := node.MeshFingerprint(cmd.Context(), cfg)
			switch {
			case err != nil:
				// The key is made and shown; where it is used is told by docs/operations.md as well.
				fmt.Fprintln(c.stderr, "How to log in could not be read from the store:", err)
			case fingerprint == "":
				fmt.Fprintln(c.stderr, "Start the node once: it makes the CA by which certmesh login knows the server.")
			default:
				fmt.Fprintf(c.stderr, "Log in with: certmesh login --server %s --ca-fingerprint %s\n", cfg.OperatorAddress(), fingerprint)
			}
			return nil
		},
	}
	create.Flags().StringVar(&name, "name", "", "who will use it (required)")
	create.Flags().StringVar(&role, "role", "operator", "admin, operator, approver or viewer")
	create.Flags().DurationVar(&ttl, "ttl", 0, "validity; 0 means until revoked")
	list := &cobra.Command{
		Use: "list", Short: "List the API keys, without their secrets", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			keys, err := node.APIKeys(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tROLE\tCREATED\tEXPIRES\tREVOKED")
			for _, k := range keys {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", k.Name, k.Role, moment(k.CreatedAt), moment(k.ExpiresAt), moment(k.RevokedAt))
			}
			return w.Flush()
		},
	}
	revoke := &cobra.Command{
		Use: "revoke NAME", Short: "End an API key for good",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{fmt.Errorf("name one key; see %s --help", cmd.CommandPath())}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			k, err := node.RevokeAPIKey(cmd.Context(), cfg, args[0])
			if err != nil {
				return err
			}
			fmt.Fprintf(c.stdout, "%s is revoked since %s\n", k.Name, moment(k.RevokedAt))
			return nil
		},
	}
	cmd.AddCommand(create, list, revoke)
	return cmd
}

// moment writes a time for a table; what has not happened is a dash.
func moment(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format(time.RFC3339)
}

// noArgs is cobra.NoArgs with our exit status for bad usage.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("%q is not a command of %s; see %s --help", args[0], cmd.CommandPath(), cmd.CommandPath())}
	}
	return nil
}
