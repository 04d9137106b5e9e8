package session

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// TestStrangers: no certificate, one of another CA, of a node, of another trust domain, and plain text.
func TestStrangers(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.host("web1")
	now := time.Now()
	t.Run("no certificate", func(t *testing.T) {
		k := p.open(p.dial())
		k.send(hello())
		if st := k.end(); st.Code() != codes.Unauthenticated || !strings.Contains(st.Message(), "client certificate") {
			t.Errorf("ended with %v", st)
		}
		_, err := agentpb.NewAgentServiceClient(p.dial()).Report(t.Context())
		if err != nil {
			t.Fatal(err)
		}
	})
	t.Run("another CA", func(t *testing.T) {
		other := newMesh(t, now)
		cert, _ := sign(t, other, ca.KindAgent, "agt_web1", newKey(t), now, time.Hour)
		k := p.open(p.dial(cert))
		k.send(hello())
		// The handshake itself is refused.
		if st := k.end(); st.Code() != codes.Unavailable {
			t.Errorf("ended with %v", st)
		}
	})
	t.Run("a node's certificate", func(t *testing.T) {
		cert, _ := sign(t, p.mesh, ca.KindNode, "node-2", newKey(t), now, time.Hour)
		k := p.open(p.dial(cert))
		k.send(hello())
		if st := k.end(); st.Code() != codes.Unauthenticated {
			t.Errorf("ended with %v", st)
		}
	})
	t.Run("plain text", func(t *testing.T) {
		k := p.open(p.dialTLS(insecure.NewCredentials()))
		k.send(hello())
		if st := k.end(); st.Code() != codes.Unavailable {
			t.Errorf("ended with %v", st)
		}
	})
	t.Run("an identity that is not on record", func(t *testing.T) {
		cert, _ := sign(t, p.mesh, ca.KindAgent, "agt_web1", newKey(t), now, time.Hour)
		k := p.open(p.dial(cert))
		k.send(hello())
		if st := k.end(); st.Code() != codes.Unauthenticated {
			t.Errorf("ended with %v", st)
		}
	})
	t.Run("an agent that is not on record", func(t *testing.T) {
		cert, _ := sign(t, p.mesh, ca.KindAgent, "agt_nobody", newKey(t), now, time.Hour)
		k := p.open(p.dial(cert))
		k.send(hello())
		if st := k.end(); st.Code() != codes.PermissionDenied {
			t.Errorf("ended with %v", st)
		}
	})
	if n := p.srv.Count(); n != 0 {
		t.Errorf("%d sessions were opened", n)
	}
	if n := len(p.store.audited("agent.connect_refused")); n != 2 {
		t.Errorf("%d refusals are in the trail", n)
	}
}

// TestGarbageOnThePort: whatever bytes come, the listener serves on.
func TestGarbageOnThePort(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	for _, garbage := range []string{"GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\xff\xff\x01", strings.Repeat("\x00", 5000), "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"} {
		c, err := net.Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte(garbage)) // it may be closed already
		_ = c.Close()
	}
	p.host("web1").online()
}

