package agentd_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/certmesh/certmesh/agent/agentd"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func verdict(o *agentpb.OpenAssignment, d agentpb.Verdict_Decision, s *agentpb.Settled) *agentpb.Verdict {
	return &agentpb.Verdict{Id: o.GetId(), Attempt: o.GetAttempt(), Decision: d, Settled: s}
}

// TestResumeAfterLostStream: what was reported and not settled is listed in the next Hello and sent again, over cut
// streams and over a restart, until the server settles it.
func TestResumeAfterLostStream(t *testing.T) {
	t.Parallel()
	f := newFake(t, newAuthority(), nil)
	cfg := config(t, f)
	r := start(t, cfg)
	s := f.next()
	s.welcome()
	s.assign(keyJob("job_1", 4, 1))
	first := expect(s, csrOf)
	s.end <- status.Error(codes.Unavailable, "the node is going")

	s = f.next()
	if o := s.hello.GetOpen(); len(o) != 1 || o[0].GetId() != "job_1" || o[0].GetAttempt() != 4 || o[0].GetPhase() != agentpb.Phase_PHASE_CSR {
		t.Fatalf("open is %v", o)
	}
	s.welcome(verdict(s.hello.GetOpen()[0], agentpb.Verdict_DECISION_REDO_REPORT, nil))
	equal(t, "the CSR sent again", expect(s, csrOf), first)
	r.end()

	r = start(t, cfg)
	s = f.next()
	if len(s.hello.GetOpen()) != 1 {
		t.Fatalf("after a restart open is %v", s.hello.GetOpen())
	}
	s.welcome(verdict(s.hello.GetOpen()[0], agentpb.Verdict_DECISION_FORGET,
		&agentpb.Settled{Id: "job_1", Attempt: 4, Outcome: agentpb.Settled_OUTCOME_OK, CertificateId: certID, Generation: 9}))
	s.end <- nil
	s = f.next()
	if len(s.hello.GetOpen()) != 0 {
		t.Errorf("settled work is still open: %v", s.hello.GetOpen())
	}
	s.welcome()
	r.end()
	if k := must(agentd.Status(cfg)).Keys; len(k) != 1 || k[0].Generation != 9 {
		t.Errorf("the key waits as %+v, not under the generation it was issued for", k)
	}
}

// TestGoodbyeForGood: Run ends with a sentence that says what to do.
func TestGoodbyeForGood(t *testing.T) {
	t.Parallel()
	for reason, want := range map[agentpb.Goodbye_Reason]string{
		agentpb.Goodbye_REASON_REVOKED:     "revoked the identity of " + agentID,
		agentpb.Goodbye_REASON_RETIRED:     "retired " + agentID,
		agentpb.Goodbye_REASON_QUARANTINED: "quarantined",
		agentpb.Goodbye_REASON_PROTOCOL:    "protocol version",
		agentpb.Goodbye_REASON_UNSPECIFIED: "sent " + agentID + " away",
	} {
		for _, instead := range []bool{true, false} {
			t.Run(fmt.Sprint(reason, instead), func(t *testing.T) {
				t.Parallel()
				f := newFake(t, newAuthority(), nil)
				r := start(t, config(t, f))
				s := f.next()
				if !instead {
					s.welcome()
				}
				s.goodbye(&agentpb.Goodbye{Reason: reason, Permanent: true, Message: "by\x1b[31m ops"})
				err := r.wait()
				if !fault.Is(err, fault.Rejected) {
					t.Fatalf("got %v", err)
				}
				contains(t, err.Error(), want, "by [31m ops")
			})
		}
	}
}

func TestGoodbyeForNow(t *testing.T) {
	t.Parallel()
	f := newFake(t, newAuthority(), nil)
	r := start(t, config(t, f))
	s := f.next()
	s.welcome()
	s.goodbye(&agentpb.Goodbye{Reason: agentpb.Goodbye_REASON_OVERLOADED, ReconnectAfterMs: 1})
	f.next().welcome()
	r.end()
}

