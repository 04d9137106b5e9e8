package permit

import (
	"container/heap"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/cluster/internal/fsm"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
)

// world is a cluster in simulated time: nodes with wrong clocks, an unreliable network, a Raft that elects anew, loses its
// quorum or is wiped, and one issuer that watches what reaches it. A seed decides everything.
type world struct {
	r       *rand.Rand
	break_  mutation
	now     time.Duration // true time
	events  eventQueue
	nth     int
	limits  Limits
	lease   time.Duration
	nodes   []*simNode
	log     *clusterpb.Snapshot
	leader  *simNode
	term    int
	quorum  bool
	calm    bool
	callNow int
	// level is of a bucket that leaks at the allowed rate and gets one drop a call.
	level   float64
	levelAt time.Duration
	begun   int
	most    int
	pauses  int
	answers int
	// long is how many calls take as long as they may; slow, how many messages take long.
	long, slow float64
	harsh      bool
	// deaf nodes notice late that they lead, or lead no more, and leadership goes to and fro between two.
	deaf    bool
	demands []int
	// peace is the longest time between two troubles.
	peace   time.Duration
	tells   bool
	history []string
	failure string
}

// mutation breaks one rule, to see that the test notices.
type mutation string

const (
	intact          mutation = "intact"
	noWait          mutation = "a new leader grants at once"
	noMax           mutation = "a new lease counts in place of the old one"
	countFromAnswer mutation = "a lease is counted from its answer"
	wholeLease      mutation = "a lease is used to its very end"
	noInstance      mutation = "a process that starts counts as the one before"
	hastyReturn     mutation = "a lease is given back with calls in flight"
	noDeadline      mutation = "a call begins whatever is left of the lease"
	noCommit        mutation = "a grant is answered before it is committed"
	fullBucket      mutation = "a lease begins with a full bucket"
	deafToPause     mutation = "a node does not heed the issuer's wish"
)

type event struct {
	at  time.Duration
	nth int
	do  func()
}

type eventQueue []event

func (q eventQueue) Len() int { return len(q) }
func (q eventQueue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].nth < q[j].nth
}
func (q eventQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *eventQueue) Push(x any)   { *q = append(*q, x.(event)) }
func (q *eventQueue) Pop() any {
	last := (*q)[len(*q)-1]
	*q = (*q)[:len(*q)-1]
	return last
}

// simNode is a node: its clock survives the process, its Holder does not.
type simNode struct {
	w    *world
	name string
	// local is what its clock says at true time localAt; it runs at rate since.
	local, localAt time.Duration
	rate           float64
	cut            bool

	process int
	h       *Holder
	wake    time.Duration
	// leads is its Granter while it believes to lead, in term.
	leads *Granter
	// busy: a grant is on its way into the log; requests wait for it.
	busy  bool
	queue []func()
	// demand is how many calls it keeps wanting.
	demand  int
	wanting int
	running []*simCall
	done    int
	// pausedUntil is when it may call again by what it was told itself.
	pausedUntil time.Duration
	// granterPause is the same of what it was told as the one that leads.
	granterPause time.Duration
}

type simCall struct {
	call *Call
	// until is its deadline on the node's clock; length is how long it would take by true time.
	until   time.Duration
	ends    time.Duration
	version int
}

func newWorld(seed uint64, m mutation) *world {
	w := &world{r: rand.New(rand.NewPCG(seed, 7)), break_: m, lease: 10 * time.Second, quorum: true, log: &clusterpb.Snapshot{}}
	w.long, w.slow = []float64{0.1, 0.5, 0.95}[w.r.IntN(3)], []float64{0.05, 0.5}[w.r.IntN(2)]
	w.peace = []time.Duration{2 * time.Second, 6 * time.Second, 20 * time.Second}[w.r.IntN(3)]
	w.limits = Limits{InFlight: 1 + w.r.IntN(10)}
	if w.r.IntN(2) == 0 {
		w.limits.Rate = 0.5 + w.r.Float64()*20
	}
	w.demands, w.deaf = []int{0, 1, 3, 30}, w.r.IntN(10) == 0
	// A third are worlds in which all depends on clocks: they are as wrong as they can be, calls last as long as they may,
	// answers come late, everybody takes all that can be had, and nodes are cut off for longer than a lease.
	if w.harsh = w.r.IntN(3) == 0 || m == countFromAnswer || m == wholeLease; w.harsh {
		w.long, w.slow, w.peace = 0.95, 0.9, 10*time.Second
		w.limits, w.demands = Limits{InFlight: 2 + w.r.IntN(3)}, []int{30}
	}
	for i := range 1 + w.r.IntN(7) {
		n := &simNode{w: w, name: fmt.Sprintf("n%d", i), local: time.Duration(w.r.IntN(1e9)), rate: 1}
		n.drift()
		n.boot()
		w.nodes = append(w.nodes, n)
	}
	return w
}

