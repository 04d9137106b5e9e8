package cli

import (
	"context"
	"encoding/json"
	"strings"

	"github.com/spf13/cobra"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

func (a *App) targets() *cobra.Command {
	return a.group(&cobra.Command{
		Use:   "targets",
		Short: "Keep the servers that certificates are installed at",
		Example: `  certmesh targets list
  certmesh targets create web-1-nginx --agent web-1 --kind nginx --settings @nginx.json --verify-address localhost:443`,
	}, a.targetsList(), a.targetsGet(), a.targetsCreate())
}

func (a *App) targetsList() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the targets",
		Example: `  certmesh targets list
  certmesh targets list --agent web-1`,
		Args: takes(),
	}
	pages, w := paging(cmd), watching(cmd, "targets")
	var agent string
	cmd.Flags().StringVar(&agent, "agent", "", "only the targets of this agent, by `NAME|ID`")
	a.completeFlag(cmd, "agent", agents)
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, _ []string) error {
		req := operatorpb.ListTargetsRequest{AgentId: agent}
		if err := ids(ctx, c, map[*string]kind{&req.AgentId: agents}); err != nil {
			return err
		}
		n := newNamer(c)
		return a.present(ctx, c, w, func(ctx context.Context) (view, error) {
			r, err := collect(ctx, pages, func(ctx context.Context, page *operatorpb.Page) (*operatorpb.ListTargetsResponse, error) {
				return c.Targets.ListTargets(ctx, &operatorpb.ListTargetsRequest{Page: page, AgentId: req.AgentId})
			})
			if err != nil {
				return view{}, err
			}
			return view{
				doc: r, table: func(p *render.Page) { p.Targets(r.GetTargets(), n.names(ctx, ofTargets(r.GetTargets()...))) },
				note: notes(empty(len(r.GetTargets()), "such targets"), pages.more(r.GetNextCursor())),
			}, nil
		})
	})
	return cmd
}

func ofTargets(list ...*operatorpb.Target) map[kind][]string {
	out := map[kind][]string{}
	for _, t := range list {
		out[agents] = append(out[agents], t.GetAgentId())
	}
	return out
}

func (a *App) targetsGet() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "get NAME|ID",
		Short:             "Show a target and its settings",
		Example:           "  certmesh targets get web-1-nginx",
		Args:              takes("NAME|ID"),
		ValidArgsFunction: a.complete(targets),
	}
	w := watching(cmd, "targets")
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		n := newNamer(c)
		return a.present(ctx, c, w, func(ctx context.Context) (view, error) {
			r, err := c.Targets.GetTarget(ctx, &operatorpb.GetTargetRequest{Id: args[0]})
			return a.targetView(ctx, n, r.GetTarget()), err
		})
	})
	return cmd
}

func (a *App) targetsCreate() *cobra.Command {
	req := &operatorpb.CreateTargetRequest{}
	var settings string
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Tell of a server that certificates are installed at",
		Long: `Creates a target: a place at an agent's host where certificates are installed, and the address where they are
then seen in a TLS handshake. Without --verify-address a certificate is read back from where it was installed, and shown
as installed, not probed.

--settings is the JSON object of the target's kind, or @FILE that holds it. The paths in it must lie below the roots that
the agent's own configuration allows.`,
		Example: `  certmesh targets create web-1-nginx --agent web-1 --kind nginx --settings @nginx.json --verify-address localhost:443 --server-name www.example.com
  certmesh targets create mail-file --agent mail --kind file --settings '{"dir": "/etc/mail/tls"}'`,
		Args: takes("NAME"),
	}
	f := cmd.Flags()
	f.StringVar(&req.Agent, "agent", "", "agent that reaches the server, by `NAME|ID`")
	f.StringVar(&req.Kind, "kind", "", "`KIND` of server: file or nginx")
	f.StringVar(&settings, "settings", "", "`JSON|@FILE` with the settings of the kind")
	f.StringVar(&req.VerifyAddress, "verify-address", "", "`HOST:PORT` where the agent sees the certificate served")
	f.StringVar(&req.ServerName, "server-name", "", "`NAME` to ask for in the TLS handshake")
	words(cmd, "kind", "file", "nginx")
	a.completeFlag(cmd, "agent", agents)
	cmd.PreRunE = func(*cobra.Command, []string) (err error) {
		switch {
		case req.Agent == "":
			return misuse("--agent is missing; name the agent that reaches the server (certmesh agents list)")
		case req.Kind == "":
			return misuse("--kind is missing; use file or nginx")
		case settings == "":
			return misuse("--settings is missing; give the JSON object of the kind, or @FILE that holds it")
		}
		req.SettingsJson, err = jsonObject(settings)
		return err
	}
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		req.Name = args[0]
		r, err := c.Targets.CreateTarget(ctx, req)
		if err != nil {
			return err
		}
		return a.show(a.targetView(ctx, newNamer(c), r.GetTarget()))
	})
	return cmd
}

// jsonObject reads --settings.
func jsonObject(arg string) (string, error) {
	if path, isFile := strings.CutPrefix(arg, "@"); isFile {
		var err error
		if arg, err = readFile("--settings", path); err != nil {
			return "", err
		}
	}
	var o map[string]json.RawMessage
	if err := json.Unmarshal([]byte(arg), &o); err != nil || o == nil {
		reason := "null"
		if err != nil {
			reason = err.Error()
		}
		return "", misuse("--settings is not a JSON object (%s); give {…}, or @FILE that holds it", reason)
	}
	return arg, nil
}

func (a *App) targetView(ctx context.Context, n *namer, t *operatorpb.Target) view {
	return view{doc: t, table: func(p *render.Page) { p.Target(t, n.names(ctx, ofTargets(t)), a.now()) }}
}
