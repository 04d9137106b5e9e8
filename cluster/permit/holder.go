package permit

import (
	"slices"
	"time"

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
)

// Holder is what one process holds and wants of one issuer's permits. It is pure: times are arguments, counted from any
// moment on this process's monotonic clock, and what it decides comes back as Effects for a Permits to carry out. It is
// not safe for concurrent use.
//
// What it keeps to: a call begins only under a lease with a permit to spare, and only if it must end before the lease
// does. The lease is counted from when it was asked for, so it began later for the leader than for us.
type Holder struct {
	issuerID, instance string
	lease, maxCall     time.Duration

	// held is the lease in use; permits is 0 without one. takes counts what was held so far.
	held  held
	takes uint64
	// spent is the highest lease id before held; spentCalls began under it or earlier ones and are in flight still.
	// returning: there is reason to say so as soon as spentCalls is 0.
	spent      uint64
	spentCalls int
	returning  bool

	inFlight, waiting int
	// queue is who waits, in order of arrival, with some who have left.
	queue []*Call
	// peak is the most that was in flight and waiting together since the last request.
	peak int

	// tokens are calls that the rate allows now, up to 1, as of tokensAt. They begin at 0 and grow only under a lease, so
	// that leases that move, and processes that start, bring no burst.
	tokens   float64
	tokensAt time.Duration

	// pausedUntil: the issuer asked for restraint. The leader was told the same up to told, and is still to be told of untold.
	pausedUntil, told, untold time.Duration
	// refuse: who cannot begin before the pause ends must be told.
	refuse bool

	// asked is the request that is out; seq numbers them. want and at are of the last one.
	asked     bool
	seq       uint64
	want      int
	at        time.Duration
	notBefore time.Duration
	failures  int
	closed    bool
}

// held is a lease in use.
type held struct {
	id      uint64
	permits int
	rate    float64
	// until is when the last call under it must have ended; renew is when to ask for the next.
	until, renew time.Duration
	// call is the longest that a call under it may take.
	call time.Duration
}

// Call is one call that wants to be made.
type Call struct {
	// deadline is when its caller gives up; forEver without one.
	deadline time.Duration
	state    callState
	// take is that of the lease it began under.
	take uint64
	// ready is for Permits: what became of it, once.
	ready chan outcome
}

type callState uint8

const (
	callWaits callState = iota
	callRuns
	callOver
)

const forEver = time.Duration(1<<63 - 1)

// Effects are what a step leads to.
type Effects struct {
	// Begin are calls that begin now, each with the time at which it must have ended.
	Begin []Begin
	// Refuse are calls that cannot begin in time. They are over.
	Refuse []*Call
	// Ask is a request for the leader; its answer comes back by Answer or Failed with Seq.
	Ask *clusterpb.LeaseRequest
	Seq uint64
	// Wake is when to call Tick, unless another step comes before; 0: nothing is due by time alone.
	Wake time.Duration
}

// Begin is a call that begins.
type Begin struct {
	Call  *Call
	Until time.Duration
}

// NewHolder is for the issuer in the process called instance. lease is how long leases usually are; no call takes longer
// than maxCall, at most MaxCall(lease).
func NewHolder(issuerID, instance string, lease, maxCall time.Duration) *Holder {
	return &Holder{issuerID: issuerID, instance: instance, lease: lease, maxCall: min(maxCall, MaxCall(lease))}
}

// Arrive says that c wants to be made.
func (h *Holder) Arrive(now time.Duration, c *Call) Effects {
	if h.closed || now < h.pausedUntil && c.deadline <= h.pausedUntil {
		c.state = callOver
		e := h.settle(now)
		e.Refuse = append(e.Refuse, c)
		return e
	}
	h.queue = append(h.queue, c)
	h.waiting++
	h.peak = max(h.peak, h.inFlight+h.waiting)
	return h.settle(now)
}

// Leave says that c, which has not begun, is wanted no more. After it has begun or was refused, Leave does nothing.
func (h *Holder) Leave(now time.Duration, c *Call) Effects {
	if c.state == callWaits {
		c.state = callOver
		h.waiting--
		if len(h.queue) > 2*h.waiting+16 {
			h.queue = slices.DeleteFunc(h.queue, func(c *Call) bool { return c.state != callWaits })
		}
	}
	return h.settle(now)
}

