package session

import (
	"context"
	"crypto/sha256"
	"sync/atomic"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/ca"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func applied(v *agentpb.StateVersion) *agentpb.ConnectRequest {
	return &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Applied{Applied: &agentpb.Applied{Version: v}}}
}

// newSuccessor is the mesh CA that follows one.
func newSuccessor(t *testing.T, former *ca.Authority) *ca.Authority {
	t.Helper()
	ring, err := secret.NewKeyring(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	m, err := ca.NewSuccessor(former, ca.Params{Now: time.Now()}, ring)
	if err != nil {
		t.Fatal(err)
	}
	a, err := ca.Open(m.CA, func(string) (domain.SealedKey, error) { return m.Keys[0], nil }, ring)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// nextBundle is the next trust bundle the agent is sent.
func (k *talk) nextBundle() *agentpb.State {
	k.t.Helper()
	for {
		if s := k.state(); s.GetVersion().GetKind() == kindTrustBundle {
			return s
		}
	}
}

// A change of the trust bundle reaches every agent without its asking; who has it in force is recorded, once.
func TestTrustBundleIsPushedAndAcknowledged(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	next := newMesh(t, time.Now())
	former, root := p.mesh.Root().Raw, next.Root().Raw
	hosts := []*host{p.host("web1"), p.host("web2")}
	talks := make([]*talk, len(hosts))
	for i, h := range hosts {
		talks[i] = h.online()
		talks[i].send(applied(talks[i].nextBundle().GetVersion()))
	}
	eventually(t, "version 1 is acknowledged by both", func() bool { return len(p.store.acknowledged()) == 2 })
	p.store.trust(2, former, root)
	if err := p.srv.TrustChanged(t.Context()); err != nil {
		t.Fatal(err)
	}
	var held *agentpb.StateVersion
	for _, k := range talks {
		s := k.nextBundle()
		if b := s.GetTrustBundle(); b.GetVersion() != 2 || len(b.GetRoots()) != 2 {
			t.Fatalf("sent %v", b)
		}
		held = s.GetVersion()
	}
	talks[0].send(applied(held))
	eventually(t, "version 2 is acknowledged by one", func() bool { return len(p.store.acknowledged()) == 3 })
	if a := p.store.acknowledged()[2]; a.AgentID != hosts[0].id || a.Version != 2 || a.At.IsZero() {
		t.Errorf("recorded %+v", a)
	}
	// The other one has it in force and went away before it said so: its next Hello says it. The first one's says nothing new.
	says := func(h *agentpb.Hello) { h.States = []*agentpb.StateVersion{held} }
	hosts[0].online(says)
	hosts[1].online(says)
	eventually(t, "version 2 is acknowledged by the other", func() bool { return len(p.store.acknowledged()) == 4 })
	if a := p.store.acknowledged()[3]; a.AgentID != hosts[1].id || a.Version != 2 {
		t.Errorf("recorded %+v", a)
	}
}

// What cannot be written is written later.
func TestAcknowledgementsSurviveAStoreThatFails(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	var failed atomic.Int64
	p.store.onCall(func(method string) error {
		if method == "AcknowledgeTrust" && failed.Add(1) < 3 {
			return fault.New(fault.Retryable, "the database does not answer")
		}
		return nil
	})
	k := p.host("web1").online()
	k.send(applied(k.nextBundle().GetVersion()))
	eventually(t, "it is acknowledged", func() bool { return len(p.store.acknowledged()) == 1 })
}

// A node that has not noticed yet that another CA signs finds out when it wants to sign, and signs with that one.
func TestIdentityOfTheCAThatSignsNow(t *testing.T) {
	t.Parallel()
	former := newMesh(t, time.Now())
	next := newSuccessor(t, former)
	var signer atomic.Pointer[ca.Authority]
	signer.Store(former)
	var reloads atomic.Int64
	store := newFakeStore([][]byte{next.Root().Raw, former.Root().Raw})
	p := newPlaneOver(t, former, store, func(c *Config) {
		c.Mesh = signer.Load
		c.Reload = func(context.Context) error { reloads.Add(1); signer.Store(next); return nil }
	})
	h := p.host("web1")
	store.mu.Lock()
	store.generation = 2
	store.mu.Unlock()
	k := h.online()
	key := newKey(t)
	k.send(&agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_IdentityCsr{IdentityCsr: &agentpb.IdentityCsr{Csr: newCSR(t, key)}}})
	chain := until(k, func(m *agentpb.ConnectResponse) (*agentpb.IdentityIssued, bool) {
		return m.GetIdentityIssued(), m.GetIdentityIssued() != nil
	}).GetChain()
	if reloads.Load() != 1 || len(chain) != 2 {
		t.Fatalf("%d reloads, a chain of %d; want the leaf and what vouches for the new CA", reloads.Load(), len(chain))
	}
	if got, want := chain[1], next.Chain()[0]; string(got) != string(want) {
		t.Error("the identity does not come with what vouches for the CA that signed it")
	}
}

func bundleOf(revision int64, hash byte) Resource {
	return Resource{Kind: kindTrustBundle, Revision: revision, Hash: [sha256.Size]byte{hash},
		Body: &agentpb.State{Body: &agentpb.State_TrustBundle{TrustBundle: &agentpb.TrustBundle{Version: revision}}}}
}

func sentBundles(effects []Effect) (versions []int64) {
	for _, e := range effects {
		if s, ok := e.(SendState); ok && s.Version.GetKind() == kindTrustBundle {
			versions = append(versions, s.Body.GetTrustBundle().GetVersion())
		}
	}
	return versions
}

// Whichever way the change of a bundle and the loading of an agent's state fall, the agent is sent the newest bundle, and
// no older one after it.
func TestNewestTrustBundleWins(t *testing.T) {
	t.Parallel()
	older, newer := bundleOf(1, 1), bundleOf(2, 2)
	hello := Received{Message: &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Hello{Hello: &agentpb.Hello{Protocol: 1}}}}
	for name, c := range map[string]struct {
		events []Event
		want   []int64
	}{
		"while the session opens": {[]Event{hello, TrustChanged{&newer}, Admitted{Desired: []Resource{older}}}, []int64{2}},
		"before Hello":            {[]Event{TrustChanged{&newer}, hello, Admitted{Desired: []Resource{newer}}}, []int64{2}},
		"after the welcome":       {[]Event{hello, Admitted{Desired: []Resource{older}}, TrustChanged{&newer}}, []int64{1, 2}},
		"read before, late":       {[]Event{hello, Admitted{Desired: []Resource{newer}}, Desired{[]Resource{older}}, TrustChanged{&older}}, []int64{2}},
		"twice":                   {[]Event{hello, Admitted{Desired: []Resource{newer}}, TrustChanged{&newer}}, []int64{2}},
	} {
		s := NewState("agt_1", time.Minute)
		var got []int64
		for _, e := range c.events {
			var effects []Effect
			s, effects = Step(s, e)
			got = append(got, sentBundles(effects)...)
		}
		if len(got) != len(c.want) || got[len(got)-1] != c.want[len(c.want)-1] {
			t.Errorf("%s: sent versions %v, want %v", name, got, c.want)
		}
	}
}

