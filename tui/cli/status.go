package cli

import (
	"context"

	"github.com/spf13/cobra"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

func (a *App) status() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the control plane at a glance",
		Long: `Shows the node that answers, how many certificates, agents and open jobs there are in each state, how many
placements do not have what is wanted in place, and when each duty last ran.`,
		Example: `  certmesh status
  certmesh status --watch
  certmesh status --format json`,
		Args: takes(),
	}
	w := watching(cmd)
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, _ []string) error {
		return a.present(ctx, c, w, func(ctx context.Context) (view, error) {
			r, err := c.System.GetStatus(ctx, &operatorpb.GetStatusRequest{})
			return view{doc: r, table: func(p *render.Page) { p.Status(r, a.now()) }}, err
		})
	})
	return cmd
}
