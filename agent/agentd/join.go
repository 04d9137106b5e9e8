package agentd

import (
	"context"
	"errors"
	mrand "math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/certmesh/certmesh/agent/internal/identity"
	"github.com/certmesh/certmesh/agent/internal/stream"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// callTimeout bounds Enroll and Reidentify; servers admit handshakes at a bounded rate.
const callTimeout = 60 * time.Second

// enrol joins with the configured token, or with that of an enrolment whose answer was lost. A patient agent tries until
// ctx ends and is then stopped without an error; an impatient one is told why the last try failed.
func (a *agent) enrol(ctx context.Context, patient bool) error {
	token, saved := a.ids.SavedToken()
	if a.cfg.JoinToken != "" {
		t, err := identity.ParseToken(a.cfg.JoinToken)
		if err != nil {
			return err
		}
		if err := a.ids.SaveToken(t); err != nil {
			return err
		}
		token = t
	} else if !saved {
		if id := a.ids.Current(); id != nil {
			return a.lost(id)
		}
		return fault.InvalidField("join_token", "is missing and this agent has not joined yet; create one with `certmesh agents token create` and set CERTMESH_JOIN_TOKEN or CERTMESH_JOIN_TOKEN_FILE")
	}
	route, addr := stream.Route{Seeds: a.cfg.Servers}.Start(mrand.Float64)
	strangers := map[string]bool{}
	for {
		err := a.enrolAt(ctx, addr, token)
		var r refusal
		switch {
		case err == nil:
			a.cfg.Log.Info("enrolled", "agent_id", a.ids.Current().AgentID, "server", addr)
			return nil
		case a.life.dead() != nil:
			return a.life.dead()
		case errors.As(err, &r):
			return r.error
		case !fault.MayRetry(err):
			// Not the mesh that the token is for, or an answer that makes no sense. One wrong address among several must
			// not end the enrolment.
			if strangers[addr] = true; len(strangers) == len(a.cfg.Servers) {
				return err
			}
		}
		if ctx.Err() == nil {
			var delay time.Duration
			from := addr
			route, addr, delay = route.Next(a.cfg.Backoff, a.cfg.Clock.Now(), stream.End{Err: err}, mrand.Float64)
			a.cfg.Log.Warn("not enrolled yet", "server", from, "next", addr, "delay", delay.Round(time.Millisecond).String(), "err", clip(err.Error()))
			if a.wait(ctx, delay) {
				continue
			}
		}
		if patient {
			return nil
		}
		return err
	}
}

// refusal is a server's final answer about a token.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

func (a *agent) enrolAt(ctx context.Context, addr string, token identity.Token) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	tc, pin := a.ids.Pinned(token)
	creds := stream.NewCredentials(tc, a.cfg.WrapConn)
	conn, err := stream.Dial(addr, creds, a.cfg.Dial, "certmesh-agent/"+a.cfg.Version)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // it is given up either way
	csr, err := a.ids.NextCSR()
	if err != nil {
		return err
	}
	resp, err := a.life.client(agentpb.NewAgentServiceClient(conn)).Enroll(ctx,
		&agentpb.EnrollRequest{Token: token.Raw(), Csr: csr, Name: a.cfg.Name, Facts: a.facts})
	switch {
	case err != nil && pin.Err() != nil:
		return pin.Err()
	case err != nil:
		err = classify(err, "the server at "+addr+" did not enrol this agent")
		if !fault.MayRetry(err) {
			return refusal{err}
		}
		return err
	}
	return a.ids.Enrolled(resp, pin)
}

// reidentify renews an identity that has expired.
func (a *agent) reidentify(ctx context.Context, addr string, id *identity.Identity) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	creds := stream.NewCredentials(a.ids.Anonymous(), a.cfg.WrapConn)
	conn, err := stream.Dial(addr, creds, a.cfg.Dial, "certmesh-agent/"+a.cfg.Version)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // it is given up either way
	if err := stream.Ready(ctx, conn); err != nil {
		if herr := creds.Err(); herr != nil {
			return herr
		}
		return err
	}
	csr, err := a.ids.NextCSR()
	if err != nil {
		return err
	}
	// Should gRPC have connected anew meanwhile, the proof is for another connection and the server refuses it; the
	// next try makes a new one.
	proof, err := id.Prove(creds.State(), csr)
	if err != nil {
		return err
	}
	resp, err := a.life.client(agentpb.NewAgentServiceClient(conn)).Reidentify(ctx,
		&agentpb.ReidentifyRequest{Certificate: id.Certificate(), Csr: csr, ProofOfPossession: proof})
	if err != nil {
		return classify(err, "the server at "+addr+" did not renew the expired identity")
	}
	if err := a.ids.Reidentified(resp); err != nil {
		return err
	}
	a.renewed = a.cfg.Clock.Now()
	a.cfg.Log.Info("expired identity renewed", "agent_id", id.AgentID, "server", addr)
	return nil
}

// classify turns a server's status into a class of ours; doing is the sentence's beginning.
func classify(err error, doing string) error {
	st := status.Convert(err)
	class := fault.Retryable
	switch st.Code() {
	case codes.InvalidArgument, codes.OutOfRange:
		class = fault.Invalid
	case codes.Unauthenticated:
		class = fault.Unauthorized
	case codes.PermissionDenied:
		class = fault.Forbidden
	case codes.NotFound:
		class = fault.NotFound
	case codes.FailedPrecondition, codes.AlreadyExists:
		class = fault.Conflict
	case codes.Unimplemented:
		class = fault.Unsupported
	}
	return fault.Wrap(class, quiet{err}, "%s: %s", doing, clip(st.Message()))
}

// quiet keeps the cause without saying everything twice.
type quiet struct{ error }

func (q quiet) Error() string { return "" }
func (q quiet) Unwrap() error { return q.error }
