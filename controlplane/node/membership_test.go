package node

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/certmesh/certmesh/protocol/fault"
)

// TestADataDirectoryIsOneNodes: of one cluster, under one id, one process at a time.
func TestADataDirectoryIsOneNodes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n := startDev(t, dir, nil)
	for _, private := range []string{"node.json", "console.sock"} {
		if s, err := os.Stat(filepath.Join(dir, private)); err != nil || s.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", private, s.Mode(), err)
		}
	}
	stopNode(t, n)
	start := func(set map[string]string) error {
		n, err := Start(t.Context(), Options{Configuration: devConfiguration(t, dir, set), Mode: Dev, Log: quiet()})
		if err == nil {
			stopNode(t, n)
		}
		return err
	}
	refused := func(what string, err error, class fault.Class, words ...string) {
		t.Helper()
		for _, w := range words {
			if !fault.Is(err, class) || !strings.Contains(err.Error(), w) {
				t.Errorf("%s: want %s and %q, got %v", what, class, w, err)
			}
		}
	}
	refused("another id", start(map[string]string{"node.id": "n2"}), fault.Invalid, "node.id", `"n1"`, "empty node.data_dir")
	refused("another store", start(map[string]string{"store.dsn": "sqlite:" + filepath.Join(t.TempDir(), "other.db")}), fault.Invalid, "store.dsn", "is the store of cluster")
	refused("a token that is none", start(map[string]string{"cluster.token": "cmjt1.a.b.c"}), fault.Invalid, "malformed", "cluster token create")

	path := filepath.Join(dir, "node.json")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused("a damaged file", start(nil), fault.Invalid, "is damaged", "cluster remove")
	// Without its secret a directory is not the node's: somebody else could have taken its id.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	refused("a lost file", start(nil), fault.Conflict, "another data directory", "cluster remove n1")
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Error("a node that was refused left papers behind")
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := start(nil); err != nil {
		t.Errorf("with everything as it was: %v", err)
	}
}

// TestACopyOfADataDirectory: two processes are the same node; the one that started later is it.
func TestACopyOfADataDirectory(t *testing.T) {
	t.Parallel()
	dir, copied := t.TempDir(), t.TempDir()
	first := startDev(t, dir, nil)
	for _, f := range []string{"node.json", "kek"} {
		data, err := os.ReadFile(filepath.Join(dir, f))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(copied, f), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	startDev(t, copied, map[string]string{"store.dsn": "sqlite:" + filepath.Join(dir, "certmesh.db")})
	select {
	case err := <-first.Failed():
		if !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), `another process runs as node "n1"`) {
			t.Errorf("the older process failed with: %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Error("two processes are one node")
	}
}

// TestRemovedNodeEnds: its permission ends while it runs.
func TestRemovedNodeEnds(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n := startDev(t, dir, nil)
	if err := n.store.RemoveNode(t.Context(), "n1", console()); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-n.Failed():
		if !fault.Is(err, fault.Forbidden) || !strings.Contains(err.Error(), "was removed from the cluster") {
			t.Errorf("the removed node failed with: %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Error("a removed node goes on")
	}
}

func TestStatusAndDrainFromTheConsole(t *testing.T) {
	t.Parallel()
	// Longer than the address of a socket may be.
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	n := startDev(t, dir, nil)
	c := devConfiguration(t, dir, nil)
	for {
		r, err := ClusterStatus(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		// A moment after the start it notes that nobody leads yet.
		if r.GetLeaderId() == "n1" && len(r.GetMembers()) == 1 && len(r.GetNotes()) == 1 {
			if r.GetSelf().GetId() != "n1" || r.GetStoreError() != "" || !strings.HasPrefix(r.GetNotes()[0], "one node:") {
				t.Errorf("%v", r)
			}
			break
		}
	}
	if err := RemoveNode(t.Context(), c, "n1"); err == nil || !strings.Contains(err.Error(), "this is node") {
		t.Errorf("a node removes itself: %v", err)
	}
	if err := RemoveNode(t.Context(), c, "n2"); err == nil || !strings.Contains(err.Error(), `there is no node "n2"`) {
		t.Errorf("remove a node that is none: %v", err)
	}
	if _, err := RecoverRaft(c); !fault.Is(err, fault.Conflict) {
		t.Errorf("recover under a node that runs: %v", err)
	}
	drained := make(chan error, 1)
	go func() { drained <- DrainNode(t.Context(), c) }()
	if err := <-n.Failed(); err != nil {
		t.Errorf("asked to end, the node failed with: %v", err)
	}
	stopNode(t, n)
	if err := <-drained; err != nil {
		t.Error(err)
	}
	if _, err := ClusterStatus(t.Context(), c); !fault.Is(err, fault.NotFound) {
		t.Errorf("status of a node that does not run: %v", err)
	}
	if aside, err := RecoverRaft(c); err != nil || !strings.HasSuffix(aside, "raft.aside-1") {
		t.Errorf("recover: %q %v", aside, err)
	}
	startDev(t, dir, nil) // it begins anew, with all it had
}

// TestClockIsCompared with the database's at the first start; PostgreSQL is the only one here that has a clock.
func TestClockIsCompared(t *testing.T) {
	t.Parallel()
	if err := checkClock(t.Context(), clockOf(time.Time{}), clockwork.NewFakeClock(), time.Minute); err != nil {
		t.Errorf("a store without a clock: %v", err)
	}
	now := clockwork.NewFakeClock()
	for off, good := range map[time.Duration]bool{0: true, 59 * time.Second: true, -59 * time.Second: true, 10 * time.Minute: false, -10 * time.Minute: false} {
		err := checkClock(t.Context(), clockOf(now.Now().Add(off)), now, time.Minute)
		if good != (err == nil) || !good && !strings.Contains(err.Error(), "cluster.max_clock_skew (1m0s)") {
			t.Errorf("%s off: %v", off, err)
		}
	}
}

type clockOf time.Time

func (c clockOf) ServerTime(context.Context) (time.Time, error) { return time.Time(c), nil }

func TestPapersKeepTheirSecret(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "node.json")
	p := papers{ClusterID: "cl_1", NodeID: "n1", Secret: "hunter2"}
	if err := writePapers(path, p); err != nil {
		t.Fatal(err)
	}
	if got, err := readPapers(path); err != nil || got != p {
		t.Errorf("%+v %v", got, err)
	}
	damaged, err := json.Marshal(map[string]string{"secret": "hunter2"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readPapers(path); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("damaged papers: %v", err)
	}
}