// say notes what happens, in the second run of a world that failed.
func (w *world) say(format string, args ...any) {
	if !w.tells {
		return
	}
	line := fmt.Sprintf("%9.3f ", w.now.Seconds()) + fmt.Sprintf(format, args...)
	if w.history = append(w.history, line); len(w.history) > 60 {
		w.history = w.history[1:]
	}
}

func (w *world) fail(format string, args ...any) {
	if w.failure == "" {
		w.say(format, args...)
		w.failure = fmt.Sprintf(format, args...) + "\n" + strings.Join(w.history, "\n")
	}
}

func (w *world) after(d time.Duration, do func()) {
	w.nth++
	heap.Push(&w.events, event{w.now + max(d, 0), w.nth, do})
}

// upTo is a random duration, small ones as likely as large ones.
func (w *world) upTo(d time.Duration) time.Duration {
	f := w.r.Float64()
	return time.Duration(float64(d) * f * f * f)
}

func (w *world) chance(p float64) bool { return w.r.Float64() < p }

// clock is what the node's monotonic clock says.
func (n *simNode) clock() time.Duration {
	n.local += time.Duration(float64(n.w.now-n.localAt) * n.rate)
	n.localAt = n.w.now
	return n.local
}

// inTrue is how long it takes until the node's clock says at.
func (n *simNode) inTrue(at time.Duration) time.Duration {
	return time.Duration(float64(at-n.clock())/n.rate) + 1
}

// drift changes how wrong the clock runs: up to a tenth, most likely by all of it.
func (n *simNode) drift() {
	n.clock()
	n.rate = []float64{0.9, 1.1, 0.9 + 0.2*n.w.r.Float64()}[n.w.r.IntN(3)]
	if n.w.harsh {
		n.rate = []float64{0.9, 1.1}[n.w.r.IntN(2)]
	}
	for _, s := range n.running {
		n.schedule(s)
	}
}

// boot starts a process.
func (n *simNode) boot() {
	n.process++
	n.h = NewHolder("iss", fmt.Sprintf("%s.%d", n.name, n.process), n.w.lease, MaxCall(n.w.lease))
	if n.w.break_ == noInstance {
		n.h.instance = n.name
	}
	n.wake, n.leads, n.wanting, n.running, n.pausedUntil, n.granterPause, n.busy, n.queue = 0, nil, 0, nil, 0, 0, false, nil
}

// kill ends the process; the issuer goes on with its calls until they would have ended.
func (n *simNode) kill() {
	n.w.say("%s is killed with %d calls in flight", n.name, len(n.running))
	process := n.process
	n.boot()
	n.w.after(n.w.upTo(5*time.Second), func() {
		if n.process == process+1 {
			n.refill()
		}
	})
}

// refill keeps as many calls wanted as the node's demand says.
func (n *simNode) refill() {
	for n.wanting < n.demand {
		n.wanting++
		c := &Call{deadline: forEver}
		if n.w.chance(0.3) {
			c.deadline = n.clock() + n.w.upTo(20*time.Second)
		}
		n.carry(n.h.Arrive(n.clock(), c))
		if c.deadline < forEver && c.state == callWaits {
			n.w.in(n, n.inTrue(c.deadline), func() {
				if c.state == callWaits {
					n.gone()
					n.carry(n.h.Leave(n.clock(), c))
				}
			})
		}
	}
}

// in is after, if the process still lives then.
func (w *world) in(n *simNode, d time.Duration, do func()) {
	process := n.process
	w.after(d, func() {
		if n.process == process {
			do()
		}
	})
}

// gone: one call less is wanted; another comes after a while.
func (n *simNode) gone() {
	n.wanting--
	n.w.in(n, n.w.upTo(time.Second)+time.Millisecond, n.refill)
}

