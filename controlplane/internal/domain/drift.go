package domain

import "time"

// Observation is what an agent found at a target when it looked by itself, against what was deployed there last.
type Observation struct {
	AgentID, CertificateID, TargetID string
	// Generation is the one that was deployed.
	Generation int64
	// The fingerprints found, SHA-256 in hex; empty: none.
	InstalledFingerprint, ServedFingerprint string
	// Problem says in a sentence what differs; empty: nothing does (any more).
	Problem   string
	RequestID string
	At        time.Time
}

// DriftMemory is how long a restored placement is remembered to have drifted: what is changed again within it is put right
// only after FailureBackoff, so that two who want different certificates at one target do not fight without rest.
const DriftMemory = time.Hour

// Lags reports whether the placement is to be deployed when wanted is the leaf's current generation.
func (p Placement) Lags(wanted int64) bool {
	return p.InstalledGeneration < wanted || p.State == PlacementFailed || !p.DriftedAt.IsZero()
}

// DueAt is when a placement that lags is deployed, now or after its back-off.
func (p Placement) DueAt(now time.Time) time.Time {
	if p.BackoffUntil.After(now) {
		return p.BackoffUntil
	}
	return Micro(now)
}

// Drifted is p after something else was found there than was deployed. The back-off of a placement that was in place is
// the memory of its last restoration.
func (p Placement) Drifted(problem string, at time.Time) Placement {
	p.LastError, p.UpdatedAt = problem, Micro(at)
	if !p.DriftedAt.IsZero() {
		return p
	}
	p.DriftedAt = Micro(at)
	if p.State != PlacementServed && p.State != PlacementInstalled {
		return p
	}
	p.State = PlacementPending
	if p.BackoffUntil.After(at) {
		p.Failures++
		p.BackoffUntil = Micro(at.Add(FailureBackoff(p.Failures)))
	} else {
		p.Failures, p.BackoffUntil = 0, time.Time{}
	}
	return p
}

// Observed is p after o, when no deployment is open; fingerprint is that of the deployed generation, probed whether the
// target has a verify address. It is p itself where o is stale, says nothing new, or contradicts itself.
func (p Placement) Observed(o Observation, fingerprint string, probed bool) Placement {
	drifted := !p.DriftedAt.IsZero()
	if p.InstalledGeneration != o.Generation && (!drifted || p.InstalledGeneration != 0) {
		return p // another generation was deployed since
	}
	installed, served := o.InstalledFingerprint == fingerprint, o.ServedFingerprint == fingerprint
	if o.Problem == "" {
		if !drifted || !installed || probed && !served || !probed && o.ServedFingerprint != "" {
			return p
		}
		p.DriftedAt, p.LastError, p.UpdatedAt = time.Time{}, "", Micro(o.At)
		p.BackoffUntil = Micro(o.At.Add(DriftMemory))
		p.State, p.InstalledGeneration, p.InstalledFingerprint = PlacementInstalled, o.Generation, fingerprint
		if probed {
			p.State, p.ServedGeneration, p.ServedFingerprint, p.ServedAt = PlacementServed, o.Generation, fingerprint, Micro(o.At)
		}
		return p
	}
	next := p.Drifted(o.Problem, o.At)
	next.InstalledFingerprint, next.ServedFingerprint = o.InstalledFingerprint, o.ServedFingerprint
	next.InstalledGeneration, next.ServedGeneration = 0, 0
	if installed {
		next.InstalledGeneration = o.Generation
	}
	if served {
		next.ServedGeneration = o.Generation
	}
	same := next
	same.UpdatedAt = p.UpdatedAt
	if same == p {
		return p
	}
	return next
}
