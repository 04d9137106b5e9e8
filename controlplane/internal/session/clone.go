package session

import (
	"slices"
	"time"
)

const (
	// cloneWindow is how far back boots are compared: two machines that take the stream from each other meet every few
	// seconds, and what a host did an hour ago says nothing.
	cloneWindow = 10 * time.Minute
	// cloneReturns is how often a boot that another had replaced must come back. A restart never does: boot ids are
	// random. Once may be a Hello that was delayed on its way.
	cloneReturns = 2
	// bootsKept bounds what is remembered per agent.
	bootsKept = 8
)

// boots are the boot ids under one identity, each where it replaced another, oldest first. A value.
type boots []boot

type boot struct {
	id string
	at time.Time
}

// hello notes a Hello and says whether two machines use the identity: their boot ids alternate (A, B, A, B). An empty id
// is not known and says nothing.
func (b boots) hello(id string, at time.Time) (boots, bool) {
	if id == "" {
		return b, false
	}
	next := slices.Clone(b)
	next = slices.DeleteFunc(next, func(x boot) bool { return at.Sub(x.at) > cloneWindow })
	if n := len(next); n > 0 && next[n-1].id == id {
		// The same process again; its former Hello counts as now, so that a quiet pair is still seen.
		next[n-1].at = at
		return next, false
	}
	next = append(next, boot{id, at})
	if len(next) > bootsKept {
		next = next[len(next)-bootsKept:]
	}
	returns := 0
	for i, x := range next {
		if slices.ContainsFunc(next[:i], func(y boot) bool { return y.id == x.id }) {
			returns++
		}
	}
	return next, returns >= cloneReturns
}

// stale reports whether nothing in it matters any more at now.
func (b boots) stale(now time.Time) bool {
	return len(b) == 0 || now.Sub(b[len(b)-1].at) > cloneWindow
}
