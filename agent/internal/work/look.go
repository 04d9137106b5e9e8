package work

import (
	"context"
	"time"

	"github.com/certmesh/certmesh/connectors/target"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// finding is what one look at a target came to.
type finding struct {
	installed, served target.Fingerprint
	// proof of the handshake; probed: the target has a verify address.
	proof  target.Proof
	probed bool
	// unread: the target could not be read; unanswered: nothing answered at its verify address.
	unread, unanswered error
	at                 time.Time
}

// problem says what of the finding is not the leaf that is wanted; nil: nothing. A Conflict is something else that was seen,
// every other class that nothing was.
func (f finding) problem(want target.Fingerprint) error {
	switch {
	case f.unread != nil:
		return f.unread
	case f.installed.IsZero():
		return fault.New(fault.Conflict, "the target holds no certificate with its key any more; SHA-256 %s was deployed there", want)
	case f.installed != want:
		return fault.New(fault.Conflict, "the target holds the certificate with SHA-256 %s, not the one that was deployed there (%s)", f.installed, want)
	case f.unanswered != nil:
		return f.unanswered
	case f.probed && f.served != want:
		return fault.New(fault.Conflict, "%s serves the certificate with SHA-256 %s, not the one that was deployed (%s), which the target holds; the service may have to be told to load it",
			clean(f.proof.Address, 300, false), f.served, want)
	default:
		return nil
	}
}

// unansweredMost is how many looks in a row may come to nothing before that is told as a problem: a service that is being
// restarted, or a host that is short of something for a moment, is no drift.
const unansweredMost = 3

// decide compares a finding with what was deployed and what was said of it last. next is what to remember (it is p when that is
// all the same), and say what to tell the server, if anything.
//
//	                     nothing said, or "well"        said to differ
//	as deployed          –                              tell that it ceased
//	something else       tell                           tell
//	nothing was seen     tell from the third in a row   tell from the third in a row
//
// What differs is told at every look, because the server may have had no use for it the last time (a deployment was open that
// came to nothing, or the agent had much to tell).
func decide(p *placed, f finding) (next *placed, say *agentpb.Observed) {
	err := f.problem(p.leaf)
	q := *p
	q.unanswered = 0
	if err != nil && !fault.Is(err, fault.Conflict) {
		if q.unanswered = min(p.unanswered+1, unansweredMost); q.unanswered < unansweredMost {
			return &q, nil
		}
	}
	differs := p.said.GetProblem() != nil
	o := &agentpb.Observed{TargetId: p.spec.GetId(), CertificateId: p.certificateID, Generation: p.generation,
		InstalledFingerprint: bytesOf(f.installed), ServedFingerprint: bytesOf(f.served), ObservedUnixUs: f.at.UnixMicro()}
	switch {
	case err == nil && !differs:
		if q.unanswered == p.unanswered {
			return p, nil
		}
		return &q, nil
	case err != nil:
		o.Problem = FailureOf(err)
	}
	q.said = o
	return &q, o
}

func bytesOf(f target.Fingerprint) []byte {
	if f.IsZero() {
		return nil
	}
	return f[:]
}

// look reads a target back and, where it has a verify address, asks what is served there, until that is the leaf wanted or
// the timeout has passed; the last finding counts. Nothing is changed.
func (e *Engine) look(ctx context.Context, spec *agentpb.TargetSpec, want target.Fingerprint, timeout time.Duration) finding {
	ctx, cancel := context.WithTimeout(ctx, max(timeout, time.Second))
	defer cancel()
	until := e.cfg.Now().Add(timeout)
	var last finding
	for waited, wait := time.Duration(0), verifyFirst; ; waited, wait = waited+wait, verifyAgain(waited+wait) {
		f := e.glance(ctx, spec)
		if ctx.Err() == nil || last.at.IsZero() {
			last = f // one that the timeout cut says less than the one before
		}
		if last.problem(want) == nil || !e.cfg.Now().Add(wait).Before(until) {
			return last
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return last
		}
	}
}

func (e *Engine) glance(ctx context.Context, spec *agentpb.TargetSpec) finding {
	f := finding{at: e.cfg.Now(), probed: spec.GetVerifyAddress() != ""}
	held, err := e.current(ctx, spec)
	if err != nil {
		f.unread = err
		return f
	}
	f.installed = held.Leaf
	if !f.probed {
		return f
	}
	if f.proof, f.unanswered = e.cfg.Probe(ctx, spec.GetVerifyAddress(), spec.GetServerName()); f.unanswered == nil {
		f.served = f.proof.Leaf
	}
	return f
}

// current reads a target while no deployment switches it.
func (e *Engine) current(ctx context.Context, spec *agentpb.TargetSpec) (target.Served, error) {
	unlock, err := e.targets.lock(ctx, spec.GetId())
	if err != nil {
		return target.Served{}, err
	}
	defer unlock()
	t, err := e.open(ctx, spec)
	if err != nil {
		return target.Served{}, err
	}
	return t.Current(ctx)
}

// verifyNow carries out a VerifyWork.
func (e *Engine) verifyNow(ctx context.Context, w *agentpb.VerifyWork) (*agentpb.Deployed, error) {
	timeout := e.cfg.VerifyTimeout()
	if ms := w.GetVerifyTimeoutMs(); ms > 0 {
		timeout = time.Duration(ms) * time.Millisecond
	}
	want := target.Fingerprint(w.GetFingerprint())
	f := e.look(ctx, w.GetTarget(), want, min(timeout, maxVerify))
	if ctx.Err() != nil {
		return nil, fault.Wrap(fault.Retryable, context.Cause(ctx), "it was stopped before it was done")
	}
	err := f.problem(want)
	id := w.GetTarget().GetId()
	switch p := e.shelf.get(id); {
	case p != nil && p.leaf == want && p.certificateID == w.GetCertificateId() && p.generation == w.GetGeneration():
		e.judge(p, f)
	case p == nil && err == nil:
		// Deployed before records were kept, or the record was damaged.
		e.keep(&placed{spec: w.GetTarget(), certificateID: w.GetCertificateId(), generation: w.GetGeneration(), leaf: want})
	}
	if err != nil {
		return nil, err
	}
	out := &agentpb.Deployed{InstalledFingerprint: bytesOf(f.installed)}
	if f.probed {
		out.ServedFingerprint, out.ServedUnixUs, out.Address = bytesOf(f.served), f.proof.At.UnixMicro(), clean(f.proof.Address, 300, false)
	}
	return out, nil
}
