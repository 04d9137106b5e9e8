package permit

import (
	"cmp"
	"slices"
	"time"

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
)

// Granter decides, for who leads, which node may use how many permits. It is pure: times are arguments, counted from any
// moment on one monotonic clock that never goes back, and what it decides is carried out by a Leader. A term of
// leadership has a Granter of its own. It is not safe for concurrent use.
//
// What it keeps to: for each issuer the leases that may still be in use, each counted from when its request came, for its
// full length on this clock, never add up to more than the cap. A lease that replaces another counts beside it, the
// larger of the two, until the replaced one would have lapsed: its holder may have calls under it, or may never hear of
// the new one.
type Granter struct {
	lease time.Duration
	// opens is when the leases of former terms have lapsed, whoever granted them; nothing is granted before.
	opens time.Duration
	// firstID is of the first lease that this term may grant, nextID of the next: one more than the last that was committed.
	// The log takes no id twice, so nothing is granted any more by one who does not know of another's grants.
	firstID, nextID uint64
	// turns counts requests; it is the order in which holders take turns.
	turns   uint64
	issuers map[string]*issuer
	// known are the leases in the log.
	known map[holding]known
}

// holding is what leases replace each other by, in the log.
type holding struct{ issuer, node string }

// known is a lease in the log and when it can be ended there.
type known struct {
	id    uint64
	until time.Duration
}

// holder is one process of a node.
type holder struct{ node, instance string }

type issuer struct {
	holders map[holder]*holderState
	// pausedUntil is when the restraint that the issuer asked for ends, 0: none is known. logged is what the log says.
	pausedUntil, logged time.Duration
}

// holderState is what one holder wants of one issuer and may be using.
type holderState struct {
	want int
	// wantUntil is when the want is forgotten: who still wants asks again long before.
	wantUntil time.Duration
	// holds says that its last request was granted, since in which turn that began to be so, or not to be so.
	holds bool
	since uint64
	// charges are leases that may be in use, by id.
	charges []charge
}

type charge struct {
	id      uint64
	permits int
	rate    float64
	until   time.Duration
}

// Term is what a Granter starts from.
type Term struct {
	// Now is a time not before the leadership began.
	Now time.Duration
	// Lease is the length of leases.
	Lease time.Duration
	// Leases, Pauses and LastID are the log's.
	Leases []*clusterpb.PermitLease
	Pauses []*clusterpb.PauseIssuer
	LastID uint64
	// Seed begins the ids where the log has none. At random: a cluster whose Raft was wiped must not use ids again that
	// a message of before could mean.
	Seed uint64
}

// NewGranter starts a term. It waits one longest lease before it grants anything: the log may have been wiped, so what it
// does not say may be in use all the same.
func NewGranter(t Term) *Granter {
	g := &Granter{lease: t.Lease, opens: t.Now + t.Lease, nextID: t.LastID + 1, issuers: map[string]*issuer{}, known: map[holding]known{}}
	if t.LastID == 0 {
		g.nextID = t.Seed>>16 + 1
	}
	g.firstID = g.nextID
	for _, l := range t.Leases {
		g.opens = max(g.opens, t.Now+time.Duration(l.GetDurationMs())*time.Millisecond)
	}
	for _, l := range t.Leases {
		g.known[holding{l.GetIssuerId(), l.GetNodeId()}] = known{l.GetId(), g.opens}
	}
	for _, p := range t.Pauses {
		i := g.issuer(p.GetIssuerId())
		i.pausedUntil = t.Now + pauseOf(p.GetPauseMs())
		i.logged = i.pausedUntil
	}
	return g
}

// pauseOf is what is counted of a pause told in milliseconds.
func pauseOf(ms int64) time.Duration {
	return stretched(time.Duration(min(max(ms, 0), maxPause.Milliseconds())) * time.Millisecond)
}

// milliseconds rounds up: who waits too short asks in vain.
func milliseconds(d time.Duration) int64 { return int64((d + time.Millisecond - 1) / time.Millisecond) }

func (g *Granter) issuer(id string) *issuer {
	i := g.issuers[id]
	if i == nil {
		i = &issuer{holders: map[holder]*holderState{}}
		g.issuers[id] = i
	}
	return i
}

// Decision is what a request leads to.
type Decision struct {
	// Response is the answer, once Commands are in the log.
	Response *clusterpb.LeaseResponse
	// Grant must be committed before Response is given, and before the next request is asked about. If it was, Committed must
	// be called; else the holder hears of the failure alone.
	Grant *clusterpb.Command
	// Pause is to be committed, so that the next leader knows.
	Pause *clusterpb.Command
}

