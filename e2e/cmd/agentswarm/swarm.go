package main

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/certmesh/certmesh/agent/agentd"
	"github.com/certmesh/certmesh/connectors/target"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

// maxAgents bounds a swarm; beyond it a process runs out of ports and memory anyway.
const maxAgents = 100_000

// swarm is all agents of the process.
type swarm struct {
	o        options
	out      *printer
	token    string
	operator *operator
	kinds    []target.Kind
	facts    *agentpb.Facts
	began    time.Time

	agents []*virtual
	// joining bounds the agents that have begun and not connected yet; healthy is how many of them behave.
	joining chan struct{}
	healthy int

	joined, connected, welcomes, failed, bad atomic.Int64
	lastWelcome, lastLost, allConnected      atomic.Int64 // Unix microseconds
	notes                                    notes
	full                                     chan struct{}
	fullOnce                                 sync.Once

	// order is the number of the command under way; an agent acknowledges it once.
	order           atomic.Int64
	acked, done     atomic.Int64
	ackedAt, doneAt atomic.Int64 // of the last one, Unix microseconds

	mu           sync.Mutex
	firstError   error
	certificates []string
}

// virtual is one agent.
type virtual struct {
	s         *swarm
	number    int
	id        atomic.Pointer[string]
	connected atomic.Bool
	started   sync.Once // gives joining back
	bad       bool
	acked     atomic.Int64
	done      atomic.Int64
}

func newSwarm(o options, out *printer) *swarm {
	return &swarm{o: o, out: out, token: o.token, kinds: []target.Kind{memoryKind()}, joining: make(chan struct{}, o.joining),
		facts: &agentpb.Facts{Hostname: "swarm", Os: runtime.GOOS, Architecture: runtime.GOARCH}, full: make(chan struct{}),
		notes: notes{counts: map[string]int64{}}}
}

func (s *swarm) run(ctx context.Context, cancel context.CancelFunc) {
	s.began = time.Now()
	bad := 0
	if s.o.bad != "" {
		bad = max(1, int(s.o.fraction*float64(s.o.agents)))
	}
	s.healthy = s.o.agents - bad
	for i := range s.o.agents {
		s.agents = append(s.agents, &virtual{s: s, number: i + 1})
	}
	if s.healthy == 0 {
		s.fullOnce.Do(func() { close(s.full) })
	}
	var printing, running sync.WaitGroup
	over := make(chan struct{})
	printing.Go(func() { s.print(over) })
	go s.commands(ctx)
	running.Go(func() {
		select {
		case <-s.full:
			s.out.event("connected", map[string]any{"agents": s.healthy, "ms": time.Since(s.began).Milliseconds()})
		case <-ctx.Done():
			return
		}
		if s.o.hold <= 0 {
			return
		}
		t := time.NewTimer(s.o.hold)
		defer t.Stop()
		select {
		case <-t.C:
			cancel()
		case <-ctx.Done():
		}
	})
	for i, v := range s.agents {
		select {
		case s.joining <- struct{}{}:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			break
		}
		if i < s.healthy {
			running.Go(func() { v.run(ctx, nil) })
		} else {
			running.Go(func() { v.misbehave(ctx, s.o.bad) })
		}
	}
	running.Wait()
	close(over)
	printing.Wait()
}

// run is one agent that behaves, over connections opened by dial (nil: plain ones).
func (v *virtual) run(ctx context.Context, dial agentd.DialFunc) {
	s := v.s
	if dial == nil {
		dial = v.dial
	}
	err := agentd.Run(ctx, agentd.Config{
		Servers: strings.Split(s.o.server, ","), JoinToken: s.token, Name: fmt.Sprintf("%s-%d", s.o.name, v.number), InMemory: true,
		Version: "swarm", Kinds: s.kinds, Facts: s.facts, Log: slog.New(counting{&s.notes}), Dial: dial,
		WrapConn: func(c net.Conn) net.Conn { return &tracked{Conn: c, v: v} }, Welcomed: v.welcomed, Cut: v.point,
	})
	v.start()
	v.lost()
	if err != nil && ctx.Err() == nil {
		s.failed.Add(1)
		s.mu.Lock()
		if s.firstError == nil {
			s.firstError = err
			s.out.event("failed", map[string]any{"agent": v.number, "error": err.Error()})
		}
		s.mu.Unlock()
	}
}

// dial spreads the local ends over a few loopback addresses, because one has only some 28,000 ports.
func (v *virtual) dial(ctx context.Context, addr string) (net.Conn, error) {
	d := net.Dialer{}
	if host, _, err := net.SplitHostPort(addr); err == nil && strings.HasPrefix(host, "127.") {
		d.LocalAddr = &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+v.number%8))}
	}
	return d.DialContext(ctx, "tcp", addr)
}

func (v *virtual) start() { v.started.Do(func() { <-v.s.joining }) }