// carry carries out what the Holder decided.
func (n *simNode) carry(e Effects) {
	for _, b := range e.Begin {
		n.begin(b)
	}
	for range e.Refuse {
		n.gone()
	}
	if e.Ask != nil {
		n.ask(e.Ask, e.Seq)
	}
	if e.Wake > 0 && e.Wake != n.wake {
		n.wake = e.Wake
		n.sleep(e.Wake)
	}
}

func (n *simNode) sleep(until time.Duration) {
	n.w.in(n, n.inTrue(until)+n.w.upTo(50*time.Millisecond), func() {
		switch {
		case n.wake != until:
		case n.clock() < until:
			n.sleep(until)
		default:
			n.wake = 0
			n.carry(n.h.Tick(n.clock()))
		}
	})
}

func (n *simNode) begin(b Begin) {
	w := n.w
	w.callNow++
	w.begun++
	w.most = max(w.most, w.callNow)
	w.say("%s begins a call, %d in flight", n.name, w.callNow)
	if w.callNow > w.limits.InFlight {
		w.fail("%d calls in flight, %d allowed", w.callNow, w.limits.InFlight)
	}
	if w.now < n.pausedUntil {
		w.fail("%s begins a call %v before the issuer's pause is over", n.name, n.pausedUntil-w.now)
	}
	if rate := w.limits.Rate; rate > 0 {
		w.level = max(0, w.level-rate*(w.now-w.levelAt).Seconds()) + 1
		w.levelAt = w.now
		if w.level > float64(len(w.nodes))+1e-6 {
			w.fail("calls begin faster than %.2f a second: %.2f too many", rate, w.level-float64(len(w.nodes)))
		}
	}
	length := w.upTo(2 * time.Second)
	if w.chance(w.long) {
		length = 20 * time.Second // to its deadline
	}
	s := &simCall{call: b.Call, until: b.Until, ends: w.now + length}
	n.running = append(n.running, s)
	n.schedule(s)
}

// schedule has the call end, at its deadline at the latest; also when its process was killed, as the issuer sees it.
func (n *simNode) schedule(s *simCall) {
	s.version++
	version, process := s.version, n.process
	n.w.after(min(s.ends-n.w.now, n.inTrue(s.until)), func() {
		if s.version != version {
			return
		}
		n.w.callNow--
		if n.process != process {
			return
		}
		n.running = slices.DeleteFunc(n.running, func(r *simCall) bool { return r == s })
		n.done++
		var pause time.Duration
		if !n.w.calm && n.w.chance(0.01) {
			pause = time.Second + n.w.upTo(15*time.Second)
			n.w.pauses++
			n.w.say("%s is told to leave the issuer alone for %v", n.name, pause)
			n.pausedUntil = max(n.pausedUntil, n.w.now+pause)
			if n.w.break_ == deafToPause {
				pause = 0
			}
		}
		n.wanting--
		n.carry(n.h.End(n.clock(), s.call, pause))
		n.w.in(n, n.w.upTo(time.Second), n.refill)
	})
}

// ask sends a request, once or twice, or loses it.
func (n *simNode) ask(r *clusterpb.LeaseRequest, seq uint64) {
	w := n.w
	if w.break_ == hastyReturn {
		r.GivenBack = max(n.h.held.id, n.h.spent)
	}
	w.in(n, n.inTrue(n.clock()+w.lease/4), func() {
		n.carry(n.h.Failed(n.clock(), seq, w.r.Float64()))
	})
	process := n.process
	paused := time.Duration(0)
	if r.GetPauseMs() > 0 {
		paused = n.pausedUntil
	}
	copies := 1
	if !w.calm && w.chance(0.1) {
		copies = 2
	}
	for range copies {
		w.send(n, func() {
			// Whom it believes to lead.
			var to *simNode
			for _, m := range w.nodes {
				if m.leads != nil && (to == nil || w.chance(0.5)) {
					to = m
				}
			}
			if to == nil || to.cut && to != n {
				return
			}
			to.decide(n, process, r, seq, paused)
		})
	}
}