// Ask decides a request that the node sent and that arrived at now.
func (g *Granter) Ask(now time.Duration, node string, r *clusterpb.LeaseRequest, limits Limits) Decision {
	i, who := g.issuer(r.GetIssuerId()), holder{node, r.GetInstance()}
	g.turns++
	i.expire(now, g.turns)
	g.giveBack(i, holding{r.GetIssuerId(), node}, who, r.GetGivenBack())
	i.wants(now, who, min(int(r.GetWant()), limits.inFlight()), g)
	var d Decision
	if r.GetPauseMs() > 0 {
		i.pausedUntil = max(i.pausedUntil, now+pauseOf(r.GetPauseMs()))
		// Many calls are told the same at once; what prolongs a pause by little is not written again.
		if i.pausedUntil > i.logged+time.Second {
			i.logged = i.pausedUntil
			d.Pause = &clusterpb.Command{Body: &clusterpb.Command_Pause{Pause: &clusterpb.PauseIssuer{
				IssuerId: r.GetIssuerId(), PauseMs: milliseconds(i.pausedUntil - now)}}}
		}
	}
	d.Response = &clusterpb.LeaseResponse{}
	switch {
	case now < i.pausedUntil:
		ms := milliseconds(i.pausedUntil - now)
		d.Response.PauseMs, d.Response.RetryAfterMs, d.Response.Undecided = ms, ms, true
	case now < g.opens:
		d.Response.RetryAfterMs, d.Response.Undecided = milliseconds(g.opens-now), true
	case r.GetWant() > 0:
		permits, rate := i.share(now, who, limits)
		if permits <= 0 {
			i.holders[who].turn(false, g.turns)
			d.Response.RetryAfterMs = milliseconds(i.patience(now, who, g.lease))
			break
		}
		g.grant(now, i, who, permits, rate, r.GetIssuerId(), &d)
	}
	return d
}

func (g *Granter) grant(now time.Duration, i *issuer, who holder, permits int, rate float64, issuerID string, d *Decision) {
	id := g.nextID
	h := i.holders[who]
	h.turn(true, g.turns)
	until := now + g.lease
	// What the new lease covers in every respect need not be counted beside it.
	h.charges = slices.DeleteFunc(h.charges, func(c charge) bool { return c.permits <= permits && c.rate <= rate && c.until <= until })
	h.charges = append(h.charges, charge{id: id, permits: permits, rate: rate, until: until})
	d.Response.Permits, d.Response.Rate, d.Response.LeaseId = int32(permits), rate, id //nolint:gosec // At most what was wanted, an int32.
	d.Response.DurationMs = g.lease.Milliseconds()
	d.Grant = &clusterpb.Command{Body: &clusterpb.Command_Grant{Grant: &clusterpb.GrantPermits{Lease: &clusterpb.PermitLease{
		Id: id, IssuerId: issuerID, NodeId: who.node, Permits: d.Response.Permits, DurationMs: d.Response.DurationMs}}}}
}

// Committed says that the grant of a decision is in the log.
func (g *Granter) Committed(now time.Duration, grant *clusterpb.Command) {
	l := grant.GetGrant().GetLease()
	g.nextID = max(g.nextID, l.GetId()+1)
	g.known[holding{l.GetIssuerId(), l.GetNodeId()}] = known{l.GetId(), now + time.Duration(l.GetDurationMs())*time.Millisecond}
}

// turn notes whether the holder has permits, and since when.
func (h *holderState) turn(holds bool, turn uint64) {
	if h.holds != holds {
		h.holds, h.since = holds, turn
	}
}

// expire forgets what has lapsed.
func (i *issuer) expire(now time.Duration, turn uint64) {
	for who, h := range i.holders {
		h.charges = slices.DeleteFunc(h.charges, func(c charge) bool { return c.until <= now })
		if len(h.charges) == 0 {
			h.turn(false, turn)
		}
		if h.wantUntil <= now {
			h.want = 0
		}
		if h.want == 0 && len(h.charges) == 0 {
			delete(i.holders, who)
		}
	}
}

// giveBack ends the holder's leases up to id, if id is of this term: others' are over anyway.
func (g *Granter) giveBack(i *issuer, at holding, who holder, id uint64) {
	h := i.holders[who]
	if h == nil || id < g.firstID || id >= g.nextID {
		return
	}
	h.charges = slices.DeleteFunc(h.charges, func(c charge) bool { return c.id <= id })
	if k, ok := g.known[at]; ok && k.id <= id {
		g.known[at] = known{id: k.id}
	}
}

