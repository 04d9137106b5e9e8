package cli

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/render"
)

// waitPoll is how often a wait looks without having been told: notices may be lost with a connection.
const waitPoll = 5 * time.Second

// await follows an order until every placement has what was ordered (jobs say which generation), until it has failed for
// good, or for at most limit. It returns the certificate and the jobs as they were last seen, also with an error, which is
// a waitError unless the tool was interrupted.
func (a *App) await(ctx context.Context, c *client.Client, n *namer, crt *operatorpb.Certificate, jobs []*operatorpb.Job, limit time.Duration,
) (*operatorpb.Certificate, []*operatorpb.Job, error) {
	outer := ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	start := a.Clock.Now()
	timeout := a.Clock.NewTimer(limit)
	defer timeout.Stop()
	o := &order{app: a, c: c, n: n, start: start, crt: crt, jobs: jobs, told: map[string]bool{}, gone: map[string]bool{}}
	fmt.Fprintf(a.Err, "Waiting until %s is in place at %s.\n", render.Clean(crt.GetName()), placements(crt))
	feed := c.Watch(ctx, a.Clock, []string{"certificates", "jobs"}, "")
	notices := feed.C
	for {
		select {
		case <-outer.Done():
			return o.crt, o.jobs, outer.Err()
		case <-timeout.Chan():
			return o.crt, o.jobs, waitError{fmt.Sprintf("after %s %s is in place at %d of %d placements; see certmesh certs why %s",
				newSpan(&limit, limit), o.crt.GetName(), o.crt.GetPlacementsCurrent(), o.crt.GetPlacementsTotal(), o.crt.GetName())}
		case _, open := <-notices:
			if !open {
				// Looking now and then still works, unless the key has become bad; then looking tells.
				notices = nil
			}
		case <-a.Clock.After(waitPoll):
		}
		done, err := o.look(ctx)
		switch {
		case outer.Err() != nil:
			return o.crt, o.jobs, outer.Err()
		case client.Code(err) == codes.Unavailable, client.Code(err) == codes.DeadlineExceeded:
			o.tell("the server cannot be reached for the moment")
		case err != nil:
			return o.crt, o.jobs, err
		case done:
			fmt.Fprintf(a.Err, "%s is %s after %s.\n", render.Clean(o.crt.GetName()), inPlace(o.crt), a.Clock.Since(start).Round(100*time.Millisecond))
			return o.crt, o.jobs, nil
		}
	}
}

func placements(c *operatorpb.Certificate) string {
	if c.GetPlacementsTotal() == 1 {
		return "1 placement"
	}
	return fmt.Sprintf("%d placements", c.GetPlacementsTotal())
}

// order is what a wait knows.
type order struct {
	app   *App
	c     *client.Client
	n     *namer
	start time.Time
	crt   *operatorpb.Certificate
	jobs  []*operatorpb.Job
	told  map[string]bool
	// gone are jobs that are not kept any more.
	gone map[string]bool
}

// look reads the order's state and tells what is new. done: every placement has what was ordered.
func (o *order) look(ctx context.Context) (done bool, err error) {
	for i, j := range o.jobs {
		if j.GetFinishedAt() != nil || finished(j.GetState()) {
			continue
		}
		r, err := o.c.Jobs.GetJob(ctx, &operatorpb.GetJobRequest{Id: j.GetId()})
		// Retention may have been quicker; the certificate tells.
		switch {
		case client.Code(err) == codes.NotFound:
			o.gone[j.GetId()] = true
		case err != nil:
			return false, err
		default:
			o.jobs[i] = r.GetJob()
		}
		if o.jobs[i].GetState() == "AwaitingApproval" {
			o.tell("waits for approval of " + j.GetId() + ": certmesh jobs approve, by somebody who did not ask for it")
		}
	}
	r, err := o.c.Certificates.GetCertificate(ctx, &operatorpb.GetCertificateRequest{Id: o.crt.GetId()})
	if err != nil {
		return false, err
	}
	o.crt = r.GetCertificate()
	names := o.n.names(ctx, ofCertificates(o.crt))
	for _, l := range o.crt.GetLeaves() {
		if o.issued(l) {
			o.tell(fmt.Sprintf("issued for agent %s (generation %d, serial %s)", named(names, l.GetAgentId()), l.GetGeneration(), l.GetSerial()))
		}
	}
	done = o.crt.GetPlacementsTotal() > 0 && o.crt.GetPlacementsCurrent() == o.crt.GetPlacementsTotal()
	for _, l := range o.crt.GetLeaves() {
		done = done && o.issued(l)
	}
	// What is deployed again was current before: its jobs tell when it has been done.
	for _, j := range o.jobs {
		done = done && (j.GetState() == "Completed" || j.GetTargetId() == "" || o.gone[j.GetId()])
	}
	for _, p := range o.crt.GetPlacements() {
		if p.GetCurrent() && o.issuedAt(p.GetAgentId()) {
			o.tell(fmt.Sprintf("%s at %s", progress(p.GetState()), p.GetTargetName()))
		}
	}
	if done {
		return true, nil
	}
	return false, o.broken(ctx)
}

