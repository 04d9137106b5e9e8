package session

import (
	"context"
	"math/rand/v2"

	"github.com/certmesh/certmesh/controlplane/internal/dispatch"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/hub"
	"github.com/certmesh/certmesh/controlplane/internal/issue"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// workStep runs the step of work and its effects; st.mu is held. What takes time goes to a pool, and its answer comes
// back by answer.
func (st *stream) workStep(e dispatch.Event) {
	var effects []dispatch.Effect
	st.work, effects = dispatch.Step(st.work, e)
	for _, f := range effects {
		st.workEffect(f)
	}
}

func (st *stream) workEffect(f dispatch.Effect) {
	s, db := st.s, st.s.cfg.Store
	switch f := f.(type) {
	case dispatch.Load:
		st.tasks++
		s.loads.add(st, f)
	case dispatch.Raise:
		d := f.Dispatch
		st.task(s.store, st.who.agentID, "dispatch", func(ctx context.Context) (dispatch.Event, error) {
			err := db.Dispatch(ctx, []domain.Dispatch{d})[0]
			if err == nil {
				s.cfg.Hub.Publish(hub.Notice{Kind: hub.Jobs, ID: d.JobID})
			}
			return dispatch.Raised{JobID: d.JobID, Attempt: d.Attempt, Err: err, At: s.now()}, err
		}, func(err error) dispatch.Event {
			return dispatch.Raised{JobID: d.JobID, Attempt: d.Attempt, Err: err, At: s.now()}
		})
	case dispatch.Accept:
		a := f.Acceptance
		ref := domain.JobRef{JobID: a.JobID, Attempt: a.Attempt}
		st.task(s.store, st.who.agentID, "accept", func(ctx context.Context) (dispatch.Event, error) {
			err := db.Accept(ctx, []domain.Acceptance{a})[0]
			if err == nil {
				s.cfg.Hub.Publish(hub.Notice{Kind: hub.Jobs, ID: a.JobID})
			}
			return dispatch.AcceptedDone{Ref: ref, Err: err, At: s.now()}, err
		}, func(err error) dispatch.Event { return dispatch.AcceptedDone{Ref: ref, Err: err, At: s.now()} })
	case dispatch.Issue:
		st.issue(f)
	case dispatch.Complete:
		r := f.Result
		ref := domain.JobRef{JobID: r.JobID, Attempt: r.Attempt}
		st.task(s.store, st.who.agentID, "complete", func(ctx context.Context) (dispatch.Event, error) {
			o := db.CompleteDeployments(ctx, []domain.DeployResult{r})[0]
			if o.Err == nil {
				s.changed(r.JobID, o.Settlement.CertificateID)
			}
			return dispatch.Completed{Ref: ref, Settlement: o.Settlement, Err: o.Err, At: s.now()}, o.Err
		}, func(err error) dispatch.Event { return dispatch.Completed{Ref: ref, Err: err, At: s.now()} })
	case dispatch.Fail:
		x := f.Failure
		x.Jitter = rand.Float64() //nolint:gosec // spreads retries, guards nothing
		ref := domain.JobRef{JobID: x.JobID, Attempt: x.Attempt}
		st.task(s.store, st.who.agentID, "fail", func(ctx context.Context) (dispatch.Event, error) {
			o := db.FailJobs(ctx, []domain.Failure{x})[0]
			if o.Err == nil {
				s.cfg.Log.Warn("assignment failed", "agent_id", st.who.agentID, "job_id", x.JobID, "attempt", x.Attempt, "class", x.Class,
					"reason", x.Message, "state", string(o.Job.State), "tries", o.Job.Tries)
				s.changed(x.JobID, o.Job.CertificateID)
			}
			return dispatch.FailedDone{Ref: ref, Job: o.Job, Err: o.Err, At: s.now()}, o.Err
		}, func(err error) dispatch.Event { return dispatch.FailedDone{Ref: ref, Err: err, At: s.now()} })
	case dispatch.Inquire:
		st.task(s.store, st.who.agentID, "inquire", func(ctx context.Context) (dispatch.Event, error) {
			all, err := db.Settlements(ctx, st.who.agentID, []domain.JobRef{f.Ref})
			ev := dispatch.Inquired{Ref: f.Ref, Err: err, At: s.now()}
			if err == nil {
				ev.Settlement = all[0]
			}
			return ev, err
		}, func(err error) dispatch.Event { return dispatch.Inquired{Ref: f.Ref, Err: err, At: s.now()} })

	case dispatch.Welcome:
		st.welcome(f.Verdicts)
	case dispatch.Assign:
		st.assign(f.Work)
	case dispatch.Cancel:
		st.put(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Cancel{Cancel: &agentpb.Cancel{Id: f.Ref.JobID, Attempt: f.Ref.Attempt}}})
	case dispatch.Settle:
		s.metrics.results.WithLabelValues(f.Settled.Class.String(), f.Settled.Outcome.String()).Inc()
		st.put(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Settled{Settled: settledPB(f.Settled)}})
	case dispatch.Foreign:
		st.foreign(f.Ref)
	case dispatch.Wait:
		if st.waitUntil.Store(microTime(f.Until)); !f.Until.IsZero() {
			s.expect(st)
		}
	}
}

