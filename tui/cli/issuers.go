package cli

import (
	"context"

	"github.com/spf13/cobra"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

func (a *App) issuers() *cobra.Command {
	return a.group(&cobra.Command{
		Use:   "issuers",
		Short: "Keep the CAs that sign certificates",
		Example: `  certmesh issuers list
  certmesh issuers create corp`,
	}, a.issuersList(), a.issuersGet(), a.issuersCreate())
}

func (a *App) issuersList() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List the issuers",
		Example: "  certmesh issuers list",
		Args:    takes(),
	}
	pages, w := paging(cmd), watching(cmd, "issuers")
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, _ []string) error {
		return a.present(ctx, c, w, func(ctx context.Context) (view, error) {
			r, err := collect(ctx, pages, func(ctx context.Context, page *operatorpb.Page) (*operatorpb.ListIssuersResponse, error) {
				return c.Issuers.ListIssuers(ctx, &operatorpb.ListIssuersRequest{Page: page})
			})
			return view{
				doc: r, table: func(p *render.Page) { p.Issuers(r.GetIssuers(), a.now()) },
				note: notes(empty(len(r.GetIssuers()), "issuers"), pages.more(r.GetNextCursor())),
			}, err
		})
	})
	return cmd
}

func (a *App) issuersGet() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get NAME|ID",
		Short: "Show an issuer and its chain",
		Example: `  certmesh issuers get corp
  certmesh issuers get corp --format json | jq -r .chain_pem`,
		Args:              takes("NAME|ID"),
		ValidArgsFunction: a.complete(issuers),
	}
	w := watching(cmd, "issuers")
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		return a.present(ctx, c, w, func(ctx context.Context) (view, error) {
			r, err := c.Issuers.GetIssuer(ctx, &operatorpb.GetIssuerRequest{Id: args[0]})
			return a.issuerView(r.GetIssuer()), err
		})
	})
	return cmd
}

func (a *App) issuersCreate() *cobra.Command {
	var certFile, keyFile string
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Create a local CA",
		Long: `Creates a local CA: a self-signed root and the intermediate that signs, both with new keys; or, from
--ca-cert and --ca-key, a CA below one that you have. Keys are sealed in the control plane and never leave it.`,
		Example: `  certmesh issuers create corp
  certmesh issuers create corp --cn "Example Corp Root CA" --key-algorithm ECDSA-P384
  certmesh issuers create corp-sub --ca-cert sub-ca.pem --ca-key sub-ca.key`,
		Args: takes("NAME"),
	}
	req := &operatorpb.CreateIssuerRequest{Kind: "local"}
	f := cmd.Flags()
	f.StringVar(&req.CommonName, "cn", "", "common name of the root (default: \"NAME Root CA\")")
	f.StringVar(&req.KeyAlgorithm, "key-algorithm", "", "`ALGORITHM` of the CA's keys: ECDSA-P256 (default), ECDSA-P384, RSA-3072 or RSA-4096")
	f.StringVar(&certFile, "ca-cert", "", "PEM `FILE` with the CA's certificate and then its issuers")
	f.StringVar(&keyFile, "ca-key", "", "PEM `FILE` with the CA's key, not encrypted")
	words(cmd, "key-algorithm", "ECDSA-P256", "ECDSA-P384", "RSA-3072", "RSA-4096")
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if (certFile == "") != (keyFile == "") {
			return misuse("a CA from files needs its certificate and its key; give both --ca-cert and --ca-key")
		}
		if certFile != "" {
			var err error
			if req.CaCertificatePem, err = readFile("--ca-cert", certFile); err != nil {
				return err
			}
			if req.CaKeyPem, err = readFile("--ca-key", keyFile); err != nil {
				return err
			}
		}
		return nil
	}
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		req.Name = args[0]
		r, err := c.Issuers.CreateIssuer(ctx, req)
		if err != nil {
			return err
		}
		return a.show(a.issuerView(r.GetIssuer()))
	})
	return cmd
}

func (a *App) issuerView(i *operatorpb.Issuer) view {
	return view{doc: i, table: func(p *render.Page) { p.Issuer(i, a.now()) }}
}
