package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/jonboulle/clockwork"
	"github.com/spf13/cobra"

	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

// The exit statuses.
const (
	ok      = 0
	failed  = 1
	misused = 2
	unmet   = 3
)

// App is one run of the tool. Its fields are its surroundings; main takes them from the process, tests from memory.
type App struct {
	In       io.Reader
	Out, Err io.Writer
	// Env looks an environment variable up; empty: not set.
	Env     func(string) string
	Clock   clockwork.Clock
	Version string
	// Terminal says whether Out is one: it is cleared and painted, otherwise printed to again.
	Terminal bool
	// ReadSecret calls prompt once nothing that is typed shows any more, and reads a line; nil: In is no terminal and is
	// simply read.
	ReadSecret func(prompt func()) (string, error)

	flags struct {
		server, config, format string
		timeout                time.Duration
	}
	key client.Key
}

// usageError is a command line that cannot be carried out as it is.
type usageError struct{ message string }

func (u usageError) Error() string { return u.message }

func misuse(format string, args ...any) error { return usageError{fmt.Sprintf(format, args...)} }

// waitError is a wait that ended without what was waited for.
type waitError struct{ message string }

func (w waitError) Error() string { return w.message }

// Run carries out a command line (without the program's name) and returns the exit status.
func (a *App) Run(ctx context.Context, args []string) int {
	root := a.Command()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return ok
	}
	fmt.Fprintf(a.Err, "certmesh: %s\n", a.line(ctx, err))
	var u usageError
	var w waitError
	switch {
	case errors.As(err, &u):
		return misused
	case errors.As(err, &w):
		return unmet
	default:
		return failed
	}
}

// line is an error as one line for a terminal. Whatever a server or a library puts into its text, the key is not in it.
func (a *App) line(ctx context.Context, err error) string {
	if errors.Is(ctx.Err(), context.Canceled) {
		return "interrupted; what was asked for may have been done, look before you repeat it"
	}
	s := strings.TrimSpace(render.Clean(err.Error()))
	for _, key := range []string{string(a.key), a.Env("CERTMESH_API_KEY")} {
		if key != "" {
			s = strings.ReplaceAll(s, key, client.Key("").String())
		}
	}
	return s
}

// now is the time that tables tell times from.
func (a *App) now() time.Time { return a.Clock.Now() }

// settings is where the server is and how to talk to it: flags before environment before profile.
func (a *App) settings() (client.Config, error) {
	cfg := client.Config{Timeout: a.flags.timeout, Version: a.Version, Now: a.now}
	var p client.Profile
	path, named, err := a.profilePath()
	if err == nil {
		p, err = client.LoadProfile(path)
	}
	server := first(a.flags.server, a.Env("CERTMESH_SERVER_URL"))
	key := client.Key(a.Env("CERTMESH_API_KEY"))
	caFile := a.Env("CERTMESH_CA_FILE")
	// Whoever says everything by the environment needs no profile; one that is named must be good.
	if err != nil && (named || server == "" || key == "" || caFile == "") {
		return cfg, err
	}
	if cfg.Key = client.Key(first(string(key), string(p.APIKey))); cfg.Key != "" {
		a.key = cfg.Key
	}
	if cfg.CA = p.CACertificate; caFile != "" {
		if cfg.CA, err = readFile("CERTMESH_CA_FILE", caFile); err != nil {
			return cfg, err
		}
	}
	switch server = first(server, p.ServerURL); {
	case server == "":
		return cfg, errors.New("no server is named; run certmesh login, or set CERTMESH_SERVER_URL or --server")
	case cfg.CA == "":
		return cfg, errors.New("no CA is known that the server could be recognised by; run certmesh login, or set CERTMESH_CA_FILE")
	}
	if cfg.Server, err = client.Address(server); err != nil {
		return cfg, usageError{err.Error()}
	}
	return cfg, nil
}

// profilePath is where the profile lies, and whether somebody said so.
func (a *App) profilePath() (path string, named bool, err error) {
	if path = first(a.flags.config, a.Env("CERTMESH_CONFIG")); path != "" {
		return path, true, nil
	}
	path, err = client.DefaultProfile()
	return path, false, err
}

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

// connected makes a command's body from one that needs the server.
func (a *App) connected(run func(ctx context.Context, c *client.Client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		cfg, err := a.settings()
		if err != nil {
			return err
		}
		c, err := client.New(cfg)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }() // the answers are here
		return run(cmd.Context(), c, args)
	}
}

