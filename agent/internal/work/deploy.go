package work

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"slices"
	"time"

	"github.com/certmesh/certmesh/agent/internal/journal"
	"github.com/certmesh/certmesh/agent/internal/keystore"
	"github.com/certmesh/certmesh/connectors/target"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// deployment is one DeployWork on its way.
type deployment struct {
	e       *Engine
	id      string
	attempt int64
	work    *agentpb.DeployWork
	receipt target.Receipt // of an installation that is not finished
	mat     target.Material
	spki    keystore.SPKI
	tgt     target.Target
	domain  string
	load    func(ctx context.Context) error
	began   time.Time
}

// slow is how long a deployment lasts before its steps are told; a quick one is told by its result.
const slow = time.Second

func (d *deployment) progress(step string) {
	if d.e.cfg.Now().Sub(d.began) >= slow {
		d.e.progress(d.id, d.attempt, step)
	}
}

// deploy runs an entry to its outcome. begin ends when the assignment is cancelled or the process stops; act a little
// later: what was begun to be installed is finished or undone.
func (e *Engine) deploy(begin, act context.Context, entry *journal.Entry) (*agentpb.Deployed, error) {
	a := entry.Assignment
	d := &deployment{e: e, id: a.GetId(), attempt: a.GetAttempt(), work: a.GetDeploy(), receipt: target.Receipt(entry.Receipt), began: e.cfg.Now()}
	if err := d.material(); err != nil {
		// Nothing is installed with it; an open receipt is undone below.
		if len(d.receipt) > 0 {
			if uerr := d.abandon(begin, act); uerr != nil {
				err = joinUndo(err, uerr)
			}
		}
		return nil, err
	}
	if e.cfg.Targets != nil && len(d.receipt) == 0 {
		// A target that is in force was judged when it came.
		if held := e.cfg.Targets(); !slices.ContainsFunc(held, func(t *agentpb.TargetSpec) bool { return t.GetId() == d.work.GetTarget().GetId() }) {
			if err := e.claims.shared(d.work.GetTarget(), held); err != nil {
				return nil, err
			}
		}
	}
	unlock, err := e.targets.lock(begin, d.work.GetTarget().GetId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := d.open(begin); err != nil {
		return nil, err
	}
	cur, err := d.tgt.Current(begin)
	if err != nil {
		return nil, err
	}
	var proof target.Proof
	if cur.Leaf == d.mat.Leaf() {
		proof, err = d.present(begin, act)
	} else {
		proof, err = d.install(begin, act)
	}
	if err != nil {
		return nil, err
	}
	cur, err = d.tgt.Current(act)
	if err != nil {
		return nil, err
	}
	if cur.Leaf != d.mat.Leaf() {
		return nil, fault.New(fault.Conflict, "another certificate was installed at the target meanwhile; two placements may share one path")
	}
	if err := e.cfg.Keys.PutLeaf(d.work.GetCertificateId(), d.spki, d.mat.Chain[0].Raw); err != nil {
		// The list of held leaves is a convenience for recovery; the deployment is a fact.
		e.cfg.Log.Warn("deployed leaf not stored beside its key", "certificate_id", d.work.GetCertificateId(), "err", err)
	}
	d.record(proof)
	out := &agentpb.Deployed{InstalledFingerprint: cur.Leaf[:]}
	if !proof.Leaf.IsZero() {
		out.ServedFingerprint, out.ServedUnixUs = proof.Leaf[:], proof.At.UnixMicro()
		out.Address = clean(proof.Address, 300, false)
	}
	return out, nil
}

// record remembers what is there now, for Watch. What was said to differ before is over, and the next stream tells so, should
// the server have taken it after the deployment's result.
func (d *deployment) record(proof target.Proof) {
	p := &placed{spec: d.work.GetTarget(), certificateID: d.work.GetCertificateId(), generation: d.work.GetGeneration(), leaf: d.mat.Leaf()}
	if was := d.e.shelf.get(p.spec.GetId()); was != nil && was.said != nil && was.certificateID == p.certificateID && was.generation == p.generation {
		p.said = &agentpb.Observed{TargetId: p.spec.GetId(), CertificateId: p.certificateID, Generation: p.generation,
			InstalledFingerprint: bytesOf(p.leaf), ServedFingerprint: bytesOf(proof.Leaf), ObservedUnixUs: d.e.cfg.Now().UnixMicro()}
	}
	d.e.keep(p)
}

// material checks the chain and that its leaf is for a key of ours.
func (d *deployment) material() error {
	var chain []*x509.Certificate
	for i, der := range d.work.GetChain() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fault.InvalidField("chain", "certificate %d cannot be decoded", i+1)
		}
		chain = append(chain, c)
	}
	for i := 1; i < len(chain); i++ {
		if err := chain[i-1].CheckSignatureFrom(chain[i]); err != nil {
			return fault.Wrap(fault.Invalid, err, "chain: certificate %d is not signed by the one after it", i)
		}
	}
	if now := d.e.cfg.Now(); !now.Before(chain[0].NotAfter) {
		return fault.New(fault.Invalid, "the certificate expired at %s; check the host's clock or renew it", chain[0].NotAfter.UTC().Format(time.RFC3339))
	}
	id := d.work.GetCertificateId()
	d.spki = keystore.SPKIOf(chain[0])
	key, err := d.e.cfg.Keys.BySPKI(id, d.spki)
	if err != nil {
		return err
	}
	d.mat = target.Material{CertificateID: id, Generation: d.work.GetGeneration(), Chain: chain,
		KeyPEM: key.PEM}
	return nil
}

