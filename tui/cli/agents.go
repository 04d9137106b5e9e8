package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

func (a *App) agents() *cobra.Command {
	return a.group(&cobra.Command{
		Use:   "agents",
		Short: "Look after the hosts",
		Example: `  certmesh agents list
  certmesh agents token create --ttl 1h
  certmesh agents get web-1`,
	}, a.agentsList(), a.agentsGet(), a.agentsRetire(), a.agentsRelease(), a.agentsToken())
}

func (a *App) agentsList() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the agents",
		Example: `  certmesh agents list --watch
  certmesh agents list --state Offline`,
		Args: takes(),
	}
	pages, w := paging(cmd), watching(cmd, "agents")
	var state string
	cmd.Flags().StringVar(&state, "state", "", "only agents in this `STATE`")
	words(cmd, "state", "Online", "Stale", "Offline", "Quarantined", "Retired")
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, _ []string) error {
		return a.present(ctx, c, w, func(ctx context.Context) (view, error) {
			r, err := collect(ctx, pages, func(ctx context.Context, page *operatorpb.Page) (*operatorpb.ListAgentsResponse, error) {
				return c.Agents.ListAgents(ctx, &operatorpb.ListAgentsRequest{Page: page, State: state})
			})
			return view{
				doc: r, table: func(p *render.Page) { p.Agents(r.GetAgents(), a.now()) },
				note: notes(empty(len(r.GetAgents()), "such agents"), pages.more(r.GetNextCursor())),
			}, err
		})
	})
	return cmd
}

func (a *App) agentView(ag *operatorpb.Agent) view {
	return view{doc: ag, table: func(p *render.Page) { p.Agent(ag, a.now()) }}
}

func (a *App) agentsGet() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "get NAME|ID",
		Short:             "Show an agent, its host, and what it refused",
		Example:           "  certmesh agents get web-1",
		Args:              takes("NAME|ID"),
		ValidArgsFunction: a.complete(agents),
	}
	w := watching(cmd, "agents")
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		return a.present(ctx, c, w, func(ctx context.Context) (view, error) {
			r, err := c.Agents.GetAgent(ctx, &operatorpb.GetAgentRequest{Id: args[0]})
			return a.agentView(r.GetAgent()), err
		})
	})
	return cmd
}

func (a *App) agentsRetire() *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "retire NAME|ID",
		Short: "Remove an agent for good",
		Long: `Retires an agent: its identities are revoked, its stream is ended and its open jobs are cancelled. It cannot come
back; the host has to join anew.`,
		Example:           `  certmesh agents retire web-1 --reason "host was replaced"`,
		Args:              takes("NAME|ID"),
		ValidArgsFunction: a.complete(agents),
	}
	cmd.Flags().StringVar(&reason, "reason", "", "`TEXT` for the trail and for whoever meets the agent later")
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if strings.TrimSpace(reason) == "" {
			return misuse("--reason is missing; say why the agent is retired")
		}
		return nil
	}
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		r, err := c.Agents.RetireAgent(ctx, &operatorpb.RetireAgentRequest{Id: args[0], Reason: reason})
		if err != nil {
			return err
		}
		return a.show(a.agentView(r.GetAgent()))
	})
	return cmd
}

func (a *App) agentsRelease() *cobra.Command {
	return &cobra.Command{
		Use:   "release NAME|ID",
		Short: "End an agent's quarantine",
		Long: `Releases an agent that is quarantined because two machines used its identity. First stop one of them and delete its
data directory, otherwise the quarantine returns.`,
		Example:           "  certmesh agents release web-1",
		Args:              takes("NAME|ID"),
		ValidArgsFunction: a.complete(agents),
		RunE: a.connected(func(ctx context.Context, c *client.Client, args []string) error {
			r, err := c.Agents.ReleaseAgent(ctx, &operatorpb.ReleaseAgentRequest{Id: args[0]})
			if err != nil {
				return err
			}
			return a.show(a.agentView(r.GetAgent()))
		}),
	}
}

func (a *App) agentsToken() *cobra.Command {
	return a.group(&cobra.Command{
		Use:   "token",
		Short: "Let hosts join",
		Example: `  certmesh agents token create
  certmesh agents token list`,
	}, a.agentsTokenCreate(), a.agentsTokenList(), a.agentsTokenRevoke())
}

