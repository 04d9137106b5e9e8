package streams

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/certmesh/certmesh/e2e/estate"
)

// Options of Measure.
type Options struct {
	// Agents is how many there are.
	Agents int
	// Bin holds the binaries; empty: they are built.
	Bin string
	// Dir is a scratch folder; the caller removes it.
	Dir string
	// Profiles is where profiles of the server go; empty: none are taken.
	Profiles string
	// Window is how long the idle server is watched, Down how long it is away at its restart.
	Window, Down time.Duration
	// Say is told what is being done.
	Say func(format string, args ...any)
}

// Figures are what Measure found.
type Figures struct {
	Agents int
	// Bare and Node are memory for each stream: that of a bare grpc-go server and certmeshd's.
	Bare, Node Memory
	// Joined is how long all took to enrol and connect, Swarm the memory that agentswarm took for each.
	Joined time.Duration
	Swarm  int64
	// CPU is the idle node's share of one core. Writes are its transactions in that window by name.
	CPU    float64
	Window time.Duration
	Writes map[string]float64
	// Down is from the kill to the node being ready, Back from then to the last agent's Welcome. Refused are the Hellos that
	// were asked to come back, Errors and Warnings the lines of the log meanwhile; Notes is what agents said.
	Down, Back       time.Duration
	Refused          float64
	Errors, Warnings int
	Notes            map[string]int64
	// Acknowledged is from the operator's first call of a command to the last of all agents acknowledging it, Called the
	// calls' part of that, Done until all have carried it out.
	Called, Acknowledged, Done time.Duration
	// Healthy and Disturbed are the same for a tenth of the agents, alone and while others misbehave.
	Healthy, Disturbed Command
	// Misbehaving is how many did.
	Misbehaving int64
}

// Command is how long a command took.
type Command struct {
	Agents             int64
	Acknowledged, Done time.Duration
}

// scene is one measurement under way.
type scene struct {
	Options
	*estate.Estate
	debug  string
	env    []string
	server *estate.Process
	swarm  *Swarm
	f      Figures
}

// Build makes the binaries that Measure needs.
func Build(ctx context.Context, dir string) error {
	root, err := estate.Root()
	if err != nil {
		return err
	}
	if err := estate.Build(ctx, root, dir, os.Stderr); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-o", dir+string(filepath.Separator), "./e2e/cmd/agentswarm")
	cmd.Dir, cmd.Stderr, cmd.Env = root, os.Stderr, append(os.Environ(), "CGO_ENABLED=0")
	return cmd.Run()
}

// Measure runs the whole scene and cleans up after itself.
func Measure(ctx context.Context, o Options) (*Figures, error) {
	if o.Bin == "" {
		o.Bin = filepath.Join(o.Dir, "bin")
		if err := Build(ctx, o.Bin); err != nil {
			return nil, err
		}
	}
	e, err := estate.New(estate.Config{Dir: filepath.Join(o.Dir, "estate"), Bin: o.Bin})
	if err != nil {
		return nil, err
	}
	defer e.Close()
	debug, err := estate.FreeAddrs(1)
	if err != nil {
		return nil, err
	}
	s := &scene{Options: o, Estate: e, debug: debug[0], env: []string{"CERTMESH_LISTEN_DEBUG=" + debug[0]}}
	s.f.Agents = o.Agents
	defer func() {
		if s.swarm != nil {
			s.swarm.Stop(30 * time.Second)
		}
	}()
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{{"bare streams", s.bare}, {"join", s.join}, {"restart", s.restart}, {"idle", s.idle}, {"command", s.command}, {"misbehaviour", s.misbehave}} {
		began := time.Now()
		if err := step.do(ctx); err != nil {
			return nil, fmt.Errorf("%s: %w", step.name, err)
		}
		o.Say("%-14s %5.1f s", step.name, time.Since(began).Seconds())
	}
	return &s.f, nil
}

// bare measures the baseline.
func (s *scene) bare(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	addrs, err := estate.FreeAddrs(2)
	if err != nil {
		return err
	}
	server, err := s.Start("bare-server", self, []string{roleEnv + "=server", roleArgs + "=" + strings.Join(addrs, " ")})
	if err != nil {
		return err
	}
	defer server.Kill()
	if err := estate.Wait(ctx, "the bare server", func(ctx context.Context) error {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addrs[0])
		if err == nil {
			_ = c.Close() // it was only to see
		}
		return err
	}); err != nil {
		return err
	}
	before, err := MemoryOf(ctx, server.PID(), addrs[1])
	if err != nil {
		return err
	}
	clients, err := s.Start("bare-clients", self, []string{roleEnv + "=clients", fmt.Sprintf("%s=%s %d", roleArgs, addrs[0], s.Agents)})
	if err != nil {
		return err
	}
	defer clients.Kill()
	if err := estate.Wait(ctx, "the bare streams", func(context.Context) error {
		select {
		case <-clients.Exited():
			return estate.Stop(errors.New("the clients ended: " + clients.Tail(5)))
		default:
		}
		if !strings.Contains(clients.Log(), "ready") {
			return errors.New("not all are open")
		}
		return nil
	}); err != nil {
		return err
	}
	s.settle(ctx)
	after, err := MemoryOf(ctx, server.PID(), addrs[1])
	s.f.Bare = after.minus(before).over(s.Agents)
	return err
}

