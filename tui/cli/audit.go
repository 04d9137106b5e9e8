package cli

import (
	"context"

	"github.com/spf13/cobra"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

func (a *App) audit() *cobra.Command {
	return a.group(&cobra.Command{
		Use:     "audit",
		Short:   "Read the trail of what was done by whom",
		Example: "  certmesh audit list",
	}, a.auditList())
}

func (a *App) auditList() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List what was done, the newest first",
		Long: `Lists the audit trail: who did what to which resource, from where, and how it ended. Refused and failed calls
are in it too.`,
		Example: `  certmesh audit list
  certmesh audit list --resource certificate/cert_0123456789abcdef0123456789abcdef
  certmesh audit list --all --format json`,
		Args: takes(),
	}
	pages, w := paging(cmd), watching(cmd)
	var resource string
	cmd.Flags().StringVar(&resource, "resource", "", "only what was done to this `KIND/ID`")
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, _ []string) error {
		return a.present(ctx, c, w, func(ctx context.Context) (view, error) {
			r, err := collect(ctx, pages, func(ctx context.Context, page *operatorpb.Page) (*operatorpb.ListAuditEventsResponse, error) {
				return c.System.ListAuditEvents(ctx, &operatorpb.ListAuditEventsRequest{Page: page, Resource: resource})
			})
			return view{
				doc: r, table: func(p *render.Page) { p.Audit(r.GetEvents()) },
				note: notes(empty(len(r.GetEvents()), "such events"), pages.more(r.GetNextCursor())),
			}, err
		})
	})
	return cmd
}