// wants records what the holder wants, and that other processes of its node want nothing any more.
func (i *issuer) wants(now time.Duration, who holder, want int, g *Granter) {
	for other, h := range i.holders {
		if other.node == who.node && other != who {
			h.want = 0
		}
	}
	h := i.holders[who]
	if want <= 0 {
		if h != nil {
			h.want = 0
		}
		return
	}
	if h == nil {
		h = &holderState{since: g.turns}
		i.holders[who] = h
	}
	h.want, h.wantUntil = want, now+g.lease
}

// share is what the holder may use besides what others may be using.
func (i *issuer) share(now time.Duration, who holder, limits Limits) (permits int, rate float64) {
	type asking struct {
		who holder
		*holderState
	}
	all := make([]asking, 0, len(i.holders))
	for other, h := range i.holders {
		all = append(all, asking{other, h})
	}
	slices.SortFunc(all, func(a, b asking) int { return inTurn(a.holderState, b.holderState, a.who, b.who) })
	restPermits, restRate := limits.inFlight(), limits.Rate
	wants := make([]int, len(all))
	for k, a := range all {
		wants[k] = a.want
		if a.who != who {
			p, r := a.inUse()
			restPermits -= p
			restRate -= r
		}
	}
	fair := shares(limits.inFlight(), wants)
	me := slices.IndexFunc(all, func(a asking) bool { return a.who == who })
	// What comes free is for those before it in turn, until they have their share; what it has of its own share it keeps.
	unreserved := restPermits
	for k, a := range all[:me] {
		p, _ := a.inUse()
		unreserved -= max(fair[k]-p, 0)
	}
	permits = min(fair[me], restPermits, max(unreserved, all[me].held()))
	if permits <= 0 || limits.Rate <= 0 {
		return permits, 0
	}
	rate = min(limits.Rate*float64(permits)/float64(limits.inFlight()), restRate)
	if rate < limits.Rate/float64(limits.inFlight())/2 {
		// A changed limit has others use nearly all of it until their leases lapse.
		return 0, 0
	}
	return permits, rate
}

// inTurn orders holders for what cannot be divided among all. First come those without, the longest waiting before the
// others; then those with permits, and who has had them longest is the first to go without. So each gets its turn.
func inTurn(a, b *holderState, whoA, whoB holder) int {
	names := cmp.Or(cmp.Compare(whoA.node, whoB.node), cmp.Compare(whoA.instance, whoB.instance))
	switch {
	case a.holds && !b.holds:
		return 1
	case b.holds && !a.holds:
		return -1
	case a.holds:
		return cmp.Or(cmp.Compare(b.since, a.since), names)
	default:
		return cmp.Or(cmp.Compare(a.since, b.since), names)
	}
}

// inUse is the most that the holder can be using.
func (h *holderState) inUse() (permits int, rate float64) {
	for _, c := range h.charges {
		permits, rate = max(permits, c.permits), max(rate, c.rate)
	}
	return permits, rate
}

// held is what the last grant to the holder left it.
func (h *holderState) held() int {
	if !h.holds || len(h.charges) == 0 {
		return 0
	}
	return h.charges[len(h.charges)-1].permits
}

// patience is when a holder that got nothing should ask again: when something lapses, but soon enough to see what is
// given back before.
func (i *issuer) patience(now time.Duration, who holder, lease time.Duration) time.Duration {
	wait := lease / 10
	for other, h := range i.holders {
		for _, c := range h.charges {
			if other != who {
				wait = min(wait, c.until-now)
			}
		}
	}
	return max(wait, lease/20)
}

// Sweep returns the commands that end in the log what has lapsed or was given back, and pauses that are over; none if
// there is nothing to say. One that cannot be committed is not said again: the next leader finds it there.
func (g *Granter) Sweep(now time.Duration) []*clusterpb.Command {
	var ended []uint64
	for at, k := range g.known {
		if k.until <= now {
			ended = append(ended, k.id)
			delete(g.known, at)
		}
	}
	var out []*clusterpb.Command
	if len(ended) > 0 {
		slices.Sort(ended)
		out = append(out, &clusterpb.Command{Body: &clusterpb.Command_End{End: &clusterpb.EndLeases{LeaseIds: ended}}})
	}
	var over []string
	for id, i := range g.issuers {
		i.expire(now, g.turns)
		if i.logged > 0 && i.pausedUntil <= now {
			i.logged = 0
			over = append(over, id)
		}
		if len(i.holders) == 0 && i.pausedUntil <= now {
			delete(g.issuers, id)
		}
	}
	slices.Sort(over)
	for _, id := range over {
		out = append(out, &clusterpb.Command{Body: &clusterpb.Command_Pause{Pause: &clusterpb.PauseIssuer{IssuerId: id}}})
	}
	return out
}