// End says that c, which had begun, is over. A pause above 0 is how long the issuer wants to be left alone from now.
func (h *Holder) End(now time.Duration, c *Call, pause time.Duration) Effects {
	if c.state == callRuns {
		c.state = callOver
		h.inFlight--
		if c.take != h.takes || h.held.permits == 0 {
			h.spentCalls--
		}
	}
	if pause > 0 {
		// All that is in flight is told much the same.
		if h.pause(now, pause) && h.pausedUntil > h.told+time.Second {
			h.untold = h.pausedUntil
		}
	}
	return h.settle(now)
}

// pause begins no call for d, or longer. It reports whether that is longer than was known.
func (h *Holder) pause(now, d time.Duration) bool {
	until := now + stretched(min(d, maxPause))
	if until <= h.pausedUntil {
		return false
	}
	h.pausedUntil, h.refuse = until, true
	return true
}

// Tick says that time has passed.
func (h *Holder) Tick(now time.Duration) Effects { return h.settle(now) }

// Answer takes the leader's answer to the request numbered seq; one to a request given up is ignored. jitter is in [0, 1).
func (h *Holder) Answer(now time.Duration, seq uint64, r *clusterpb.LeaseResponse, jitter float64) Effects {
	if !h.asked || seq != h.seq {
		return h.settle(now)
	}
	h.asked, h.failures = false, 0
	h.notBefore = now + time.Duration(r.GetRetryAfterMs())*time.Millisecond + part(h.lease/100, jitter)
	if r.GetRetryAfterMs() <= 0 {
		h.notBefore = h.at + h.lease/100
	}
	if r.GetPauseMs() > 0 {
		h.pause(now, time.Duration(r.GetPauseMs())*time.Millisecond)
	}
	if !r.GetUndecided() {
		h.adopt(now, r, jitter)
	}
	return h.settle(now)
}

// adopt replaces the lease in use, also by none.
func (h *Holder) adopt(now time.Duration, r *clusterpb.LeaseResponse, jitter float64) {
	h.fill(now)
	last := h.held
	h.held = held{}
	if use := usable(time.Duration(r.GetDurationMs()) * time.Millisecond); r.GetPermits() > 0 && h.at+use > now {
		// Half of it, a little earlier: the answer takes time, and a call may take the other half.
		h.held = held{id: r.GetLeaseId(), permits: int(r.GetPermits()), rate: r.GetRate(), until: h.at + use,
			renew: h.at + use*35/100 + part(use/10, jitter), call: min(h.maxCall, use/2)}
	}
	h.retire(last)
}

// retire notes that last is used no more for calls that begin.
func (h *Holder) retire(last held) {
	if last.id != 0 {
		h.spent = last.id
	}
	h.takes++
	h.spentCalls = h.inFlight
	h.returning = h.returning || last.permits > h.held.permits
}

// Failed says that the request numbered seq got no answer. jitter is in [0, 1).
func (h *Holder) Failed(now time.Duration, seq uint64, jitter float64) Effects {
	if !h.asked || seq != h.seq {
		return h.settle(now)
	}
	h.asked = false
	h.untold, h.told = max(h.untold, h.told), 0
	h.failures = min(h.failures+1, 10)
	most := min(h.lease/100<<h.failures, h.lease/10)
	h.notBefore = now + most/10 + part(most, jitter)
	return h.settle(now)
}

// Close refuses whoever waits and comes, and asks for nothing any more. Calls in flight go on.
func (h *Holder) Close(now time.Duration) Effects {
	h.closed, h.refuse = true, true
	return h.settle(now)
}

func part(d time.Duration, jitter float64) time.Duration { return time.Duration(float64(d) * jitter) }

// Leased is how many permits are held at now.
func (h *Holder) Leased(now time.Duration) int {
	if now >= h.held.until {
		return 0
	}
	return h.held.permits
}

