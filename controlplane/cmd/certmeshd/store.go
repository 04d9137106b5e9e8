package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/certmesh/certmesh/controlplane/node"
)

// store holds the commands that move a store as a whole.
func (c *command) store() *cobra.Command {
	cmd := &cobra.Command{Use: "store", Short: "Back up the store, or move it to another database", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(c.storeBackup())
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
