package stream

import (
	"slices"
	"time"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

// Backoff bounds the delays between connections.
type Backoff struct {
	// First is the window of the first delay; it doubles with every failure.
	First time.Duration
	// Young caps the window while the outage is younger than YoungFor.
	Young    time.Duration
	YoungFor time.Duration
	// Old is what the cap grows to afterwards.
	Old time.Duration
	// Stable is how long a stream must have lived for its end to count as a first failure.
	Stable time.Duration
}

// DefaultBackoff is for real fleets: a node that restarts gets its agents back within seconds but not in one instant,
// and a long outage costs next to nothing.
func DefaultBackoff() Backoff {
	return Backoff{First: time.Second, Young: 5 * time.Second, YoungFor: 2 * time.Minute, Old: 2 * time.Minute, Stable: 10 * time.Second}
}

// Route is where to connect next and when; a value, advanced by Next.
type Route struct {
	// Seeds are the configured addresses, at least one; Known those that the last Welcome with any named.
	Seeds, Known []string
	// Prefer are addresses a Move named, tried before all others, each once.
	Prefer []string
	// Last is the address that was tried last.
	Last string
	// Failures in a row, and since when there has been no stable stream (zero: there was one).
	Failures int
	Since    time.Time
}

// End says how a connection ended.
type End struct {
	// Welcomed is when the server's Welcome arrived; zero: never.
	Welcomed time.Time
	// Known are the nodes that Welcome named.
	Known []string
	// Goodbye and Move are set if the server sent them.
	Goodbye *agentpb.Goodbye
	Move    *agentpb.Move
	// Left says that this side ended the stream in order (Move, renewed identity): come back at once.
	Left bool
	// Err is why it ended otherwise.
	Err error
}

// maxAsked bounds what a Goodbye may ask for.
const maxAsked = time.Hour

// supersededWait keeps a machine and its clone from taking the stream from each other many times a second.
const supersededWait = 5 * time.Second

// candidates returns all known addresses without duplicates: seeds first, in order.
func (r Route) candidates() []string {
	var out []string
	for _, a := range slices.Concat(r.Seeds, r.Known) {
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

// Start returns the first address: any of the known ones. The order of the others is drawn as well, so that agents with
// one configuration spread over the nodes at the start and again when a node is lost. rnd returns numbers in [0,1).
func (r Route) Start(rnd func() float64) (Route, string) {
	r.Seeds, r.Known = shuffled(r.Seeds, rnd), shuffled(r.Known, rnd)
	c := r.candidates()
	r.Last = c[int(rnd()*float64(len(c)))%len(c)]
	return r, r.Last
}

func shuffled(list []string, rnd func() float64) []string {
	list = slices.Clone(list)
	for i := len(list) - 1; i > 0; i-- {
		j := int(rnd() * float64(i+1))
		list[i], list[j] = list[j], list[i]
	}
	return list
}

// Next decides, after a connection to r.Last ended as e at now, what to try next and after which delay. rnd returns
// numbers in [0,1).
func (r Route) Next(b Backoff, now time.Time, e End, rnd func() float64) (Route, string, time.Duration) {
	if e.Known != nil {
		r.Known = slices.Clone(e.Known)
	}
	if !e.Welcomed.IsZero() {
		// A Move has had its effect; what else it named is of no interest any more.
		r.Prefer = nil
	}
	stable := !e.Welcomed.IsZero() && now.Sub(e.Welcomed) >= b.Stable
	if stable || e.Left {
		r.Failures, r.Since = 0, time.Time{}
	}
	if r.Since.IsZero() {
		r.Since = now
	}
	if e.Move != nil {
		r.Prefer = slices.Clone(e.Move.GetNodes())
	}
	var delay time.Duration
	if !e.Left {
		delay = time.Duration(rnd() * float64(b.window(r.Failures, now.Sub(r.Since))))
		r.Failures++
	}
	if g := e.Goodbye; g != nil {
		asked := min(time.Duration(g.GetReconnectAfterMs())*time.Millisecond, maxAsked)
		if g.GetReason() == agentpb.Goodbye_REASON_SUPERSEDED {
			asked = max(asked, supersededWait)
		}
		if asked > 0 {
			// A quarter of spread, so that what was told the same does not return the same instant.
			delay = max(delay, asked+time.Duration(rnd()*float64(asked)/4))
		}
	}
	r.Last, r.Prefer = r.pick(e)
	return r, r.Last, delay
}

// pick chooses the address after r.Last in the ring of candidates, so that another node is always tried first. A
// stream that this side left without being moved (a renewed identity) goes back to its node.
func (r Route) pick(e End) (string, []string) {
	if len(r.Prefer) > 0 {
		return r.Prefer[0], r.Prefer[1:]
	}
	if e.Left && e.Move == nil {
		return r.Last, nil
	}
	c := r.candidates()
	return c[(slices.Index(c, r.Last)+1)%len(c)], nil
}

// window is the range of a full-jitter delay.
func (b Backoff) window(failures int, age time.Duration) time.Duration {
	w := b.First << min(failures, 20)
	if w <= 0 {
		w = b.Old
	}
	limit := b.Young
	for past := age - b.YoungFor; past >= 0 && limit < b.Old; past -= b.YoungFor {
		limit *= 2
	}
	return min(w, limit, b.Old)
}
