package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/certmesh/certmesh/e2e/bench/streams"
	"github.com/certmesh/certmesh/e2e/estate"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

func µs(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// middle of values, which it sorts.
func middle(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// use is processor time by who used it.
type use struct{ node, db, swarm time.Duration }

func (u use) all() time.Duration { return u.node + u.db + u.swarm }

// processor starts to count the processor time of nodes, of the database and of a swarm, if there is one; the returned
// function says how much it was.
func (s *scene) processor(nodes []*estate.ClusterNode, w *streams.Swarm) (func() (use, error), error) {
	read := func() (u use, err error) {
		for _, m := range nodes {
			d, err := streams.CPU(m.Process.PID())
			if err != nil {
				return u, err
			}
			u.node += d
		}
		if w != nil {
			u.swarm, err = streams.CPU(w.PID())
		}
		u.db = serverCPU(s.server)
		return u, err
	}
	before, err := read()
	return func() (use, error) {
		u, err := read()
		return use{u.node - before.node, u.db - before.db, u.swarm - before.swarm}, err
	}, err
}

// stat returns the fields of /proc/pid/stat from the state on, the third of all (proc(5)); nil: the process has ended.
func stat(pid string) []string {
	text, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
	if err != nil {
		return nil
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	if f := strings.Fields(rest); len(f) > waitedSystem {
		return f
	}
	return nil
}

// Fields of stat.
const parent, user, system, waitedSystem = 1, 11, 12, 14

// serverCPU is the processor time of PostgreSQL's processes, those that ended included.
func serverCPU(server int) time.Duration {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return 0
	}
	var ticks int64
	for _, d := range dirs {
		f := stat(d.Name())
		if f == nil {
			continue
		}
		last := system
		switch strconv.Itoa(server) {
		case d.Name():
			last = waitedSystem
		case f[parent]:
		default:
			continue
		}
		for _, n := range f[user : last+1] {
			v, _ := strconv.ParseInt(n, 10, 64) // the kernel writes numbers
			ticks += v
		}
	}
	return time.Duration(ticks) * (time.Second / 100) // USER_HZ is 100 on every Linux of today
}

// postmaster is the process id of the database's server, the parent of who serves us.
func (s *scene) postmaster(ctx context.Context) (int, error) {
	var pid int
	if err := s.db.QueryRowContext(ctx, "SELECT pg_backend_pid()").Scan(&pid); err != nil {
		return 0, err
	}
	f := stat(strconv.Itoa(pid))
	if f == nil {
		return 0, fmt.Errorf("the database's process %d is not to be seen", pid)
	}
	return strconv.Atoi(f[parent])
}

// counts are what the database and the nodes have counted so far.
type counts struct{ commits, wal, size, raft, link float64 }

func (s *scene) counted(ctx context.Context) (c counts, err error) {
	err = s.db.QueryRowContext(ctx, `SELECT xact_commit + xact_rollback, pg_current_wal_insert_lsn() - '0/0', pg_database_size(current_database())
FROM pg_stat_database WHERE datname = current_database()`).Scan(&c.commits, &c.wal, &c.size)
	if err != nil {
		return c, err
	}
	v, err := streams.Metrics(ctx, s.Nodes[0].Estate)
	if err != nil {
		return c, err
	}
	c.raft = v["certmesh_raft_applied_index"]
	c.link, err = s.linked(ctx)
	return c, err
}

// linked is how many messages nodes have sent to one another, pings and their answers left out.
func (s *scene) linked(ctx context.Context) (float64, error) {
	n := 0.0
	for _, m := range s.Nodes {
		v, err := streams.Metrics(ctx, m.Estate)
		if err != nil {
			return 0, err
		}
		for k, x := range v {
			if strings.HasPrefix(k, "certmesh_link_sent_total") && !strings.Contains(k, "ping") && !strings.Contains(k, "pong") && !strings.Contains(k, "clock") {
				n += x
			}
		}
	}
	return n, nil
}

// statements is how many statements the nodes sent to the database because of what do did, each a round trip: those that
// they send anyway in the same time are left out.
func (s *scene) statements(ctx context.Context, do func() error) (float64, error) {
	set := func(what string) error {
		// What we ask ourselves is not counted.
		for _, q := range []string{"SET log_statement = none", "ALTER SYSTEM SET log_statement = " + what, "SELECT pg_reload_conf()"} {
			if _, err := s.db.ExecContext(ctx, q); err != nil {
				return err
			}
		}
		pause(ctx, 500*time.Millisecond) // each backend hears of it by a signal
		return nil
	}
	count := func() (float64, error) {
		text, err := os.ReadFile(s.estate.Path("postgres.log"))
		return float64(strings.Count(string(text), "LOG:  execute") + strings.Count(string(text), "LOG:  statement:")), err
	}
	if err := set("'all'"); err != nil {
		return 0, err
	}
	began := time.Now()
	before, err := count()
	if err != nil {
		return 0, err
	}
	pause(ctx, 3*time.Second)
	quiet := time.Since(began)
	between, err := count()
	if err != nil {
		return 0, err
	}
	if err := do(); err != nil {
		return 0, err
	}
	busy := time.Since(began) - quiet
	after, err := count()
	if err != nil {
		return 0, err
	}
	return after - between - (between-before)*busy.Seconds()/quiet.Seconds(), set("'none'")
}

// memory is what all nodes have in use, in bytes.
func (s *scene) memory(ctx context.Context) (int64, error) {
	var n int64
	for _, m := range s.Nodes {
		x, err := streams.MemoryOf(ctx, m.Process.PID(), s.debug[m])
		if err != nil {
			return 0, err
		}
		n += x.InUse
	}
	return n, nil
}

// spent is what a stretch of time or work took.
type spent struct {
	use
	counts
	took time.Duration
}

// above is what x took beyond what would have been taken in the same time with nothing to do.
func (x spent) above(idle spent) spent {
	share := x.took.Seconds() / idle.took.Seconds()
	of := func(d time.Duration) time.Duration { return time.Duration(float64(d) * share) }
	return spent{use{max(0, x.node-of(idle.node)), max(0, x.db-of(idle.db)), 0},
		counts{max(0, x.commits-idle.commits*share), max(0, x.wal-idle.wal*share), max(0, x.size-idle.size*share), max(0, x.raft-idle.raft*share),
			max(0, x.link-idle.link*share)}, x.took}
}

func (s *scene) spend(ctx context.Context, do func() error) (x spent, err error) {
	used, err := s.processor(s.Nodes, nil)
	if err != nil {
		return x, err
	}
	before, err := s.counted(ctx)
	if err != nil {
		return x, err
	}
	began := time.Now()
	if err := do(); err != nil {
		return x, err
	}
	x.took = time.Since(began)
	if x.use, err = used(); err != nil {
		return x, err
	}
	after, err := s.counted(ctx)
	x.counts = counts{after.commits - before.commits, after.wal - before.wal, after.size - before.size, after.raft - before.raft, after.link - before.link}
	return x, err
}

// costs measures what nodes and database take for one of each thing that there are many of. The renewals are of all agents
// at once, so that they share commits; wake has what one takes that comes alone.
func (s *scene) costs(ctx context.Context, agents, renewals, watches int, window time.Duration) ([]figure, error) {
	quiet := func() error { pause(ctx, window); return nil }
	empty, err := s.spend(ctx, quiet)
	if err != nil {
		return nil, err
	}
	bytes0, err := s.memory(ctx)
	if err != nil {
		return nil, err
	}
	w, err := s.swarm(ctx, s.MeshAddresses(), agents)
	if err != nil {
		return nil, err
	}
	pause(ctx, window) // what joining left behind
	idle, err := s.spend(ctx, quiet)
	if err != nil {
		return nil, err
	}
	// So many agents beat at this rate; what is written of it is one row each.
	const beatEvery = 30 * time.Second
	beats := float64(agents) * idle.took.Seconds() / beatEvery.Seconds()
	bytes1, err := s.memory(ctx)
	if err != nil {
		return nil, err
	}
	for _, c := range []string{"targets", "order", "renew"} {
		if _, err := w.Tell(ctx, c); err != nil {
			return nil, err
		}
	}
	renew := func() error {
		for range renewals {
			if _, err := w.Tell(ctx, "renew"); err != nil {
				return err
			}
			if err := s.settled(ctx); err != nil {
				return err
			}
		}
		return nil
	}
	work, err := s.spend(ctx, renew)
	if err != nil {
		return nil, err
	}
	var clients float64
	err = s.db.QueryRowContext(ctx, "SELECT count(*) - 1 FROM pg_stat_activity WHERE backend_type = 'client backend'").Scan(&clients)
	if err != nil {
		return nil, err
	}
	asked, err := s.statements(ctx, func() error {
		if _, err := w.Tell(ctx, "renew"); err != nil {
			return err
		}
		return s.settled(ctx)
	})
	if err != nil {
		return nil, err
	}
	bytes2, err := s.memory(ctx)
	if err != nil {
		return nil, err
	}
	stop, err := s.watch(ctx, watches)
	if err != nil {
		return nil, err
	}
	defer stop()
	bytes3, err := s.memory(ctx)
	if err != nil {
		return nil, err
	}
	watched, err := s.spend(ctx, renew)
	if err != nil {
		return nil, err
	}
	each := idle.above(empty)
	perHour := 3600 / (empty.took + idle.took).Seconds()
	raft := (empty.raft + idle.raft) * perHour
	work, watched = work.above(idle), watched.above(idle)
	done := float64(renewals * agents)
	return []figure{
		{"B/agent", float64(bytes1-bytes0) / float64(agents)}, {"B/watch", float64(bytes3-bytes2) / float64(watches)},
		{"idle-cpu-%/node", 100 * empty.node.Seconds() / empty.took.Seconds() / float64(len(s.Nodes))},
		{"idle-db-cpu-%", 100 * empty.db.Seconds() / empty.took.Seconds()},
		{"cpu-µs/beat", µs(each.node) / beats}, {"db-cpu-µs/beat", µs(each.db) / beats}, {"wal-B/beat", each.wal / beats},
		{"cpu-µs/renewal", µs(work.node) / done}, {"db-cpu-µs/renewal", µs(work.db) / done}, {"wal-B/renewal", work.wal / done},
		{"size-B/renewal", work.size / done}, {"tx/renewal", work.commits / done}, {"statements/renewal", asked / float64(agents)},
		{"link-msgs/renewal", work.link / done}, {"raft-entries/renewal", work.raft / done},
		{"raft-entries/hour", raft}, {"renewals/s", done / work.took.Seconds()},
		{"cpu-µs/renewal/watch", µs(watched.node-work.node) / done / float64(watches)}, {"db-conns/node", clients / float64(len(s.Nodes))},
	}, nil
}

// watch opens so many watches of everything, spread over the nodes.
func (s *scene) watch(ctx context.Context, n int) (stop func(), err error) {
	ctx, stop = context.WithCancel(ctx)
	for i := range n {
		st, err := s.ops[s.Nodes[i%len(s.Nodes)]].System.Watch(ctx, &operatorpb.WatchRequest{})
		if err == nil {
			_, err = st.Recv()
		}
		if err != nil {
			stop()
			return nil, fmt.Errorf("watch %d: %w", i+1, err)
		}
		go func() {
			for {
				if _, err := st.Recv(); err != nil {
					return
				}
			}
		}()
	}
	return stop, nil
}