// settle waits until what has just happened is over: buffers given back, the last beats written.
func (s *scene) settle(ctx context.Context) { pause(ctx, s.Window/5) }

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// join starts the node and all agents.
func (s *scene) join(ctx context.Context) error {
	var err error
	if s.server, err = s.StartServer(ctx, s.env...); err != nil {
		return err
	}
	began := time.Now()
	if s.swarm, err = StartSwarm(ctx, s.Bin, s.Dir, s.swarmArgs("swarm", s.Agents)...); err != nil {
		return err
	}
	stop := s.profile(ctx, "join")
	_, err = s.swarm.Wait(ctx, "all to join", func(st SwarmStatus) bool { return st.AllConnected > 0 })
	stop()
	s.f.Joined = time.Since(began)
	return err
}

func (s *scene) swarmArgs(name string, n int, more ...string) []string {
	return append([]string{"--server", s.Mesh, "--operator", s.Path("server", "client.yaml"), "--name", name, "--agents", fmt.Sprint(n),
		"--targets-per-agent", "1"}, more...)
}

// restart kills the node and starts it again, and measures the memory of a node whose agents have come back.
func (s *scene) restart(ctx context.Context) error {
	lines := strings.Count(s.server.Log(), "\n")
	killed := time.Now()
	s.server.Kill()
	pause(ctx, s.Down)
	var err error
	if s.server, err = s.StartServer(ctx, s.env...); err != nil {
		return err
	}
	ready := time.Now()
	s.f.Down = ready.Sub(killed)
	stop := s.profile(ctx, "return")
	st, err := s.swarm.Wait(ctx, "all to come back", func(st SwarmStatus) bool {
		return st.Connected >= int64(st.Healthy) && st.AllConnected > killed.UnixMicro()
	})
	stop()
	if err != nil {
		return err
	}
	s.f.Back = max(time.UnixMicro(st.AllConnected).Sub(ready), 0)
	s.f.Swarm = st.RSS / int64(s.Agents)
	m, err := Metrics(ctx, s.Estate)
	if err != nil {
		return err
	}
	s.f.Refused = Sum(m, "certmesh_session_handshakes_refused_total")
	for _, line := range strings.Split(s.server.Log(), "\n")[lines:] {
		var l struct {
			Level string `json:"level"`
		}
		if json.Unmarshal([]byte(line), &l) != nil {
			continue
		}
		switch l.Level {
		case "ERROR":
			s.f.Errors++
		case "WARN":
			s.f.Warnings++
		}
	}
	return nil
}

// idle watches the node while nothing happens, and compares its memory with that of a node without agents.
func (s *scene) idle(ctx context.Context) error {
	pause(ctx, s.Window) // the last of the return: sessions, states, first beats
	before, err := Metrics(ctx, s.Estate)
	if err != nil {
		return err
	}
	cpu, err := CPU(s.server.PID())
	if err != nil {
		return err
	}
	began := time.Now()
	stop := s.profile(ctx, "idle")
	pause(ctx, s.Window)
	used, err := CPU(s.server.PID())
	if err != nil {
		return err
	}
	s.f.Window = time.Since(began)
	stop()
	s.f.CPU = float64(used-cpu) / float64(s.f.Window)
	after, err := Metrics(ctx, s.Estate)
	if err != nil {
		return err
	}
	s.f.Writes = map[string]float64{}
	for k, v := range after {
		name, ok := strings.CutPrefix(k, `certmesh_store_seconds_count{tx="`)
		if ok && v > before[k] {
			s.f.Writes[strings.TrimSuffix(name, `"}`)] = v - before[k]
		}
	}
	full, err := MemoryOf(ctx, s.server.PID(), s.debug)
	if err != nil {
		return err
	}
	if s.Profiles != "" {
		heap, err := get(ctx, "http://"+s.debug+"/debug/pprof/heap")
		if err == nil {
			err = os.WriteFile(filepath.Join(s.Profiles, "heap.pb.gz"), []byte(heap), 0o600)
		}
		if err != nil {
			return err
		}
	}
	empty, err := s.empty(ctx)
	s.f.Node = full.minus(empty).over(s.Agents)
	return err
}