// inPlace says at how many placements a certificate that is in place everywhere is served, and at how many it is only known to
// be installed, because they are not probed.
func inPlace(c *operatorpb.Certificate) string {
	unprobed := 0
	for _, p := range c.GetPlacements() {
		if p.GetState() == "Installed" {
			unprobed++
		}
	}
	switch probed := len(c.GetPlacements()) - unprobed; {
	case unprobed == 0:
		return "served at " + placements(c)
	case probed == 0:
		return "in place (read back, not probed) at " + placements(c)
	default:
		return fmt.Sprintf("in place at %s (%d served, %d read back and not probed)", placements(c), probed, unprobed)
	}
}

func progress(state string) string {
	if state == "Installed" {
		return "in place (read back, not probed)"
	}
	return "served"
}

func named(names render.Names, id string) string {
	if name := names[id]; name != "" {
		return name
	}
	return id
}

func finished(state string) bool {
	return state == "Completed" || state == "Failed" || state == "Cancelled"
}

// wanted is the generation that was ordered of an agent's leaf.
func (o *order) wanted(agentID string) int64 {
	wanted := int64(1)
	for _, j := range o.jobs {
		if j.GetAgentId() == agentID {
			wanted = max(wanted, j.GetGeneration())
		}
	}
	return wanted
}

func (o *order) issued(l *operatorpb.Leaf) bool { return l.GetGeneration() >= o.wanted(l.GetAgentId()) }

func (o *order) issuedAt(agentID string) bool {
	for _, l := range o.crt.GetLeaves() {
		if l.GetAgentId() == agentID {
			return o.issued(l)
		}
	}
	return false
}

// broken is a waitError once the order has failed for good: a job of it failed or was cancelled, or a placement failed
// and nothing is under way any more.
func (o *order) broken(ctx context.Context) error {
	next := "see certmesh certs why " + o.crt.GetName()
	for _, j := range o.jobs {
		switch j.GetState() {
		case "Failed":
			return waitError{fmt.Sprintf("%s of %s failed: %s; %s", j.GetKind(), o.crt.GetName(), first(j.GetError(), "no reason is known"), next)}
		case "Cancelled":
			return waitError{fmt.Sprintf("%s of %s was cancelled; %s", j.GetKind(), o.crt.GetName(), next)}
		}
	}
	for _, p := range o.crt.GetPlacements() {
		if p.GetCurrent() || p.GetState() != "Failed" || !o.issuedAt(p.GetAgentId()) {
			continue
		}
		o.tell(fmt.Sprintf("failed at %s: %s", p.GetTargetName(), first(p.GetLastError(), "no reason is known")))
		// A failure of the generation before stays until the new one is installed; an open job says that it is coming.
		r, err := o.c.Jobs.ListJobs(ctx, &operatorpb.ListJobsRequest{CertificateId: o.crt.GetId(), Open: true, Page: &operatorpb.Page{Size: 100}})
		if err != nil {
			return err
		}
		if len(r.GetJobs()) > 0 {
			continue
		}
		// The last job may have ended well since the certificate was read.
		again, err := o.c.Certificates.GetCertificate(ctx, &operatorpb.GetCertificateRequest{Id: o.crt.GetId()})
		if err != nil {
			return err
		}
		if still(again.GetCertificate(), p) {
			return waitError{fmt.Sprintf("%s is not in place at %s: %s; %s", o.crt.GetName(), p.GetTargetName(), first(p.GetLastError(), "no reason is known"), next)}
		}
	}
	if o.crt.GetStatus() == "Revoked" || o.crt.GetStatus() == "Archived" {
		return waitError{fmt.Sprintf("%s is %s; %s", o.crt.GetName(), o.crt.GetStatus(), next)}
	}
	return nil
}

// still reports whether a placement is as it was.
func still(c *operatorpb.Certificate, was *operatorpb.Placement) bool {
	for _, p := range c.GetPlacements() {
		if p.GetTargetId() == was.GetTargetId() {
			return p.GetState() == was.GetState() && p.GetCurrent() == was.GetCurrent()
		}
	}
	return false
}

// tell prints a line of progress once.
func (o *order) tell(line string) {
	if o.told[line] {
		return
	}
	o.told[line] = true
	fmt.Fprintf(o.app.Err, "%6.1fs  %s\n", o.app.Clock.Since(o.start).Seconds(), render.Clean(line))
}
