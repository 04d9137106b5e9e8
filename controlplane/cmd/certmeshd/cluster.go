package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/certmesh/certmesh/controlplane/node"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func (c *command) cluster() *cobra.Command {
	cmd := &cobra.Command{Use: "cluster", Short: "Nodes: who belongs to the cluster and how it stands", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(c.clusterToken(), c.clusterStatus(), c.clusterDrain(), c.clusterRemove(), c.clusterRecover())
	return cmd
}

func (c *command) clusterToken() *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "Tokens with which nodes enrol", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	var ttl time.Duration
	create := &cobra.Command{
		Use: "create", Short: "Make a token and print it once", Args: noArgs,
		Long: `Make a token with which one node can enrol, and print it once. Put it into a file on the new node's host (mode 0600),
name the file in cluster.token_file, and start the node with the same configuration as the others: the same store, the same
key-encryption key, the same cluster.join. The first node of an empty store needs none.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if ttl <= 0 {
				return usageError{fmt.Errorf("--ttl %s: must be above zero", ttl)}
			}
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			token, err := node.CreateClusterToken(cmd.Context(), cfg, ttl)
			if err != nil {
				return err
			}
			fmt.Fprintln(c.stdout, token)
			return nil
		},
	}
	create.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it can be used")
	cmd.AddCommand(create)
	return cmd
}

func (c *command) clusterStatus() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show the cluster as the node of this data directory sees it", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			r, err := node.ClusterStatus(cmd.Context(), cfg)
			if fault.Is(err, fault.NotFound) {
				return c.nodesOfStore(cmd.Context(), cfg)
			}
			if err != nil {
				return err
			}
			c.showCluster(r)
			return nil
		},
	}
}

func (c *command) showCluster(r *clusterpb.StatusResponse) {
	leader := r.GetLeaderId()
	if leader == "" {
		leader = "nobody"
	}
	store := "answers"
	if r.GetStoreError() != "" {
		store = r.GetStoreError()
	}
	fmt.Fprintf(c.stdout, "cluster  %s\nleader   %s\nstore    %s\nthis     %s, %d agents\n\n", r.GetClusterId(), leader, store, r.GetSelf().GetId(), r.GetAgents())
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tROLE\tHEALTH\tLINK\tMESH\tRAFT\tVERSION")
	for _, m := range r.GetMembers() {
		role, health, link := "voter", "-", "no"
		if m.GetSuffrage() != clusterpb.Member_SUFFRAGE_VOTER {
			role = "non-voter"
		}
		if m.GetId() == r.GetLeaderId() {
			role = "leader"
		}
		// Only who leads judges the others.
		if r.GetLeaderId() == r.GetSelf().GetId() {
			health = "unwell"
			if m.GetHealthy() {
				health = "well"
			}
		}
		if m.GetDraining() {
			health = "draining"
		}
		switch {
		case m.GetId() == r.GetSelf().GetId():
			link = "-"
		case slices.Contains(r.GetLinked(), m.GetId()):
			link = "yes"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", m.GetId(), role, health, link, m.GetMeshAddress(), m.GetRaftAddress(), m.GetProgram())
	}
	_ = w.Flush() // standard output is gone; there is nobody to tell
	for _, note := range r.GetNotes() {
		fmt.Fprintln(c.stdout, "\n"+note)
	}
}

// nodesOfStore is what can be said without a node: who may be one.
func (c *command) nodesOfStore(ctx context.Context, cfg *node.Configuration) error {
	nodes, err := node.Nodes(ctx, cfg)
	if err != nil {
		return err
	}
	fmt.Fprintln(c.stderr, "No node runs with this data directory; this is who may be a node, from the store.")
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tENROLLED\tSTARTED\tREMOVED")
	for _, n := range nodes {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", n.ID, moment(n.EnrolledAt), moment(n.StartedAt), moment(n.RemovedAt))
	}
	return w.Flush()
}

func (c *command) clusterDrain() *cobra.Command {
	return &cobra.Command{
		Use: "drain", Short: "Move the agents of this data directory's node elsewhere and end it, as SIGTERM does", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), cfg.ShutdownTimeout()+10*time.Second)
			defer cancel()
			if err := node.DrainNode(ctx, cfg); err != nil {
				return err
			}
			fmt.Fprintln(c.stdout, "the node has ended")
			return nil
		},
	}
}

func (c *command) clusterRemove() *cobra.Command {
	return &cobra.Command{
		Use: "remove NODE", Short: "Take another node out of the cluster for good",
		Long: `Take a node out of the cluster for good: it loses its vote, and a process that still runs as this node ends within seconds.
Run it beside another node. Without a node that runs with this data directory it works on the store alone.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{fmt.Errorf("name one node; see %s --help", cmd.CommandPath())}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			if err := node.RemoveNode(cmd.Context(), cfg, args[0]); err != nil {
				return err
			}
			fmt.Fprintf(c.stdout, "%s is removed\n", args[0])
			return nil
		},
	}
}

func (c *command) clusterRecover() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use: "recover", Short: "Set this node's Raft directory aside, after a loss of the quorum or of the directory's health", Args: noArgs,
		Long: strings.TrimSpace(`
Set this node's Raft directory aside, so that the node begins anew with the command line it always had. Nothing is lost by
that: certificates, agents, jobs and CAs are in the database.

When most voters are gone for good: stop the nodes that are left, run this on each of them, set cluster.bootstrap_expect to how
many are left (1, or 3 and more), start them. When the directory of one node is damaged: run "certmeshd cluster remove" for it
beside another node first, then this, then start it with a new token.`),
		RunE: func(*cobra.Command, []string) error {
			if !yes {
				return usageError{errors.New("say --yes: the node forgets who its cluster's members are")}
			}
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			aside, err := node.RecoverRaft(cfg)
			if err != nil {
				return err
			}
			if aside == "" {
				fmt.Fprintln(c.stdout, "there was no Raft directory; the node begins anew when it starts")
				return nil
			}
			fmt.Fprintf(c.stdout, "the former Raft directory is %s; delete it when all is well\n", aside)
			return nil
		},
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "really")
	return cmd
}
