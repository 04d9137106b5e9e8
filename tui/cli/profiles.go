package cli

import (
	"context"

	"github.com/spf13/cobra"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

func (a *App) profiles() *cobra.Command {
	return a.group(&cobra.Command{
		Use:     "profiles",
		Short:   "Show what may be issued",
		Example: "  certmesh profiles list",
	}, a.profilesList())
}

func (a *App) profilesList() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List the profiles with their keys, purposes and lifetimes",
		Example: "  certmesh profiles list",
		Args:    takes(),
	}
	pages, w := paging(cmd), watching(cmd)
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, _ []string) error {
		return a.present(ctx, c, w, func(ctx context.Context) (view, error) {
			r, err := collect(ctx, pages, func(ctx context.Context, page *operatorpb.Page) (*operatorpb.ListProfilesResponse, error) {
				return c.Issuers.ListProfiles(ctx, &operatorpb.ListProfilesRequest{Page: page})
			})
			return view{
				doc: r, table: func(p *render.Page) { p.Profiles(r.GetProfiles()) },
				note: notes(empty(len(r.GetProfiles()), "profiles"), pages.more(r.GetNextCursor())),
			}, err
		})
	})
	return cmd
}