func (d *deployment) open(ctx context.Context) error {
	t, err := d.e.open(ctx, d.work.GetTarget())
	if err != nil {
		return err
	}
	d.tgt = t
	d.domain, d.load = domainOf(t, d.work.GetTarget().GetId())
	return nil
}

// present handles a target that already holds what is wanted: after a crash the service may not have loaded it.
func (d *deployment) present(begin, act context.Context) (target.Proof, error) {
	if len(d.receipt) == 0 {
		if p, err := d.verify(begin, 0); err == nil {
			return p, nil
		}
	}
	if err := d.e.domains.do(act, d.domain, &step{ctx: begin, activate: d.load,
		install: func(context.Context) error { return nil }}); err != nil {
		return target.Proof{}, d.rollback(act, err)
	}
	d.progress("activated")
	d.progress("verifying")
	p, err := d.verify(act, d.timeout())
	if err != nil {
		return p, d.rollback(act, err)
	}
	return p, nil
}

func (d *deployment) install(begin, act context.Context) (target.Proof, error) {
	if len(d.receipt) > 0 {
		// Staged by a former life of the agent and never committed.
		if err := d.tgt.Undo(act, d.receipt); err != nil {
			return target.Proof{}, err
		}
	}
	err := d.e.domains.do(act, d.domain, &step{ctx: begin, activate: d.load,
		install: func(ctx context.Context) error {
			if begin.Err() != nil {
				return fault.Wrap(fault.Retryable, context.Cause(begin), "it was stopped before anything was installed")
			}
			return d.commit(ctx)
		},
		undo: func(ctx context.Context) error {
			if len(d.receipt) == 0 {
				return nil
			}
			return d.undo(ctx)
		}})
	if err != nil {
		return target.Proof{}, err
	}
	d.progress("activated")
	d.progress("verifying")
	p, err := d.verify(act, d.timeout())
	if err != nil {
		return p, d.rollback(act, err)
	}
	return p, nil
}

// commit stages, journals the receipt, and only then installs.
func (d *deployment) commit(ctx context.Context) error {
	if err := d.e.writes.Acquire(ctx, 1); err != nil {
		return fault.Wrap(fault.Retryable, context.Cause(ctx), "it was stopped before anything was installed")
	}
	defer d.e.writes.Release(1)
	st, err := d.tgt.Stage(ctx, d.mat)
	if err != nil {
		return err
	}
	d.progress("staged")
	d.receipt = st.Receipt()
	if err := d.e.journalReceipt(d.id, d.attempt, d.receipt); err != nil {
		return err
	}
	if err := st.Commit(ctx); err != nil {
		return err
	}
	d.progress("committed")
	return nil
}

// undoTries is how often going back is tried: nothing else restores the host.
const undoTries = 3