// TestTLSVersionAndGroups: nothing below TLS 1.3.
func TestTLSVersionAndGroups(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	_, err := tls.Dial("tcp", p.addr, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"}})
	if err == nil {
		t.Fatal("TLS 1.2 was accepted")
	}
	c, err := tls.Dial("tcp", p.addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }() // given up either way
	if got := c.ConnectionState().CurveID; got != tls.X25519MLKEM768 {
		t.Errorf("the key exchange is %s", got)
	}
}

// TestProtocolViolations: each ends the stream with a precise status.
func TestProtocolViolations(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	beat := &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Beat{Beat: &agentpb.Beat{}}}
	cases := map[string]struct {
		say  []*agentpb.ConnectRequest
		code codes.Code
		part string
	}{
		"no Hello first":         {[]*agentpb.ConnectRequest{beat}, codes.InvalidArgument, "Hello"},
		"empty message":          {[]*agentpb.ConnectRequest{{}}, codes.InvalidArgument, "Hello"},
		"two Hellos":             {[]*agentpb.ConnectRequest{hello(), hello()}, codes.InvalidArgument, "one Hello"},
		"unknown message":        {[]*agentpb.ConnectRequest{hello(), {}}, codes.InvalidArgument, "protocol version 1"},
		"negative credit":        {[]*agentpb.ConnectRequest{hello(), grants(agentpb.WorkClass_WORK_CLASS_KEY, -1)}, codes.InvalidArgument, "positive"},
		"negative in open":       {[]*agentpb.ConnectRequest{hello(credits(-1, 0))}, codes.InvalidArgument, "positive"},
		"no id":                  {[]*agentpb.ConnectRequest{hello(), accepted("", 1)}, codes.InvalidArgument, "no assignment"},
		"id of another alphabet": {[]*agentpb.ConnectRequest{hello(), accepted("job\x1b[2J", 1)}, codes.InvalidArgument, "no assignment"},
		"empty result":           {[]*agentpb.ConnectRequest{hello(), {Message: &agentpb.ConnectRequest_Result{Result: &agentpb.Result{Id: "job_1", Attempt: 1}}}}, codes.InvalidArgument, "Result"},
		"too large":              {[]*agentpb.ConnectRequest{hello(), csrFor("job_1", 1, make([]byte, 70<<10))}, codes.ResourceExhausted, "65536"},
		"too much open":          {[]*agentpb.ConnectRequest{hello(holds(manyOpen(maxOpen + 1)...))}, codes.InvalidArgument, "512"},
	}
	i := 0
	for name, c := range cases {
		h := p.host(fmt.Sprint("v", i))
		i++
		t.Run(name, func(t *testing.T) {
			k := p.open(p.dial(h.cert))
			for _, m := range c.say {
				k.send(m)
			}
			st := k.end()
			if st.Code() != c.code || !strings.Contains(st.Message(), c.part) {
				t.Errorf("ended with %v", st)
			}
		})
	}
}

func manyOpen(n int) []*agentpb.OpenAssignment {
	out := make([]*agentpb.OpenAssignment, n)
	for i := range out {
		out[i] = &agentpb.OpenAssignment{Id: fmt.Sprintf("job_%032d", i), Attempt: 1, Phase: agentpb.Phase_PHASE_RESULT}
	}
	return out
}

// TestAFullJournalFitsIntoWelcome: the most that can be open is answered in one message.
func TestAFullJournalFitsIntoWelcome(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("proxy")
	for i := range 256 {
		id := fmt.Sprintf("tgt_%032d", i)
		p.store.targets[id] = domain.Target{ID: id, AgentID: h.id, Kind: "file", Enabled: true, Revision: 1}
	}
	w := h.connect(holds(manyOpen(maxOpen)...)).welcome()
	if len(w.GetVerdicts()) != maxOpen || !fits(w) {
		t.Fatalf("%d verdicts", len(w.GetVerdicts()))
	}
}

// TestUnknownProtocol names what this server speaks.
func TestUnknownProtocol(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	k := h.connect(func(h *agentpb.Hello) { h.Protocol, h.ProtocolMin = 9, 7 })
	g := k.goodbye()
	if g.GetReason() != agentpb.Goodbye_REASON_PROTOCOL || !strings.Contains(g.GetMessage(), "7 to 9, this server 1 to 1") {
		t.Fatalf("goodbye %v", g)
	}
	if st := k.end(); st.Code() != codes.FailedPrecondition {
		t.Fatalf("ended with %v", st)
	}
	// A newer agent that still speaks 1 is welcome.
	if w := h.connect(func(h *agentpb.Hello) { h.Protocol, h.ProtocolMin = 9, 1 }).welcome(); w.GetProtocol() != 1 {
		t.Fatalf("welcome %v", w)
	}
}

// TestSupersede: the newer stream takes over, the older one is told, and the session stays held.
func TestSupersede(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	old := h.online(credits(1, 1))
	young := h.online(credits(1, 1))
	if g := old.goodbye(); g.GetReason() != agentpb.Goodbye_REASON_SUPERSEDED || g.GetPermanent() {
		t.Fatalf("goodbye %v", g)
	}
	if st := old.end(); st.Code() != codes.Aborted {
		t.Fatalf("ended with %v", st)
	}
	eventually(t, "the older one is gone", func() bool { return len(p.srv.of(h.id)) == 1 && p.store.count("CloseSession") == 1 })
	if s := p.store.session(h.id); s.Holder != testNode || s.Epoch != 2 {
		t.Fatalf("the session is %+v", s)
	}
	j := p.store.order(domain.JobRenewal, h.id, "cert_1", "")
	p.srv.Wake(h.id)
	if a := young.assignment(); a.GetId() != j.ID {
		t.Fatalf("assigned %v", a)
	}
	if !p.srv.Holds(h.id) || p.srv.Count() != 1 {
		t.Error("the session is not counted as held")
	}
}

