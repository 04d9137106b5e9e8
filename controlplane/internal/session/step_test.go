package session

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"pgregory.net/rapid"

	"github.com/certmesh/certmesh/controlplane/internal/dispatch"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// keeper is the agent's side of states: what is not newer changes nothing, what is refused leaves the former in force.
type keeper struct {
	held    map[stateKey]*agentpb.StateVersion
	refuses map[[sha256.Size]byte]bool
	refused map[stateKey]int64
}

// take answers a state as the agent does.
func (k *keeper) take(s SendState) *agentpb.ConnectRequest {
	v := s.Version
	key := stateKey{v.GetKind(), v.GetName()}
	applied := &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Applied{Applied: &agentpb.Applied{Version: v}}}
	if have := k.held[key]; have != nil && v.GetVersion() <= have.GetVersion() {
		return applied
	}
	switch {
	case s.Body == nil:
		delete(k.held, key)
	case k.refuses[hashFrom(v.GetHash())]:
		k.refused[key] = v.GetVersion()
		return &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Rejected{Rejected: &agentpb.Rejected{Version: v,
			Failure: &agentpb.Failure{Class: string(fault.Invalid), Message: "no"}}}}
	default:
		k.held[key] = v
	}
	return applied
}

// TestStatesConverge drives the step through random changes of what is desired, answers, losses and reconnects: numbers
// only rise, what was refused is not sent again until it changes or the agent was started anew, and in the end the agent
// holds what is desired.
func TestStatesConverge(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		agent := &keeper{held: map[stateKey]*agentpb.StateVersion{}, refuses: map[[sha256.Size]byte]bool{}, refused: map[stateKey]int64{}}
		desired := map[stateKey]Resource{}
		stored := map[stateKey]domain.StateRejection{}
		revision := int64(0)
		content := func(k stateKey, r int64) Resource {
			return Resource{Kind: k.kind, Name: k.name, Revision: r, Hash: sha256.Sum256([]byte(fmt.Sprint(k, r))), Body: &agentpb.State{}}
		}
		change := func(t *rapid.T, k stateKey) {
			revision++
			r := content(k, revision)
			if k.kind == kindSettings {
				r.Revision = 0
			}
			desired[k] = r
			if k.kind == kindTarget && rapid.IntRange(0, 3).Draw(t, "refused") == 0 {
				agent.refuses[r.Hash] = true
			}
		}
		change(t, stateKey{kindTrustBundle, ""})
		change(t, stateKey{kindSettings, ""})
		list := func() []Resource {
			var out []Resource
			for _, k := range slices.SortedFunc(maps.Keys(desired), func(a, b stateKey) int {
				return slices.Compare([]string{a.kind, a.name}, []string{b.kind, b.name})
			}) {
				out = append(out, desired[k])
			}
			return out
		}
		var s State
		var wire []SendState
		last := map[stateKey]int64{}
		run := func(e Event) {
			var effects []Effect
			s, effects = Step(s, e)
			for _, f := range effects {
				switch f := f.(type) {
				case SendState:
					k := stateKey{f.Version.GetKind(), f.Version.GetName()}
					if f.Version.GetVersion() <= last[k] {
						t.Fatalf("%v has version %d after %d", k, f.Version.GetVersion(), last[k])
					}
					last[k] = f.Version.GetVersion()
					if f.Body != nil && k.kind == kindTarget && f.Version.GetVersion() == agent.refused[k] {
						t.Fatalf("%v version %d was refused and is sent again", k, f.Version.GetVersion())
					}
					// The latest in the outbox wins.
					wire = slices.DeleteFunc(wire, func(o SendState) bool {
						return stateKey{o.Version.GetKind(), o.Version.GetName()} == k && rapid.Bool().Draw(t, "merged")
					})
					wire = append(wire, f)
				case RecordRefusal:
					stored[stateKey{f.Refusal.Kind, f.Refusal.Name}] = f.Refusal
				case ClearRefusal:
					delete(stored, stateKey{f.Kind, f.Name})
				case Finish:
					t.Fatalf("it ended: %+v", f)
				}
			}
		}
		connect := func(restarted bool) {
			s, wire, last = NewState("agt_1", time.Second), nil, map[stateKey]int64{}
			h := &agentpb.Hello{Protocol: 1}
			for _, v := range agent.held {
				h.States = append(h.States, v)
			}
			run(Received{Message: &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Hello{Hello: h}}})
			run(Admitted{Desired: list(), Refused: slices.Collect(maps.Values(stored)), Restarted: restarted})
		}
		deliver := func() bool {
			if len(wire) == 0 {
				return false
			}
			m := wire[0]
			wire = wire[1:]
			run(Received{Message: agent.take(m)})
			return true
		}
		connect(false)
		target := func(t *rapid.T) stateKey {
			return stateKey{kindTarget, rapid.SampledFrom([]string{"tgt_1", "tgt_2", "tgt_3"}).Draw(t, "target")}
		}
		t.Repeat(map[string]func(*rapid.T){
			"":          func(*rapid.T) {},
			"change":    func(t *rapid.T) { change(t, target(t)) },
			"settings":  func(t *rapid.T) { change(t, stateKey{kindSettings, ""}) },
			"roots":     func(t *rapid.T) { change(t, stateKey{kindTrustBundle, ""}) },
			"remove":    func(t *rapid.T) { delete(desired, target(t)) },
			"push":      func(*rapid.T) { run(Desired{Resources: list()}) },
			"deliver":   func(*rapid.T) { deliver() },
			"reconnect": func(*rapid.T) { connect(false) },
			"restart": func(t *rapid.T) {
				clear(agent.refused)
				if rapid.Bool().Draw(t, "mended") {
					clear(agent.refuses)
				}
				connect(true)
				for deliver() { //nolint:revive // until nothing is under way
				}
			},
		})
		run(Desired{Resources: list()})
		for deliver() { //nolint:revive // until nothing is under way
		}
		for k, r := range desired {
			have := agent.held[k]
			if agent.refuses[r.Hash] {
				continue
			}
			if hashFrom(have.GetHash()) != r.Hash {
				t.Fatalf("%v: the agent holds %v, desired is revision %d", k, have, r.Revision)
			}
		}
		for k := range agent.held {
			if _, ok := desired[k]; !ok {
				t.Fatalf("%v is gone and the agent still holds it", k)
			}
		}
	})
}

