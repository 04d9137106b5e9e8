package cli

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

var jobStates = []string{"Pending", "AwaitingCSR", "AwaitingApproval", "Running", "Completed", "Failed", "Cancelled"}

func (a *App) jobs() *cobra.Command {
	return a.group(&cobra.Command{
		Use:   "jobs",
		Short: "Show, approve and cancel work",
		Example: `  certmesh jobs list --open
  certmesh jobs get job_0123456789abcdef0123456789abcdef`,
	}, a.jobsList(), a.jobsGet(), a.jobsApprove(), a.jobsReject(), a.jobsCancel())
}

func (a *App) jobsList() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List jobs",
		Example: `  certmesh jobs list --open --watch
  certmesh jobs list --certificate web
  certmesh jobs list --agent web-1 --state Failed`,
		Long: `Lists jobs, the newest first: all, or by one of state, --open, certificate and agent, or by agent or certificate with
--open, or by agent with a state in which a job has ended. The server refuses other combinations, which no index serves.`,
		Args: takes(),
	}
	pages, w := paging(cmd), watching(cmd, "jobs")
	var state, certificate, agent string
	var open bool
	f := cmd.Flags()
	f.StringVar(&state, "state", "", "only jobs in this `STATE`")
	f.StringVar(&certificate, "certificate", "", "only jobs of this certificate, by `NAME|ID`")
	f.StringVar(&agent, "agent", "", "only jobs of this agent, by `NAME|ID`")
	f.BoolVar(&open, "open", false, "only jobs that are still to be finished")
	words(cmd, "state", jobStates...)
	a.completeFlag(cmd, "certificate", certificates)
	a.completeFlag(cmd, "agent", agents)
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, _ []string) error {
		if err := ids(ctx, c, map[*string]kind{&certificate: certificates, &agent: agents}); err != nil {
			return err
		}
		n := newNamer(c)
		return a.present(ctx, c, w, func(ctx context.Context) (view, error) {
			r, err := collect(ctx, pages, func(ctx context.Context, page *operatorpb.Page) (*operatorpb.ListJobsResponse, error) {
				return c.Jobs.ListJobs(ctx, &operatorpb.ListJobsRequest{Page: page, State: state, CertificateId: certificate, AgentId: agent, Open: open})
			})
			if err != nil {
				return view{}, err
			}
			return view{
				doc: r, table: func(p *render.Page) { p.Jobs(r.GetJobs(), n.names(ctx, ofJobs(r.GetJobs()...)), a.now()) },
				note: notes(empty(len(r.GetJobs()), "such jobs"), pages.more(r.GetNextCursor())),
			}, nil
		})
	})
	return cmd
}

func ofJobs(list ...*operatorpb.Job) map[kind][]string {
	out := map[kind][]string{}
	for _, j := range list {
		out[certificates] = append(out[certificates], j.GetCertificateId())
		out[agents] = append(out[agents], j.GetAgentId())
		out[targets] = append(out[targets], j.GetTargetId())
	}
	return out
}

func (a *App) jobsGet() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "get ID",
		Short:   "Show a job",
		Example: "  certmesh jobs get job_0123456789abcdef0123456789abcdef --watch",
		Args:    takes("ID"),
	}
	w := watching(cmd, "jobs")
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		n := newNamer(c)
		w.id = args[0]
		return a.present(ctx, c, w, func(ctx context.Context) (view, error) {
			r, err := c.Jobs.GetJob(ctx, &operatorpb.GetJobRequest{Id: args[0]})
			return a.jobView(ctx, n, r.GetJob()), err
		})
	})
	return cmd
}

func (a *App) jobsCancel() *cobra.Command {
	return &cobra.Command{
		Use:   "cancel ID",
		Short: "Cancel a job that is not finished",
		Long: `Cancels an open job. The certificate or placement stays as it is and stays due, so that its duty will order the
work again later.`,
		Example: "  certmesh jobs cancel job_0123456789abcdef0123456789abcdef",
		Args:    takes("ID"),
		RunE: a.connected(func(ctx context.Context, c *client.Client, args []string) error {
			r, err := c.Jobs.CancelJob(ctx, &operatorpb.CancelJobRequest{Id: args[0]})
			if err != nil {
				return err
			}
			return a.show(a.jobView(ctx, newNamer(c), r.GetJob()))
		}),
	}
}

func (a *App) jobsApprove() *cobra.Command {
	req := &operatorpb.ApproveJobRequest{}
	cmd := &cobra.Command{
		Use:   "approve ID",
		Short: "Let a job that waits for approval go on",
		Long: `Approves the issuance or renewal of a certificate that was ordered with --require-approval; it begins at once. Neither
who ordered the certificate nor who asked for this renewal can approve it. A try that fails is tried again without another
approval.`,
		Example: `  certmesh jobs list --state AwaitingApproval
  certmesh jobs approve job_0123456789abcdef0123456789abcdef --reason "change 4711"`,
		Args: takes("ID"),
	}
	cmd.Flags().StringVar(&req.Reason, "reason", "", "`TEXT` for the trail")
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		req.Id = args[0]
		r, err := c.Jobs.ApproveJob(ctx, req)
		if err != nil {
			return err
		}
		return a.show(a.jobView(ctx, newNamer(c), r.GetJob()))
	})
	return cmd
}

func (a *App) jobsReject() *cobra.Command {
	req := &operatorpb.RejectJobRequest{}
	cmd := &cobra.Command{
		Use:   "reject ID --reason TEXT",
		Short: "Cancel a job that waits for approval",
		Long: `Rejects the issuance or renewal of a certificate that was ordered with --require-approval: the job is cancelled. The
certificate stays due, so that its duty will ask again after an hour. Neither who ordered the certificate nor who asked for
this renewal can reject it; they cancel it.`,
		Example: `  certmesh jobs reject job_0123456789abcdef0123456789abcdef --reason "the names are wrong"`,
		Args:    takes("ID"),
	}
	cmd.Flags().StringVar(&req.Reason, "reason", "", "`TEXT` for the trail and for whoever meets the job later (required)")
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if strings.TrimSpace(req.GetReason()) == "" {
			return misuse("--reason is missing; say why the job is rejected")
		}
		return nil
	}
	cmd.RunE = a.connected(func(ctx context.Context, c *client.Client, args []string) error {
		req.Id = args[0]
		r, err := c.Jobs.RejectJob(ctx, req)
		if err != nil {
			return err
		}
		return a.show(a.jobView(ctx, newNamer(c), r.GetJob()))
	})
	return cmd
}

func (a *App) jobView(ctx context.Context, n *namer, j *operatorpb.Job) view {
	return view{doc: j, table: func(p *render.Page) { p.Job(j, n.names(ctx, ofJobs(j)), a.now()) }}
}