// TestTakenOverByAnotherNode: the store refuses this node's dispatches; the stream ends as superseded.
func TestTakenOverByAnotherNode(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	k := h.online(credits(1, 1))
	p.store.mu.Lock()
	p.store.sessions[h.id] = domain.Session{AgentID: h.id, Epoch: 9, Holder: "node-2"}
	p.store.mu.Unlock()
	p.store.order(domain.JobRenewal, h.id, "cert_1", "")
	p.srv.Wake(h.id)
	if g := k.goodbye(); g.GetReason() != agentpb.Goodbye_REASON_SUPERSEDED {
		t.Fatalf("goodbye %v", g)
	}
	k.end()
	eventually(t, "it is gone", func() bool { return p.store.count("CloseSession") == 1 })
	if s := p.store.session(h.id); s.Holder != "node-2" {
		t.Fatalf("the other node's session was closed: %+v", s)
	}
}

// TestClonesAreQuarantined: boot ids that alternate under one identity; a restart is none.
func TestClonesAreQuarantined(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	for _, b := range []string{"a", "b", "c"} {
		h.online(bootID(b)) // restarts
	}
	h2 := p.host("web2")
	var k *talk
	for _, b := range []string{"a", "b", "a", "b"} {
		k = h2.connect(bootID(b))
		if b == "b" && len(p.store.audited("agent.quarantined")) > 0 {
			break
		}
		until(k, func(m *agentpb.ConnectResponse) (bool, bool) {
			return true, m.GetWelcome() != nil || m.GetGoodbye() != nil
		})
	}
	k.end()
	if a := p.store.agent(h2.id); a.State != domain.AgentQuarantined || !strings.Contains(a.Reason, "two machines") {
		t.Fatalf("the agent is %+v", a)
	}
	if a := p.store.agent(h.id); a.State == domain.AgentQuarantined {
		t.Fatal("a restart counts as a clone")
	}
	k = h2.connect(bootID("a"))
	if g := k.goodbye(); g.GetReason() != agentpb.Goodbye_REASON_QUARANTINED || g.GetPermanent() || g.GetReconnectAfterMs() == 0 {
		t.Fatalf("goodbye %v", g)
	}
	if n := p.srv.Count(); n != 1 {
		t.Errorf("%d sessions are open", n)
	}
}

func TestBoots(t *testing.T) {
	t.Parallel()
	for seq, want := range map[string]bool{
		"A": false, "AAAA": false, "AB": false, "ABCDEFGHIJ": false, "ABA": false, "AABBA": false, "ABAC": false,
		"ABAB": true, "ABCABC": true, "AABBAABB": true, "ABACA": true,
	} {
		var b boots
		at, got := time.Unix(0, 0), false
		for _, r := range seq {
			at = at.Add(5 * time.Second)
			b, got = b.hello(string(r), at)
			if got {
				break
			}
		}
		if got != want {
			t.Errorf("%s: cloned is %v, want %v", seq, got, want)
		}
		if len(b) > bootsKept {
			t.Errorf("%s: %d boots are kept", seq, len(b))
		}
	}
	// The same hours apart is two machines of which one was started from the other's backup, one at a time.
	var b boots
	at, got := time.Unix(0, 0), false
	for _, r := range "ABABAB" {
		at = at.Add(time.Hour)
		if b, got = b.hello(string(r), at); got {
			t.Fatal("far apart counts as alternating")
		}
	}
	if !b.stale(at.Add(time.Hour)) || b.stale(at) {
		t.Error("staleness is wrong")
	}
	if _, got = b.hello("", at); got {
		t.Error("an unknown boot id says something")
	}
}