// task runs f in a pool and brings its answer back; broken makes the answer after a panic.
func (st *stream) task(p *pool, lane, what string, f func(ctx context.Context) (dispatch.Event, error), broken func(err error) dispatch.Event) {
	st.tasks++
	p.do(lane, func() {
		timeout := storeTimeout
		if p == st.s.issuing {
			timeout = issueTimeout
		}
		ctx, cancel := context.WithTimeout(st.s.ctx, timeout)
		defer cancel()
		var ev dispatch.Event
		var failed error
		if err := contain(st.s.cfg.Log, what, func() error { ev, failed = f(ctx); return nil }); err != nil {
			ev = broken(err)
		} else if failed != nil && fault.MayRetry(failed) {
			st.s.cfg.Log.Warn("not done yet: "+what, "agent_id", st.who.agentID, "err", failed)
		}
		st.answer(ev)
	})
}

func (st *stream) issue(f dispatch.Issue) {
	s, j := st.s, f.Work.Job
	ref := domain.JobRef{JobID: j.ID, Attempt: j.Attempt}
	st.task(s.issuing, f.Work.Owner, "issue", func(ctx context.Context) (dispatch.Event, error) {
		o, err := s.cfg.Issue.Issue(ctx, issue.Request{Work: f.Work, CSR: f.CSR, RequestID: j.RequestID})
		ev := dispatch.Issued{Ref: ref, Generation: o.Generation, Deployments: o.Deployments, Err: err, At: s.now()}
		if err == nil {
			s.changed(j.ID, j.CertificateID)
			for _, w := range o.Deployments {
				s.cfg.Hub.Publish(hub.Notice{Kind: hub.Jobs, ID: w.Job.ID})
			}
		}
		return ev, err
	}, func(err error) dispatch.Event { return dispatch.Issued{Ref: ref, Err: err, At: s.now()} })
}

// changed follows a commit that changed a job and what hangs on it.
func (s *Server) changed(jobID, certificateID string) {
	s.cfg.Hub.Publish(hub.Notice{Kind: hub.Jobs, ID: jobID})
	if certificateID != "" {
		s.cfg.Hub.Publish(hub.Notice{Kind: hub.Certificates, ID: certificateID})
	}
	if s.cfg.Changed != nil {
		s.cfg.Changed()
	}
}

func (st *stream) welcome(verdicts []dispatch.Verdict) {
	w := st.greeting
	st.greeting = nil
	w.Epoch = int64(st.epochNow())
	for _, v := range verdicts {
		w.Verdicts = append(w.Verdicts, verdictPB(v))
	}
	if !fits(w) {
		w.Resend = nil // informational
	}
	st.put(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Welcome{Welcome: w}})
}

func (st *stream) assign(w domain.Work) {
	m := &agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Assignment{Assignment: assignmentPB(w)}}
	if !fits(m) {
		// It would end the stream, again and again. The job fails with the reason instead; its credit stays spent, since
		// the agent has no way to know.
		st.workStep(dispatch.Reported{At: st.s.now(), Report: dispatch.Report{Kind: dispatch.ReportRefused,
			Ref: domain.JobRef{JobID: w.Job.ID, Attempt: w.Job.Attempt}, Failure: dispatch.Failure{Class: fault.Invalid,
				Message: "the assignment is larger than a control message may be (64 KiB); use fewer names, a shorter chain or smaller settings"}}})
		return
	}
	st.s.metrics.assigned.WithLabelValues(dispatch.ClassOf(w.Job.Kind).String()).Inc()
	st.put(m)
}

