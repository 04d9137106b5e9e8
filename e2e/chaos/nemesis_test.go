package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"time"

	"github.com/certmesh/certmesh/e2e/chaos/history"
	"github.com/certmesh/certmesh/e2e/estate"
)

// fault is something done to the cluster and undone again.
type fault struct {
	// before is the quiet time before it.
	before, lasts time.Duration
	what          string
	// leader: it hits who leads; else the node with this number.
	leader bool
	node   int
	agent  int
}

func (f fault) String() string {
	who := fmt.Sprintf("n%d", f.node+1)
	if f.leader {
		who = "the leader"
	}
	return fmt.Sprintf("%s, %s, agent %d, for %s", f.what, who, f.agent+1, f.lasts)
}

// faults are what there is, how often by weight, and how long it lasts.
var faults = []struct {
	what        string
	weight      int
	least, most time.Duration
}{
	{"kill node", 5, 0, 3 * time.Second},
	{"stop node", 2, 0, time.Second},
	{"pause node", 3, 3 * time.Second, 8 * time.Second},
	{"cut node from nodes", 4, 3 * time.Second, 8 * time.Second},
	{"cut node from database", 3, 2 * time.Second, 8 * time.Second},
	{"cut agent from node", 3, 2 * time.Second, 8 * time.Second},
	{"cut agent from nodes", 1, 2 * time.Second, 6 * time.Second},
	{"kill agent", 4, 0, 2 * time.Second},
	{"pause agent", 1, 2 * time.Second, 6 * time.Second},
	{"pause database", 2, time.Second, 6 * time.Second},
	{"crash database", 2, 0, time.Second},
	{"kill all nodes", 1, 0, time.Second},
}

// plan is the faults of a run that lasts so long. Any two may overlap by little: the second begins when the first was undone
// and what it hit is still coming back.
func plan(r *rand.Rand, lasts time.Duration, nodes, agents int) []fault {
	var all []fault
	sum := 0
	for _, k := range faults {
		sum += k.weight
	}
	for at := time.Duration(0); at < lasts; {
		d := r.IntN(sum)
		i := 0
		for d >= faults[i].weight {
			d -= faults[i].weight
			i++
		}
		k := faults[i]
		f := fault{before: time.Duration(r.Int64N(int64(2 * time.Second))).Round(time.Millisecond), what: k.what, leader: r.IntN(2) == 0, node: r.IntN(nodes), agent: r.IntN(agents),
			lasts: k.least + time.Duration(r.Int64N(int64(k.most-k.least))).Round(time.Millisecond)}
		at += f.before + f.lasts
		all = append(all, f)
	}
	return all
}

// rage carries a plan out until ctx ends, and leaves all undone.
func (s *trial) rage(ctx context.Context, all []fault) error {
	for _, f := range all {
		if !estate.Pause(ctx, f.before) {
			return nil
		}
		m := s.victim(ctx, f)
		end := s.recorder.Invoke(history.Event{Kind: history.Nemesis, Node: m.ID, Name: f.String()})
		s.T.Logf("%7.3fs %s: %s", s.since().Seconds(), m.ID, f)
		err := s.inflict(ctx, f, m)
		end(history.OK, history.Answer{})
		if err != nil {
			return fmt.Errorf("%s: %w", f, err)
		}
		s.count(f.what)
		if err := s.supervise(); err != nil {
			return err
		}
	}
	return nil
}

// victim is the node that a fault hits.
func (s *trial) victim(ctx context.Context, f fault) *estate.ClusterNode {
	m := s.Nodes[f.node]
	if f.leader && strings.Contains(f.what, "node") {
		short, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		if l, err := s.Leader(short, nil); err == nil {
			return l
		}
	}
	return m
}

func (s *trial) inflict(ctx context.Context, f fault, m *estate.ClusterNode) error {
	switch f.what {
	case "kill node":
		m.Process.Kill()
		estate.Pause(ctx, f.lasts)
		return s.LaunchNode(m)
	case "stop node":
		if err := m.Process.Stop(40 * time.Second); err != nil {
			s.T.Logf("SIGTERM: %v", err)
		}
		estate.Pause(ctx, f.lasts)
		return s.LaunchNode(m)
	case "kill all nodes":
		for _, o := range s.Nodes {
			o.Process.Kill()
		}
		estate.Pause(ctx, f.lasts)
		for _, o := range s.Nodes {
			if err := s.LaunchNode(o); err != nil {
				return err
			}
		}
		return nil
	case "pause node":
		return paused(ctx, f.lasts, m.Process)
	case "pause agent":
		return paused(ctx, f.lasts, s.agents[f.agent].process)
	case "kill agent":
		s.agents[f.agent].process.Kill()
		estate.Pause(ctx, f.lasts)
		return s.startAgent(s.agents[f.agent])
	case "cut node from nodes":
		s.cut(ctx, f.lasts, m.ID, s.ids(m)...)
	case "cut node from database":
		s.cut(ctx, f.lasts, m.ID, "database")
	case "cut agent from node":
		s.cut(ctx, f.lasts, s.agents[f.agent].name, m.ID)
	case "cut agent from nodes":
		s.cut(ctx, f.lasts, s.agents[f.agent].name, s.ids(nil)...)
	case "pause database":
		if err := s.PauseDatabase(); err != nil {
			return err
		}
		estate.Pause(ctx, f.lasts)
		return s.ResumeDatabase()
	case "crash database":
		if err := s.Database.Crash(); err != nil {
			return err
		}
		estate.Pause(ctx, f.lasts)
		return s.Database.Start(s.Ctx)
	default:
		return errors.New("nobody knows how to do that")
	}
	return nil
}

func paused(ctx context.Context, lasts time.Duration, p *estate.Process) error {
	if !p.Running() {
		return nil
	}
	if err := p.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	estate.Pause(ctx, lasts)
	return p.Signal(syscall.SIGCONT)
}

// cut separates a party from others for a while.
func (s *trial) cut(ctx context.Context, lasts time.Duration, from string, to ...string) {
	for _, other := range to {
		s.Network.Cut(from, other)
	}
	estate.Pause(ctx, lasts)
	for _, other := range to {
		s.Network.Heal(from, other)
	}
}

// ids are the nodes but one.
func (s *trial) ids(not *estate.ClusterNode) []string {
	var out []string
	for _, m := range s.Nodes {
		if m != not {
			out = append(out, m.ID)
		}
	}
	return out
}

// supervise starts again what has ended by itself, as a host's supervisor does.
func (s *trial) supervise() error {
	for _, m := range s.Nodes {
		if !m.Running() {
			s.T.Logf("%7.3fs %s had ended by itself, status %d: %s", s.since().Seconds(), m.ID, m.Process.ExitCode(), m.Process.Tail(1))
			s.count("node ended by itself")
			if err := s.LaunchNode(m); err != nil {
				return err
			}
		}
	}
	for _, a := range s.agents {
		if !a.process.Running() {
			s.T.Logf("%7.3fs agent %s had ended by itself, status %d: %s", s.since().Seconds(), a.name, a.process.ExitCode(), a.process.Tail(1))
			s.count("agent ended by itself")
			if err := s.startAgent(a); err != nil {
				return err
			}
		}
	}
	return nil
}