// TestRetireAndRevokeEndTheStreamAtOnce.
func TestRetireAndRevokeEndTheStreamAtOnce(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	for _, c := range []struct {
		name, reason string
		want         agentpb.Goodbye_Reason
		code         codes.Code
		change       func(h *host)
	}{
		{"retired", "the agent was retired: broken disk", agentpb.Goodbye_REASON_RETIRED, codes.PermissionDenied, func(h *host) {
			p.store.setAgent(h.id, func(a *domain.Agent) { a.State, a.Reason = domain.AgentRetired, "broken disk" })
		}},
		{"revoked", "the identity was revoked", agentpb.Goodbye_REASON_REVOKED, codes.Unauthenticated, func(h *host) {
			p.store.mu.Lock()
			defer p.store.mu.Unlock()
			i := p.store.identities[h.serial]
			i.RevokedAt = time.Now()
			p.store.identities[h.serial] = i
		}},
	} {
		h := p.host(c.name)
		k := h.online()
		c.change(h)
		p.srv.Disconnect(h.id, c.reason)
		if g := k.goodbye(); g.GetReason() != c.want || !g.GetPermanent() || g.GetMessage() != c.reason {
			t.Errorf("%s: goodbye %v", c.name, g)
		}
		if st := k.end(); st.Code() != c.code {
			t.Errorf("%s: ended with %v", c.name, st)
		}
		k = h.connect()
		if g := k.goodbye(); g.GetReason() != c.want || !g.GetPermanent() {
			t.Errorf("%s: back again: goodbye %v", c.name, g)
		}
		k.end()
	}
	eventually(t, "refusals are in the trail", func() bool { return len(p.store.audited("agent.connect_refused")) == 2 })
}

// TestLesson14Overloaded: only so many Hellos are worked on at once, so many wait, and the rest is asked to come back, at
// different times.
func TestLesson14Overloaded(t *testing.T) {
	t.Parallel()
	p := newPlane(t, func(c *Config) { c.Handshakes, c.helloQueue, c.helloWait = 2, 1, time.Hour })
	begun, release := make(chan struct{}, 3), make(chan struct{})
	p.store.onCall(func(method string) error {
		if method == "OpenSessions" {
			begun <- struct{}{}
			<-release
		}
		return nil
	})
	first, second := p.host("a").connect(), p.host("b").connect()
	<-begun
	<-begun
	third := p.host("c").connect()
	eventually(t, "the third waits", func() bool { return p.srv.waiting.Load() == 1 })
	g := p.host("d").connect().goodbye()
	if g.GetReason() != agentpb.Goodbye_REASON_OVERLOADED || g.GetReconnectAfterMs() < 1000 || g.GetPermanent() {
		t.Errorf("goodbye %v", g)
	}
	close(release)
	first.welcome()
	second.welcome()
	third.welcome()
}

// TestHelloDoesNotWaitForEver: who is not admitted in time is asked to come back.
func TestHelloDoesNotWaitForEver(t *testing.T) {
	t.Parallel()
	p := newPlane(t, func(c *Config) { c.Handshakes, c.helloWait = 1, time.Millisecond })
	begun, release := make(chan struct{}, 1), make(chan struct{})
	p.store.onCall(func(method string) error {
		if method == "OpenSessions" {
			begun <- struct{}{}
			<-release
		}
		return nil
	})
	first := p.host("a").connect()
	<-begun
	if g := p.host("b").connect().goodbye(); g.GetReason() != agentpb.Goodbye_REASON_OVERLOADED {
		t.Errorf("goodbye %v", g)
	}
	close(release)
	first.welcome()
}

// TestNoWakeIsMissed: a job whose creator commits and wakes while a Hello is under way is dispatched, whether it was made
// before or after the epoch was committed and the work loaded.
func TestNoWakeIsMissed(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"OpenSessions", "OpenWork", "TargetsOfAgent", "Rejections"} {
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			p := newPlane(t)
			h := p.host("web1")
			made := make(chan string, 1)
			p.store.onCall(func(method string) error {
				if method == at {
					select {
					case made <- p.store.order(domain.JobRenewal, h.id, "cert_1", "").ID:
						p.srv.Wake(h.id)
					default:
					}
				}
				return nil
			})
			k := h.online(credits(1, 1))
			if a := k.assignment(); a.GetId() != <-made {
				t.Fatalf("assigned %v", a)
			}
		})
	}
}