// send brings a message after a while, much later at times, or never.
func (w *world) send(n *simNode, deliver func()) {
	delay := w.upTo(50 * time.Millisecond)
	if !w.calm {
		switch {
		case n.cut, w.chance(0.03):
			return
		case w.chance(0.03):
			delay = w.upTo(30 * time.Second)
		case w.chance(w.slow):
			delay = time.Duration(w.r.Int64N(int64(w.lease / 4)))
		}
	}
	w.after(delay, deliver)
}

// decide has the node answer a request, as one that believes to lead. paused is until when the request says that the
// issuer is to be left alone, in true time.
func (n *simNode) decide(from *simNode, process int, r *clusterpb.LeaseRequest, seq uint64, paused time.Duration) {
	if n.busy {
		n.queue = append(n.queue, func() { n.decide(from, process, r, seq, paused) })
		return
	}
	w, g := n.w, n.leads
	if g == nil {
		return
	}
	d := g.Ask(n.clock(), from.name, r, w.limits)
	if w.break_ == noMax {
		for _, h := range g.issuers["iss"].holders {
			h.charges = h.charges[max(0, len(h.charges)-1):]
		}
	}
	n.granterPause = max(n.granterPause, paused)
	if d.Response.GetPermits() > 0 && w.now < n.granterPause {
		w.fail("%s grants %v before the issuer's pause is over", n.name, n.granterPause-w.now)
	}
	if d.Pause != nil {
		n.propose(d.Pause, func(result) {})
	}
	answer := func() {
		w.send(from, func() {
			if from.process != process {
				return
			}
			w.answers++
			if w.break_ == countFromAnswer && from.h.seq == seq {
				from.h.at = from.clock()
			}
			response := d.Response
			if w.break_ == wholeLease {
				response = &clusterpb.LeaseResponse{Permits: response.Permits, DurationMs: response.DurationMs * 5 / 4, Rate: response.Rate,
					LeaseId: response.LeaseId, RetryAfterMs: response.RetryAfterMs, PauseMs: response.PauseMs, Undecided: response.Undecided}
			}
			if w.break_ == fullBucket && response.Permits > 0 {
				from.h.tokens = 1
			}
			w.say("%s hears of %d permits (lease %d) by %s", from.name, response.Permits, response.LeaseId, n.name)
			e := from.h.Answer(from.clock(), seq, response, w.r.Float64())
			if w.break_ == noDeadline {
				from.h.held.until += MaxCall(w.lease)
			}
			from.carry(e)
		})
	}
	if d.Grant == nil {
		answer()
		return
	}
	if w.break_ == noCommit {
		answer()
		g.Committed(n.clock(), d.Grant)
	}
	n.busy = true
	n.propose(d.Grant, func(got result) {
		switch {
		case w.break_ == noCommit:
		case got == committed:
			g.Committed(n.clock(), d.Grant)
			answer()
		case got == overtaken && n.leads == g:
			n.leads = n.granter()
		}
		n.busy = false
		for len(n.queue) > 0 && !n.busy {
			next := n.queue[0]
			n.queue = n.queue[1:]
			next()
		}
	})
}

// result is what became of a proposal.
type result int

const (
	failed result = iota
	committed
	overtaken
)

// propose commits the command if its proposer leads when a quorum has it, in whichever term, and tells the outcome later.
func (n *simNode) propose(c *clusterpb.Command, outcome func(result)) {
	w := n.w
	w.after(w.upTo(100*time.Millisecond), func() {
		got := failed
		if w.quorum && w.leader == n && !n.cut {
			got = w.apply(c)
		}
		if !w.calm && w.chance(0.02) {
			got = failed // It is decided, and its proposer does not get to know.
		}
		w.in(n, w.upTo(time.Second), func() { outcome(got) })
	})
}

// apply is the cluster's own state machine.
func (w *world) apply(c *clusterpb.Command) result {
	entry, err := proto.Marshal(c)
	if err != nil {
		w.fail("%v", err)
	}
	next, err := fsm.Apply(w.log, entry)
	switch {
	case errors.Is(err, fsm.ErrStale):
		return overtaken
	case err != nil:
		w.fail("the state machine refuses %v: %v", c, err)
	}
	w.log = next
	return committed
}

