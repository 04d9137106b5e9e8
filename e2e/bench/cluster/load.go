package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/certmesh/certmesh/agent/agentd"
	"github.com/certmesh/certmesh/e2e/bench/streams"
	"github.com/certmesh/certmesh/e2e/estate"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// reattach kills the leader while it holds all of so many streams, and measures how long after the signal the last of them
// was welcomed by another node.
func (s *scene) reattach(ctx context.Context, agents int) ([]figure, error) {
	dead, err := s.leader(ctx)
	if err != nil {
		return nil, err
	}
	w, err := s.swarm(ctx, dead.Mesh, agents)
	if err != nil {
		return nil, err
	}
	pause(ctx, 2*time.Second) // the last of the joining
	v, err := streams.Metrics(ctx, dead.Estate)
	if err != nil {
		return nil, err
	}
	if held := v["certmesh_session_open"]; int(held) < agents {
		return nil, fmt.Errorf("%s holds %v streams, not all %d", dead.ID, held, agents)
	}
	used, err := s.processor(s.others(dead), w)
	if err != nil {
		return nil, err
	}
	stop := s.profiles(ctx, "reattach", s.others(dead))
	died := time.Now()
	dead.Process.Kill()
	st, err := w.Wait(ctx, "all to be with other nodes", func(st streams.SwarmStatus) bool {
		return st.Connected >= int64(st.Healthy) && st.AllConnected > died.UnixMicro()
	})
	stop()
	if err != nil {
		return nil, err
	}
	back := time.UnixMicro(st.AllConnected).Sub(died)
	u, err := used()
	if err != nil {
		return nil, err
	}
	refused := 0.0
	for _, m := range s.others(dead) {
		v, err := streams.Metrics(ctx, m.Estate)
		if err != nil {
			return nil, err
		}
		refused += streams.Sum(v, "certmesh_session_handshakes_refused_total")
	}
	return []figure{{"back-s", back.Seconds()}, {"streams", float64(agents)}, {"streams/s", float64(agents) / back.Seconds()}, {"sent-away", refused},
		{"node-cpu-ms/stream", ms(u.node) / float64(agents)}, {"db-cpu-ms/stream", ms(u.db) / float64(agents)}, {"swarm-cpu-ms/stream", ms(u.swarm) / float64(agents)},
		{"cpu-limit-s", u.all().Seconds() / float64(runtime.NumCPU())}}, nil
}

// rates compares how fast agents' certificates are renewed by one node and by three, each with a database of its own, in
// turns. Beside the rates is how much processor time they took, which other work on the machine moves less: cpu-ratio is
// that of one node, database and agents included, to that of three.
func rates(ctx context.Context, bin, dir string, agents, turns int) ([]figure, error) {
	var all [2][]float64
	var swarms [2]*streams.Swarm
	var scenes [2]*scene
	var cpu [2]use
	for i, n := range []int{1, 3} {
		s, err := open(ctx, bin, filepath.Join(dir, fmt.Sprint(n)), n)
		if err != nil {
			return nil, err
		}
		defer s.close()
		scenes[i] = s
		if swarms[i], err = s.swarm(ctx, s.MeshAddresses(), agents); err != nil {
			return nil, err
		}
		for _, c := range []string{"targets", "order", "renew"} { // first times are not like others
			if _, err := swarms[i].Tell(ctx, c); err != nil {
				return nil, err
			}
		}
		if err := s.settled(ctx); err != nil {
			return nil, err
		}
	}
	for turn := range turns {
		for j := range swarms {
			i := (j + turn) % 2
			used, err := scenes[i].processor(scenes[i].Nodes, swarms[i])
			if err != nil {
				return nil, err
			}
			e, err := swarms[i].Tell(ctx, "renew")
			if err != nil {
				return nil, err
			}
			u, err := used()
			if err != nil {
				return nil, err
			}
			cpu[i] = use{cpu[i].node + u.node, cpu[i].db + u.db, cpu[i].swarm + u.swarm}
			if e.Done < int64(agents) || e.DoneMS == 0 {
				return nil, fmt.Errorf("of %d agents %d finished", agents, e.Done)
			}
			all[i] = append(all[i], 1000*float64(e.Done)/float64(e.DoneMS))
		}
	}
	one, three := middle(all[0]), middle(all[1])
	per := float64(turns * agents)
	return []figure{{"one-renewals/s", one}, {"three-renewals/s", three}, {"ratio", three / one}, {"cpu-ratio", float64(cpu[0].all()) / float64(cpu[1].all())},
		{"one-cpu-µs", µs(cpu[0].node) / per}, {"one-db-cpu-µs", µs(cpu[0].db) / per}, {"three-cpu-µs", µs(cpu[1].node) / per},
		{"three-db-cpu-µs", µs(cpu[1].db) / per}, {"swarm-cpu-µs", µs(cpu[0].swarm) / per}}, nil
}