// TestRefusedUntilRestart: a refusal holds for the process that made it. Another process is sent the state once more,
// under no lower number, and either clears the stored refusal or makes it its own.
func TestRefusedUntilRestart(t *testing.T) {
	t.Parallel()
	target := Resource{Kind: kindTarget, Name: "tgt_1", Revision: 3, Hash: hashOf([]byte("x")), Body: &agentpb.State{}}
	settings := Resource{Kind: kindSettings, Hash: hashOf([]byte("y")), Body: &agentpb.State{}}
	all := []Resource{settings, target}
	refused := []domain.StateRejection{{Kind: kindSettings, Version: 6}, {Kind: kindTarget, Name: "tgt_1", Version: 5}}
	open := func(restarted bool) (State, map[string]*agentpb.StateVersion) {
		s, _ := Step(NewState("agt_1", time.Second), Received{Message: hello()})
		s, effects := Step(s, Admitted{Desired: all, Refused: refused, Restarted: restarted})
		sent := map[string]*agentpb.StateVersion{}
		for _, f := range effects {
			if f, ok := f.(SendState); ok {
				sent[f.Version.GetKind()] = f.Version
			}
		}
		return s, sent
	}
	if _, sent := open(false); sent[kindTarget] != nil {
		t.Errorf("the same process is sent %v", sent)
	}
	s, sent := open(true)
	if sent[kindTarget].GetVersion() != 5 || sent[kindSettings].GetVersion() != 6 {
		t.Fatalf("another process is sent %v", sent)
	}
	if _, effects := Step(s, Desired{all}); len(effects) != 0 {
		t.Errorf("sent twice: %v", effects)
	}
	applied := &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Applied{Applied: &agentpb.Applied{Version: sent[kindTarget]}}}
	_, effects := Step(s, Received{Message: applied})
	if len(effects) != 1 || effects[0] != (ClearRefusal{Kind: kindTarget, Name: "tgt_1"}) {
		t.Errorf("applied: %v", effects)
	}

	s, sent = open(true)
	no := &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Rejected{Rejected: &agentpb.Rejected{Version: sent[kindTarget]}}}
	s, effects = Step(s, Received{Message: no})
	if len(effects) != 1 || effects[0].(RecordRefusal).Refusal.Version != 5 {
		t.Errorf("refused again: %v", effects)
	}
	if _, effects = Step(s, Desired{all}); len(effects) != 0 {
		t.Errorf("sent in spite of a new refusal: %v", effects)
	}
}