func (n *simNode) granter() *Granter {
	w := n.w
	g := NewGranter(Term{Now: n.clock(), Lease: w.lease, Leases: w.log.GetLeases(), Pauses: w.log.GetPauses(), LastID: w.log.GetLastLeaseId(), Seed: w.r.Uint64()})
	if w.break_ == noWait {
		g.opens = 0
	}
	return g
}

// elect makes a node lead. Who led before hears of it later, if at all.
func (w *world) elect() {
	n := w.nodes[w.r.IntN(len(w.nodes))]
	if w.deaf {
		n = w.nodes[w.r.IntN(min(len(w.nodes), 2))]
	}
	w.term++
	term := w.term
	w.leader = n
	for _, old := range w.nodes {
		if g := old.leads; g != nil {
			w.in(old, w.lag(20*time.Second), func() {
				if old.leads == g {
					old.leads = nil
				}
			})
		}
	}
	usual := w.upTo(200 * time.Millisecond)
	if n.leads != nil {
		usual = w.lag(usual) // It grants as what it was before.
	}
	w.in(n, usual, func() {
		if w.term != term {
			return
		}
		w.say("%s leads in term %d", n.name, term)
		n.granterPause = 0
		n.leads = n.granter()
	})
}

// lag is how long a node takes to notice that its leadership has begun or ended; what it did before it goes on with.
func (w *world) lag(usual time.Duration) time.Duration {
	if !w.calm && w.deaf {
		return time.Duration(w.r.Int64N(int64(60 * time.Second)))
	}
	return w.upTo(usual)
}

// nemesis does harm, every few seconds.
func (w *world) nemesis() {
	if w.calm {
		return
	}
	w.after(time.Duration(w.r.Int64N(int64(w.peace))), w.nemesis)
	n := w.nodes[w.r.IntN(len(w.nodes))]
	trouble := w.r.IntN(12)
	if w.harsh && trouble != 0 {
		trouble = 3
	}
	switch trouble {
	case 0:
		w.elect()
	case 1:
		w.quorum = false
		w.after(w.upTo(20*time.Second), func() { w.quorum = true })
	case 2:
		w.say("Raft is wiped")
		w.log = &clusterpb.Snapshot{}
		for _, n := range w.nodes {
			n.leads = nil
		}
		w.elect()
	case 3, 4:
		n.cut = true
		w.after(w.upTo(15*time.Second)+w.upTo(10*time.Second), func() { n.cut = false })
	case 5, 6:
		n.kill()
		if w.leader == n {
			w.elect()
		}
	case 7, 8:
		n.drift()
	default:
		n.demand = w.demands[w.r.IntN(len(w.demands))]
		n.refill()
	}
}

func (w *world) sweep() {
	for _, n := range w.nodes {
		if n.leads != nil {
			for _, c := range n.leads.Sweep(n.clock()) {
				n.propose(c, func(result) {})
			}
		}
	}
	w.after(w.lease, w.sweep)
}

func (w *world) runUntil(end time.Duration) {
	for len(w.events) > 0 && w.failure == "" && w.events[0].at <= end {
		e := heap.Pop(&w.events).(event)
		if w.now = e.at; w.nth > 1_000_000 {
			w.fail("this world does not come to rest")
		}
		e.do()
	}
	w.now = max(w.now, end)
}

// tell simulates the world again and tells what happened before it failed.
func tell(seed uint64, m mutation) string {
	w := newWorld(seed, m)
	w.tells = true
	w.run()
	return w.failure
}

func simulate(seed uint64, m mutation) *world {
	w := newWorld(seed, m)
	w.run()
	return w
}

// run is a troubled time and then a calm one, in which everybody who wants to call gets to.
func (w *world) run() {
	for _, n := range w.nodes {
		n.demand = w.demands[w.r.IntN(len(w.demands))]
		n.refill()
	}
	w.elect()
	w.nemesis()
	w.sweep()
	w.runUntil(90 * time.Second)
	w.calm, w.quorum = true, true
	before := make([]int, len(w.nodes))
	for i, n := range w.nodes {
		n.cut, n.demand = false, max(n.demand, 1)
		n.refill()
		before[i] = n.done
	}
	w.elect()
	w.runUntil(190 * time.Second)
	for i, n := range w.nodes {
		if n.done == before[i] {
			w.fail("%s made no call in a calm time, of %d permits at %.2f a second", n.name, w.limits.InFlight, w.limits.Rate)
		}
	}
}