// foreign writes to the trail that an agent spoke of another's job, bounded like all that strangers can cause.
func (st *stream) foreign(ref domain.JobRef) {
	s := st.s
	s.cfg.Log.Warn("agent spoke of a job that is not its own", "agent_id", st.who.agentID, "job_id", ref.JobID)
	if !s.guard.mayAudit() {
		return
	}
	s.background("audit a foreign assignment", func(ctx context.Context) error {
		return s.audit(ctx, st.who, "agent.foreign_assignment", "job/"+clean(ref.JobID, maxID), string(fault.NotFound), nil)
	})
}

// observed records what the agent found at a target. One that could not be recorded is said again on the next stream.
func (st *stream) observed(o domain.Observation) {
	s := st.s
	o.RequestID = st.who.requestID
	s.background("record an observation", func(ctx context.Context) error {
		changed, err := s.cfg.Store.RecordObservation(ctx, o)
		if fault.Is(err, fault.NotFound) {
			s.cfg.Log.Warn("agent observed what is not placed there", "agent_id", o.AgentID, "target_id", o.TargetID, "certificate_id", o.CertificateID)
			if !s.guard.mayAudit() {
				return nil
			}
			return s.audit(ctx, st.who, "agent.foreign_observation", "certificate/"+o.CertificateID, string(fault.NotFound),
				map[string]string{"target": o.TargetID})
		}
		if err != nil || !changed {
			return err
		}
		if o.Problem != "" {
			s.cfg.Log.Warn("placement drifted", "agent_id", o.AgentID, "target_id", o.TargetID, "certificate_id", o.CertificateID, "reason", o.Problem)
		}
		s.cfg.Hub.Publish(hub.Notice{Kind: hub.Certificates, ID: o.CertificateID})
		if s.cfg.Changed != nil {
			s.cfg.Changed()
		}
		return nil
	})
}

// admit records the session, loads all that is known of the agent, and begins the conversation.
func (st *stream) admit(h Hello) {
	s := st.s
	if s.isDraining() {
		s.metrics.refused.WithLabelValues("draining").Inc()
		st.end(endDraining())
		return
	}
	// One agent's many Hellos must not fill the queue at the gate.
	if !s.register(st) || !s.pass(st) {
		s.metrics.refused.WithLabelValues("overloaded").Inc()
		st.end(endOverloaded(jitter(helloRetry)))
		return
	}
	defer s.gate.Release(1)
	// Its own deadline instead of the stream's: a session that is recorded must not be left behind because the agent hung
	// up in that moment.
	ctx, cancel := context.WithTimeout(s.ctx, storeTimeout)
	defer cancel()
	id := st.who.agentID
	now := s.now()
	hello := []domain.SessionOpen{{AgentID: id, Node: s.cfg.NodeID, BootID: h.BootID, Facts: h.Facts,
		Labels: h.Labels, Protocol: protocolMax, Capabilities: h.Capabilities, IdentitySerial: st.who.serial, At: now}}
	o := s.cfg.Store.OpenSessions(ctx, hello)[0]
	if fault.Is(o.Err, fault.Unauthorized) && s.readmit(ctx, st.who) {
		o = s.cfg.Store.OpenSessions(ctx, hello)[0]
	}
	if o.Err != nil {
		st.refuse(ctx, o.Err)
		return
	}
	older, newest, gone := s.opened(st, o.Epoch)
	if gone {
		st.closeSession(o.Epoch)
		return
	}
	for _, other := range older {
		other.end(endSuperseded())
	}
	if !newest {
		st.end(endSuperseded())
		return
	}
	if s.booted(id, o.Previous.BootID, h.BootID, now) {
		st.quarantine(ctx)
		return
	}
	ev, err := s.everything(ctx, id, o.Epoch, h)
	if err != nil {
		s.cfg.Log.Warn("agent's work and state not loaded", "agent_id", id, "err", err)
		st.end(endError(err))
		return
	}
	// An id that is not known says nothing.
	ev.Restarted = h.BootID != "" && h.BootID != o.Previous.BootID
	st.proto(ev)
	s.cfg.Log.Info("agent connected", "agent_id", id, "epoch", o.Epoch, "open", len(h.Held), "remote_addr", st.who.remote)
	s.cfg.Hub.Publish(hub.Notice{Kind: hub.Agents, ID: id})
}

// pass waits for a place at the gate, first come first served: the TLS handshake, which costs more than the Hello, is paid
// for by then, and an agent that is sent away makes another. False: too many wait, or it took too long.
func (s *Server) pass(st *stream) bool {
	if s.gate.TryAcquire(1) {
		return true
	}
	defer s.waiting.Add(-1)
	if s.waiting.Add(1) > s.cfg.helloQueue {
		return false
	}
	ctx, cancel := context.WithTimeout(st.wire.Context(), s.cfg.helloWait)
	defer cancel()
	return s.gate.Acquire(ctx, 1) == nil
}

