package cli

import (
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/certmesh/certmesh/tui/render"
)

func (a *App) version() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version of this tool",
		Long:    `Prints the version of this tool; "certmesh status" has the server's.`,
		Example: "  certmesh version",
		Args:    takes(),
		RunE: func(*cobra.Command, []string) error {
			doc := &structpb.Struct{Fields: map[string]*structpb.Value{"version": structpb.NewStringValue(a.Version)}}
			return a.show(view{doc: doc, table: func(p *render.Page) { p.Say("certmesh " + a.Version) }})
		},
	}
}
