package agentd_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

func welcomeNaming(nodes ...string) *agentpb.ConnectResponse {
	return &agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Welcome{Welcome: &agentpb.Welcome{Protocol: 1, Epoch: 1, Nodes: nodes}}}
}

// TestNodesOutliveARestart: the node that is configured is gone for good; one that a Welcome named takes its place, also
// for an agent that is started anew.
func TestNodesOutliveARestart(t *testing.T) {
	t.Parallel()
	mesh := newAuthority()
	a, b := newFake(t, mesh, nil), newFake(t, mesh, nil)
	cfg := config(t, a)
	r := start(t, cfg)
	s := a.next()
	s.send(welcomeNaming("not an address", b.addr, "http://x:1", b.addr))
	s.state(&agentpb.State{Version: &agentpb.StateVersion{Kind: "settings", Version: 1}, Body: &agentpb.State_Settings{Settings: &agentpb.Settings{}}})
	expect(s, appliedOf) // the Welcome has been dealt with
	r.end()

	file := filepath.Join(cfg.DataDir, "state", "nodes.json")
	info := must(os.Stat(file))
	if got := string(must(os.ReadFile(file))); info.Mode().Perm() != 0o600 || got != fmt.Sprintf("[%q]", b.addr) {
		t.Fatalf("%s: %v %s", file, info.Mode(), got)
	}
	cfg.Servers, cfg.JoinToken = []string{"127.0.0.1:1"}, ""
	r = start(t, cfg)
	b.next().welcome()
	r.end()
	if got := string(must(os.ReadFile(file))); got != fmt.Sprintf("[%q]", b.addr) {
		t.Errorf("a Welcome without nodes: %s", got)
	}

	// A damaged file costs no more than what it says.
	must(0, os.WriteFile(file, []byte("{"), 0o600))
	cfg.Servers = []string{b.addr}
	r = start(t, cfg)
	var many []string
	for i := range 1000 {
		many = append(many, fmt.Sprintf("10.0.0.1:%d", 1+i))
	}
	s = b.next()
	s.send(welcomeNaming(many...))
	s.state(&agentpb.State{Version: &agentpb.StateVersion{Kind: "settings", Version: 2}, Body: &agentpb.State_Settings{Settings: &agentpb.Settings{}}})
	expect(s, appliedOf)
	r.end()
	if got := string(must(os.ReadFile(file))); strings.Count(got, ":") != 64 {
		t.Errorf("%d nodes are kept", strings.Count(got, ":"))
	}
}

// TestMovedPastDeadNodes: of the nodes that a Move names the first is down and the second takes no agents.
func TestMovedPastDeadNodes(t *testing.T) {
	t.Parallel()
	mesh := newAuthority()
	a, b, c := newFake(t, mesh, nil), newFake(t, mesh, nil), newFake(t, mesh, nil)
	r := start(t, config(t, a))
	s := a.next()
	s.welcome()
	s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Move{Move: &agentpb.Move{Nodes: []string{"127.0.0.1:1", b.addr, c.addr}, WindowMs: 5}}})
	draining := b.next()
	draining.goodbye(&agentpb.Goodbye{Reason: agentpb.Goodbye_REASON_SHUTDOWN, Message: "this node takes no agents now"})
	draining.end <- nil
	c.next().welcome()
	<-s.gone
	r.end()
}