// TestMoved: the agent leaves in order and comes back elsewhere.
func TestMoved(t *testing.T) {
	t.Parallel()
	mesh := newAuthority()
	a, b := newFake(t, mesh, nil), newFake(t, mesh, nil)
	r := start(t, config(t, a))
	s := a.next()
	s.welcome()
	s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Move{Move: &agentpb.Move{Nodes: []string{b.addr}, WindowMs: 5}}})
	b.next().welcome()
	<-s.gone
	r.end()
}

// TestNodesOfWelcome: a node that dies is replaced by one that only Welcome named.
func TestNodesOfWelcome(t *testing.T) {
	t.Parallel()
	mesh := newAuthority()
	a, b := newFake(t, mesh, nil), newFake(t, mesh, nil)
	r := start(t, config(t, a))
	s := a.next()
	s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Welcome{Welcome: &agentpb.Welcome{Protocol: 1, Nodes: []string{b.addr}}}})
	s.end <- status.Error(codes.Unavailable, "down")
	b.next().welcome()
	r.end()
}

// TestRenewalOverTheStream: past half of its life the identity is renewed, used at once, and the former one deleted.
func TestRenewalOverTheStream(t *testing.T) {
	t.Parallel()
	var fresh atomic.Bool
	f := newFake(t, newAuthority(), func(f *fake) {
		f.life = func(n time.Time) (time.Time, time.Time) {
			if fresh.Load() {
				return n.Add(-time.Minute), n.Add(7 * 24 * time.Hour)
			}
			return n.Add(-5 * 24 * time.Hour), n.Add(2 * 24 * time.Hour)
		}
	})
	cfg := config(t, f)
	r := start(t, cfg)
	s := f.next()
	s.welcome()
	csr := expect(s, identityOf)
	fresh.Store(true)
	chain := must(f.issue(csr.GetCsr()))
	s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_IdentityIssued{IdentityIssued: &agentpb.IdentityIssued{Chain: chain}}})
	n := f.next()
	if n.hello.GetIdentitySerial() == s.hello.GetIdentitySerial() || string(n.cert.Raw) != string(chain[0]) {
		t.Error("the renewed identity is not used")
	}
	if n.hello.GetBootId() != s.hello.GetBootId() {
		t.Error("another boot id without a restart looks like a cloned machine")
	}
	n.welcome()
	n.state(&agentpb.State{Version: &agentpb.StateVersion{Kind: "settings", Version: 1}, Body: &agentpb.State_Settings{Settings: &agentpb.Settings{}}})
	expect(n, appliedOf) // Welcome was handled
	r.end()
	if left := must(os.ReadDir(filepath.Join(cfg.DataDir, "identity"))); len(left) != 2 {
		t.Errorf("the identity folder holds %v", left)
	}
}

// TestNewIdentityRefused: the former identity is put back, and the agent does not stay away.
func TestNewIdentityRefused(t *testing.T) {
	t.Parallel()
	var refused atomic.Pointer[[]byte]
	f := newFake(t, newAuthority(), func(f *fake) {
		f.life = func(n time.Time) (time.Time, time.Time) {
			return n.Add(-5 * 24 * time.Hour), n.Add(2 * 24 * time.Hour)
		}
		f.judge = func(c *x509.Certificate) error {
			if bad := refused.Load(); bad != nil && string(*bad) == string(c.Raw) {
				return status.Error(codes.Unauthenticated, "never heard of it")
			}
			return nil
		}
	})
	r := start(t, config(t, f))
	s := f.next()
	s.welcome()
	chain := must(f.issue(expect(s, identityOf).GetCsr()))
	refused.Store(&chain[0])
	s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_IdentityIssued{IdentityIssued: &agentpb.IdentityIssued{Chain: chain}}})
	n := f.next()
	if n.hello.GetIdentitySerial() != s.hello.GetIdentitySerial() {
		t.Error("the former identity is not used")
	}
	n.welcome()
	r.end()
}