// TestStates: what the agent lacks is announced and sent, what it holds is not; a refusal is kept and that version not
// sent again; a later one that is applied clears it; what is gone is removed.
func TestStates(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	p.store.targets["tgt_1"] = domain.Target{ID: "tgt_1", Name: "site", AgentID: h.id, Kind: "file", Settings: []byte(`{}`), Enabled: true, Revision: 3}
	k := h.connect(func(h *agentpb.Hello) {
		h.States = []*agentpb.StateVersion{{Kind: "trust_bundle", Version: 1}, {Kind: "target", Name: "tgt_old", Version: 7}, {Kind: "weather", Version: 1}}
	})
	w := k.welcome()
	if len(w.GetResend()) != 3 {
		t.Fatalf("announced %v", w.GetResend())
	}
	got := map[string]*agentpb.State{}
	for range 3 {
		s := k.state()
		got[s.GetVersion().GetKind()+"/"+s.GetVersion().GetName()] = s
	}
	if s := got["settings/"]; s.GetSettings().GetVerifyTimeoutMs() != 5000 || s.GetVersion().GetVersion() != 1 {
		t.Errorf("settings %v", s)
	}
	if s := got["target/tgt_1"]; s.GetTarget().GetName() != "site" || s.GetVersion().GetVersion() != 3 || len(s.GetVersion().GetHash()) != sha256.Size {
		t.Errorf("target %v", s)
	}
	if s := got["target/tgt_old"]; s.GetRemoved() == nil || s.GetVersion().GetVersion() != 8 {
		t.Errorf("removed %v", s)
	}
	answer := func(s *agentpb.State, refusal string) {
		if refusal == "" {
			k.send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Applied{Applied: &agentpb.Applied{Version: s.GetVersion()}}})
			return
		}
		k.send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Rejected{Rejected: &agentpb.Rejected{Version: s.GetVersion(),
			Failure: &agentpb.Failure{Class: string(fault.Invalid), Message: refusal}}}})
	}
	answer(got["settings/"], "")
	answer(got["target/tgt_old"], "")
	answer(got["target/tgt_1"], "the path is\noutside the roots")
	eventually(t, "the refusal is kept", func() bool { return p.store.refusals() == 1 })
	r, _ := p.store.Rejections(context.Background(), h.id)
	if r[0].Version != 3 || r[0].Reason != "the path is outside the roots" || r[0].Name != "tgt_1" {
		t.Errorf("kept %+v", r[0])
	}
	// Read again without a change, nothing is sent; on the next stream neither.
	p.srv.PushState(h.id)
	held := func(h *agentpb.Hello) {
		h.States = []*agentpb.StateVersion{{Kind: "trust_bundle", Version: 1}, got["settings/"].GetVersion()}
	}
	if w := h.connect(held).welcome(); len(w.GetResend()) != 0 {
		t.Errorf("sent again: %v", w.GetResend())
	}
	k = h.online(held)
	p.store.mu.Lock()
	x := p.store.targets["tgt_1"]
	x.Settings, x.Revision = []byte(`{"path":"/etc/ssl"}`), 4
	p.store.targets["tgt_1"] = x
	p.store.mu.Unlock()
	p.srv.PushState(h.id)
	s := k.state()
	if s.GetVersion().GetVersion() != 4 {
		t.Fatalf("sent %v", s)
	}
	answer(s, "")
	eventually(t, "the refusal is forgotten", func() bool { return p.store.refusals() == 0 })
}

// TestRefusedStateAfterRestart: an agent that was started anew is sent again what it refused; once it has applied that,
// the refusal is forgotten and the duties look again.
func TestRefusedStateAfterRestart(t *testing.T) {
	t.Parallel()
	var changed atomic.Int64
	p := newPlane(t, func(c *Config) { c.Changed = func() { changed.Add(1) } })
	h := p.host("web1")
	p.store.targets["tgt_1"] = domain.Target{ID: "tgt_1", Name: "site", AgentID: h.id, Kind: "file", Settings: []byte(`{}`), Enabled: true, Revision: 3}
	target := func(k *talk) *agentpb.StateVersion {
		for {
			if v := k.state().GetVersion(); v.GetKind() == "target" {
				return v
			}
		}
	}
	k := h.online()
	k.send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Rejected{Rejected: &agentpb.Rejected{Version: target(k),
		Failure: &agentpb.Failure{Class: string(fault.Rejected), Message: "the path is outside the roots"}}}})
	eventually(t, "the refusal is kept", func() bool { return p.store.refusals() == 1 })
	for _, boot := range []string{"boot-1", ""} { // the same, and one that is not known
		w := h.connect(bootID(boot)).welcome()
		if slices.ContainsFunc(w.GetResend(), func(v *agentpb.StateVersion) bool { return v.GetKind() == "target" }) {
			t.Errorf("boot %q is sent %v", boot, w.GetResend())
		}
	}
	k = h.online(bootID("boot-2"))
	v := target(k)
	if v.GetName() != "tgt_1" || v.GetVersion() != 3 {
		t.Fatalf("sent %v", v)
	}
	if changed.Load() != 0 {
		t.Errorf("duties were nudged %d times before", changed.Load())
	}
	k.send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Applied{Applied: &agentpb.Applied{Version: v}}})
	eventually(t, "the refusal is forgotten", func() bool { return p.store.refusals() == 0 })
	eventually(t, "duties look again", func() bool { return changed.Load() == 1 })
}