func (d *deployment) undo(ctx context.Context) error {
	var err error
	for range undoTries {
		if err = d.tgt.Undo(ctx, d.receipt); err == nil || !fault.MayRetry(err) {
			return err
		}
	}
	return err
}

// rollback goes back to the former material and makes the service load it; it returns why.
func (d *deployment) rollback(act context.Context, why error) error {
	if len(d.receipt) == 0 {
		return why
	}
	// Its own patience: going back must happen even if the assignment was cancelled meanwhile.
	err := d.e.domains.do(act, d.domain, &step{ctx: act, activate: d.load, install: d.undo})
	return joinUndo(why, err)
}

// abandon settles an open receipt whose assignment will not be finished: what was installed is kept and loaded, because
// it was wanted; what was only staged is undone.
func (d *deployment) abandon(begin, act context.Context) error {
	unlock, err := d.e.targets.lock(begin, d.work.GetTarget().GetId())
	if err != nil {
		return err
	}
	defer unlock()
	if err := d.open(act); err != nil {
		return err
	}
	cur, err := d.tgt.Current(act)
	if err != nil {
		return err
	}
	if wantedLeaf(d.work) != cur.Leaf {
		return d.undo(act)
	}
	return d.e.domains.do(act, d.domain, &step{ctx: act, activate: d.load, install: func(context.Context) error { return nil }})
}

// wantedLeaf is the fingerprint of the chain's first certificate.
func wantedLeaf(w *agentpb.DeployWork) target.Fingerprint {
	if len(w.GetChain()) == 0 {
		return target.Fingerprint{}
	}
	return sha256.Sum256(w.GetChain()[0])
}

func (d *deployment) timeout() time.Duration {
	if ms := d.work.GetVerifyTimeoutMs(); ms > 0 {
		return min(time.Duration(ms)*time.Millisecond, maxVerify)
	}
	return min(d.e.cfg.VerifyTimeout(), maxVerify)
}

const (
	// maxVerify bounds what a setting may ask for; a target's lock is held meanwhile.
	maxVerify = 5 * time.Minute
	// A reloading service answers with the old certificate for some milliseconds, sometimes seconds. A probe costs it a
	// handshake, and what is asked too late is waited for in vain.
	verifyFirst = 2 * time.Millisecond
	verifyLast  = 500 * time.Millisecond
)

// verifyAgain is how long to wait for the next look: a quarter of what was waited so far, so that no more than that is lost.
func verifyAgain(waited time.Duration) time.Duration {
	return min(max(waited/4, verifyFirst), verifyLast)
}

// verify asks until the wanted leaf is seen or the timeout has passed; at least once. A target without a verify address
// is installed, not probed: the proof is zero then, and Current is read back by the caller.
func (d *deployment) verify(ctx context.Context, timeout time.Duration) (target.Proof, error) {
	look := d.look()
	if look == nil {
		return target.Proof{}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, max(timeout, time.Second))
	defer cancel()
	until := d.e.cfg.Now().Add(timeout)
	for waited, wait := time.Duration(0), verifyFirst; ; waited, wait = waited+wait, verifyAgain(waited+wait) {
		p, err := look(ctx)
		want := d.mat.Leaf()
		if err == nil && !bytes.Equal(p.Leaf[:], want[:]) {
			err = fault.New(fault.Conflict, "%s serves the certificate with SHA-256 %s, not the new one (%s); check that the address leads to this target", clean(p.Address, 300, false), p.Leaf, want)
		}
		if err == nil {
			return p, nil
		}
		if !d.e.cfg.Now().Add(wait).Before(until) {
			return target.Proof{}, err
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return target.Proof{}, err
		}
	}
}

func (d *deployment) look() func(ctx context.Context) (target.Proof, error) {
	if v, ok := d.tgt.(target.Verifier); ok {
		return func(ctx context.Context) (target.Proof, error) { return v.Verify(ctx, d.mat) }
	}
	addr, name := d.work.GetTarget().GetVerifyAddress(), d.work.GetTarget().GetServerName()
	if addr == "" {
		return nil
	}
	return func(ctx context.Context) (target.Proof, error) { return d.e.cfg.Probe(ctx, addr, name) }
}