// TestForeignIdentities: what the server issues must be this agent's, of this mesh, and valid.
func TestForeignIdentities(t *testing.T) {
	t.Parallel()
	other := newAuthority()
	f := newFake(t, newAuthority(), func(f *fake) {
		f.life = func(n time.Time) (time.Time, time.Time) {
			return n.Add(-5 * 24 * time.Hour), n.Add(2 * 24 * time.Hour)
		}
	})
	cfg := config(t, f)
	r := start(t, cfg)
	s := f.next()
	s.welcome()
	req := must(x509.ParseCertificateRequest(expect(s, identityOf).GetCsr()))
	now := time.Now()
	for _, chain := range [][][]byte{
		{f.mesh.identity("/agent/agt_ffffffffffffffffffffffffffffffff", req.PublicKey, now.Add(-time.Hour), now.Add(time.Hour))},
		{f.mesh.identity("/node/n1", req.PublicKey, now.Add(-time.Hour), now.Add(time.Hour))},
		{other.identity("/agent/"+agentID, req.PublicKey, now.Add(-time.Hour), now.Add(time.Hour))},
		{f.mesh.identity("/agent/"+agentID, other.key.Public(), now.Add(-time.Hour), now.Add(time.Hour))},
		{f.mesh.identity("/agent/"+agentID, req.PublicKey, now.Add(-2*time.Hour), now.Add(-time.Hour))},
		{[]byte("garbage")}, {},
	} {
		s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_IdentityIssued{IdentityIssued: &agentpb.IdentityIssued{Chain: chain}}})
	}
	s.state(&agentpb.State{Version: &agentpb.StateVersion{Kind: "settings", Version: 1}, Body: &agentpb.State_Settings{Settings: &agentpb.Settings{}}})
	expect(s, appliedOf)
	if id := must(agentd.Status(cfg)).Identity; id.Serial != s.hello.GetIdentitySerial() {
		t.Errorf("identity is %+v", id)
	}
	r.end()
}

// TestReidentify: an agent that was off for longer than its identity lasts comes back without an operator; after the
// grace it says what to do.
func TestReidentify(t *testing.T) {
	t.Parallel()
	clk := clockwork.NewFakeClockAt(time.Now())
	f := newFake(t, newAuthority(), func(f *fake) { f.now = clk.Now })
	cfg := config(t, f)
	cfg.Clock = clk
	cfg.Backoff = agentd.Backoff{First: 1, Young: 1, YoungFor: time.Hour, Old: 1, Stable: time.Hour}
	r := start(t, cfg)
	f.next().welcome()
	r.end()

	cfg.JoinToken = ""
	clk.Advance(20 * 24 * time.Hour)
	r = start(t, cfg)
	s := f.next()
	if f.renewals.Load() != 1 || !clk.Now().Before(s.cert.NotAfter) || s.hello.GetAgentId() != agentID {
		t.Errorf("%d renewals; the identity is valid until %v", f.renewals.Load(), s.cert.NotAfter)
	}
	s.welcome()
	r.end()

	clk.Advance(38 * 24 * time.Hour)
	err := start(t, cfg).wait()
	if err == nil {
		t.Fatal("an identity that is lost was used")
	}
	contains(t, err.Error(), agentID, "more than 30 days ago", "certmesh agents token create")

	// With a token it joins anew.
	cfg.JoinToken = f.token
	r = start(t, cfg)
	f.next().welcome()
	r.end()
}

// TestSlowClock: a host whose clock is behind is refused with an identity that looks good to it.
func TestSlowClock(t *testing.T) {
	t.Parallel()
	var off atomic.Int64
	f := newFake(t, newAuthority(), func(f *fake) {
		f.now = func() time.Time { return time.Now().Add(time.Duration(off.Load())) }
		f.life = func(n time.Time) (time.Time, time.Time) { return n.Add(-24 * time.Hour), n.Add(12 * time.Hour) }
	})
	r := start(t, config(t, f))
	s := f.next()
	s.welcome()
	off.Store(int64(13 * time.Hour))
	s.end <- status.Error(codes.Unavailable, "restart")
	n := f.next()
	if f.renewals.Load() != 1 || n.hello.GetIdentitySerial() == s.hello.GetIdentitySerial() {
		t.Error("the identity was not renewed")
	}
	n.welcome()
	r.end()
}

