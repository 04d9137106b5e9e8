package cli

import (
	"context"

	"github.com/spf13/cobra"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

func (a *App) certs() *cobra.Command {
	return a.group(&cobra.Command{
		Use:   "certs",
		Short: "Order and look after certificates",
		Example: `  certmesh certs list
  certmesh certs create web --dns www.example.com --issuer corp --target web-1-nginx --wait
  certmesh certs why web`,
	}, a.certsList(), a.certsGet(), a.certsCreate(), a.certsRenew(), a.certsDeploy(), a.certsVerify(), a.certsRevoke(), a.certsVersions(), a.certsWhy())
}

var certificateStatuses = []string{"Pending", "Active", "Expiring", "Expired", "RenewalInProgress", "Failed", "Revoked", "Archived"}

func (a *App) certsList() *cobra.Command {
	req := &operatorpb.ListCertificatesRequest{}
	var before, after string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List certificates",
		Long: `Lists certificates with two facts about each: STATUS (Active says issued) and IN PLACE, how many of its placements
serve what is wanted or, where they have no verify address and are not probed, hold it.

Every list is read from an index, so that it is as fast among a million certificates as among ten. What no index serves,
most filters together, is refused with what can be asked for; --format json and a filter of your own do the rest.`,
		Example: `  certmesh certs list --watch
  certmesh certs list --status Failed
  certmesh certs list --expires-before 30d
  certmesh certs list --owner shop --sort -created
  certmesh certs list --name-prefix web- --all --format json`,
		Args: takes(),
	}
	pages, w := paging(cmd), watching(cmd, "certificates")
	f := cmd.Flags()
	f.StringVar(&req.Status, "status", "", "only certificates in this `STATUS`")
	f.StringVar(&req.IssuerId, "issuer", "", "only certificates of this issuer, by `NAME|ID`")
	f.StringVar(&req.ProfileId, "profile", "", "only certificates of this profile, by `NAME|ID`")
	f.StringVar(&req.AgentId, "agent", "", "only certificates placed at this agent, by `NAME|ID`")
	f.StringVar(&req.Owner, "owner", "", "only certificates of this `OWNER`")
	f.StringVar(&req.NamePrefix, "name-prefix", "", "only certificates whose name begins with `TEXT`")
	f.StringVar(&req.Sort, "sort", "", "`ORDER`: created, name or not_after, with - before it the other way round")
	f.StringVar(&before, "expires-before", "", "only issued ones that expire before this `TIME`: 30d from now, 2027-01-31 or 2027-01-31T12:00:00Z")
	f.StringVar(&after, "expires-after", "", "only issued ones that do not expire before this `TIME`")
	words(cmd, "status", certificateStatuses...)
	words(cmd, "sort", "created", "-created", "name", "-name", "not_after", "-not_after")
	a.completeFlag(cmd, "issuer", issuers)
	a.completeFlag(cmd, "profile", profiles)
	a.completeFlag(cmd, "agent", agents)
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, _ []string) error {
		if err := ids(ctx, c, map[*string]kind{&req.IssuerId: issuers, &req.ProfileId: profiles, &req.AgentId: agents}); err != nil {
			return err
		}
		n := newNamer(c)
		return a.present(ctx, c, w, func(ctx context.Context) (view, error) {
			var err error
			if req.ExpiresBefore, err = moment("--expires-before", before, a.now()); err != nil {
				return view{}, err
			}
			if req.ExpiresAfter, err = moment("--expires-after", after, a.now()); err != nil {
				return view{}, err
			}
			r, err := collect(ctx, pages, func(ctx context.Context, page *operatorpb.Page) (*operatorpb.ListCertificatesResponse, error) {
				req.Page = page
				return c.Certificates.ListCertificates(ctx, req)
			})
			if err != nil {
				return view{}, err
			}
			list := r.GetCertificates()
			return view{
				doc: r, table: func(p *render.Page) { p.Certificates(list, n.names(ctx, ofCertificates(list...)), a.now()) },
				note: notes(empty(len(list), "such certificates"), pages.more(r.GetNextCursor())),
			}, nil
		})
	})
	return cmd
}

// ofCertificates are the ids that certificates are shown with.
func ofCertificates(list ...*operatorpb.Certificate) map[kind][]string {
	out := map[kind][]string{}
	for _, c := range list {
		out[issuers] = append(out[issuers], c.GetIssuerId())
		out[profiles] = append(out[profiles], c.GetProfileId())
		for _, l := range c.GetLeaves() {
			out[agents] = append(out[agents], l.GetAgentId())
		}
		for _, p := range c.GetPlacements() {
			out[agents] = append(out[agents], p.GetAgentId())
		}
	}
	return out
}

