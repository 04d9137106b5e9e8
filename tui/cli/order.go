package cli

import (
	"context"
	"crypto/rand"
	"net/netip"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

// waitFlags are --wait and --wait-timeout.
type waitFlags struct {
	on      bool
	timeout time.Duration
}

func waiting(cmd *cobra.Command) *waitFlags {
	w := &waitFlags{}
	cmd.Flags().BoolVar(&w.on, "wait", false, "wait until every placement serves it, or holds it where it is not probed")
	cmd.Flags().Var(newSpan(&w.timeout, time.Minute), "wait-timeout", "how long --wait waits before it ends with status 3")
	return w
}

func (w *waitFlags) check() error {
	if w.timeout <= 0 {
		return misuse("--wait-timeout %s leaves no time; give a positive duration, e.g. 60s", w.timeout)
	}
	return nil
}

func (a *App) certsCreate() *cobra.Command {
	var (
		names   operatorpb.Names
		req     = &operatorpb.CreateCertificateRequest{Names: &names}
		windows []string
		alerts  []int
		policy  operatorpb.RenewalPolicy
	)
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Order a certificate and place it at targets",
		Long: `Orders a certificate: the agent of each target makes a key that never leaves its host, the issuer signs, the agent
installs it, reads it back and, where the target has a verify address, verifies by a handshake that it is served.
NAME is what the certificate is called here; the names in it are given by --dns, --ip, --email, --uri and --cn.

With --wait the command ends when every placement serves the certificate, or holds it where it is not probed; progress is on
standard error. With --request-id the order is safe to repeat: the same order under the same id answers the same
certificate.`,
		Example: `  certmesh certs create web --dns www.example.com --dns example.com --issuer corp --target web-1-nginx --wait
  certmesh certs create db --dns db.internal --ip 10.0.0.5 --issuer corp --target db-1 --target db-2 --owner dba
  certmesh certs create pay --dns pay.example.com --issuer corp --target pay-nginx --require-approval --window "Mon-Fri 02:00-05:00"
  certmesh certs create job --dns job.internal --issuer corp --profile short-lived --target job-file --renew-fraction 0.5`,
		Args: takes("NAME"),
	}
	f := cmd.Flags()
	f.StringArrayVar(&names.Dns, "dns", nil, "DNS `NAME` (repeatable)")
	f.StringArrayVar(&names.Ip, "ip", nil, "IP `ADDRESS` (repeatable)")
	f.StringArrayVar(&names.Email, "email", nil, "email `ADDRESS` (repeatable)")
	f.StringArrayVar(&names.Uri, "uri", nil, "`URI` (repeatable)")
	f.StringVar(&names.CommonName, "cn", "", "common `NAME` of the subject")
	f.StringVar(&req.Issuer, "issuer", "", "who signs, by `NAME|ID`")
	f.StringVar(&req.Profile, "profile", "tls-server", "what may be issued, by `NAME|ID`")
	f.StringArrayVar(&req.Targets, "target", nil, "where it is installed, by `NAME|ID` (repeatable)")
	f.StringVar(&req.Owner, "owner", "", "`WHO` answers for it")
	f.Float64Var(&policy.Fraction, "renew-fraction", 0, "renew after this `FRACTION` of the lifetime, between 0 and 1 (default: 2/3)")
	f.StringArrayVar(&windows, "window", nil, "renew by itself only within this weekly `SPAN` in UTC, e.g. \"Mon-Fri 02:00-05:00\" (repeatable; default: always)")
	f.IntSliceVar(&alerts, "alert-days", nil, "`DAYS` before its end at which it counts as Expiring, e.g. 30,14,7: the greatest below its lifetime")
	f.BoolVar(&policy.Disabled, "no-renewal", false, "do not renew it by itself")
	f.BoolVar(&policy.RequireApproval, "require-approval", false, "issuance and each renewal wait until somebody else approves (certmesh jobs approve)")
	f.StringVar(&req.RequestId, "request-id", "", "`ID` that makes the order safe to repeat (default: a new one)")
	wait := waiting(cmd)
	a.completeFlag(cmd, "issuer", issuers)
	a.completeFlag(cmd, "profile", profiles)
	a.completeFlag(cmd, "target", targets)
	cmd.PreRunE = func(*cobra.Command, []string) error {
		switch {
		case req.GetIssuer() == "":
			return misuse("--issuer is missing; name who signs (certmesh issuers list)")
		case len(req.GetTargets()) == 0:
			return misuse("--target is missing; name where it is installed (certmesh targets list)")
		case len(names.GetDns())+len(names.GetIp())+len(names.GetEmail())+len(names.GetUri()) == 0 && names.GetCommonName() == "":
			return misuse("the certificate has no names; give --dns, --ip, --email, --uri or --cn")
		case f.Changed("renew-fraction") && !(policy.GetFraction() > 0 && policy.GetFraction() < 1):
			return misuse("--renew-fraction %v is not a fraction of the lifetime; give a number between 0 and 1, e.g. 0.66", policy.GetFraction())
		}
		for _, text := range windows {
			w, ok := parseWindow(text)
			if !ok {
				return misuse("--window %q is not a weekly span; give days and UTC times, e.g. \"Mon-Fri 02:00-05:00\" or \"Sat,Sun 22:00-04:00\"", text)
			}
			policy.Windows = append(policy.Windows, w)
		}
		for _, d := range alerts {
			if d < 1 || d > maxAlertDays {
				return misuse("--alert-days %d is not a number of days; give 1 to %d, e.g. 30,14,7", d, maxAlertDays)
			}
			policy.AlertThresholdsDays = append(policy.AlertThresholdsDays, int32(d))
		}
		for _, ip := range names.GetIp() {
			if _, err := netip.ParseAddr(ip); err != nil {
				return misuse("--ip %q is not an IP address; give one such as 10.0.0.5 or 2001:db8::5", ip)
			}
		}
		return wait.check()
	}
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		req.Name = args[0]
		if !proto.Equal(&policy, &operatorpb.RenewalPolicy{}) {
			req.Policy = &policy
		}
		if req.GetRequestId() == "" {
			req.RequestId = newRequestID()
		}
		r, err := c.Certificates.CreateCertificate(ctx, req)
		if err != nil {
			return err
		}
		crt, n := r.GetCertificate(), newNamer(c)
		var unmet error
		if wait.on {
			crt, _, unmet = a.await(ctx, c, n, crt, r.GetJobs(), wait.timeout)
		}
		if err := a.show(a.certificateView(ctx, n, crt)); err != nil {
			return err
		}
		return unmet
	})
	return cmd
}

