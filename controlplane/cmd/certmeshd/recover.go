package main

import (
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/certmesh/certmesh/controlplane/node"
)

// recover holds what is to be done after a restore from backup.
func (c *command) recover() *cobra.Command {
	var afterRestore bool
	var crls []string
	cmd := &cobra.Command{Use: "recover", Short: "Go on with a database that was restored from a backup", Args: noArgs,
		Long: `Make a database that was restored from a backup safe to go on with, before the first node starts on it. Whatever was given
out after the backup and is not in it is left behind: epochs, attempts, generations, versions of targets and numbers of CRLs
are raised above all that may have been given out, and nothing that was to be signed before is signed. Agents then report
the leaves they hold, and what the backup does not know is taken in again. No node may run. Running it again does no harm.

What was revoked after the backup only the CRLs say that were published since: give the newest of each issuer, as relying
parties or caches have it, with --crl, and it is revoked again.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !afterRestore {
				return usageError{errors.New("--after-restore is needed: only a database that was restored from a backup is recovered; see certmeshd recover --help")}
			}
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			r, back, err := node.RecoverAfterRestore(cmd.Context(), cfg, crls)
			if err != nil {
				return err
			}
			c.recovered(r, back)
			return nil
		},
	}
	cmd.Flags().BoolVar(&afterRestore, "after-restore", false, "the database was restored from a backup (required)")
	cmd.Flags().StringArrayVar(&crls, "crl", nil, "file with a CRL that was published after the backup, DER or PEM; may be repeated")
	cmd.AddCommand(c.recoverLeaves(), c.recoverRevoke())
	return cmd
}

func (c *command) recovered(r node.Recovery, back node.Relisted) {
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "recovery\t%d\n", r.Generation)
	for _, l := range []struct {
		what string
		n    int64
	}{{"duties raised", r.Duties}, {"sessions raised", r.Sessions}, {"nodes raised", r.Nodes}, {"leaves raised", r.Leaves},
		{"open jobs begun anew", r.Jobs}, {"intents abandoned", r.Abandoned}, {"targets raised", r.Targets}, {"CRLs to build anew", r.CRLs}} {
		fmt.Fprintf(w, "%s\t%d\n", l.what, l.n)
	}
	fmt.Fprintf(w, "certificates revoked again\t%d\n", len(back.Certificates))
	fmt.Fprintf(w, "further serials revoked again\t%d\n", back.Versions+back.Unknown)
	_ = w.Flush() // standard output is gone; there is nobody to tell
	for _, name := range back.Certificates {
		fmt.Fprintf(c.stdout, "revoked again: %s\n", name)
	}
	fmt.Fprintf(c.stderr, `Start the nodes now. What was changed after the backup is as it was before; look through it:
  %d API keys and %d join tokens are good, some may have been revoked or used: certmeshd apikey list, certmesh agents token list
  %d agents, %d identities, %d nodes and %d cluster tokens are trusted, some may have been retired, revoked or removed
  certificates that were revoked after the backup and are on no CRL given by --crl are not revoked any more, and the next CRL
  lacks them: revoke them again
  certificates that were ordered after the backup are unknown: order them again; what agents still hold of them is listed by
  certmeshd recover leaves, once the agents have connected, and revoked by certmeshd recover revoke
`, r.Trusted.APIKeys, r.Trusted.JoinTokens, r.Trusted.Agents, r.Trusted.Identities, r.Trusted.Nodes, r.Trusted.ClusterTokens)
}

func (c *command) recoverLeaves() *cobra.Command {
	return &cobra.Command{
		Use: "leaves", Short: "List the leaves that agents hold and no certificate is known for", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			all, err := node.FoundLeaves(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "SERIAL\tISSUER\tAGENT\tCERTIFICATE\tEXPIRES\tREVOKED\tWHY")
			for _, l := range all {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.Serial, l.IssuerID, l.AgentID, l.CertificateID, moment(l.NotAfter), moment(l.RevokedAt), l.Reason)
			}
			return w.Flush()
		},
	}
}

func (c *command) recoverRevoke() *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use: "revoke SERIAL", Short: "Revoke a leaf that certmeshd recover leaves lists",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{fmt.Errorf("name one serial; see %s --help", cmd.CommandPath())}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			if err := node.RevokeFoundLeaf(cmd.Context(), cfg, args[0], reason); err != nil {
				return err
			}
			fmt.Fprintf(c.stdout, "%s is revoked; the issuer's next CRL lists it\n", args[0])
			fmt.Fprintln(c.stderr, "A CRL is built with the next certificate that is revoked, when a node starts, and every scheduler.crl_generation_interval.")
			return nil
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "unspecified", "why, by its name in RFC 5280, e.g. keyCompromise")
	return cmd
}