func (v *virtual) welcomed(id string) {
	s := v.s
	if v.id.Swap(&id) == nil {
		s.joined.Add(1)
	}
	s.welcomes.Add(1)
	now := time.Now().UnixMicro()
	s.lastWelcome.Store(now)
	switch first := v.connected.CompareAndSwap(false, true); {
	case !first:
	case v.bad:
		s.bad.Add(1)
	case s.connected.Add(1) == int64(s.healthy):
		s.allConnected.Store(now)
		s.fullOnce.Do(func() { close(s.full) })
	}
	v.start()
}

func (v *virtual) lost() {
	switch was := v.connected.CompareAndSwap(true, false); {
	case !was:
	case v.bad:
		v.s.bad.Add(-1)
	default:
		v.s.connected.Add(-1)
		v.s.lastLost.Store(time.Now().UnixMicro())
	}
}

// point watches what the agent sends; see agentd.Config.Cut. It never cuts.
func (v *virtual) point(name string) error {
	switch name {
	case "send accepted":
		v.count(&v.acked, &v.s.acked, &v.s.ackedAt)
	case "send result":
		v.count(&v.done, &v.s.done, &v.s.doneAt)
	}
	return nil
}

// count notes once per order that the agent got so far.
func (v *virtual) count(mine, all, at *atomic.Int64) {
	n := v.s.order.Load()
	if n > 0 && mine.Swap(n) != n {
		at.Store(time.Now().UnixMicro())
		all.Add(1)
	}
}

// tracked tells when a connection is over.
type tracked struct {
	net.Conn
	v *virtual
}

func (t *tracked) Close() error {
	t.v.lost()
	return t.Conn.Close()
}

// counting is a log handler that counts messages by what they say: ten thousand agents' lines are of no use to anyone.
type counting struct{ n *notes }

type notes struct {
	mu     sync.Mutex
	counts map[string]int64
}

func (n *notes) add(what string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, known := n.counts[what]; known || len(n.counts) < 64 {
		n.counts[what]++
	}
}

func (n *notes) copy() map[string]int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.counts)
}

func (counting) Enabled(context.Context, slog.Level) bool { return true }
func (c counting) WithAttrs([]slog.Attr) slog.Handler     { return c }
func (c counting) WithGroup(string) slog.Handler          { return c }
func (c counting) Handle(_ context.Context, r slog.Record) error {
	if r.Level < slog.LevelInfo {
		return nil
	}
	what := r.Message
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "reason" || r.Level >= slog.LevelWarn && a.Key == "err" {
			what += ": " + shorten(a.Value.String())
		}
		return true
	})
	c.n.add(what)
	return nil
}

// shorten drops what differs from agent to agent, such as addresses.
func shorten(s string) string {
	words := strings.Fields(s)
	for i, w := range words {
		if strings.ContainsAny(w, "0123456789") {
			words[i] = "…"
		}
	}
	if s = strings.Join(words, " "); len(s) > 200 {
		s = strings.ToValidUTF8(s[:200], "")
	}
	return s
}

// print prints the state until over is closed, and once more then.
func (s *swarm) print(over <-chan struct{}) {
	t := time.NewTicker(s.o.every)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			s.out.status(s.status())
		case <-over:
			s.out.status(s.status())
			s.out.event("ended", map[string]any{"notes": s.notes.copy()})
			return
		}
	}
}

func (s *swarm) status() status {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return status{Agents: s.o.agents, Healthy: s.healthy, Joined: s.joined.Load(), Connected: s.connected.Load(), Welcomes: s.welcomes.Load(),
		Failed: s.failed.Load(), Bad: s.bad.Load(), Acknowledged: s.acked.Load(), Done: s.done.Load(), AllConnected: s.allConnected.Load(),
		LastWelcome: s.lastWelcome.Load(), LastLost: s.lastLost.Load(), ElapsedMS: time.Since(s.began).Milliseconds(),
		RSS: residentBytes(), Heap: int64(m.HeapInuse), Goroutines: runtime.NumGoroutine()}
}

// residentBytes is the process's resident memory; 0 where the system does not say.
func residentBytes() int64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	if f := strings.Fields(string(b)); len(f) > 1 {
		pages, err := strconv.ParseInt(f[1], 10, 64)
		if err == nil {
			return pages * int64(os.Getpagesize())
		}
	}
	return 0
}

func writeHeap(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	runtime.GC()
	if err := pprof.WriteHeapProfile(f); err != nil {
		_ = f.Close() // the first error says what matters
		return err
	}
	return f.Close()
}

// commands carries out what standard input asks for.
func (s *swarm) commands(ctx context.Context) {
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		f := strings.Fields(in.Text())
		if len(f) == 0 {
			continue
		}
		if f[0] == "quit" || ctx.Err() != nil {
			return
		}
		if err := s.command(ctx, f); err != nil {
			s.out.event("command", map[string]any{"name": f[0], "error": err.Error()})
		}
	}
}