// TestHostileServers: none of them ends or blocks the agent, which comes back for a good one.
func TestHostileServers(t *testing.T) {
	t.Parallel()
	for name, act := range map[string]func(s *stream){
		"not Welcome first": func(s *stream) { s.settle(&agentpb.Settled{Id: "job_1"}) },
		"two Welcomes":      func(s *stream) { s.welcome(); s.welcome() },
		"unknown protocol": func(s *stream) {
			s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Welcome{Welcome: &agentpb.Welcome{Protocol: 99}}})
		},
		"oversized message": func(s *stream) {
			s.welcome()
			s.goodbye(&agentpb.Goodbye{Message: strings.Repeat("x", 65<<10)})
		},
		"oversized Welcome": func(s *stream) {
			s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Welcome{Welcome: &agentpb.Welcome{Protocol: 1, Nodes: []string{strings.Repeat("x", 65<<10)}}}})
		},
		"ends at once": func(s *stream) { s.end <- nil },
		"nonsense": func(s *stream) {
			s.welcome(&agentpb.Verdict{Id: "nobody", Decision: 77})
			s.send(&agentpb.ConnectResponse{})
			s.settle(&agentpb.Settled{Id: "nobody", RetireBelow: 1 << 60})
			s.state(&agentpb.State{})
			s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Cancel{Cancel: &agentpb.Cancel{Id: "nobody"}}})
			s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Assignment{}})
			s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_IdentityIssued{}})
			s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Move{}})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t, newAuthority(), nil)
			r := start(t, config(t, f))
			act(f.next())
			s := f.next()
			s.welcome()
			s.assign(keyJob("job_ok", 1, 1))
			expect(s, csrOf)
			r.end()
		})
	}
}

// garbage listens and answers every connection with act.
func garbage(t *testing.T, act func(net.Conn)) string {
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			act(c)
			_ = c.Close() // the agent sees it either way
		}
	}()
	t.Cleanup(func() {
		_ = l.Close() // the test is over
		<-done
	})
	return l.Addr().String()
}

// TestGarbageOnThePort: the agent goes on to the server that is one.
func TestGarbageOnThePort(t *testing.T) {
	t.Parallel()
	mesh, stranger := newAuthority(), newAuthority()
	f := newFake(t, mesh, nil)
	cert := tls.Certificate{Certificate: [][]byte{stranger.identity("/node/n1", stranger.key.Public(), time.Now().Add(-time.Hour), time.Now().Add(time.Hour))}, PrivateKey: stranger.key}
	noise := garbage(t, func(c net.Conn) { _, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")) })
	silent := garbage(t, func(net.Conn) {})
	strange := garbage(t, func(c net.Conn) {
		_ = tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}}).Handshake() // it fails
	})
	cfg := config(t, f)
	cfg.Servers = []string{noise, silent, strange, f.addr}
	r := start(t, cfg)
	s := f.next()
	s.welcome()
	s.end <- status.Error(codes.Unavailable, "restart")
	f.next().welcome()
	r.end()
}

