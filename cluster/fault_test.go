package cluster_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/certmesh/certmesh/cluster"
	"github.com/certmesh/certmesh/cluster/clustertest"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// fullDisk refuses to write while it is full.
type fullDisk struct {
	cluster.Backend
	full *atomic.Bool
}

func (d fullDisk) err() error {
	if d.full.Load() {
		return syscall.ENOSPC
	}
	return nil
}

func (d fullDisk) StoreLog(l *raft.Log) error { return d.StoreLogs([]*raft.Log{l}) }

func (d fullDisk) StoreLogs(l []*raft.Log) error {
	if err := d.err(); err != nil {
		return err
	}
	return d.Backend.StoreLogs(l)
}

func (d fullDisk) Set(k, v []byte) error {
	if err := d.err(); err != nil {
		return err
	}
	return d.Backend.Set(k, v)
}

func (d fullDisk) SetUint64(k []byte, v uint64) error {
	if err := d.err(); err != nil {
		return err
	}
	return d.Backend.SetUint64(k, v)
}

// TestFullDisk: a leader whose disk is full gives up, another leads, and with room again it follows without a restart.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	e, r := clustertest.NewEstate(t), newReigns()
	full := map[string]*atomic.Bool{}
	var nodes []*cluster.Node
	for _, id := range three {
		cfg := r.watch(e.Config(id, 3, three...))
		full[id] = &atomic.Bool{}
		cfg.SetBackend(func(b cluster.Backend) cluster.Backend { return fullDisk{b, full[id]} })
		nodes = append(nodes, e.Start(cfg))
	}
	settled(e, nodes...)
	leader := e.Leader(nodes...)
	e.Wait("it has established", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return len(r.contexts[leader.ID()]) > 0 })
	term := r.last(leader.ID())
	full[leader.ID()].Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), clustertest.Patience)
	defer cancel()
	if err := leader.Propose(ctx, configurationChanged()); err == nil {
		t.Error("decided on a full disk")
	}
	select {
	case <-term.Done():
	case <-ctx.Done():
		t.Fatal("its term did not end")
	}
	next := e.Leader(without(nodes, leader)...)
	if err := next.Propose(ctx, configurationChanged()); err != nil {
		t.Fatal(err)
	}
	e.Wait("it says so", func() bool { return strings.Contains(leader.Trouble(), "no space left") || leader.Trouble() != "" })
	select {
	case err := <-leader.Failed():
		t.Errorf("a full disk is no end: %v", err)
	default:
	}
	full[leader.ID()].Store(false)
	e.Wait("it has caught up", func() bool { return leader.ConfigurationRevision() == next.ConfigurationRevision() })
	e.Wait("no trouble is left", func() bool { return leader.Trouble() == "" })
}

// TestStopOnAFullDisk: nothing hangs.
func TestStopOnAFullDisk(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	var full atomic.Bool
	cfg := e.Config("n1", 1)
	cfg.SetBackend(func(b cluster.Backend) cluster.Backend { return fullDisk{b, &full} })
	n := e.Start(cfg)
	e.Leader(n)
	full.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := n.Propose(ctx, configurationChanged()); err == nil {
		t.Error("decided on a full disk")
	}
	e.Wait("it does not lead", func() bool { return !n.IsLeader() })
	e.Stop(n)
}

// TestDamage: files that are cut off or overwritten are an error that says what to do, and after that the node starts.
func TestDamage(t *testing.T) {
	t.Parallel()
	overwrite := func(from, n int64) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte(strings.Repeat("garbage!", int(n/8))), from); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	truncate := func(keep float64) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, int64(float64(info.Size())*keep)); err != nil {
				t.Fatal(err)
			}
		}
	}
	remove := func(t *testing.T, path string) {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name  string
		file  string
		spoil func(t *testing.T, path string)
		// free: what is spoilt may be a page that nothing uses.
		free bool
	}{
		{"the log is cut off in the middle", "raft.db", truncate(0.3), false},
		{"the log is cut off at the end", "raft.db", truncate(0.7), false},
		{"the log is cut off to a page", "raft.db", truncate(0.1), false},
		{"the log is empty", "raft.db", truncate(0), false},
		{"the log is no log", "raft.db", overwrite(0, 1<<17), false},
		{"the log's pages are overwritten", "raft.db", overwrite(3*4096, 1<<15), true},
		{"a page of the log is overwritten", "raft.db", overwrite(5*4096, 1<<12), true},
		{"the snapshot is cut off", "snapshots/*/state.bin", truncate(0.5), false},
		{"the snapshot is overwritten", "snapshots/*/state.bin", overwrite(0, 16), false},
		{"the snapshot's description is overwritten", "snapshots/*/meta.json", overwrite(0, 16), false},
		{"the snapshot's description is gone", "snapshots/*/meta.json", remove, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			e := clustertest.NewEstate(t)
			cfg := e.Config("n1", 1)
			n := e.Start(cfg)
			e.Leader(n)
			if err := n.Compact(); err != nil {
				t.Fatal(err)
			}
			for range 40 {
				if err := n.Propose(t.Context(), &clusterpb.Command{Body: &clusterpb.Command_Plan{Plan: &clusterpb.PlanShards{NodeIds: []string{strings.Repeat("n", 2000)}}}}); err != nil {
					t.Fatal(err)
				}
			}
			if err := n.Snapshot(); err != nil {
				t.Fatal(err)
			}
			for range 40 {
				if err := n.Propose(t.Context(), configurationChanged()); err != nil {
					t.Fatal(err)
				}
			}
			e.Stop(n)
			paths, err := filepath.Glob(filepath.Join(cfg.Dir, c.file))
			if err != nil || len(paths) == 0 {
				t.Fatalf("%v, %v", paths, err)
			}
			c.spoil(t, paths[len(paths)-1])
			if n, err := e.TryStart(e.Config("n1", 1)); err == nil && c.free {
				// Nothing used the page.
				e.Wait("all is there", func() bool { return n.ConfigurationRevision() == 40 })
				return
			} else if err == nil {
				t.Fatal("damage was not noticed")
			} else if !fault.Is(err, fault.Rejected) || !strings.Contains(err.Error(), "certmeshd cluster recover") {
				t.Fatalf("%v", err)
			}
			if _, err := cluster.Recover(cfg.Dir); err != nil {
				t.Fatal(err)
			}
			e.Leader(e.Start(e.Config("n1", 1)))
		})
	}
}