// TestDeadlines with a clock that the test moves: a stream without a Hello, an agent that reads nothing, an identity that
// ends.
func TestDeadlines(t *testing.T) {
	t.Parallel()
	clk := clockwork.NewFakeClockAt(time.Now())
	p := newPlane(t, func(c *Config) { c.Clock = clk })
	advance := func(k *talk, d time.Duration) {
		deadline := time.After(patience)
		for {
			clk.Advance(d)
			select {
			case <-k.done:
				return
			case <-deadline:
				t.Fatal("the stream lives on")
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
	silent := p.open(p.dial(p.host("silent").cert))
	// Its stream has begun once the server counts it.
	eventually(t, "the stream is there", func() bool { p.srv.mu.RLock(); defer p.srv.mu.RUnlock(); return len(p.srv.all) == 1 })
	advance(silent, time.Second)
	if st := silent.end(); st.Code() != codes.InvalidArgument || !strings.Contains(st.Message(), "no Hello") {
		t.Errorf("a silent stream ended with %v", st)
	}

	stalled := p.host("stalled")
	p.store.targets["tgt_big"] = domain.Target{ID: "tgt_big", AgentID: "agt_x", Kind: "file", Settings: make([]byte, 50<<10)}
	for i := range 30 {
		p.store.order(domain.JobDeployment, stalled.id, fmt.Sprint("cert_", i), "tgt_big")
	}
	k := p.openWith(p.dial(stalled.cert), false)
	k.send(hello(credits(0, 50)))
	eventually(t, "the sender is blocked", func() bool {
		for _, st := range p.srv.of(stalled.id) {
			if st.sendSince.Load() != 0 && p.store.count("Dispatch") >= 30 {
				return true
			}
		}
		return false
	})
	deadline := time.After(patience)
	for p.srv.Holds(stalled.id) {
		clk.Advance(time.Second)
		select {
		case <-deadline:
			t.Fatal("the stalled stream lives on")
		case <-time.After(5 * time.Millisecond):
		}
	}
	go k.read()
	if st := k.end(); st.Code() != codes.ResourceExhausted {
		t.Errorf("a stalled stream ended with %v", st)
	}

	online := p.host("lapsing").online()
	advance(online, 10*time.Minute)
	if st := online.end(); st.Code() != codes.Unauthenticated {
		t.Errorf("a stream whose identity ended: %v", st)
	}
}

// TestBeatsAreWrittenInBatches: they touch memory only, and are flushed together.
func TestBeatsAreWrittenInBatches(t *testing.T) {
	t.Parallel()
	clk := clockwork.NewFakeClockAt(time.Now())
	p := newPlane(t, func(c *Config) { c.Clock = clk })
	a, b := p.host("a").online(), p.host("b").online()
	for range 20 {
		a.send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Beat{Beat: &agentpb.Beat{}}})
		b.send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Beat{Beat: &agentpb.Beat{}}})
	}
	if n := p.store.count("FlushSeen"); n != 0 {
		t.Fatalf("%d writes for beats", n)
	}
	eventually(t, "beats are written", func() bool {
		clk.Advance(time.Second)
		p.store.mu.Lock()
		defer p.store.mu.Unlock()
		return len(p.store.seen) == 2
	})
	if n := p.store.count("FlushSeen"); n > 2 {
		t.Errorf("%d writes for 40 beats", n)
	}
}