// TestStates: what is refused leaves the last good version in force, and Hello lists that one.
func TestStates(t *testing.T) {
	t.Parallel()
	f := newFake(t, newAuthority(), nil)
	root := t.TempDir()
	cfg := config(t, f)
	cfg.TargetRoots = []string{root}
	r := start(t, cfg)
	s := f.next()
	s.welcome()
	target := func(version int64, spec *agentpb.TargetSpec) *agentpb.State {
		return &agentpb.State{Version: &agentpb.StateVersion{Kind: "target", Name: targetID, Version: version},
			Body: &agentpb.State_Target{Target: spec}}
	}
	s.state(target(1, fileTarget(root)))
	expect(s, appliedOf)
	s.state(target(2, fileTarget("/etc")))
	if rej := expect(s, rejectedOf); rej.GetVersion().GetVersion() != 2 || rej.GetFailure().GetMessage() == "" {
		t.Errorf("rejected as %v", rej)
	}
	s.state(target(3, &agentpb.TargetSpec{Id: targetID, Kind: "f5"}))
	if rej := expect(s, rejectedOf); rej.GetFailure().GetClass() != string(fault.Unsupported) {
		t.Errorf("rejected as %v", rej)
	}
	bundle := &agentpb.TrustBundle{Version: 2, Roots: [][]byte{newAuthority().cert.Raw}}
	s.state(&agentpb.State{Version: &agentpb.StateVersion{Kind: "trust_bundle", Version: 2}, Body: &agentpb.State_TrustBundle{TrustBundle: bundle}})
	contains(t, expect(s, rejectedOf).GetFailure().GetMessage(), "does not verify the server")
	bundle = &agentpb.TrustBundle{Version: 3, Roots: [][]byte{f.mesh.cert.Raw, newAuthority().cert.Raw}}
	s.state(&agentpb.State{Version: &agentpb.StateVersion{Kind: "trust_bundle", Version: 3}, Body: &agentpb.State_TrustBundle{TrustBundle: bundle}})
	expect(s, appliedOf)
	r.end()

	start(t, cfg)
	s = f.next()
	got := map[string]int64{}
	for _, v := range s.hello.GetStates() {
		got[v.GetKind()] = v.GetVersion()
	}
	if len(got) != 2 || got["target"] != 1 || got["trust_bundle"] != 3 {
		t.Errorf("in force are %v", got)
	}
	s.welcome()
}

// TestReportLeaves: the list goes over Report, in messages below the limit.
func TestReportLeaves(t *testing.T) {
	t.Parallel()
	f := newFake(t, newAuthority(), nil)
	issuer := newAuthority()
	root := t.TempDir()
	cfg := config(t, f)
	cfg.TargetRoots = []string{root}
	start(t, cfg)
	s := f.next()
	s.welcome()
	s.assign(keyJob("job_k", 1, 5))
	leaf := issuer.leaf(expect(s, csrOf).GetCsr())
	s.assign(deployJob("job_d", 1, 5, [][]byte{leaf}, fileTarget(root)))
	if expect(s, resultOf).GetDeployed() == nil {
		t.Fatal("not deployed")
	}
	s.end <- status.Error(codes.Unavailable, "restart")
	s = f.next()
	if s.hello.GetLeafCount() != 1 || len(s.hello.GetLeavesHash()) != 32 {
		t.Errorf("Hello counts %d leaves, hash %x", s.hello.GetLeafCount(), s.hello.GetLeavesHash())
	}
	s.send(&agentpb.ConnectResponse{Message: &agentpb.ConnectResponse_Welcome{Welcome: &agentpb.Welcome{Protocol: 1, ReportLeaves: true}}})
	select {
	case got := <-f.reports:
		if len(got) != 1 || got[0].GetCertificateId() != certID || got[0].GetGeneration() != 5 || string(got[0].GetCertificate()) != string(leaf) {
			t.Errorf("reported %v", got)
		}
	case <-time.After(patience):
		t.Fatal("nothing was reported")
	}
}

// TestRefusedAssignments: each gets its reason at once, and none is journalled.
func TestRefusedAssignments(t *testing.T) {
	t.Parallel()
	f := newFake(t, newAuthority(), nil)
	root := t.TempDir()
	cfg := config(t, f)
	cfg.TargetRoots = []string{root}
	start(t, cfg)
	s := f.next()
	s.welcome()
	edit := func(f func(*agentpb.Assignment)) *agentpb.Assignment {
		a := keyJob("job_1", 1, 1)
		f(a)
		return a
	}
	for want, a := range map[string]*agentpb.Assignment{
		"is not a certificate id": edit(func(a *agentpb.Assignment) { a.GetKey().CertificateId = "../../etc" }),
		"cannot make a key":       edit(func(a *agentpb.Assignment) { a.GetKey().KeyAlgorithm = "RSA-512" }),
		"not an IP address":       edit(func(a *agentpb.Assignment) { a.GetKey().IpAddresses = []string{"1.2.3"} }),
		"count from 1":            edit(func(a *agentpb.Assignment) { a.Attempt = 0 }),
		"1 to 64":                 edit(func(a *agentpb.Assignment) { a.Id = strings.Repeat("j", 65) }),
		"does not fit its work":   edit(func(a *agentpb.Assignment) { a.Class = agentpb.WorkClass_WORK_CLASS_DEPLOY }),
		"does not know":           edit(func(a *agentpb.Assignment) { a.Work = nil; a.Class = 99 }),
		"no connector":            deployJob("job_1", 1, 1, [][]byte{{1}}, &agentpb.TargetSpec{Id: targetID, Kind: "f5"}),
		"holds 0 certificates":    deployJob("job_1", 1, 1, nil, fileTarget(root)),
	} {
		s.assign(a)
		contains(t, expect(s, rejectedOf).GetFailure().GetMessage(), want)
	}
	// Outside the roots is found out when the target is opened, and a chain of strangers when it is parsed.
	s.assign(deployJob("job_2", 1, 1, [][]byte{f.mesh.cert.Raw}, fileTarget(root)))
	contains(t, expect(s, resultOf).GetFailure().GetMessage(), "holds no key")
	s.end <- status.Error(codes.Unavailable, "restart")
	s = f.next()
	if o := s.hello.GetOpen(); len(o) != 1 || o[0].GetId() != "job_2" {
		t.Errorf("open is %v", o)
	}
	s.welcome()
}