func (a *App) certificateView(ctx context.Context, n *namer, crt *operatorpb.Certificate) view {
	return view{doc: crt, table: func(p *render.Page) { p.Certificate(crt, n.names(ctx, ofCertificates(crt)), a.now()) }}
}

func (a *App) certsGet() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get NAME|ID",
		Short: "Show a certificate, its leaves and its placements",
		Example: `  certmesh certs get web
  certmesh certs get web --watch
  certmesh certs get web --format json | jq .placements`,
		Args:              takes("NAME|ID"),
		ValidArgsFunction: a.complete(certificates),
	}
	w := watching(cmd, "certificates")
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		n := newNamer(c)
		return a.present(ctx, c, w, func(ctx context.Context) (view, error) {
			r, err := c.Certificates.GetCertificate(ctx, &operatorpb.GetCertificateRequest{Id: args[0]})
			return a.certificateView(ctx, n, r.GetCertificate()), err
		})
	})
	return cmd
}

func (a *App) certsRevoke() *cobra.Command {
	req := &operatorpb.RevokeCertificateRequest{}
	cmd := &cobra.Command{
		Use:   "revoke NAME|ID",
		Short: "Revoke what was issued of a certificate",
		Long: `Revokes what is issued of a certificate; the CRL carries it within seconds, and the certificate is not renewed any
more. To serve on, order it anew under another name.`,
		Example:           `  certmesh certs revoke web --reason keyCompromise`,
		Args:              takes("NAME|ID"),
		ValidArgsFunction: a.complete(certificates),
	}
	cmd.Flags().StringVar(&req.Reason, "reason", "", "RFC 5280 `REASON`, e.g. superseded (default: unspecified)")
	words(cmd, "reason", "unspecified", "keyCompromise", "caCompromise", "affiliationChanged", "superseded", "cessationOfOperation",
		"certificateHold", "privilegeWithdrawn")
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		req.Id = args[0]
		r, err := c.Certificates.RevokeCertificate(ctx, req)
		if err != nil {
			return err
		}
		return a.show(view{doc: r, table: func(p *render.Page) { p.Revoked(r.GetCertificate(), r.GetSerials()) }})
	})
	return cmd
}

func (a *App) certsVersions() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "versions NAME|ID",
		Short: "List what was issued of a certificate",
		Long:  `Lists every leaf that was signed for a certificate. --format json has the PEM of each with its chain.`,
		Example: `  certmesh certs versions web
  certmesh certs versions web --format json | jq -r '.versions[0].pem'`,
		Args:              takes("NAME|ID"),
		ValidArgsFunction: a.complete(certificates),
	}
	pages := paging(cmd)
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		id, err := certificates.id(ctx, c, args[0])
		if err != nil {
			return err
		}
		r, err := collect(ctx, pages, func(ctx context.Context, page *operatorpb.Page) (*operatorpb.ListVersionsResponse, error) {
			return c.Certificates.ListVersions(ctx, &operatorpb.ListVersionsRequest{CertificateId: id, Page: page})
		})
		if err != nil {
			return err
		}
		of := map[kind][]string{}
		for _, v := range r.GetVersions() {
			of[agents] = append(of[agents], v.GetAgentId())
		}
		return a.show(view{
			doc: r, table: func(p *render.Page) { p.Versions(r.GetVersions(), newNamer(c).names(ctx, of), a.now()) },
			note: notes(empty(len(r.GetVersions()), "versions yet"), pages.more(r.GetNextCursor())),
		})
	})
	return cmd
}

func (a *App) certsWhy() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "why NAME|ID",
		Short: "Explain why a certificate is or is not due, and what its placements wait for",
		Example: `  certmesh certs why web
  certmesh certs why web --watch`,
		Args:              takes("NAME|ID"),
		ValidArgsFunction: a.complete(certificates),
	}
	// What a placement waits for is often a job, or an agent that is away.
	w := watching(cmd, "certificates", "jobs", "agents", "targets")
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		n := newNamer(c)
		return a.present(ctx, c, w, func(ctx context.Context) (view, error) {
			r, err := c.Certificates.ExplainCertificate(ctx, &operatorpb.ExplainCertificateRequest{Id: args[0]})
			if err != nil {
				return view{}, err
			}
			of := map[kind][]string{}
			for _, l := range r.GetLeaves() {
				of[agents] = append(of[agents], l.GetAgentId())
			}
			return view{doc: r, table: func(p *render.Page) { p.Why(r, n.names(ctx, of), a.now()) }}, nil
		})
	})
	return cmd
}