func (a *App) agentsTokenList() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the join tokens, without their secrets",
		Long:  `Lists the join tokens, the newest first. One that has expired is kept as long as a finished job.`,
		Example: `  certmesh agents token list
  certmesh agents token list --all --format json`,
		Args: takes(),
	}
	pages := paging(cmd)
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, _ []string) error {
		r, err := collect(ctx, pages, func(ctx context.Context, page *operatorpb.Page) (*operatorpb.ListJoinTokensResponse, error) {
			return c.Agents.ListJoinTokens(ctx, &operatorpb.ListJoinTokensRequest{Page: page})
		})
		if err != nil {
			return err
		}
		return a.show(view{
			doc: r, table: func(p *render.Page) { p.Tokens(r.GetTokens(), a.now()) },
			note: notes(empty(len(r.GetTokens()), "join tokens"), pages.more(r.GetNextCursor())),
		})
	})
	return cmd
}

func (a *App) agentsTokenRevoke() *cobra.Command {
	return &cobra.Command{
		Use:   "revoke ID",
		Short: "End a join token",
		Long: `Revokes a join token: no host joins with it any more. Agents that have joined with it stay; certmesh agents retire
removes them. Once more it changes nothing.`,
		Example: "  certmesh agents token revoke jt_0123456789abcdef0123456789abcdef",
		Args:    takes("ID"),
		RunE: a.connected(func(ctx context.Context, c *client.Client, args []string) error {
			r, err := c.Agents.RevokeJoinToken(ctx, &operatorpb.RevokeJoinTokenRequest{Id: args[0]})
			if err != nil {
				return err
			}
			return a.show(view{doc: r.GetToken(), table: func(p *render.Page) { p.Tokens([]*operatorpb.JoinToken{r.GetToken()}, a.now()) }})
		}),
	}
}

func (a *App) agentsTokenCreate() *cobra.Command {
	var ttl time.Duration
	var uses int32
	var labels []string
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Mint a token by which a host joins",
		Long: `Mints a join token. It is a secret, it is shown once, and it carries the fingerprint of the server's CA, so that the
host knows whom it joins. As a table it is printed alone on standard output, what there is to say about it on standard
error.`,
		Example: `  certmesh agents token create --ttl 15m
  CERTMESH_JOIN_TOKEN=$(certmesh agents token create) certmesh-agent run
  certmesh agents token create --ttl 7d --uses 200 --label site=fra1 --label tier=web`,
		Args: takes(),
	}
	f := cmd.Flags()
	f.Var(newSpan(&ttl, time.Hour), "ttl", "how long the token is good, 1m to 30d")
	f.Int32Var(&uses, "uses", 1, "how many hosts may join by it, `1..100000`")
	f.StringArrayVar(&labels, "label", nil, "`KEY=VALUE` that agents get which join by it (repeatable)")
	req := &operatorpb.CreateJoinTokenRequest{Labels: map[string]string{}}
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if ttl < time.Minute || ttl > 30*24*time.Hour {
			return misuse("--ttl %s is not possible; a join token lives from 1m to 30d", newSpan(&ttl, ttl))
		}
		if uses < 1 || uses > 100_000 {
			return misuse("--uses %d is not a number of uses; use 1 to 100000", uses)
		}
		for _, l := range labels {
			k, v, found := strings.Cut(l, "=")
			if !found || k == "" {
				return misuse("--label %q is not a label; give KEY=VALUE", l)
			}
			if _, twice := req.Labels[k]; twice {
				return misuse("--label %s is given twice; give each key once", k)
			}
			req.Labels[k] = v
		}
		return nil
	}
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, _ []string) error {
		req.Ttl, req.MaxUses = durationpb.New(ttl), uses
		r, err := c.Agents.CreateJoinToken(ctx, req)
		if err != nil {
			return err
		}
		hosts := "one host"
		if uses > 1 {
			hosts = fmt.Sprintf("%d hosts", uses)
		}
		return a.show(view{
			doc: r, table: func(p *render.Page) { p.Say(r.GetToken()) },
			note: fmt.Sprintf("Token %s lets %s join until %s. On the host: CERTMESH_JOIN_TOKEN=<token> certmesh-agent run. It is not shown again.",
				r.GetId(), hosts, render.Time(r.GetExpiresAt(), a.now())),
		})
	})
	return cmd
}
