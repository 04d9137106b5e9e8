package work

import (
	"context"
	"math/rand/v2"
	"time"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

const (
	// watchLeast bounds how often a setting may have targets looked at.
	watchLeast = time.Second
	// watchAgain is after how long a look that came to nothing, or did not happen because of a deployment, is made again.
	watchAgain = time.Minute
)

// Watch looks by itself, every WatchInterval, at each target that a deployment left a certificate at, and tells the server
// while what is there differs from that, and when it ceases to. It returns when ctx ends.
//
// Each target has its own time, spread over the interval, so that neither the targets of a host nor the hosts of a fleet
// are looked at all at once.
func (e *Engine) Watch(ctx context.Context) {
	due := map[string]time.Time{}
	var every time.Duration
	for {
		now := e.cfg.Clock.Now()
		if set := e.cfg.WatchInterval(); set != every {
			every = set
			clear(due)
		}
		next := time.Time{}
		if every > 0 {
			every := max(every, watchLeast)
			next = now.Add(every)
			kept := e.shelf.all()
			known := make(map[string]bool, len(kept))
			for _, p := range kept {
				id := p.spec.GetId()
				known[id] = true
				at, ok := due[id]
				if !ok {
					at = now.Add(time.Duration(rand.Float64() * float64(every))) //nolint:gosec // spreads looks, guards nothing
				}
				if !at.After(now) {
					wait := every - every/10 + time.Duration(rand.Float64()*float64(every)/5) //nolint:gosec // spreads looks, guards nothing
					if again := e.observe(ctx, id); again {
						wait = min(wait, watchAgain)
					}
					if ctx.Err() != nil {
						return
					}
					at = e.cfg.Clock.Now().Add(wait)
				}
				if due[id] = at; at.Before(next) {
					next = at
				}
			}
			for id := range due {
				if !known[id] {
					delete(due, id)
				}
			}
		}
		if !e.pause(ctx, next) {
			return
		}
	}
}

// pause waits until at (zero: without end), or until what is watched has changed. It returns false when ctx has ended.
func (e *Engine) pause(ctx context.Context, at time.Time) bool {
	var ring <-chan time.Time
	if !at.IsZero() {
		t := e.cfg.Clock.NewTimer(max(at.Sub(e.cfg.Clock.Now()), 0))
		defer t.Stop()
		ring = t.Chan()
	}
	select {
	case <-ring:
	case <-e.watchChanged:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

// Rewatch makes Watch look at its settings and targets again.
func (e *Engine) Rewatch() {
	select {
	case e.watchChanged <- struct{}{}:
	default:
	}
}

// Forget ends the watch over a target that is gone.
func (e *Engine) Forget(targetID string) {
	if err := e.shelf.drop(targetID); err != nil {
		e.cfg.Log.Warn("record of a deployment not removed", "target_id", clean(targetID, maxIDLength, false), "err", err)
	}
	e.Rewatch()
}

// keep remembers a deployment. It is a fact whether or not the disk takes the record.
func (e *Engine) keep(p *placed) {
	if err := e.shelf.put(p); err != nil {
		e.cfg.Log.Error("deployment not recorded; after a restart nobody looks whether it stays in place", "target_id", clean(p.spec.GetId(), maxIDLength, false), "err", err)
	}
	e.Rewatch()
}

// observe looks at one target. again asks for another look soon.
func (e *Engine) observe(ctx context.Context, targetID string) (again bool) {
	p := e.shelf.get(targetID)
	if p == nil || !e.placedHere(targetID) {
		return false
	}
	e.mu.Lock()
	busy := e.deployingLocked(targetID)
	e.mu.Unlock()
	if busy {
		return true
	}
	f := e.look(ctx, p.spec, p.leaf, min(e.cfg.VerifyTimeout(), maxVerify))
	if ctx.Err() != nil {
		return false
	}
	return e.judge(p, f)
}

// placedHere reports whether the server still has the target on this agent.
func (e *Engine) placedHere(targetID string) bool {
	if e.cfg.Targets == nil {
		return true
	}
	for _, t := range e.cfg.Targets() {
		if t.GetId() == targetID {
			return true
		}
	}
	return false
}

// deployingLocked reports whether a deployment to the target is open: what is found there meanwhile says nothing.
func (e *Engine) deployingLocked(targetID string) bool {
	for _, it := range e.model.items {
		if d := it.entry.Assignment.GetDeploy(); d != nil && d.GetTarget().GetId() == targetID {
			return true
		}
	}
	return false
}

// judge draws the conclusion of a look at p, unless a deployment has begun or ended since. again: it came to nothing.
func (e *Engine) judge(p *placed, f finding) (again bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	id := p.spec.GetId()
	if e.shelf.get(id) != p || e.deployingLocked(id) {
		return true
	}
	next, say := decide(p, f)
	again = next.unanswered > 0 && next.unanswered < unansweredMost
	if say == nil {
		e.shelf.note(p, next)
		return again
	}
	if pr := say.GetProblem(); pr != nil {
		e.cfg.Log.Warn("target is not as it was deployed", "target_id", clean(id, maxIDLength, false), "certificate_id", p.certificateID, "class", pr.GetClass(), "reason", pr.GetMessage())
	} else {
		e.cfg.Log.Info("target is as it was deployed again", "target_id", clean(id, maxIDLength, false), "certificate_id", p.certificateID)
	}
	if err := e.shelf.put(next); err != nil {
		e.cfg.Log.Warn("observation not recorded; it is told, but perhaps not again", "target_id", clean(id, maxIDLength, false), "err", err)
	}
	if e.sink != nil {
		e.sink.Post(observedMessage(say))
	}
	return again
}

func observedMessage(o *agentpb.Observed) *agentpb.ConnectRequest {
	return &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Observed{Observed: o}}
}

// tellLocked says again on a new stream what differs. That something ceased to differ is said on one more stream, because
// the former may have broken before it arrived.
func (e *Engine) tellLocked() {
	for _, p := range e.shelf.all() {
		if p.said == nil || e.deployingLocked(p.spec.GetId()) || !e.placedHere(p.spec.GetId()) {
			continue
		}
		e.sink.Post(observedMessage(p.said))
		if p.said.GetProblem() != nil {
			continue
		}
		next := *p
		next.said = nil
		if err := e.shelf.put(&next); err != nil {
			e.cfg.Log.Warn("observation not forgotten; it is told once more", "target_id", clean(p.spec.GetId(), maxIDLength, false), "err", err)
		}
	}
}