// TestEnrolment: what each kind of trouble is called, and that nobody else's server gets the token.
func TestEnrolment(t *testing.T) {
	t.Parallel()
	short := func() context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		t.Cleanup(cancel)
		return ctx
	}
	t.Run("another mesh", func(t *testing.T) {
		t.Parallel()
		f, other := newFake(t, newAuthority(), nil), newFake(t, newAuthority(), nil)
		cfg := config(t, f)
		cfg.JoinToken = other.token
		err := agentd.Run(t.Context(), cfg)
		if !fault.Is(err, fault.Rejected) || f.enrols.Load() != 0 {
			t.Fatalf("%v, %d calls", err, f.enrols.Load())
		}
		contains(t, err.Error(), "does not present the CA that the join token names")
	})
	t.Run("refused token", func(t *testing.T) {
		t.Parallel()
		f := newFake(t, newAuthority(), nil)
		cfg := config(t, f)
		cfg.JoinToken = strings.Replace(f.token, "tok_1", "tok_2", 1)
		err := agentd.Run(t.Context(), cfg)
		if !fault.Is(err, fault.Unauthorized) {
			t.Fatal(err)
		}
		contains(t, err.Error(), "unknown, used up or expired")
		if strings.Contains(err.Error(), strings.Split(f.token, ".")[2]) {
			t.Error("the error repeats the token's secret")
		}
	})
	t.Run("no token", func(t *testing.T) {
		t.Parallel()
		f := newFake(t, newAuthority(), nil)
		cfg := config(t, f)
		cfg.JoinToken = ""
		if err := agentd.Run(t.Context(), cfg); !fault.Is(err, fault.Invalid) {
			t.Fatal(err)
		}
	})
	t.Run("nobody there", func(t *testing.T) {
		t.Parallel()
		cfg := config(t, newFake(t, newAuthority(), nil))
		cfg.Servers = []string{"127.0.0.1:1"}
		if err := agentd.Enroll(short(), cfg); !fault.Is(err, fault.Retryable) {
			t.Fatal(err)
		}
		if err := agentd.Run(short(), cfg); err != nil {
			t.Fatalf("a stop before enrolment is clean, not %v", err)
		}
	})
	t.Run("wrong answers", func(t *testing.T) {
		t.Parallel()
		other := newAuthority()
		for _, edit := range []func(*agentpb.EnrollResponse){
			func(r *agentpb.EnrollResponse) { r.AgentId = "agt_ffffffffffffffffffffffffffffffff" },
			func(r *agentpb.EnrollResponse) { r.AgentId = "../x" },
			func(r *agentpb.EnrollResponse) { r.TrustDomain = "other.test" },
			func(r *agentpb.EnrollResponse) { r.TrustBundle.Roots = [][]byte{other.cert.Raw} },
			func(r *agentpb.EnrollResponse) { r.TrustBundle = nil },
			func(r *agentpb.EnrollResponse) { r.Chain = nil },
		} {
			f := newFake(t, newAuthority(), func(f *fake) {
				f.enrol = func(_ *agentpb.EnrollRequest, r *agentpb.EnrollResponse) error { edit(r); return nil }
			})
			cfg := config(t, f)
			err := agentd.Enroll(t.Context(), cfg)
			if err == nil {
				t.Error("a wrong answer was taken")
			}
			if rep := must(agentd.Status(cfg)); rep.Identity != nil {
				t.Errorf("it left the identity %+v", rep.Identity)
			}
		}
	})
	t.Run("answer lost", func(t *testing.T) {
		t.Parallel()
		var keys []string
		f := newFake(t, newAuthority(), func(f *fake) {
			f.enrol = func(r *agentpb.EnrollRequest, _ *agentpb.EnrollResponse) error {
				req := must(x509.ParseCertificateRequest(r.GetCsr()))
				keys = append(keys, string(req.RawSubjectPublicKeyInfo))
				if len(keys) < 3 {
					return status.Error(codes.Unavailable, "the answer is lost")
				}
				return nil
			}
		})
		cfg := config(t, f)
		died := errors.New("died")
		n := 0
		cut := cfg
		cut.Cut = func(p string) error {
			if p == "send enroll" {
				n++
			}
			if n == 2 {
				return died
			}
			return nil
		}
		if err := agentd.Enroll(t.Context(), cut); !errors.Is(err, died) {
			t.Fatal(err)
		}
		// After a restart the token is no longer given.
		cfg.JoinToken = ""
		if err := agentd.Enroll(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		if len(keys) != 3 || keys[0] != keys[1] || keys[1] != keys[2] {
			t.Error("the same enrolment was asked for with different keys")
		}
		if es := must(os.ReadDir(filepath.Join(cfg.DataDir, "identity"))); slices.ContainsFunc(es, func(e os.DirEntry) bool { return e.Name() == "enrol.json" }) {
			t.Error("the token stayed on disk")
		}
	})
}

