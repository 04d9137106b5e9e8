package storetest_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// hello opens a session of the agent with the labels it sends.
func (x *estate) hello(a domain.Agent, labels map[string]string) domain.SessionOpened {
	x.t.Helper()
	serial := "id-" + a.ID
	x.must(x.RecordIdentity(x.ctx, domain.Identity{Serial: serial, AgentID: a.ID, SPKI: "s-" + a.ID, NotBefore: x.now, NotAfter: x.now.Add(time.Hour),
		CreatedAt: x.now}, x.op()))
	out := x.OpenSessions(x.ctx, []domain.SessionOpen{{AgentID: a.ID, Node: "n1", BootID: "b", Labels: labels, Protocol: 1,
		IdentitySerial: serial, At: x.now}})[0]
	x.must(out.Err)
	return out
}

// An agent that says Hello with other labels each time must not make its row, and every list of agents, grow for ever.
func TestLabelsOfHellosDoNotPileUp(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		a := x.agent("web")
		x.hello(a, map[string]string{"first": "1"})
		for i := range 20 {
			labels := map[string]string{"first": fmt.Sprint(i)}
			for j := range 60 {
				labels[fmt.Sprintf("k-%d-%d", i, j)] = strings.Repeat("x", 200)
			}
			x.hello(a, labels)
		}
		got, err := x.Agent(x.ctx, a.ID)
		x.must(err)
		if n := len(got.Labels); n > 128 {
			t.Errorf("%d labels were kept", n)
		}
		same(t, "a label that was there is still renewed", got.Labels["first"], "19")
		for k, v := range a.Labels {
			same(t, "label of the token "+k, got.Labels[k], v)
		}
	})
}

// After an outage of the database, or a jump of its clock, the sweep calls agents Offline whose streams have lived on: the
// next beat says so. A beat that is written after the stream's end says nothing.
func TestABeatBringsAnOfflineAgentBack(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		a := x.agent("web")
		opened := x.hello(a, nil)
		f, err := x.TakeDuty(x.ctx, "agents", "n1", x.now)
		x.must(err)
		later := x.now.Add(time.Hour)
		_, err = x.SweepAgents(x.ctx, f, later.Add(-time.Minute), later.Add(-time.Minute), later)
		x.must(err)
		got, err := x.Agent(x.ctx, a.ID)
		x.must(err)
		same(t, "swept", got.State, domain.AgentOffline)

		x.must(x.FlushSeen(x.ctx, []domain.Seen{{AgentID: a.ID, At: later.Add(time.Second)}}))
		got, err = x.Agent(x.ctx, a.ID)
		x.must(err)
		same(t, "after a beat", got.State, domain.AgentOnline)
		same(t, "offline since", got.OfflineSince.IsZero(), true)

		x.must(x.CloseSession(x.ctx, a.ID, opened.Epoch, later.Add(2*time.Second)))
		x.must(x.FlushSeen(x.ctx, []domain.Seen{{AgentID: a.ID, At: later.Add(3 * time.Second)}}))
		got, err = x.Agent(x.ctx, a.ID)
		x.must(err)
		same(t, "after the stream's end", got.State, domain.AgentOffline)
	})
}