// Command builds the tree of commands.
func (a *App) Command() *cobra.Command {
	root := &cobra.Command{
		Use:   "certmesh",
		Short: "Order, deploy and look after certificates",
		Long: `certmesh is the operators' tool of the certmesh control plane: it orders certificates, shows where they
are served and why they are or are not due, and looks after the hosts that hold them.

It finds the control plane by a profile that "certmesh login" writes. CERTMESH_SERVER_URL, CERTMESH_API_KEY and
CERTMESH_CA_FILE override the profile, so that automation needs none. There is no flag for the API key, since every
user of a machine can read the arguments of its processes.

Exit status: 0 done; 1 refused or failed; 2 the command line is wrong; 3 --wait ended without success.`,
		Example: `  certmesh login --server mesh.example.com:8442 --ca-fingerprint 3f9a…
  certmesh status
  certmesh certs create web --dns www.example.com --issuer corp --target web-1-nginx --wait
  certmesh certs why web`,
		SilenceErrors: true,
		SilenceUsage:  true,
		// Groups and the root show their help; anything else after them is a mistake.
		Args: a.noSuchCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if !slices.Contains(formats, a.flags.format) {
				return misuse("--format %q is not a format; use one of %s", a.flags.format, strings.Join(formats, ", "))
			}
			if a.flags.timeout <= 0 {
				return misuse("--timeout %s leaves no time; give a positive duration, e.g. 30s", a.flags.timeout)
			}
			return nil
		},
	}
	root.SetIn(a.In)
	root.SetOut(a.Out)
	root.SetErr(a.Err)
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return misuse("%s; see %s --help", flagSentence(err), cmd.CommandPath())
	})
	f := root.PersistentFlags()
	f.StringVar(&a.flags.server, "server", "", "`HOST:PORT` of the control plane (CERTMESH_SERVER_URL; default: the profile's)")
	f.StringVar(&a.flags.config, "config", "", "profile `FILE` (CERTMESH_CONFIG; default: certmesh/client.yaml in the user's configuration directory)")
	f.StringVar(&a.flags.format, "format", "table", "`FORMAT` of the answer: table, json or yaml")
	f.Var(newSpan(&a.flags.timeout, 30*time.Second), "timeout", "how long one call to the server may take")
	words(root, "format", formats...)
	root.AddCommand(
		a.login(), a.status(), a.certs(), a.agents(), a.jobs(), a.issuers(), a.profiles(), a.targets(), a.audit(),
		a.completion(), a.version(),
	)
	root.SetHelpCommand(a.help())
	return root
}

var formats = []string{"table", "json", "yaml"}

// flagSentence is what is wrong with a flag, without the parser's stack of colons.
func flagSentence(err error) string {
	s := err.Error()
	// invalid argument "x" for "--page-size" flag: <reason of the value's own>
	if before, reason, found := strings.Cut(s, "\" flag: "); found && strings.HasPrefix(s, "invalid argument ") {
		_, flag, _ := strings.Cut(before, "\" for \"")
		value := strings.TrimPrefix(strings.TrimSuffix(before, "\" for \""+flag), "invalid argument ")
		if strings.HasPrefix(reason, "strconv.") {
			reason = "it is not a number that is allowed here"
			if strings.Contains(s, "ParseBool") {
				reason = "it is neither true nor false"
			}
		}
		return fmt.Sprintf("%s cannot be %s\": %s", flag, value, reason)
	}
	return s
}

// group is a command that only holds others.
func (a *App) group(cmd *cobra.Command, children ...*cobra.Command) *cobra.Command {
	cmd.Args = a.noSuchCommand
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	cmd.AddCommand(children...)
	return cmd
}

// noSuchCommand refuses what is no command of cmd, with what might have been meant.
func (a *App) noSuchCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		return misuse("%s has no command %q; did you mean %s?", cmd.CommandPath(), args[0], strings.Join(near, " or "))
	}
	return misuse("%s has no command %q; see %s --help", cmd.CommandPath(), args[0], cmd.CommandPath())
}

// takes refuses any other number of arguments than those named.
func takes(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return misuse("%s needs %s; see %s --help", cmd.CommandPath(), strings.Join(names[len(args):], " and "), cmd.CommandPath())
		case len(args) > len(names):
			return misuse("%s does not take %q; see %s --help", cmd.CommandPath(), args[len(names)], cmd.CommandPath())
		}
		if i := slices.Index(args, ""); i >= 0 {
			return misuse("%s needs %s, which is empty; see %s --help", cmd.CommandPath(), names[i], cmd.CommandPath())
		}
		return nil
	}
}

func (a *App) help() *cobra.Command {
	return &cobra.Command{
		Use:     "help [COMMAND]",
		Short:   "Explain a command",
		Example: "  certmesh help certs create",
		RunE: func(cmd *cobra.Command, args []string) error {
			found, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return misuse("there is no command %q; see certmesh --help", strings.Join(args, " "))
			}
			found.InitDefaultHelpFlag()
			return found.Help()
		},
	}
}