func TestOneAgentPerDirectory(t *testing.T) {
	t.Parallel()
	f := newFake(t, newAuthority(), nil)
	cfg := config(t, f)
	r := start(t, cfg)
	f.next().welcome()
	if err := agentd.Run(t.Context(), cfg); !fault.Is(err, fault.Conflict) {
		t.Fatal(err)
	}
	second := cfg
	second.DataDir, second.KeyDir = t.TempDir(), filepath.Join(cfg.DataDir, "keys")
	if err := agentd.Run(t.Context(), second); !fault.Is(err, fault.Conflict) {
		t.Errorf("two agents share a key directory: %v", err)
	}
	r.end()
}

// TestUnusableDirectory: a file in place of a directory stands for everything that cannot be written.
func TestUnusableDirectory(t *testing.T) {
	t.Parallel()
	f := newFake(t, newAuthority(), nil)
	for _, name := range []string{"", "identity", "journal", "state", "keys"} {
		cfg := config(t, f)
		if name == "" {
			cfg.DataDir = filepath.Join(cfg.DataDir, "data")
			if err := os.WriteFile(cfg.DataDir, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(filepath.Join(cfg.DataDir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		err := agentd.Run(t.Context(), cfg)
		if !fault.Is(err, fault.Retryable) {
			t.Fatalf("%q: %v", name, err)
		}
		contains(t, err.Error(), cfg.DataDir)
	}
}

// TestManyInMemory: agents share nothing but the process.
func TestManyInMemory(t *testing.T) {
	t.Parallel()
	f := newFake(t, newAuthority(), nil)
	const n = 25
	var rs []*running
	for range n {
		cfg := config(t, f)
		cfg.DataDir, cfg.InMemory = "", true
		rs = append(rs, start(t, cfg))
	}
	boots := map[string]bool{}
	for i := range n {
		s := f.next()
		boots[s.hello.GetBootId()] = true
		s.welcome()
		s.assign(keyJob(fmt.Sprint("job_", i), 1, 1))
		expect(s, csrOf)
	}
	if len(boots) != n {
		t.Errorf("%d boot ids of %d agents", len(boots), n)
	}
	for _, r := range rs {
		r.end()
	}
}