// TestRestartFromASnapshot: with the log cut down to nearly nothing, and for a node that joins only then.
func TestRestartFromASnapshot(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	n := e.Start(e.Config("n1", 1))
	e.Leader(n)
	if err := n.Compact(); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if err := n.Propose(t.Context(), configurationChanged()); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Snapshot(); err != nil {
		t.Fatal(err)
	}
	joined := e.Start(e.Config("n2", 1, "n1"))
	e.Wait("the snapshot has arrived", func() bool { return joined.ConfigurationRevision() == 20 })
	e.Stop(n)
	n = e.Start(e.Config("n1", 1))
	if n.ConfigurationRevision() != 20 {
		t.Errorf("revision %d after a restart, want 20", n.ConfigurationRevision())
	}
	e.Leader(n, joined)
}

// TestTooOld: a command of a later version stops the node, says so, and leaves its files to a newer program.
func TestTooOld(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	n := e.Start(e.Config("n1", 1))
	e.Leader(n)
	later := protowire.AppendBytes(protowire.AppendTag(nil, 900, protowire.BytesType), []byte("x"))
	ignorable := protowire.AppendVarint(protowire.AppendTag(later, 1, protowire.VarintType), 1)
	for _, data := range [][]byte{[]byte("\xff garbage"), ignorable} {
		if err := n.ApplyRaw(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Propose(t.Context(), configurationChanged()); err != nil {
		t.Fatal(err)
	}
	if err := n.ApplyRaw(later); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-n.Failed():
		if !fault.Is(err, fault.Unsupported) || !strings.Contains(err.Error(), "too old for the cluster") {
			t.Errorf("%v", err)
		}
	case <-time.After(clustertest.Patience):
		t.Fatal("the node does not notice")
	}
	if err := n.Snapshot(); err == nil {
		t.Error("a snapshot of a state that stands still")
	}
	if err := n.Propose(t.Context(), configurationChanged()); !fault.Is(err, fault.Unsupported) {
		t.Errorf("%v", err)
	}
	if n.ConfigurationRevision() != 1 {
		t.Error("the state goes on")
	}
}

// TestEstablishFails: leadership goes to a node that can establish, and one that is alone tries again.
func TestEstablishFails(t *testing.T) {
	t.Parallel()
	e, r := clustertest.NewEstate(t), newReigns()
	var able atomic.Value
	able.Store("n2")
	var nodes []*cluster.Node
	for _, id := range three {
		cfg := r.watch(e.Config(id, 3, three...))
		inner := cfg.Leading
		cfg.Leading = func(ctx context.Context, term cluster.Term) error {
			if able.Load() != id {
				return errors.New("cannot")
			}
			return inner(ctx, term)
		}
		nodes = append(nodes, e.Start(cfg))
	}
	e.Wait("n2 leads", func() bool { return nodes[1].IsLeader() })
	for _, n := range nodes {
		select {
		case err := <-n.Failed():
			t.Errorf("%s: %v", n.ID(), err)
		default:
		}
	}

	alone := clustertest.NewEstate(t)
	var tries atomic.Int32
	cfg := alone.Config("n1", 1)
	established := make(chan cluster.Term, 1)
	cfg.Leading = func(_ context.Context, term cluster.Term) error {
		if tries.Add(1) < 3 {
			return errors.New("not yet")
		}
		established <- term
		return nil
	}
	began := time.Now()
	alone.Start(cfg)
	select {
	case term := <-established:
		if term.Since.Before(began) || term.Number == 0 {
			t.Errorf("%+v", term)
		}
	case <-time.After(clustertest.Patience):
		t.Fatal("it gave up")
	}
}

// TestLeadingMayStay: Leading that stays until its context ends is left before Revoke, and Stop waits for both.
func TestLeadingMayStay(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	var mu sync.Mutex
	var order []string
	say := func(s string) { mu.Lock(); defer mu.Unlock(); order = append(order, s) }
	cfg := e.Config("n1", 1)
	entered := make(chan struct{})
	cfg.Leading = func(ctx context.Context, _ cluster.Term) error {
		close(entered)
		<-ctx.Done()
		say("left")
		return ctx.Err()
	}
	cfg.Revoke = func(cluster.Term) { say("revoked") }
	n := e.Start(cfg)
	<-entered
	e.Stop(n)
	if got := strings.Join(order, " "); got != "left revoked" {
		t.Errorf("%s", got)
	}
}

func TestPropose(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	n := e.Start(e.Config("n1", 1))
	e.Leader(n)
	lease := func(id uint64, permits int32) *clusterpb.Command {
		return &clusterpb.Command{Body: &clusterpb.Command_Grant{Grant: &clusterpb.GrantPermits{Lease: &clusterpb.PermitLease{
			Id: id, IssuerId: "acme", NodeId: "n1", Permits: permits, DurationMs: 1000,
		}}}}
	}
	changes, cancel := n.Changes()
	defer cancel()
	for _, c := range []struct {
		name    string
		command *clusterpb.Command
		class   fault.Class
	}{
		{"a lease", lease(n.LastLeaseID()+1, 5), ""},
		{"an old lease", lease(1, 5), fault.Conflict},
		{"a lease of nothing", lease(2, 0), fault.Invalid},
		{"nothing", &clusterpb.Command{}, fault.Unsupported},
		{"too much", &clusterpb.Command{Body: &clusterpb.Command_Plan{Plan: &clusterpb.PlanShards{NodeIds: []string{strings.Repeat("n", 1<<17)}}}}, fault.Exhausted},
	} {
		if err := n.Propose(t.Context(), c.command); fault.ClassOf(err) != c.class {
			t.Errorf("%s: %v, want %q", c.name, err, c.class)
		}
	}
	select {
	case <-changes:
	case <-time.After(clustertest.Patience):
		t.Error("no change is told")
	}
	if l := n.Leases(); len(l) != 1 || l[0].GetPermits() != 5 || n.LastLeaseID() != 1 || len(n.Pauses()) != 0 {
		t.Errorf("%v", l)
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	registry := prometheus.NewPedanticRegistry()
	cfg := e.Config("n1", 1)
	cfg.Metrics = registry
	n := e.Start(cfg)
	e.Leader(n)
	e.Wait("the change is counted", func() bool { return n.IsLeader() && value(t, registry, "certmesh_raft_leader_changes_total") == 1 })
	for name, want := range map[string]float64{"certmesh_raft_leader": 1, "certmesh_raft_members": 1, "certmesh_raft_disk_failing": 0} {
		if got := value(t, registry, name); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	if value(t, registry, "certmesh_raft_term") == 0 || value(t, registry, "certmesh_raft_applied_index") == 0 {
		t.Error("term and index stay 0")
	}
	e.Stop(n)
	if families, err := registry.Gather(); err != nil || len(families) != 0 {
		t.Errorf("after Stop: %d metrics, %v", len(families), err)
	}
}

// value returns the sum of a metric over its labels.
func value(t *testing.T, registry *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				sum += m.GetGauge().GetValue() + m.GetCounter().GetValue()
			}
		}
	}
	return sum
}

