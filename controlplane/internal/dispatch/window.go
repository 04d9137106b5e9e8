package dispatch

import (
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// Of an agent with much open work a window is in hand, and what the agent has. The window is read anew when half of it was
// given, or when credit of a class is left and nothing of the class in hand; so each read is paid for by what it lets go
// out. What waits and is not in the new window is forgotten: the store brings it again when its turn has come.

const (
	// windowLow is half of what a window has of a kind.
	windowLow = domain.WorkWindow / 2
	// turnPause is between windows of which nothing could be given, because the jobs of all owners in them rest.
	turnPause = time.Second
)

// window notes what lies beyond an answer.
func (m *machine) window(w domain.OpenWork) {
	m.more, m.moreOwners, m.onward = [Classes]bool{}, w.MoreOwners, w.Next
	for _, k := range w.More {
		m.more[ClassOf(k)] = true
	}
}

// refill plans a Load when the window runs low.
func (m *machine) refill() {
	if m.loading || m.resting {
		return
	}
	for c := range Classes {
		if !m.low(c) {
			continue
		}
		if m.given[c] > 0 {
			m.reload(m.at)
			return
		}
		m.reload(later(m.at, m.loadedAt.Add(turnPause)))
	}
}

// low reports whether the next window may have work of the class that could go out, and this one soon has not.
func (m *machine) low(c Class) bool {
	switch {
	case m.more[c] && m.given[c] >= windowLow:
		return true
	case m.credits[c] == 0 || m.inHand(c) > 0:
		return false
	default:
		return m.moreOwners || m.more[c] && m.given[c] > 0
	}
}

// load begins a Load, of the next owners if these have had their turn.
func (m *machine) load() {
	turned := false
	for c := range Classes {
		turned = turned || m.low(c)
	}
	if turned {
		m.after = m.onward
	}
	m.loading, m.loadAt, m.woken, m.loadedAt = true, time.Time{}, false, m.at
	m.loads++
	m.given = [Classes]int{}
	m.do(Load{Verify: m.verify, Out: m.withAgent(), After: m.after})
	m.verify = false
}

// withAgent are the jobs that the agent has, or will have.
func (m *machine) withAgent() []domain.JobRef {
	var refs []domain.JobRef
	for _, it := range m.items {
		switch {
		case it.phase == waiting:
		case it.bare:
			refs = append(refs, domain.JobRef{JobID: it.work.Job.ID})
		default:
			refs = append(refs, it.ref())
		}
	}
	return refs
}

// inHand is how many jobs of a class wait for nothing but credit; Classes: of all.
func (m *machine) inHand(c Class) int {
	n := 0
	for _, it := range m.items {
		if it.phase == waiting && (c == Classes || c == ClassOf(it.work.Job.Kind)) && !m.at.Before(it.work.Job.RunAt) && !m.at.Before(it.notBefore) {
			n++
		}
	}
	return n
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