// wake measures the time from an operator's call to renew until the agent has the assignment, with the call at the node
// that holds the agent's stream and at another, in turns.
func (s *scene) wake(ctx context.Context, times int) ([]figure, error) {
	holder := s.Nodes[1]
	a, err := s.listen(ctx, "wake", holder)
	if err != nil {
		return nil, err
	}
	defer a.end()
	var all [2][]time.Duration
	idle, err := s.spend(ctx, func() error { pause(ctx, 5*time.Second); return nil })
	if err != nil {
		return nil, err
	}
	const warm = 3
	work, err := s.spend(ctx, func() error {
		for i := range times + warm {
			for j := range 2 {
				which := (i + j) % 2
				took, err := a.renew(ctx, s.Nodes[1+which])
				if err != nil {
					return err
				}
				if i >= warm {
					all[which] = append(all[which], took)
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	alone, err := s.statements(ctx, func() error {
		for range min(times, 10) {
			if _, err := a.renew(ctx, holder); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	work = work.above(idle)
	done := float64(2 * (times + warm))
	same, other := quantile(all[0], 0.5), quantile(all[1], 0.5)
	return []figure{{"same-p50-ms", ms(same)}, {"other-p50-ms", ms(other)}, {"added-p50-ms", ms(other - same)},
		{"same-p99-ms", ms(quantile(all[0], 0.99))}, {"other-p99-ms", ms(quantile(all[1], 0.99))},
		{"link-msgs/renewal", work.link / done}, {"statements/renewal", alone / float64(min(times, 10))},
		{"cpu-µs/renewal", µs(work.node) / done}, {"db-cpu-µs/renewal", µs(work.db) / done}, {"wal-B/renewal", work.wal / done}, {"tx/renewal", work.commits / done}}, nil
}

// listener is an agent in this process that tells when it is given work.
type listener struct {
	s    *scene
	id   string // of its certificate
	got  chan time.Time
	want atomic.Bool
	end  func()
}

// listen starts an agent at a node, with one certificate in place.
func (s *scene) listen(ctx context.Context, name string, m *estate.ClusterNode) (_ *listener, err error) {
	token, err := s.Nodes[0].Token(ctx)
	if err != nil {
		return nil, err
	}
	root := filepath.Join(s.dir, "sites", name)
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	l := &listener{s: s, got: make(chan time.Time, 1)}
	runCtx, cancel := context.WithCancel(ctx)
	done, welcome := make(chan error, 1), make(chan struct{}, 1)
	l.end = func() {
		cancel()
		_ = <-done // it was ended, and says so
	}
	go func() {
		done <- agentd.Run(runCtx, agentd.Config{Servers: []string{m.Mesh}, JoinToken: token, Name: name, InMemory: true, TargetRoots: []string{root},
			Welcomed: func(string) {
				select {
				case welcome <- struct{}{}:
				default:
				}
			},
			Cut: func(point string) error {
				if point == "receive assignment" && l.want.CompareAndSwap(true, false) {
					l.got <- time.Now()
				}
				return nil
			}})
	}()
	defer func() {
		if err != nil {
			l.end()
		}
	}()
	select {
	case <-welcome:
	case err := <-done:
		done <- err
		return nil, fmt.Errorf("the agent ended: %w", err)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	l.id, err = s.order(ctx, m, name, filepath.Join(root, "site.pem"))
	return l, err
}

// renew renews at a node and returns how long after the call the agent had its work. It waits until all is in place.
func (l *listener) renew(ctx context.Context, m *estate.ClusterNode) (time.Duration, error) {
	l.want.Store(true)
	began := time.Now()
	if _, err := l.s.ops[m].Certificates.RenewCertificate(ctx, &operatorpb.RenewCertificateRequest{Id: l.id}); err != nil {
		return 0, err
	}
	select {
	case at := <-l.got:
		return at.Sub(began), l.s.settled(ctx)
	case <-ctx.Done():
		return 0, fmt.Errorf("the agent was given no work: %w", ctx.Err())
	}
}
