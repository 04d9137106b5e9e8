package cli

import (
	"context"

	"github.com/spf13/cobra"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

func (a *App) certsVerify() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify NAME|ID",
		Short: "Look now whether a certificate is where it was deployed",
		Long: `Has the agents look at every placement of a certificate now, and shows the jobs: what the target holds is read back, and
where it has a verify address a TLS handshake shows what it serves. Nothing is changed by it. Where something else is found
than was deployed, the job fails with what that is, and what is wanted is deployed again; with --wait the command then ends
with status 3. Where a job of the placement is under way already, that one is shown.`,
		Example: `  certmesh certs verify web
  certmesh certs verify web --wait`,
		Args:              takes("NAME|ID"),
		ValidArgsFunction: a.complete(certificates),
	}
	wait := waiting(cmd)
	cmd.PreRunE = func(*cobra.Command, []string) error { return wait.check() }
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		r, err := c.Certificates.VerifyCertificate(ctx, &operatorpb.VerifyCertificateRequest{Id: args[0], RequestId: newRequestID()})
		if err != nil {
			return err
		}
		n := newNamer(c)
		var unmet error
		if wait.on {
			got, err := c.Certificates.GetCertificate(ctx, &operatorpb.GetCertificateRequest{Id: args[0]})
			if err != nil {
				return err
			}
			_, r.Jobs, unmet = a.await(ctx, c, n, got.GetCertificate(), r.GetJobs(), wait.timeout)
		}
		if err := a.show(view{
			doc: r, table: func(p *render.Page) { p.Jobs(r.GetJobs(), n.names(ctx, ofJobs(r.GetJobs()...)), a.now()) },
		}); err != nil {
			return err
		}
		return unmet
	})
	return cmd
}