// settle begins what can begin and asks for what is missing.
func (h *Holder) settle(now time.Duration) Effects {
	var e Effects
	h.fill(now)
	if h.held.permits > 0 && now >= h.held.until {
		last := h.held
		h.held = held{}
		h.retire(last)
		h.returning = false // It has lapsed for the leader too before long.
	}
	h.turnAway(now, &e)
	stuck := h.begin(now, &e)
	if h.closed {
		return e
	}
	wake := forEver
	if h.waiting > 0 {
		wake = min(wake, stuck)
	}
	if !h.asked {
		if due := h.due(now); due <= now {
			h.ask(now, &e)
		} else {
			wake = min(wake, due)
		}
	}
	if wake < forEver {
		e.Wake = wake
	}
	return e
}

// turnAway refuses calls that cannot begin in time.
func (h *Holder) turnAway(now time.Duration, e *Effects) {
	if !h.refuse {
		return
	}
	h.refuse = false
	if !h.closed && now >= h.pausedUntil {
		return
	}
	for _, c := range h.queue {
		if c.state == callWaits && (h.closed || c.deadline <= h.pausedUntil) {
			h.over(c, e)
		}
	}
}

func (h *Holder) over(c *Call, e *Effects) {
	c.state = callOver
	h.waiting--
	e.Refuse = append(e.Refuse, c)
}

// begin begins calls in order of arrival, until one cannot; it returns when time alone lets it (forEver: it does not).
func (h *Holder) begin(now time.Duration, e *Effects) time.Duration {
	for len(h.queue) > 0 {
		c := h.queue[0]
		if c.state == callWaits {
			if c.deadline <= now {
				h.over(c, e)
				continue
			}
			until := min(c.deadline, now+h.held.call)
			switch {
			case now < h.pausedUntil:
				return h.pausedUntil
			case h.inFlight >= h.held.permits || until >= h.held.until:
				return forEver
			case h.held.rate > 0 && h.tokens < 1:
				return now + time.Duration((1-h.tokens)/(h.held.rate*paceShare)*float64(time.Second)) + 1
			}
			if h.held.rate > 0 {
				h.tokens--
			}
			c.state, c.take = callRuns, h.takes
			h.waiting--
			h.inFlight++
			e.Begin = append(e.Begin, Begin{c, until})
		}
		h.queue[0] = nil
		h.queue = h.queue[1:]
	}
	h.queue = nil
	return forEver
}

// fill lets tokens grow for the time that has passed under the lease.
func (h *Holder) fill(now time.Duration) {
	to := min(now, h.held.until)
	if h.held.permits > 0 && h.held.rate > 0 && to > h.tokensAt {
		h.tokens = min(1, h.tokens+h.held.rate*paceShare*(to-h.tokensAt).Seconds())
	}
	h.tokensAt = now
}

// due is when to ask next, were nothing else to happen; forEver: there is nothing to ask for.
func (h *Holder) due(now time.Duration) time.Duration {
	demand := h.inFlight + h.waiting
	var at time.Duration
	switch {
	case h.untold > now:
		if h.failures == 0 {
			return now
		}
		at = now
	case h.returning && h.spentCalls == 0:
		return now // Others wait for it; it is one request.
	case now < h.pausedUntil:
		if h.waiting == 0 {
			return forEver
		}
		at = h.pausedUntil
	case h.held.permits == 0:
		if h.waiting == 0 {
			return forEver
		}
		at = now
	default:
		at = h.held.renew
		if demand > h.held.permits && h.held.permits >= h.want {
			// It got all that it asked for, and that has become too little.
			at = now
		}
	}
	return max(at, h.notBefore)
}

// ask asks for what has been needed of late. What has not been used since the last request is given back.
func (h *Holder) ask(now time.Duration, e *Effects) {
	h.want = max(h.peak, h.inFlight+h.waiting)
	h.peak = h.inFlight + h.waiting
	if h.want == 0 && h.held.permits > 0 && now >= h.held.renew {
		last := h.held
		h.fill(now)
		h.held = held{}
		h.retire(last)
	}
	r := &clusterpb.LeaseRequest{IssuerId: h.issuerID, Instance: h.instance, Want: int32(min(h.want, 1<<20))} //nolint:gosec // Bounded here.
	if h.spentCalls == 0 {
		r.GivenBack, h.returning = h.spent, false
	}
	if h.untold > now {
		r.PauseMs = milliseconds(h.untold - now)
	}
	h.seq++
	h.told, h.untold = max(h.told, h.untold), 0
	h.asked, h.at = true, now
	e.Ask, e.Seq = r, h.seq
}
