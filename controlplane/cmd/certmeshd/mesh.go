package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/certmesh/certmesh/controlplane/node"
)

// mesh holds the commands for the CA of agents and nodes.
func (c *command) mesh() *cobra.Command {
	cmd := &cobra.Command{Use: "mesh", Short: "The CA that agents and nodes know one another by", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(c.rollover())
	return cmd
}

func (c *command) rollover() *cobra.Command {
	cmd := &cobra.Command{Use: "rollover", Short: "Change the mesh CA while everything runs", Args: noArgs,
		Long: `Change the mesh CA while everything runs, next to the store: start, activate, finish. Nodes notice each step within
seconds and tell their agents. Every step may be taken again after it was interrupted; status says what comes next.
docs/operations.md tells it as a whole.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	var activate, finish int
	step := func(use, short, long string, run func(context.Context, *node.Configuration) (node.RolloverProgress, error)) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Long: long, Args: noArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			p, err := run(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			return showRollover(c.stdout, p, cfg.OperatorAddress())
		}}
	}
	activating := step("activate", "Have the new CA sign from now on",
		`Have the new CA sign from now on. Nodes take identities of it at once, agents within half an hour. Refused while agents
have not acknowledged the new root; those that are off come back by what the former root signed for the new one, as long
as the rollover is not finished.`,
		func(ctx context.Context, cfg *node.Configuration) (node.RolloverProgress, error) {
			return node.ActivateRollover(ctx, cfg, activate)
		})
	activating.Flags().IntVar(&activate, "force", 0, "go on although up to so many agents have not acknowledged the new root")
	finishing := step("finish", "Drop the former root and destroy its key",
		`Drop the former root and destroy its key. Refused while an agent that may come back has not connected with an identity of
the new CA, and while join tokens that can be used name the former root. It cannot be undone.`,
		func(ctx context.Context, cfg *node.Configuration) (node.RolloverProgress, error) {
			return node.FinishRollover(ctx, cfg, finish)
		})
	finishing.Flags().IntVar(&finish, "force", 0, "go on although up to so many agents and join tokens are left behind")
	cmd.AddCommand(
		step("start", "Make a new mesh CA, whose root is trusted beside the present one", "", node.StartRollover),
		step("status", "Show how far it has come, and who it waits for", "", node.RolloverStatus),
		activating, finishing,
		step("abort", "Take back a rollover that is not activated", "", node.AbortRollover),
	)
	return cmd
}

func fingerprint(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// showRollover says where things stand and what comes next.
func showRollover(out io.Writer, p node.RolloverProgress, server string) error {
	r, m := p.Rollover, p.Mesh
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	phase := string(r.Phase)
	switch {
	case phase == "":
		phase = "none"
	case !r.EndedAt.IsZero():
		phase += " at " + moment(r.EndedAt)
	case !r.ActivatedAt.IsZero():
		phase += " at " + moment(r.ActivatedAt)
	default:
		phase += " at " + moment(r.StartedAt)
	}
	fmt.Fprintf(w, "rollover\t%s\n", phase)
	fmt.Fprintf(w, "trust bundle\tversion %d\n", m.Bundle)
	for i, root := range m.Roots {
		what := "trusted"
		if i == 0 {
			what = "signs"
		}
		fmt.Fprintf(w, "root\t%s, %s, until %s\n", fingerprint(root), what, node.RootUntil(root).UTC().Format(time.DateOnly))
	}
	if r.Phase.UnderWay() {
		fmt.Fprintf(w, "agents\t%d of %d are ready for the next step\n", p.Agents-p.Lagging, p.Agents)
		if !r.ActivatedAt.IsZero() {
			fmt.Fprintf(w, "identities\t%d valid ones are of the former CA\n", p.FormerIdentities)
		}
		fmt.Fprintf(w, "join tokens\t%d that can be used name the former root\n", p.TokensTotal)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	listLags(out, p)
	listTokens(out, p)
	nextStep(out, p, server)
	return nil
}

func listLags(out io.Writer, p node.RolloverProgress) {
	if len(p.Lags) == 0 {
		return
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nAGENT\tSTATE\tLAST SEEN\tWAITS FOR")
	for _, l := range p.Lags {
		why := "an identity of the new CA"
		switch {
		case !l.Acknowledged && l.Refusal != "":
			why = "the new root, which it refuses: " + l.Refusal
		case !l.Acknowledged:
			why = "the new root"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", l.Name, l.State, moment(l.LastSeen), why)
	}
	_ = w.Flush() // standard output is gone; there is nobody to tell
	if more := p.Lagging - len(p.Lags); more > 0 {
		fmt.Fprintf(out, "and %d more\n", more)
	}
}

func listTokens(out io.Writer, p node.RolloverProgress) {
	if len(p.Tokens) == 0 {
		return
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nJOIN TOKEN\tCREATED BY\tEXPIRES\tUSES LEFT")
	for _, t := range p.Tokens {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\n", t.ID, t.CreatedBy, moment(t.ExpiresAt), t.MaxUses-t.Uses)
	}
	_ = w.Flush() // standard output is gone; there is nobody to tell
	if more := p.TokensTotal - len(p.Tokens); more > 0 {
		fmt.Fprintf(out, "and %d more\n", more)
	}
}

// nextStep is for a person; what a step needs is refused by the step itself.
func nextStep(out io.Writer, p node.RolloverProgress, server string) {
	r := p.Rollover
	login := ""
	if len(p.Mesh.Roots) > 0 {
		login = fmt.Sprintf("certmesh login --server %s --ca-fingerprint %s", server, fingerprint(p.Mesh.Roots[0]))
	}
	switch {
	case r.Phase.UnderWay() && r.ActivatedAt.IsZero():
		if !node.Vouched(p) {
			fmt.Fprintln(out, "\nThe present root allows no CA below it, so it cannot vouch for the next one: agents that do not acknowledge the new root have to join again after activate.")
		}
		fmt.Fprintln(out, "\nNext: certmeshd mesh rollover activate, when all agents are ready.")
	case r.Phase.UnderWay():
		fmt.Fprintf(out, "\nNext: operators log in again, before the former root is dropped: %s\nThen: certmeshd mesh rollover finish, when all agents are ready.\n", login)
	case !r.EndedAt.IsZero() && !r.ActivatedAt.IsZero():
		fmt.Fprintf(out, "\nThe former root is not trusted any more. Who logged in by it logs in again: %s\n", login)
	}
}
