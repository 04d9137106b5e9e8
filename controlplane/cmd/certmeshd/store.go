package main

import (
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/certmesh/certmesh/controlplane/node"
)

// store holds the commands that move a store as a whole.
func (c *command) store() *cobra.Command {
	cmd := &cobra.Command{Use: "store", Short: "Back up the store, or move it to another database", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(c.storeBackup(), c.storeCopy())
	return cmd
}

func (c *command) storeBackup() *cobra.Command {
	var to string
	cmd := &cobra.Command{
		Use: "backup", Short: "Copy the SQLite store into a new file while the node runs", Args: noArgs,
		Long: `Copy the SQLite store into a new file, whether or not a node uses it. The copy is the store as it was at one moment, with
mode 0600; it appears under its name only when it is complete, checked and on the disk. The key-encryption key is not in
it: keep that apart. Servers have tools of their own: pg_dump, BACKUP DATABASE.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if to == "" {
				return usageError{errors.New("--to is needed: the new file, e.g. --to /backup/certmesh-$(date +%F).db")}
			}
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			made, err := node.BackupStore(cmd.Context(), cfg, to)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.stdout, "%s: %d bytes, schema version %d\n", made.Path, made.Bytes, made.Schema)
			fmt.Fprintln(c.stderr, "The key-encryption key is not in it; keep a copy of that elsewhere.")
			return nil
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "the new file (required)")
	return cmd
}

func (c *command) storeCopy() *cobra.Command {
	var from, to string
	cmd := &cobra.Command{
		Use: "copy", Short: "Move the store to another database", Args: noArgs,
		Long: `Copy every row of a store into an empty database, of another kind or the same, and compare each. No node may run on
either meanwhile. Killed, it goes on where it stopped when it is run again with the same --from and --to; nodes refuse a
database that is not complete. Afterwards start the nodes with store.dsn set to the new one, with the same key-encryption
key and data directories, and put the old one away: it must never be used beside the new one.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if from == "" || to == "" {
				return usageError{errors.New("--from and --to are needed, e.g. --from sqlite:/var/lib/certmesh/certmesh.db --to postgres://certmesh@db/certmesh")}
			}
			cfg, err := c.load(node.Admin)
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "TABLE\tROWS\tCOPIED BEFORE\tCOPYING\tCOMPARING")
			var rows, fresh int64
			var copying time.Duration
			err = node.CopyStore(cmd.Context(), cfg, from, to, func(t node.Copied) {
				fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%s\n", t.Table, t.Rows, t.Before, t.Copying.Round(time.Millisecond), t.Verifying.Round(time.Millisecond))
				rows, fresh, copying = rows+t.Rows, fresh+t.Rows-t.Before, copying+t.Copying
			})
			if err != nil {
				return err
			}
			_ = w.Flush() // standard output is gone; there is nobody to tell
			fmt.Fprintf(c.stdout, "%d rows are the same on both sides; %.0f rows a second were copied\n", rows, float64(fresh)/max(copying.Seconds(), 0.001))
			fmt.Fprintln(c.stderr, "Start the nodes on the new store now, and put the old one away.")
			return nil
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "DSN of the store (required)")
	cmd.Flags().StringVar(&to, "to", "", "DSN of the empty database (required)")
	return cmd
}