// TestStrangersAtTheRaftListener: who shows no node's identity of this mesh does not get in, and holds up nobody.
func TestStrangersAtTheRaftListener(t *testing.T) {
	t.Parallel()
	e := clustertest.NewEstate(t)
	nodes := begin(e, nil, three...)
	foreign := clustertest.NewAuthority(t, "elsewhere.test")
	reach := func(certificate *tls.Certificate) error {
		raw, err := e.Dialer("stranger")(t.Context(), "n1:8445")
		if err != nil {
			return err
		}
		defer raw.Close()
		if err := raw.SetDeadline(time.Now().Add(clustertest.Patience)); err != nil {
			return err
		}
		config := &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}
		if certificate != nil {
			config.Certificates = []tls.Certificate{*certificate}
		}
		c := tls.Client(raw, config)
		if err := c.Handshake(); err != nil {
			return err
		}
		_, err = c.Read(make([]byte, 1))
		return err
	}
	var ne net.Error
	for name, certificate := range map[string]*tls.Certificate{
		"no certificate":       nil,
		"an agent":             e.Authority.Identity(t, "agent", "n2", time.Hour),
		"an expired node":      e.Authority.Identity(t, "node", "n2", -time.Minute),
		"another trust domain": foreign.Node(t, "n2"),
		"this node's own id":   e.Authority.Node(t, "n1"),
	} {
		if err := reach(certificate); err == nil || errors.As(err, &ne) && ne.Timeout() {
			t.Errorf("%s gets in: %v", name, err)
		}
	}
	// And some that say nothing.
	for range 80 {
		raw, err := e.Dialer("stranger")(t.Context(), "n1:8445")
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
	}
	e.Leader(nodes...)
}