// TestHelloTextIsBounded: facts, labels and capabilities are hostile.
func TestHelloTextIsBounded(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	h.online(func(h *agentpb.Hello) {
		h.Facts = &agentpb.Facts{Os: strings.Repeat("x", 500), Hostname: "a\x1b]0;pwned\x07\nb\u202e", Platform: "-----BEGIN PRIVATE KEY-----"}
		h.Labels = map[string]string{"env\x00": "prod\r\n", "": "x"}
		for i := range 100 {
			h.Labels[fmt.Sprint("l", i)] = "y"
			h.Capabilities = append(h.Capabilities, fmt.Sprint("target/k", i))
		}
	})
	a := p.store.agent(h.id)
	if len(a.Facts.OS) != 64 || a.Facts.Hostname != "a]0;pwned b" || strings.Contains(a.Facts.Platform, "BEGIN") {
		t.Errorf("facts %+v", a.Facts)
	}
	if a.Labels["env"] != "prod" || len(a.Labels) != maxLabels || len(a.Capabilities) != maxCapabilities {
		t.Errorf("%d labels, %d capabilities: %v", len(a.Labels), len(a.Capabilities), a.Labels["env"])
	}
}

func TestNewNeedsAllParts(t *testing.T) {
	t.Parallel()
	if _, err := New(Config{NodeID: "n"}); !fault.Is(err, fault.Internal) {
		t.Fatalf("error %v", err)
	}
}

// TestReport: leaves that are on record are known; others are counted, and put into the trail. The list is asked for once.
func TestReport(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	mine, theirs := fakeVersion("cert_1", h.id, 2), fakeVersion("cert_1", "agt_other", 3)
	p.store.versions[versionKey("cert_1", h.id, 2)] = mine
	p.store.versions[versionKey("cert_1", "agt_other", 3)] = theirs
	// More of others than fit on a page, before and after the agent's own.
	for i := range 300 {
		before, after := fmt.Sprintf("agt_zz%03d", i), fmt.Sprintf("agt_aa%03d", i)
		p.store.versions[versionKey("cert_1", before, 1)] = fakeVersion("cert_1", before, 1)
		p.store.versions[versionKey("cert_1", after, 1)] = fakeVersion("cert_1", after, 1)
	}
	leaves := []*agentpb.HeldLeaf{
		{CertificateId: "cert_1", Generation: 2, Certificate: mine.DER},
		{CertificateId: "cert_1", Generation: 3, Certificate: theirs.DER},
		{CertificateId: "cert_nope", Generation: 1, Certificate: []byte("x")},
		{CertificateId: "cert_1", Generation: 2, Certificate: []byte("changed")},
	}
	says := func(h *agentpb.Hello) {
		h.LeafCount, h.LeavesHash = int32(len(leaves)), leavesHash(leaves)
	}
	conn := p.dial(h.cert)
	k := p.open(conn)
	k.send(hello(says))
	if w := k.welcome(); !w.GetReportLeaves() {
		t.Fatal("the list was not asked for")
	}
	st, err := agentpb.NewAgentServiceClient(conn).Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range leaves {
		if err := st.Send(&agentpb.ReportRequest{Body: &agentpb.ReportRequest_Leaves{Leaves: &agentpb.HeldLeaves{Leaves: []*agentpb.HeldLeaf{l}, Last: i == 3}}}); err != nil {
			t.Fatal(err)
		}
	}
	r, err := st.CloseAndRecv()
	if err != nil || r.GetUnknown() != 3 {
		t.Fatalf("%v, %v", r, err)
	}
	if n := p.store.count("Versions"); n != 3 { // two pages of the one certificate, one for the other
		t.Errorf("versions were read %d times", n)
	}
	if n := len(p.store.audited("agent.unknown_leaf")); n != 3 {
		t.Errorf("%d unknown leaves are in the trail", n)
	}
	if w := h.connect(says).welcome(); w.GetReportLeaves() {
		t.Error("the same list is asked for again")
	}
	// Without a stream there is nothing to report to.
	other := p.host("web2")
	st, err = agentpb.NewAgentServiceClient(p.dial(other.cert)).Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = st.CloseAndRecv()
	wantCode(t, err, codes.FailedPrecondition)
}

func leavesHash(leaves []*agentpb.HeldLeaf) []byte {
	var prints []string
	for _, l := range leaves {
		prints = append(prints, domain.HashHex(l.GetCertificate()))
	}
	slices.Sort(prints)
	sum := sha256.Sum256([]byte(strings.Join(prints, "\n") + "\n"))
	return sum[:]
}