// TestRandomMessages: whatever order messages and endings come in, there is one Hello, one end, and nothing after it.
func TestRandomMessages(t *testing.T) {
	t.Parallel()
	messages := []*agentpb.ConnectRequest{
		hello(credits(1, 1)), grants(agentpb.WorkClass_WORK_CLASS_KEY, 1), grants(agentpb.WorkClass(77), 1), accepted("job_1", 1),
		csrFor("job_1", 1, []byte("x")), deployed("job_1", 1, nil), failedWith("job_1", 1, fault.Internal, ""), {},
		{Message: &agentpb.ConnectRequest_Beat{}}, {Message: &agentpb.ConnectRequest_Hello{}}, {Message: &agentpb.ConnectRequest_Credit{}},
		{Message: &agentpb.ConnectRequest_Result{}}, {Message: &agentpb.ConnectRequest_Applied{}}, {Message: &agentpb.ConnectRequest_Rejected{}},
		{Message: &agentpb.ConnectRequest_IdentityCsr{}}, {Message: &agentpb.ConnectRequest_Goodbye{}}, {Message: &agentpb.ConnectRequest_Progress{}},
		{Message: &agentpb.ConnectRequest_Observed{}}, observed("cert_1", "tgt_1", "it differs"),
	}
	rapid.Check(t, func(t *rapid.T) {
		s := NewState("agt_1", time.Second)
		admits, ends, renewing := 0, 0, 0
		run := func(e Event) {
			before := s.Phase()
			var effects []Effect
			s, effects = Step(s, e)
			if before == Closing && len(effects) > 0 {
				t.Fatalf("after the end: %v", effects)
			}
			for _, f := range effects {
				switch f.(type) {
				case Admit:
					admits++
				case Finish:
					ends++
				case RenewIdentity:
					renewing++
				case Work:
					if before != Open && admits != 1 {
						t.Fatalf("work in phase %d", before)
					}
				}
			}
			if admits > 1 || ends > 1 || renewing > 1 || ends == 1 != (s.Phase() == Closing) {
				t.Fatalf("%d admitted, %d ended, %d renewals at once, phase %d", admits, ends, renewing, s.Phase())
			}
		}
		at := time.Unix(0, 0)
		t.Repeat(map[string]func(*rapid.T){
			"": func(*rapid.T) {},
			"hello": func(*rapid.T) {
				if s.Phase() == AwaitHello {
					run(Received{Message: messages[0], At: at})
				}
			},
			"message": func(t *rapid.T) {
				at = at.Add(time.Duration(rapid.IntRange(0, 2000).Draw(t, "ms")) * time.Millisecond)
				run(Received{Message: rapid.SampledFrom(messages).Draw(t, "message"), At: at})
			},
			"admitted": func(*rapid.T) { run(Admitted{Work: dispatch.Opened{AgentID: "agt_1", Epoch: 1}}) },
			"identity": func(t *rapid.T) {
				if renewing == 1 {
					renewing = 0
					run(IdentityMade{Chain: [][]byte{{1}}})
				}
			},
			"push": func(*rapid.T) { run(Desired{}) },
			"end": func(t *rapid.T) {
				if rapid.IntRange(0, 5).Draw(t, "really") == 0 {
					run(rapid.SampledFrom([]Event{Ending{endSuperseded()}, HungUp{}, HungUp{Err: fault.New(fault.Exhausted, "large")}}).Draw(t, "how"))
				}
			},
		})
	})
}

// TestEndings: each way a stream ends has its Goodbye and status.
func TestEndings(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		end       End
		reason    agentpb.Goodbye_Reason
		permanent bool
		code      codes.Code
	}{
		{endShutdown(), agentpb.Goodbye_REASON_SHUTDOWN, false, codes.Unavailable},
		{endSuperseded(), agentpb.Goodbye_REASON_SUPERSEDED, false, codes.Aborted},
		{endRevoked("x"), agentpb.Goodbye_REASON_REVOKED, true, codes.Unauthenticated},
		{endRetired("x"), agentpb.Goodbye_REASON_RETIRED, true, codes.PermissionDenied},
		{endQuarantined("x"), agentpb.Goodbye_REASON_QUARANTINED, false, codes.PermissionDenied},
		{endOverloaded(time.Second), agentpb.Goodbye_REASON_OVERLOADED, false, codes.Unavailable},
		{endProtocol(7, 9), agentpb.Goodbye_REASON_PROTOCOL, false, codes.FailedPrecondition},
	} {
		if c.end.Reason != c.reason || c.end.Permanent != c.permanent || c.end.Code != c.code || c.end.Silent || c.end.Message == "" {
			t.Errorf("%s: %+v", c.reason, c.end)
		}
	}
}

// TestOutboxOrder: Welcome first, then states before work, Goodbye last; a state replaces its unsent predecessor.
func TestOutboxOrder(t *testing.T) {
	t.Parallel()
	state := func(v int64) *agentpb.State { return &agentpb.State{Version: &agentpb.StateVersion{Version: v}} }
	o := outbox{box: []*agentpb.State{state(1), state(2)}, ending: &End{Message: "bye"}, queue: []*agentpb.ConnectResponse{
		{Message: &agentpb.ConnectResponse_Welcome{}}, {Message: &agentpb.ConnectResponse_Assignment{}}}}
	var got []string
	for {
		m, fin := o.next()
		if m == nil {
			if !fin {
				t.Fatal("it is not over")
			}
			break
		}
		got = append(got, answerName(m))
	}
	if want := []string{"welcome", "state", "state", "assignment", "goodbye"}; !slices.Equal(got, want) {
		t.Fatalf("sent %v, want %v", got, want)
	}
}

func FuzzClean(f *testing.F) {
	f.Add("a\x00b\x1b[0m\u202e\n\xff", 5)
	f.Fuzz(func(t *testing.T, s string, most int) {
		most = max(most%200, 0)
		got := clean(s, most)
		if len(got) > most {
			t.Fatalf("%q has %d bytes, at most %d are wanted", got, len(got), most)
		}
		for _, r := range got {
			if r < 0x20 || r == 0x7f || r == 0xFFFD {
				t.Fatalf("%q holds %U", got, r)
			}
		}
	})
}
