package session

import (
	"bytes"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// TestOneAgentCannotHoldTheGate: an agent that says many Hellos at once keeps nobody else out. The store takes Hellos of
// one agent one after the other, so they would stand in the gate for long.
func TestOneAgentCannotHoldTheGate(t *testing.T) {
	t.Parallel()
	p := newPlane(t, func(c *Config) { c.Handshakes = 4 })
	var hold atomic.Bool
	hold.Store(true)
	const many = 8
	release, seen := make(chan struct{}), make(chan struct{}, many)
	p.store.onCall(func(method string) error {
		if method == "OpenSessions" && hold.Load() {
			seen <- struct{}{}
			<-release
		}
		return nil
	})
	bad := p.host("bad")
	var done sync.WaitGroup
	for range many {
		k := bad.connect()
		done.Go(func() {
			m, ok := <-k.in
			if ok && m.GetGoodbye().GetReason() == agentpb.Goodbye_REASON_OVERLOADED {
				seen <- struct{}{}
			}
		})
	}
	for range many {
		<-seen
	}
	hold.Store(false)
	p.host("good").online()
	close(release)
	done.Wait()
}

// TestReportsNobodyAskedFor: a report costs reads for each certificate that it names, so it is taken once per question.
func TestReportsNobodyAskedFor(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	leaves := []*agentpb.HeldLeaf{{CertificateId: "cert_1", Generation: 1, Certificate: []byte("x")}}
	report := func(conn agentpb.AgentServiceClient) error {
		st, err := conn.Report(t.Context())
		if err != nil {
			return err
		}
		_ = st.Send(&agentpb.ReportRequest{Body: &agentpb.ReportRequest_Leaves{Leaves: &agentpb.HeldLeaves{Leaves: leaves, Last: true}}})
		_, err = st.CloseAndRecv()
		return err
	}
	conn := p.dial(h.cert)
	k := p.open(conn)
	k.send(hello())
	k.welcome()
	wantCode(t, report(agentpb.NewAgentServiceClient(conn)), codes.FailedPrecondition)

	// The list that was announced is not the one that comes: it is taken once all the same.
	conn = p.dial(h.cert)
	k = p.open(conn)
	k.send(hello(func(h *agentpb.Hello) { h.LeafCount, h.LeavesHash = 1, bytes.Repeat([]byte{7}, 32) }))
	if !k.welcome().GetReportLeaves() {
		t.Fatal("the list was not asked for")
	}
	for i := range 5 {
		err := report(agentpb.NewAgentServiceClient(conn))
		if i == 0 && err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			wantCode(t, err, codes.FailedPrecondition)
		}
	}
	if n := p.store.count("Versions"); n != 1 {
		t.Errorf("versions were read %d times", n)
	}
}

// TestIdentitiesPerAgentAreBounded: an agent that connects anew for each of them gets no more identities than one that
// stays.
func TestIdentitiesPerAgentAreBounded(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	h := p.host("web1")
	issued, limited := 0, 0
	for range 20 {
		k := h.online()
		k.send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_IdentityCsr{IdentityCsr: &agentpb.IdentityCsr{Csr: newCSR(t, newKey(t))}}})
		r := until(k, func(m *agentpb.ConnectResponse) (*agentpb.IdentityIssued, bool) {
			return m.GetIdentityIssued(), m.GetIdentityIssued() != nil
		})
		switch {
		case r.GetFailure() == nil:
			issued++
		case r.GetFailure().GetClass() == string(fault.RateLimited):
			limited++
			if !strings.Contains(r.GetFailure().GetMessage(), "later") {
				t.Errorf("it is not said what to do: %s", r.GetFailure().GetMessage())
			}
		default:
			t.Fatalf("%v", r.GetFailure())
		}
		k.cancel()
		k.end()
	}
	if issued == 0 || issued > identityBurst || limited != 20-issued {
		t.Errorf("%d identities were made, %d requests limited", issued, limited)
	}
}

// TestStopClosesEverySession: the last stream's session is closed in the store before Stop gives the store up.
func TestStopClosesEverySession(t *testing.T) {
	t.Parallel()
	for range 40 {
		p := newPlane(t)
		h := p.host("web1")
		h.online()
		if err := p.srv.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if s := p.store.session(h.id); s.Holder != "" {
			t.Fatalf("after Stop %s holds the session", s.Holder)
		}
	}
}