// empty is the memory of a node that has a store of its own and no agents.
func (s *scene) empty(ctx context.Context) (Memory, error) {
	e, err := estate.New(estate.Config{Dir: filepath.Join(s.Dir, "empty"), Bin: s.Bin})
	if err != nil {
		return Memory{}, err
	}
	defer e.Close()
	debug, err := estate.FreeAddrs(1)
	if err != nil {
		return Memory{}, err
	}
	p, err := e.StartServer(ctx, "CERTMESH_LISTEN_DEBUG="+debug[0])
	if err != nil {
		return Memory{}, err
	}
	pause(ctx, time.Second)
	return MemoryOf(ctx, p.PID(), debug[0])
}

// command orders certificates on all agents.
func (s *scene) command(ctx context.Context) error {
	if _, err := s.swarm.Tell(ctx, "targets"); err != nil {
		return err
	}
	s.settle(ctx)
	stop := s.profile(ctx, "command")
	e, err := s.swarm.Tell(ctx, "order")
	stop()
	if err != nil {
		return err
	}
	if e.Acknowledged < int64(s.Agents) || e.Done < int64(s.Agents) {
		return fmt.Errorf("of %d agents %d acknowledged and %d finished", s.Agents, e.Acknowledged, e.Done)
	}
	s.f.Called, s.f.Acknowledged, s.f.Done = ms(e.CallsMS), ms(e.AcknowledgedMS), ms(e.DoneMS)
	return nil
}

func ms(n int64) time.Duration { return time.Duration(n) * time.Millisecond }

// misbehave renews on a tenth of the agents, alone and beside bad ones of each kind.
func (s *scene) misbehave(ctx context.Context) error {
	certs := max(s.Agents/10/100, 1)
	var err error
	if s.f.Healthy, err = s.renew(ctx, certs); err != nil {
		return err
	}
	var bad []*Swarm
	defer func() {
		for _, b := range bad {
			b.Stop(30 * time.Second)
		}
	}()
	n := max(s.Agents/30, 1)
	for _, kind := range []string{"half-open", "slow-reader", "never-accept"} {
		b, err := StartSwarm(ctx, s.Bin, s.Dir, s.swarmArgs(kind, n, "--bad", kind, "--bad-fraction", "1")...)
		if err != nil {
			return err
		}
		bad = append(bad, b)
	}
	for i, b := range bad {
		st, err := b.Wait(ctx, "bad agents", func(st SwarmStatus) bool { return st.Bad >= int64(n) })
		if err != nil {
			return err
		}
		s.f.Misbehaving += st.Bad
		if i == 0 {
			continue // half of its agents have no identity, the others hear nothing
		}
		if _, err := b.Tell(ctx, "targets"); err != nil {
			return err
		}
		// They will not do it; nobody waits for them.
		if _, err := b.in.Write([]byte("order\n")); err != nil {
			return err
		}
	}
	s.settle(ctx)
	s.f.Disturbed, err = s.renew(ctx, certs)
	return err
}

// renew renews certificates and returns the middle one of three times.
func (s *scene) renew(ctx context.Context, certs int) (Command, error) {
	var all []Command
	for range 3 {
		e, err := s.swarm.Tell(ctx, fmt.Sprint("renew ", certs))
		if err != nil {
			return Command{}, err
		}
		if e.Done < e.Agents {
			return Command{}, fmt.Errorf("of %d agents %d finished", e.Agents, e.Done)
		}
		all = append(all, Command{e.Agents, ms(e.AcknowledgedMS), ms(e.DoneMS)})
	}
	slices.SortFunc(all, func(a, b Command) int { return int(a.Done - b.Done) })
	return all[1], nil
}

// profile takes a CPU profile until it is stopped, at most two minutes.
func (s *scene) profile(ctx context.Context, name string) (stop func()) {
	if s.Profiles == "" {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for n := 1; ctx.Err() == nil; n++ {
			// In slices, because a profile that is given up is lost.
			p, err := get(ctx, "http://"+s.debug+"/debug/pprof/profile?seconds=5")
			if err == nil {
				err = os.WriteFile(filepath.Join(s.Profiles, fmt.Sprintf("cpu-%s-%d.pb.gz", name, n)), []byte(p), 0o600)
			}
			if err != nil && ctx.Err() == nil {
				s.Say("profile of %s: %v", name, err)
				return
			}
		}
	}()
	return func() { cancel(); <-done }
}
