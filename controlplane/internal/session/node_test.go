package session

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

// TestWhatOperatorsSee: holding, counting, credits and metrics follow the streams.
func TestWhatOperatorsSee(t *testing.T) {
	t.Parallel()
	metrics := prometheus.NewRegistry()
	p := newPlane(t, func(c *Config) { c.Metrics = metrics })
	h := p.host("web1")
	if p.srv.Holds(h.id) || p.srv.Credits(h.id) != nil || p.srv.Count() != 0 {
		t.Fatal("an agent that never came is held")
	}
	for range 3 {
		p.store.order(domain.JobDeployment, h.id, "cert_1", "tgt_1")
	}
	k := h.online(credits(4, 2))
	k.assignment()
	k.assignment()
	if c := p.srv.Credits(h.id); c["key"] != 4 || c["deploy"] != 0 {
		t.Errorf("credits %v", c)
	}
	want := `
# HELP certmesh_session_assignments_sent_total Assignments sent by class of work.
# TYPE certmesh_session_assignments_sent_total counter
certmesh_session_assignments_sent_total{class="deploy"} 2
# HELP certmesh_session_credits Credits that agents granted and that are not used up, by class of work.
# TYPE certmesh_session_credits gauge
certmesh_session_credits{class="deploy"} 0
certmesh_session_credits{class="key"} 4
certmesh_session_credits{class="verify"} 0
# HELP certmesh_session_jobs Jobs of the agents held here: waiting for time or credit, or with the agent.
# TYPE certmesh_session_jobs gauge
certmesh_session_jobs{where="waiting"} 1
certmesh_session_jobs{where="with_agent"} 2
# HELP certmesh_session_open Agents whose stream this node holds.
# TYPE certmesh_session_open gauge
certmesh_session_open 1
`
	if err := testutil.GatherAndCompare(metrics, strings.NewReader(want), "certmesh_session_assignments_sent_total", "certmesh_session_credits",
		"certmesh_session_jobs", "certmesh_session_open"); err != nil {
		t.Error(err)
	}
	k.send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Goodbye{Goodbye: &agentpb.Goodbye{}}})
	k.end()
	eventually(t, "nothing is held any more", func() bool { return !p.srv.Holds(h.id) && p.store.session(h.id).Holder == "" })
	if a := p.store.agent(h.id); a.State != domain.AgentOffline {
		t.Errorf("the agent is %s", a.State)
	}
}

// TestDisconnectDuringHello: an agent that is sent away while its session is being recorded leaves none behind.
func TestDisconnectDuringHello(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	begun, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	p.store.onCall(func(method string) error {
		if method == "OpenSessions" {
			once.Do(func() { close(begun) })
			<-release
		}
		return nil
	})
	k := h.connect()
	<-begun
	p.srv.Disconnect(h.id, "the agent was retired")
	k.goodbye()
	k.end()
	eventually(t, "the stream is gone", func() bool { return len(p.srv.of(h.id)) == 0 })
	close(release)
	eventually(t, "the session is closed", func() bool { s := p.store.session(h.id); return s.Epoch == 1 && s.Holder == "" })
}

// TestStopTwiceAndWithoutStart.
func TestStopTwiceAndWithoutStart(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	for range 2 {
		if err := p.srv.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	s, err := New(Config{NodeID: "n", TrustDomain: testDomain, Store: p.store, Mesh: p.srv.cfg.Mesh, Issue: p.store, Hub: p.hub,
		Clock: p.srv.cfg.Clock, Log: p.srv.cfg.Log, NewID: p.srv.cfg.NewID})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(context.WithoutCancel(t.Context())); err != nil {
		t.Fatal(err)
	}
}

// TestIdleStreamsCostTwoGoroutines: the handler and the reader, nothing per stream besides. It runs alone, because it
// counts the goroutines of the process.
func TestIdleStreamsCostTwoGoroutines(t *testing.T) { //nolint:paralleltest // see above
	p := newPlane(t)
	const n = 20
	for i := range n {
		p.host(fmt.Sprint("idle", i)).online()
	}
	ours := func() int {
		stacks := make([]byte, 4<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		count := 0
		for g := range strings.SplitSeq(string(stacks), "\n\n") {
			if strings.Contains(g, "session.(*stream)") || strings.Contains(g, "session.(*Server).Connect") {
				count++
			}
		}
		return count
	}
	eventually(t, "all is quiet", func() bool { return ours() == 2*n })
	for _, st := range p.srv.of("agt_idle0") {
		st.mu.Lock()
		if st.out.queue != nil || st.out.box != nil || st.tasks != 0 {
			t.Errorf("an idle stream keeps %d messages, %d states, %d tasks", cap(st.out.queue), cap(st.out.box), st.tasks)
		}
		st.mu.Unlock()
	}
}
