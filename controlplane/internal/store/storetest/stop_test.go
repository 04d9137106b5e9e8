package storetest

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/protocol/fault"
)

// stopper is a store.Faults that stops its own process before the second statement of a transaction, which follows the
// look at the fence.
type stopper struct{ name string }

func (s stopper) Before(name string, n int) error {
	if name == s.name && n == 2 {
		fmt.Println("inside") //nolint:forbidigo // the parent reads it
		return syscall.Kill(os.Getpid(), syscall.SIGSTOP)
	}
	return nil
}

func (stopper) Commit(string) error { return nil }

// stoppedHolder tells the child of TestStoppedProcessCommitsNothing what to do: DSN, epoch, certificate and agent.
const stoppedHolder = "CERTMESH_TEST_STOPPED_HOLDER"

// TestStoppedHolder is the child; in a run of its own it does nothing.
func TestStoppedHolder(t *testing.T) { //nolint:paralleltest // it stops the process
	args := strings.Fields(os.Getenv(stoppedHolder))
	if len(args) != 4 {
		return // it is the child of the test below
	}
	var epoch int64
	if _, err := fmt.Sscan(args[1], &epoch); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), store.Config{DSN: args[0], NodeID: "n1", Faults: stopper{"leaf.jobs"}})
	must(t, err)
	defer func() { _ = s.Close() }() // the process ends
	_, err = s.CreateLeafJobs(t.Context(), domain.Fence{Duty: "renew", Holder: "n1", Epoch: domain.Epoch(epoch)},
		[]domain.NewJob{{CertificateID: args[2], AgentID: args[3]}}, domain.Op{Actor: "node:n1", RequestID: "r", At: Start})
	fmt.Printf("answer %s %v\n", fault.ClassOf(err), err) //nolint:forbidigo // the parent reads it
}

// A whole process that is stopped (SIGSTOP) inside a fenced transaction, after it has looked at the fence: with what the
// product sets for its sessions the next holder waits no longer than the database lets an idle transaction stand, and
// what the former one goes on to do when it runs again is refused.
func TestStoppedProcessCommitsNothing(t *testing.T) {
	t.Parallel()
	for _, e := range Engines(t) {
		if e.Name != "postgres" {
			continue // SQLite has one process
		}
		w := NewWorld(t, e)
		a := w.Agent(t, "web1")
		c, jobs := w.Order(t, "a.test", domain.Policy{}, w.Target(t, a.ID, "one").ID)
		w.Issue(t, jobs[0], w.Open(t, a.ID, "n1").Epoch, "key")
		old, err := w.S.TakeDuty(t.Context(), "renew", "n1", w.Now())
		must(t, err)

		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		child := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestStoppedHolder$")
		child.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %s %s", stoppedHolder, w.DSN, old.Epoch, c.ID, a.ID))
		child.Stderr = os.Stderr
		out, err := child.StdoutPipe()
		must(t, err)
		must(t, child.Start())
		lines := make(chan string, 64)
		go func() {
			defer close(lines)
			for s := bufio.NewScanner(out); s.Scan(); {
				lines <- s.Text()
			}
		}()
		defer func() { _ = child.Process.Kill() }() // it has ended unless the test failed
		for line := within(t, lines, "line of the child"); line != "inside"; line = within(t, lines, "line of the child") {
			if strings.HasPrefix(line, "answer") {
				t.Fatalf("the child did not stop: %s", line)
			}
		}
		waitStopped(t, child.Process.Pid)

		const idle = 5 * time.Second
		began := time.Now()
		_, err = w.S.TakeDuty(ctx, "renew", "n2", w.Now())
		for fault.Is(err, fault.Retryable) && time.Since(began) < 2*idle {
			_, err = w.S.TakeDuty(ctx, "renew", "n2", w.Now())
		}
		took := time.Since(began)
		must(t, err)
		if took > idle+3*time.Second {
			t.Errorf("the next holder waited for %s", took)
		}
		t.Logf("the next holder waited for %s", took.Round(time.Millisecond))
		must(t, child.Process.Signal(syscall.SIGCONT))
		answer := ""
		for line := range lines {
			if strings.HasPrefix(line, "answer") {
				answer = line
			}
		}
		if !strings.HasPrefix(answer, "answer "+string(fault.Conflict)) {
			t.Errorf("the stopped process went on to: %s", answer)
		}
		must(t, child.Wait())
		if n := w.count(t, "SELECT COUNT(*) FROM job WHERE kind = 'Renewal'"); n != 0 {
			t.Error("the stopped process's job is there")
		}
	}
}

// waitStopped waits until the system says that the process stands.
func waitStopped(t *testing.T, pid int) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 2000 {
		// pid (name) state …
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		must(t, err)
		if f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:])); len(f) > 0 && f[0] == "T" {
			return
		}
		<-tick.C
	}
	t.Fatal("the child does not stand still")
}