func (a *App) certsRenew() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "renew NAME|ID",
		Short: "Renew a certificate now",
		Long: `Orders the renewal of every leaf of a certificate now, whatever its policy says, and shows the jobs. Where a renewal
is under way already, that one is shown.`,
		Example: `  certmesh certs renew web
  certmesh certs renew web --wait --wait-timeout 2m`,
		Args:              takes("NAME|ID"),
		ValidArgsFunction: a.complete(certificates),
	}
	wait := waiting(cmd)
	cmd.PreRunE = func(*cobra.Command, []string) error { return wait.check() }
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		r, err := c.Certificates.RenewCertificate(ctx, &operatorpb.RenewCertificateRequest{Id: args[0], RequestId: newRequestID()})
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
			note: empty(len(r.GetJobs()), "jobs; nothing of this certificate is placed anywhere"),
		}); err != nil {
			return err
		}
		return unmet
	})
	return cmd
}

func (a *App) certsDeploy() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "deploy NAME|ID",
		Short: "Deploy what is issued of a certificate again now",
		Long: `Orders the deployment of what is issued at every placement of a certificate now, also where it is current already or
rests after failures, and shows the jobs. Where a deployment is under way already, that one is shown. No key changes and
nothing is issued: certmesh certs renew does that.`,
		Example: `  certmesh certs deploy web
  certmesh certs deploy web --wait`,
		Args:              takes("NAME|ID"),
		ValidArgsFunction: a.complete(certificates),
	}
	wait := waiting(cmd)
	cmd.PreRunE = func(*cobra.Command, []string) error { return wait.check() }
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		r, err := c.Certificates.DeployCertificate(ctx, &operatorpb.DeployCertificateRequest{Id: args[0], RequestId: newRequestID()})
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

// newRequestID makes a call recognisable in the server's log and in the trail.
func newRequestID() string { return "cli-" + rand.Text() }
