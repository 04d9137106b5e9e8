package dispatch

import (
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// simSeed names a variable with the one seed to be played again, simSeeds one with the number of seeds.
const simSeed, simSeeds = "CERTMESH_SIM_SEED", "CERTMESH_SIM_SEEDS"

func variable(t *testing.T, name string, fallback uint64) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return fallback
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// holding is an agent's stream at one node, as that node sees it: it may be the last to hear that the agent is elsewhere.
type holding struct {
	node     int
	epoch    domain.Epoch
	state    State
	pending  []*use
	inFlight map[string]int
	down     []Effect
	up       []Report
	granted  [Classes]int
	sent     [Classes]int
	ticks    time.Time
}

// sim is several nodes that serve one agent one after the other, on one store.
type sim struct {
	*world
	random *rand.Rand
	// at is the stream that the agent has; the others are of nodes that do not know yet that it is gone.
	at     *holding
	others []*holding
	clocks []time.Duration // how far each node's clock is off
	now    time.Time
}

const simNodes = 3

func newSim(seed uint64, fail func(string, ...any)) *sim {
	s := &sim{world: newWorld(fail), random: rand.New(rand.NewPCG(seed, 0)), clocks: make([]time.Duration, simNodes), now: start}
	for i := range s.clocks {
		s.clocks[i] = s.skew()
	}
	s.connect()
	return s
}

// skew is how far a clock may be off; nodes that are off by more are refused.
func (s *sim) skew() time.Duration {
	return time.Duration(s.random.IntN(120_000)-60_000) * time.Millisecond
}

// as does something at the node that holds h, by its clock.
func (s *sim) as(h *holding, f func()) {
	w := s.world
	former, newest := *s.current(), w.epoch
	s.restore(h)
	w.now = s.now.Add(s.clocks[h.node])
	f()
	*h = *s.current()
	if w.epoch != newest {
		s.fail("a session was minted at a node that only works")
	}
	s.restore(&former)
}

// current is the stream that the world has in hand; the store's epoch is not a part of it.
func (s *sim) current() *holding {
	w := s.world
	h := &holding{state: w.state, pending: w.pending, inFlight: w.inFlight, down: w.down, up: w.up, granted: w.granted, sent: w.sent, ticks: w.ticks}
	if s.at != nil {
		h.node, h.epoch = s.at.node, s.at.epoch
	}
	return h
}

func (s *sim) restore(h *holding) {
	w := s.world
	w.state, w.pending, w.inFlight, w.down, w.up, w.granted, w.sent, w.ticks = h.state, h.pending, h.inFlight, h.down, h.up, h.granted, h.sent, h.ticks
	if s.at != nil {
		s.at.node, s.at.epoch = h.node, h.epoch
	}
}

// connect is the agent's Hello to some node. The former node learns of it by its next look at the session, if ever.
func (s *sim) connect() {
	if s.at != nil {
		former := s.current()
		former.down = nil // the agent reads no more of it; what it wrote may still arrive
		s.others = append(s.others, former)
		if len(s.others) > simNodes {
			s.others = s.others[1:] // that node has died
		}
	}
	w := s.world
	w.state, w.pending, w.inFlight = State{}, nil, map[string]int{}
	s.at = &holding{node: s.random.IntN(simNodes)}
	w.now = s.now.Add(s.clocks[s.at.node])
	w.connect(both(1 + s.random.IntN(3)))
	s.at.epoch = w.epoch
}

// one lets one thing happen.
func (s *sim) one() {
	w := s.world
	w.now = s.now.Add(s.clocks[s.at.node])
	switch d := s.random.IntN(100); {
	case d < 12:
		kinds := []domain.JobKind{domain.JobIssuance, domain.JobRenewal, domain.JobDeployment, domain.JobValidation}
		w.create(kinds[s.random.IntN(len(kinds))])
		s.wake()
	case d < 14:
		s.cancel()
	case d < 15:
		s.reap()
	case d < 40:
		s.store()
	case d < 55:
		w.agentTakes()
	case d < 70:
		w.serverTakes()
	case d < 80:
		s.agentWorks()
	case d < 84:
		w.grant()
	case d < 88:
		s.now = s.now.Add(time.Duration(1+s.random.IntN(20_000)) * time.Millisecond)
		w.now = s.now.Add(s.clocks[s.at.node])
		w.tickIfDue()
	case d < 89:
		s.clocks[s.random.IntN(simNodes)] = s.skew() // set by an operator, or a bad source
	case d < 92:
		s.connect()
	default:
		s.stale()
	}
}

// wake tells the holder of new work, unless the link between the nodes loses it.
func (s *sim) wake() {
	if s.random.IntN(3) > 0 {
		s.step(Woken{At: s.world.now})
	}
}

// cancel ends a job as an operator does.
func (s *sim) cancel() {
	open := slices.DeleteFunc(slices.Sorted(maps.Keys(s.jobs)), func(id string) bool { return !s.jobs[id].State.Open() })
	if len(open) == 0 {
		return
	}
	j := s.jobs[open[s.random.IntN(len(open))]]
	j.State, j.FinishedAt = domain.JobCancelled, s.world.now
	s.jobs[j.ID] = j
	s.wake()
}

// reap raises the attempt of a job that stood still, as the duty does that another node runs.
func (s *sim) reap() {
	open := slices.DeleteFunc(slices.Sorted(maps.Keys(s.jobs)), func(id string) bool { return !s.jobs[id].State.Open() || s.jobs[id].Attempt == 0 })
	if len(open) == 0 {
		return
	}
	j := s.jobs[open[s.random.IntN(len(open))]]
	j.Attempt++
	j.State, j.AcceptedAt = j.Kind.InitialState(), time.Time{}
	s.jobs[j.ID] = j
	s.wake()
}

// store lets a use of the store happen or be answered, in any order; some fail, some are kept and not answered.
func (s *sim) store() {
	w := s.world
	if len(w.pending) == 0 {
		return
	}
	i, broken := s.random.IntN(len(w.pending)), s.random.IntN(6) == 0
	if s.random.IntN(3) == 0 {
		w.commit(i, broken)
		return
	}
	w.answer(i, broken)
}

func (s *sim) agentWorks() {
	ids := slices.Sorted(maps.Keys(s.journal))
	if len(ids) > 0 {
		s.works(s.journal[ids[s.random.IntN(len(ids))]], s.random.IntN(4) > 0)
	}
}

// stale lets a node that has lost the agent go on as if it had it: with what it was told, its store and its clock.
func (s *sim) stale() {
	if len(s.others) == 0 {
		return
	}
	i := s.random.IntN(len(s.others))
	h := s.others[i]
	gone := false
	s.as(h, func() {
		w := s.world
		switch d := s.random.IntN(10); {
		case d < 5:
			s.store()
		case d < 7:
			w.serverTakes()
		case d < 8:
			s.step(Woken{At: w.now})
		case d < 9:
			w.now = w.now.Add(time.Duration(s.random.IntN(40_000)) * time.Millisecond)
			w.tickIfDue()
		default: // its look at the session, or the end of its connection
			w.state, _ = Step(w.state, Closed{})
			gone = true
		}
		w.down = nil
	})
	if gone {
		s.others = slices.Delete(s.others, i, i+1)
	}
}

// TestSimulation: whatever nodes that died, were cut off or have wrong clocks still do, no attempt is applied twice, what
// is sent was raised by whoever held the session, and all work ends at the node that has the agent.
func TestSimulation(t *testing.T) {
	t.Parallel()
	first, seeds := variable(t, simSeed, 0), variable(t, simSeeds, 500)
	if first > 0 {
		seeds = 1
	}
	first = max(1, first)
	for seed := first; seed < first+seeds && !t.Failed(); seed++ {
		s := newSim(seed, func(f string, args ...any) {
			t.Helper()
			t.Fatalf("%s=%d: "+f, append([]any{simSeed, seed}, args...)...)
		})
		for range 300 {
			s.one()
		}
		// Nothing is lost any more: the stale nodes end, the safety net under lost wake-ups passes, and the agent is ready.
		s.others = nil
		s.world.now = s.now.Add(s.clocks[s.at.node])
		s.step(Woken{At: s.world.now})
		for c := range s.ready {
			s.ready[c] += 2
		}
		s.settle()
	}
}
