package session

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func (k *talk) move() *agentpb.Move {
	k.t.Helper()
	return until(k, func(m *agentpb.ConnectResponse) (*agentpb.Move, bool) { return m.GetMove(), m.GetMove() != nil })
}

// leave ends the stream in order, as an agent does that was moved.
func (k *talk) leave() {
	_ = k.st.CloseSend() // the end shows at the receiving side
}

// TestDrainMovesAgents: all are asked to go to the other nodes, come back nowhere else, and nobody new is taken.
func TestDrainMovesAgents(t *testing.T) {
	t.Parallel()
	x := newPair(t)
	const n = 30
	var talks []*talk
	for i := range n {
		talks = append(talks, x.a.host(fmt.Sprint("h", i)).online())
	}
	drained := make(chan error, 1)
	nodes := []string{x.b.addr, "n3.example:8444"}
	go func() { drained <- x.a.srv.Drain(t.Context(), nodes) }()
	firsts := map[string]bool{}
	for _, k := range talks {
		m := k.move()
		firsts[m.GetNodes()[0]] = true
		if slices.Sort(m.GetNodes()); len(m.GetNodes()) != 2 || !slices.Contains(m.GetNodes(), x.b.addr) || m.GetWindowMs() < 50 || m.GetWindowMs() > 1000 {
			t.Fatalf("%v", m)
		}
	}
	if len(firsts) != 2 {
		t.Errorf("all go to %v", firsts)
	}
	late := x.a.host("late")
	k := late.connect()
	if g := k.goodbye(); g.GetReason() != agentpb.Goodbye_REASON_SHUTDOWN || g.GetPermanent() {
		t.Errorf("%v", g)
	}
	k.end()
	for i, k := range talks {
		k.leave()
		if i == 0 {
			k.end()
			select {
			case err := <-drained:
				t.Fatalf("the drain ended before the agents had left: %v", err)
			default:
			}
		}
	}
	if err := <-drained; err != nil {
		t.Fatal(err)
	}
	if got := testutil.ToFloat64(x.a.srv.metrics.moved); got != n || x.a.srv.Count() != 0 {
		t.Errorf("%v moved, %d are held", got, x.a.srv.Count())
	}
	late.connect().goodbye()
	x.a.srv.Accept()
	late.online()
}

// TestDrainFinishesWhatIsSigned: an agent is asked to go when its certificate was issued and told; it gets no other work.
func TestDrainFinishesWhatIsSigned(t *testing.T) {
	t.Parallel()
	x := newPair(t)
	h, idle := x.a.host("busy"), x.a.host("idle")
	order := x.a.store.order(domain.JobIssuance, h.id, "cert_1", "")
	k, other := h.online(credits(8, 8)), idle.online()
	k.assignment()
	signing, release := make(chan struct{}), make(chan struct{})
	x.a.store.onCall(func(method string) error {
		if method == "Issue" {
			close(signing)
			<-release
		}
		return nil
	})
	k.send(accepted(order.ID, 1))
	k.send(csrFor(order.ID, 1, newCSR(t, newKey(t))))
	<-signing
	drained := make(chan error, 1)
	go func() { drained <- x.a.srv.Drain(t.Context(), []string{x.b.addr}) }()
	other.move()
	other.leave()
	next := x.a.store.order(domain.JobDeployment, h.id, "cert_9", "tgt_9")
	x.a.srv.Wake(h.id)
	close(release)
	settled := k.settled()
	for {
		m := k.next()
		if m.GetMove() != nil {
			break
		}
		if m.GetAssignment() != nil {
			t.Fatalf("work is given to an agent that is to go: %v", m)
		}
	}
	if settled.GetId() != order.ID || settled.GetOutcome() != agentpb.Settled_OUTCOME_OK {
		t.Errorf("%v", settled)
	}
	k.leave()
	if err := <-drained; err != nil {
		t.Fatal(err)
	}
	x.a.store.onCall(nil)
	if a := h.at(x.b).online(credits(8, 8)).assignment(); a.GetId() != next.ID {
		t.Errorf("%v", a)
	}
}

// TestStopDrainsFirst: who goes is moved, who stays is told Goodbye within the time there is.
func TestStopDrainsFirst(t *testing.T) {
	t.Parallel()
	p := newPlane(t, func(c *Config) { c.Reachable = func() []string { return []string{"n2.example:8444"} } })
	goes, stays := p.host("goes").online(), p.host("stays").online()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	stopped := make(chan error, 1)
	go func() { stopped <- p.srv.Stop(ctx) }()
	goes.move()
	goes.leave()
	goes.end()
	stays.move()
	if g := stays.goodbye(); g.GetReason() != agentpb.Goodbye_REASON_SHUTDOWN {
		t.Errorf("%v", g)
	}
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
}

// TestDrainWithoutAnotherNode: agents are told Goodbye, as by Stop.
func TestDrainWithoutAnotherNode(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	k := p.host("web1").online()
	if err := p.srv.Drain(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if g := k.goodbye(); g.GetReason() != agentpb.Goodbye_REASON_SHUTDOWN {
		t.Errorf("%v", g)
	}
	if err := p.srv.Drain(t.Context(), nil); err != nil {
		t.Fatalf("twice: %v", err)
	}
}

// TestDrainDoesNotWaitForEver: an agent that does not go is counted in the error.
func TestDrainDoesNotWaitForEver(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	k := p.host("web1").online()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := p.srv.Drain(ctx, []string{"n2:1"}); !fault.Is(err, fault.Retryable) {
		t.Fatalf("drained: %v", err)
	}
	k.move()
}

// TestWavesEndInTime, for however many agents, and are no larger than they must be.
func TestWavesEndInTime(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ agents, want int }{{1, waveLeast}, {201, waveLeast}, {10_000, 834}, {50_000, 4167}} {
		if got := waveSize(c.agents, drainMost); got != c.want {
			t.Errorf("%d agents: waves of %d, want %d", c.agents, got, c.want)
		}
	}
	if got := waveSize(1000, time.Second/2); got != 1000 {
		t.Errorf("without time: waves of %d", got)
	}
}
