package cli

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

const (
	// completionTimeout is how long a person who presses Tab may be kept waiting.
	completionTimeout = 3 * time.Second
	// completions is how many names are offered.
	completions = 200
)

func (a *App) completion() *cobra.Command {
	shells := map[string]func(*cobra.Command) error{
		"bash":       func(root *cobra.Command) error { return root.GenBashCompletionV2(a.Out, true) },
		"zsh":        func(root *cobra.Command) error { return root.GenZshCompletion(a.Out) },
		"fish":       func(root *cobra.Command) error { return root.GenFishCompletion(a.Out, true) },
		"powershell": func(root *cobra.Command) error { return root.GenPowerShellCompletionWithDesc(a.Out) },
	}
	return &cobra.Command{
		Use:   "completion bash|zsh|fish|powershell",
		Short: "Print a script by which a shell completes commands and names",
		Long: `Prints a script that completes commands, flags and, by asking the control plane, the names of certificates, agents,
targets, issuers and profiles.`,
		Example: `  source <(certmesh completion bash)
  certmesh completion zsh > "${fpath[1]}/_certmesh"
  certmesh completion fish > ~/.config/fish/completions/certmesh.fish
  certmesh completion powershell | Out-String | Invoke-Expression`,
		Args:      takes("bash, zsh, fish or powershell"),
		ValidArgs: []string{"bash", "zsh", "fish", "powershell"},
		RunE: func(cmd *cobra.Command, args []string) error {
			script, known := shells[args[0]]
			if !known {
				return misuse("%q is not a shell that is known here; use bash, zsh, fish or powershell", args[0])
			}
			return script(cmd.Root())
		},
	}
}

// complete offers the names of a kind as the first argument.
func (a *App) complete(k kind) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return a.offer(cmd.Context(), k, begun), cobra.ShellCompDirectiveNoFileComp
	}
}

// completeFlag offers the names of a kind as a flag's value.
func (a *App) completeFlag(cmd *cobra.Command, flag string, k kind) {
	// It fails only for flags that do not exist; a test completes each.
	_ = cmd.RegisterFlagCompletionFunc(flag, func(cmd *cobra.Command, _ []string, begun string) ([]string, cobra.ShellCompDirective) {
		return a.offer(cmd.Context(), k, begun), cobra.ShellCompDirectiveNoFileComp
	})
}

// offer lists names that begin with what was typed. Whatever fails, the shell just offers nothing.
func (a *App) offer(ctx context.Context, k kind, begun string) []string {
	cfg, err := a.settings()
	if err != nil {
		return nil
	}
	cfg.Timeout = min(cfg.Timeout, completionTimeout)
	c, err := client.New(cfg)
	if err != nil {
		return nil
	}
	defer func() { _ = c.Close() }() // the answer is here
	ctx, cancel := context.WithTimeout(ctx, completionTimeout)
	defer cancel()
	var out []string
	add := func(name, about string) {
		// A name with odd characters would come back as arguments of a command line.
		if strings.HasPrefix(name, begun) && name == render.Clean(name) && len(out) < completions {
			out = append(out, cobra.CompletionWithDesc(name, render.Clean(about)))
		}
	}
	page := &operatorpb.Page{Size: maxPage}
	switch k {
	case certificates:
		r, _ := c.Certificates.ListCertificates(ctx, &operatorpb.ListCertificatesRequest{Page: &operatorpb.Page{Size: completions}, NamePrefix: begun})
		for _, x := range r.GetCertificates() {
			add(x.GetName(), x.GetStatus())
		}
	case agents:
		r, _ := c.Agents.ListAgents(ctx, &operatorpb.ListAgentsRequest{Page: page})
		for _, x := range r.GetAgents() {
			add(x.GetName(), x.GetState())
		}
	case targets:
		r, _ := c.Targets.ListTargets(ctx, &operatorpb.ListTargetsRequest{Page: page})
		for _, x := range r.GetTargets() {
			add(x.GetName(), x.GetKind())
		}
	case issuers:
		r, _ := c.Issuers.ListIssuers(ctx, &operatorpb.ListIssuersRequest{Page: page})
		for _, x := range r.GetIssuers() {
			add(x.GetName(), x.GetKind())
		}
	case profiles:
		r, _ := c.Issuers.ListProfiles(ctx, &operatorpb.ListProfilesRequest{Page: page})
		for _, x := range r.GetProfiles() {
			add(x.GetName(), x.GetKeyAlgorithm())
		}
	}
	return out
}