// everything loads what an open conversation needs.
func (s *Server) everything(ctx context.Context, agentID string, epoch domain.Epoch, h Hello) (Admitted, error) {
	ev := Admitted{Work: dispatch.Opened{AgentID: agentID, Epoch: epoch, Credits: h.Credits, Held: h.Held}}
	var err error
	if len(h.Held) > 0 {
		refs := make([]domain.JobRef, len(h.Held))
		for i, o := range h.Held {
			refs[i] = o.Ref
		}
		if ev.Work.Settlements, err = s.cfg.Store.Settlements(ctx, agentID, refs); err != nil {
			return ev, err
		}
	}
	query := domain.WorkQuery{AgentID: agentID}
	for _, o := range h.Held {
		query.Out = append(query.Out, domain.JobRef{JobID: o.Ref.JobID}) // whatever attempt it is at
	}
	work, err := s.cfg.Store.OpenWork(ctx, []domain.WorkQuery{query})
	if err != nil {
		return ev, err
	}
	ev.Work.Work = work[0]
	if ev.Desired, err = s.desired(ctx, agentID, false); err != nil {
		return ev, err
	}
	if ev.Refused, err = s.cfg.Store.Rejections(ctx, agentID); err != nil {
		return ev, err
	}
	ev.ReportLeaves = s.held.wants(agentID, h.LeafCount, h.LeavesHash)
	ev.Work.At = s.now()
	return ev, nil
}

// refuse says why the store would not have the agent: for good when it is retired or its identity revoked.
func (st *stream) refuse(ctx context.Context, err error) {
	s := st.s
	end := endError(err)
	reason := string(fault.ClassOf(err))
	switch fault.ClassOf(err) {
	case fault.Forbidden:
		switch a, aerr := s.cfg.Store.Agent(ctx, st.who.agentID); {
		case aerr == nil && a.State == domain.AgentRetired:
			end = endRetired("the agent was retired" + because(a.Reason))
		case aerr == nil && a.State == domain.AgentQuarantined:
			end = endQuarantined(quarantined + because(a.Reason))
		}
	case fault.Unauthorized:
		// An identity that the store does not know may be one of before a restore: that is no reason to give up for good.
		if i, ierr := s.cfg.Store.Identity(ctx, st.who.serial); ierr == nil && !i.RevokedAt.IsZero() {
			end = endRevoked("the identity was revoked; join again with a new token")
		}
	default:
		s.cfg.Log.Warn("session not recorded", "agent_id", st.who.agentID, "err", err)
	}
	s.metrics.refused.WithLabelValues(reason).Inc()
	if (fault.Is(err, fault.Forbidden) || fault.Is(err, fault.Unauthorized)) && s.guard.mayAudit() {
		if aerr := s.audit(ctx, st.who, "agent.connect_refused", "agent/"+st.who.agentID, reason, map[string]string{"message": end.Message}); aerr != nil {
			s.cfg.Log.Error("refusal not audited", "agent_id", st.who.agentID, "err", aerr)
		}
	}
	st.end(end)
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return ": " + reason
}

// quarantine stops an identity that two machines use; an operator decides which of them is the agent.
func (st *stream) quarantine(ctx context.Context) {
	s, id := st.s, st.who.agentID
	const reason = "two machines use this identity (their boot ids alternate): a cloned disk or virtual machine; enrol one of them anew"
	s.metrics.refused.WithLabelValues("cloned").Inc()
	s.cfg.Log.Error("agent quarantined", "agent_id", id, "reason", reason)
	op := domain.Op{Actor: "node:" + s.cfg.NodeID, RequestID: st.who.requestID, RemoteAddr: st.who.remote, At: s.now()}
	if err := s.cfg.Store.QuarantineAgent(ctx, id, reason, op); err != nil {
		s.cfg.Log.Error("quarantine not recorded", "agent_id", id, "err", err)
		st.end(endError(err))
		return
	}
	for _, other := range s.of(id) {
		other.end(endQuarantined(quarantined + because(reason)))
	}
	if s.cfg.RemoteDisconnect != nil {
		s.cfg.RemoteDisconnect(id, quarantined+because(reason))
	}
	s.cfg.Hub.Publish(hub.Notice{Kind: hub.Agents, ID: id})
}