// Only an answer to what was sent, or a Hello that lists it, acknowledges.
func TestStaleAnswerAcknowledgesNothing(t *testing.T) {
	t.Parallel()
	older, newer := bundleOf(1, 1), bundleOf(2, 2)
	s := NewState("agt_1", time.Minute)
	var acks []int64
	step := func(e Event) []Effect {
		var effects []Effect
		s, effects = Step(s, e)
		for _, f := range effects {
			if a, ok := f.(Acknowledge); ok {
				acks = append(acks, a.Version)
			}
		}
		return effects
	}
	step(Received{Message: &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Hello{Hello: &agentpb.Hello{Protocol: 1}}}})
	step(Admitted{Desired: []Resource{older}})
	step(TrustChanged{&newer})
	for _, v := range []int64{1, 3, 2, 2} {
		step(Received{Message: applied(&agentpb.StateVersion{Kind: kindTrustBundle, Version: v})})
	}
	step(Received{Message: applied(&agentpb.StateVersion{Kind: kindSettings, Version: 1})})
	if len(acks) != 1 || acks[0] != 2 {
		t.Errorf("acknowledged %v, want version 2 alone", acks)
	}
}

func TestAcksAreBoundedAndWrittenOnce(t *testing.T) {
	t.Parallel()
	a := &acks{}
	at := time.Now()
	a.note(domain.TrustAck{AgentID: "a", Version: 1, At: at})
	a.note(domain.TrustAck{AgentID: "a", Version: 2, At: at})
	a.note(domain.TrustAck{AgentID: "a", Version: 1, At: at})
	first := a.take()
	if len(first) != 1 || first[0].Version != 2 || len(a.take()) != 0 {
		t.Errorf("taken %+v", first)
	}
	a.wrote(first)
	a.note(domain.TrustAck{AgentID: "a", Version: 2, At: at})
	if len(a.take()) != 0 {
		t.Error("what is written waits again")
	}
	a.note(domain.TrustAck{AgentID: "a", Version: 3, At: at})
	if len(a.take()) != 1 {
		t.Error("what is newer does not wait")
	}
}
