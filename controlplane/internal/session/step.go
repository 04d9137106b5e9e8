package session

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/certmesh/certmesh/controlplane/internal/dispatch"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// The protocol versions this server speaks.
const (
	protocolMin = 1
	protocolMax = 1
)

// Kinds of state.
const (
	kindTrustBundle = "trust_bundle"
	kindSettings    = "settings"
	kindTarget      = "target"
)

// Phase of a conversation.
type Phase uint8

// The phases.
const (
	AwaitHello Phase = iota
	Opening          // Hello was said; the session is being recorded
	Open
	Closing // the end has been decided; whatever still comes is ignored
)

// State is the protocol's side of one stream. Step takes a state over: the former value must not be used again.
type State struct {
	agentID string
	phase   Phase
	// held is what the agent has in force, sent what it has not answered yet, refused what it would not take.
	held, sent, refused []version
	// trustRevision is of the newest trust bundle offered, trust one that came before the agent could be sent any.
	trustRevision int64
	trust         *Resource
	// renewing: an identity is being made. No further one is made before nextIdentity.
	renewing     bool
	nextIdentity time.Time
	identityGap  time.Duration
	// observed is when the agent's observations would be used up if each took observeEvery; see observe.
	observed time.Time
}

// NewState is the state of a stream whose client certificate names agentID; identities are made at most once per gap.
func NewState(agentID string, gap time.Duration) State {
	return State{agentID: agentID, identityGap: gap}
}

// Phase says where the conversation stands.
func (s *State) Phase() Phase { return s.phase }

type stateKey struct{ kind, name string }

type version struct {
	key     stateKey
	number  int64
	hash    [sha256.Size]byte // zero: not known
	removed bool
	// revision is the Resource's, where it was this server that sent it.
	revision int64
	// former: a refusal of an earlier start of the agent, whose configuration may have been another.
	former bool
}

func lookup(list []version, k stateKey) (version, bool) {
	if i := slices.IndexFunc(list, func(v version) bool { return v.key == k }); i >= 0 {
		return list[i], true
	}
	return version{}, false
}

func without(list []version, k stateKey) []version {
	list = slices.DeleteFunc(list, func(v version) bool { return v.key == k })
	if len(list) == 0 {
		return nil
	}
	return list
}

func with(list []version, v version) []version { return append(without(list, v.key), v) }

// Resource is one state as the agent is to have it.
type Resource struct {
	Kind, Name string
	// Revision rises with the content; the number sent is higher where the agent holds a higher one.
	Revision int64
	Hash     [sha256.Size]byte
	// Body is a State without its version. It is shared and must not be changed.
	Body *agentpb.State
}

// Hello is what an agent said of itself, bounded and stripped.
type Hello struct {
	Facts        domain.Facts
	Labels       map[string]string
	Capabilities []string
	BootID       string
	LeafCount    int32
	LeavesHash   []byte
	Credits      [dispatch.Classes]int
	Held         []dispatch.Held
}

// Event is what happened to a stream.
type Event interface{ event() }

// The events.
type (
	// Received is a message of the agent.
	Received struct {
		Message *agentpb.ConnectRequest
		At      time.Time
	}
	// Admitted: the session is recorded and everything about the agent loaded.
	Admitted struct {
		Work dispatch.Opened
		// Desired is what the agent is to have, Refused what the store knows it would not take.
		Desired []Resource
		Refused []domain.StateRejection
		// Restarted: the agent's process is another than that of its previous session.
		Restarted    bool
		ReportLeaves bool
	}
	// Desired is the agent's desired state, read again.
	Desired struct{ Resources []Resource }
	// TrustChanged is another trust bundle.
	TrustChanged struct{ Resource *Resource }
	// IdentityMade answers RenewIdentity.
	IdentityMade struct {
		Chain [][]byte
		Err   error
	}
	// Ending ends the stream from this side.
	Ending struct{ End End }
	// HungUp: the agent closed its sending side, or the connection broke (Err).
	HungUp struct{ Err error }
)

func (Received) event()     {}
func (Admitted) event()     {}
func (Desired) event()      {}
func (TrustChanged) event() {}
func (IdentityMade) event() {}
func (Ending) event()       {}
func (HungUp) event()       {}

// Effect is what is to be done for a stream.
type Effect interface{ effect() }

// The effects.
type (
	// Admit has the session recorded and everything loaded; answered by Admitted or Ending.
	Admit struct{ Hello Hello }
	// Greet prepares the Welcome, which the verdicts of the Work that follows complete.
	Greet struct {
		Resend       []*agentpb.StateVersion
		ReportLeaves bool
	}
	// Work is for dispatch.Step.
	Work struct{ Event dispatch.Event }
	// SendState sends a state; a nil Body says that the resource is gone.
	SendState struct {
		Version *agentpb.StateVersion
		Body    *agentpb.State
	}
	// RecordRefusal keeps a refusal, ClearRefusal forgets it.
	RecordRefusal struct{ Refusal domain.StateRejection }
	ClearRefusal  struct{ Kind, Name string }
	// RenewIdentity makes an identity; SendIdentity answers the agent.
	RenewIdentity struct{ CSR []byte }
	SendIdentity  struct {
		Chain   [][]byte
		Failure dispatch.Failure
	}
	// Observe records what the agent found at a target.
	Observe struct{ Observation domain.Observation }
	// Acknowledge records that the agent has a trust bundle of this version in force.
	Acknowledge struct{ Version int64 }
	// Finish ends the stream: the rest is sent unless End.Now, then Goodbye if there is one, then the status.
	Finish struct{ End End }
)

func (Admit) effect()         {}
func (Greet) effect()         {}
func (Work) effect()          {}
func (SendState) effect()     {}
func (RecordRefusal) effect() {}
func (ClearRefusal) effect()  {}
func (RenewIdentity) effect() {}
func (SendIdentity) effect()  {}
func (Observe) effect()       {}
func (Acknowledge) effect()   {}
func (Finish) effect()        {}

// End is how a stream ends.
type End struct {
	// Reason of the Goodbye; GOODBYE_REASON_UNSPECIFIED with an empty Message says none.
	Reason    agentpb.Goodbye_Reason
	Permanent bool
	// After is when the agent may come back at the earliest.
	After time.Duration
	// Code and Message are the status; codes.OK ends without one.
	Code    codes.Code
	Message string
	// Now leaves out what has not been sent yet.
	Now bool
	// Silent: no Goodbye, the status says all.
	Silent bool
}

// The endings. A Goodbye speaks to agents that know it, the status to everything else.
func endShutdown() End {
	return End{Reason: agentpb.Goodbye_REASON_SHUTDOWN, Code: codes.Unavailable, Message: "this node is stopping"}
}

func endDraining() End {
	return End{Reason: agentpb.Goodbye_REASON_SHUTDOWN, Code: codes.Unavailable, Message: "this node takes no agents now; connect to another", Now: true}
}

func endUnread() End {
	return End{Reason: agentpb.Goodbye_REASON_SHUTDOWN, Code: codes.Unavailable, Message: "this node does not reach its database; connect to another", Now: true}
}

func endSuperseded() End {
	return End{Reason: agentpb.Goodbye_REASON_SUPERSEDED, Code: codes.Aborted, Message: "a newer stream of this agent took over", Now: true}
}

func endRevoked(message string) End {
	return End{Reason: agentpb.Goodbye_REASON_REVOKED, Permanent: true, Code: codes.Unauthenticated, Message: message, Now: true}
}

func endRetired(message string) End {
	return End{Reason: agentpb.Goodbye_REASON_RETIRED, Permanent: true, Code: codes.PermissionDenied, Message: message, Now: true}
}

// endQuarantined is not permanent: once an operator has released the agent it comes back by itself.
func endQuarantined(message string) End {
	return End{Reason: agentpb.Goodbye_REASON_QUARANTINED, After: 5 * time.Minute, Code: codes.PermissionDenied, Message: message, Now: true}
}

func endOverloaded(after time.Duration) End {
	return End{Reason: agentpb.Goodbye_REASON_OVERLOADED, After: after, Code: codes.Unavailable,
		Message: "this node admits agents at a bounded rate; come back a little later", Now: true}
}

func endProtocol(low, high int32) End {
	return End{Reason: agentpb.Goodbye_REASON_PROTOCOL, After: 10 * time.Minute, Code: codes.FailedPrecondition, Now: true,
		Message: fmt.Sprintf("the agent speaks protocol versions %d to %d, this server %d to %d; install versions that fit", low, high, protocolMin, protocolMax)}
}

// endError ends a stream by an error's class and sentence, without a Goodbye.
func endError(err error) End {
	f := dispatch.FailureOf(err)
	return End{Code: codeOf(f.Class), Message: f.Message, Silent: true, Now: true}
}

func violation(format string, args ...any) End {
	return End{Code: codes.InvalidArgument, Message: fmt.Sprintf(format, args...), Silent: true, Now: true}
}

// Bounds of a Hello. The message itself has at most 64 KiB.
const (
	maxOpen         = 512 // what an agent's journal holds at most
	maxStates       = 512
	maxCapabilities = 64
	maxLabels       = 64
	maxID           = 128
)

// Step advances s by e.
func Step(s State, e Event) (State, []Effect) {
	m := &machine{State: s}
	if m.phase == Closing {
		return m.State, nil
	}
	switch e := e.(type) {
	case Received:
		m.received(e.Message, e.At)
	case Admitted:
		m.admitted(e)
	case Desired:
		if m.phase == Open {
			m.push(e.Resources)
		}
	case TrustChanged:
		if m.phase == Open {
			m.offerTrust(*e.Resource)
		} else {
			m.trust = e.Resource
		}
	case IdentityMade:
		m.renewing = false
		if e.Err != nil {
			m.do(SendIdentity{Failure: dispatch.FailureOf(e.Err)})
			break
		}
		m.do(SendIdentity{Chain: e.Chain})
	case Ending:
		m.finish(e.End)
	case HungUp:
		m.hungUp(e.Err)
	}
	return m.State, m.out
}

type machine struct {
	State
	out []Effect
}

func (m *machine) do(e Effect) { m.out = append(m.out, e) }

func (m *machine) finish(e End) {
	m.phase = Closing
	m.held, m.sent, m.refused = nil, nil, nil
	m.do(Finish{e})
}

func (m *machine) hungUp(err error) {
	if err == nil {
		m.finish(End{Code: codes.OK, Silent: true})
		return
	}
	m.finish(endError(err))
}

func (m *machine) received(r *agentpb.ConnectRequest, at time.Time) {
	if m.phase != Open {
		h := r.GetHello()
		if h == nil || m.phase != AwaitHello {
			m.finish(violation("the first message of a stream is Hello, and nothing follows it before Welcome"))
			return
		}
		m.hello(h)
		return
	}
	switch v := r.GetMessage().(type) {
	case *agentpb.ConnectRequest_Hello:
		m.finish(violation("a stream has one Hello; connect again to say another"))
	case *agentpb.ConnectRequest_Credit:
		c, ok := classFrom(v.Credit.GetClass())
		if v.Credit.GetAmount() < 0 {
			m.finish(violation("a credit of %d was granted; credits are positive", v.Credit.GetAmount()))
		} else if ok {
			m.do(Work{dispatch.Granted{Class: c, Amount: int(v.Credit.GetAmount()), At: at}})
		}
	case *agentpb.ConnectRequest_Accepted:
		m.report(dispatch.Report{Kind: dispatch.ReportAccepted, Ref: domain.JobRef{JobID: v.Accepted.GetId(), Attempt: v.Accepted.GetAttempt()}}, at)
	case *agentpb.ConnectRequest_Csr:
		m.report(dispatch.Report{Kind: dispatch.ReportCSR, Ref: domain.JobRef{JobID: v.Csr.GetId(), Attempt: v.Csr.GetAttempt()}, CSR: v.Csr.GetCsr()}, at)
	case *agentpb.ConnectRequest_Result:
		m.result(v.Result, at)
	case *agentpb.ConnectRequest_Applied:
		m.applied(v.Applied.GetVersion())
	case *agentpb.ConnectRequest_Rejected:
		m.rejected(v.Rejected, at)
	case *agentpb.ConnectRequest_IdentityCsr:
		m.identity(v.IdentityCsr, at)
	case *agentpb.ConnectRequest_Observed:
		m.observe(v.Observed, at)
	case *agentpb.ConnectRequest_Goodbye:
		m.finish(End{Code: codes.OK, Silent: true})
	case *agentpb.ConnectRequest_Beat, *agentpb.ConnectRequest_Progress:
		// Signs of life; nothing follows.
	default:
		m.finish(violation("the message is of a kind that protocol version %d does not have", protocolMax))
	}
}

func (m *machine) hello(h *agentpb.Hello) {
	low, high := h.GetProtocolMin(), h.GetProtocol()
	if low == 0 {
		low = high
	}
	switch {
	case low > protocolMax || high < protocolMin:
		m.finish(endProtocol(low, high))
		return
	case h.GetAgentId() != "" && h.GetAgentId() != m.agentID:
		m.finish(End{Code: codes.PermissionDenied, Silent: true, Now: true,
			Message: fmt.Sprintf("Hello names agent %q, the client certificate %s", clean(h.GetAgentId(), 64), m.agentID)})
		return
	case len(h.GetOpen()) > maxOpen:
		m.finish(violation("Hello lists %d open assignments; at most %d can be open", len(h.GetOpen()), maxOpen))
		return
	case len(h.GetStates()) > maxStates:
		m.finish(violation("Hello lists %d states; at most %d are kept", len(h.GetStates()), maxStates))
		return
	case h.GetLeafCount() < 0 || len(h.GetLeavesHash()) > sha256.Size:
		m.finish(violation("Hello's count or hash of leaves cannot be one"))
		return
	}
	hello := Hello{Facts: factsFrom(h.GetFacts()), Labels: labelsFrom(h.GetLabels()), BootID: clean(h.GetBootId(), 64),
		LeafCount: h.GetLeafCount(), LeavesHash: h.GetLeavesHash()}
	for _, c := range h.GetCapabilities() {
		if c = clean(c, 64); c != "" && len(hello.Capabilities) < maxCapabilities {
			hello.Capabilities = append(hello.Capabilities, c)
		}
	}
	for _, c := range h.GetCredits() {
		class, ok := classFrom(c.GetClass())
		if c.GetAmount() < 0 {
			m.finish(violation("a credit of %d was granted; credits are positive", c.GetAmount()))
			return
		}
		if ok {
			hello.Credits[class] = min(int(c.GetAmount()), dispatch.MaxCredit)
		}
	}
	held := map[string]int{}
	for _, o := range h.GetOpen() {
		if o.GetId() == "" || len(o.GetId()) > maxID {
			m.finish(violation("Hello lists an assignment whose id has %d bytes; 1 to %d are expected", len(o.GetId()), maxID))
			return
		}
		d := dispatch.Held{Ref: domain.JobRef{JobID: o.GetId(), Attempt: o.GetAttempt()},
			Reported: o.GetPhase() == agentpb.Phase_PHASE_CSR || o.GetPhase() == agentpb.Phase_PHASE_RESULT}
		if i, twice := held[o.GetId()]; twice {
			if hello.Held[i].Ref.Attempt < d.Ref.Attempt {
				hello.Held[i] = d
			}
			continue
		}
		held[o.GetId()] = len(hello.Held)
		hello.Held = append(hello.Held, d)
	}
	for _, v := range h.GetStates() {
		k, ok := keyFrom(v)
		if !ok {
			continue // of a newer version; it is none of what this server sends
		}
		if _, twice := lookup(m.held, k); twice {
			continue
		}
		m.held = append(m.held, version{key: k, number: v.GetVersion(), hash: hashFrom(v.GetHash())})
	}
	m.phase = Opening
	m.do(Admit{hello})
}

func (m *machine) admitted(e Admitted) {
	if m.phase != Opening {
		return
	}
	m.phase = Open
	for _, r := range e.Refused {
		if k, ok := keyFrom(&agentpb.StateVersion{Kind: r.Kind, Name: r.Name}); ok {
			m.refused = with(m.refused, version{key: k, number: r.Version, former: e.Restarted})
		}
	}
	// The states go out after the Welcome that announces them.
	before := m.out
	m.out = nil
	m.push(e.Desired)
	states := m.out
	m.out = before
	g := Greet{ReportLeaves: e.ReportLeaves}
	for _, s := range states {
		if s, ok := s.(SendState); ok {
			v := s.Version
			g.Resend = append(g.Resend, &agentpb.StateVersion{Kind: v.GetKind(), Name: v.GetName(), Version: v.GetVersion()})
		}
	}
	m.do(g)
	m.do(Work{e.Work})
	m.out = append(m.out, states...)
}

// push sends what the agent does not hold, has not been sent and has not refused since it was started.
func (m *machine) push(all []Resource) {
	desired := make(map[stateKey]struct{}, len(all))
	for _, r := range all {
		desired[stateKey{r.Kind, r.Name}] = struct{}{}
		if r.Kind == kindTrustBundle {
			m.offerTrust(r)
		} else {
			m.offer(r)
		}
	}
	for _, v := range slices.Concat(m.held, m.sent) {
		if _, ok := desired[v.key]; ok || v.key.kind != kindTarget {
			continue
		}
		if have, _ := m.latest(v.key); !have.removed {
			no, _ := lookup(m.refused, v.key)
			m.send(version{key: v.key, number: max(have.number, no.number) + 1, removed: true}, nil)
		}
	}
}

// offer sends a resource that the agent does not hold, has not been sent and has not refused since it was started.
func (m *machine) offer(r Resource) {
	k := stateKey{r.Kind, r.Name}
	have, known := m.latest(k)
	if known && !have.removed && (have.hash == r.Hash || have.hash == [sha256.Size]byte{} && r.Kind == kindTrustBundle && have.number >= r.Revision) {
		if _, asked := lookup(m.sent, k); !asked {
			m.acknowledge(k, r.Revision)
		}
		return
	}
	number := max(r.Revision, 1)
	if known {
		number = max(number, have.number+1)
	}
	if no, ok := lookup(m.refused, k); ok {
		switch {
		case no.former:
			// It may take it now. An answer to a lower number would not replace the stored refusal.
			number = max(number, no.number)
		case no.hash == r.Hash:
			return
		case r.Kind == kindSettings:
			// Their number does not come from a revision: a new one shows that they are others.
			number = max(number, no.number+1)
		case no.number >= number:
			return
		}
	}
	m.send(version{key: k, number: number, hash: r.Hash, revision: r.Revision}, r.Body)
}

// latest is what the agent will have once it has answered.
func (m *machine) latest(k stateKey) (version, bool) {
	if v, ok := lookup(m.sent, k); ok {
		return v, true
	}
	return lookup(m.held, k)
}

func (m *machine) send(v version, body *agentpb.State) {
	m.sent = with(m.sent, v)
	out := &agentpb.StateVersion{Kind: v.key.kind, Name: v.key.name, Version: v.number}
	if !v.removed {
		out.Hash = slices.Clone(v.hash[:])
	}
	m.do(SendState{Version: out, Body: body})
}

// answered returns the version that an answer is about, if it is the one that was sent last.
func (m *machine) answered(v *agentpb.StateVersion) (version, bool) {
	k, ok := keyFrom(v)
	if !ok {
		return version{}, false
	}
	sent, ok := lookup(m.sent, k)
	if !ok || sent.number != v.GetVersion() {
		return version{}, false
	}
	m.sent = without(m.sent, k)
	return sent, true
}

func (m *machine) applied(v *agentpb.StateVersion) {
	sent, ok := m.answered(v)
	if !ok {
		return
	}
	// What was removed is kept as such: should it come back on this stream, its number goes on from there.
	m.held = with(m.held, sent)
	m.acknowledge(sent.key, sent.revision)
	if _, was := lookup(m.refused, sent.key); was {
		m.refused = without(m.refused, sent.key)
		m.do(ClearRefusal{Kind: sent.key.kind, Name: sent.key.name})
	}
}

func (m *machine) rejected(r *agentpb.Rejected, at time.Time) {
	failure := failureFrom(r.GetFailure())
	if id := r.GetAssignmentId(); id != "" {
		m.report(dispatch.Report{Kind: dispatch.ReportRefused, Ref: domain.JobRef{JobID: id, Attempt: r.GetAttempt()}, Failure: failure}, at)
		return
	}
	if r.GetVersion() == nil {
		m.finish(violation("Rejected names neither a state nor an assignment"))
		return
	}
	if sent, ok := m.answered(r.GetVersion()); ok {
		m.refused = with(m.refused, sent)
		m.do(RecordRefusal{domain.StateRejection{AgentID: m.agentID, Kind: sent.key.kind, Name: sent.key.name, Version: sent.number,
			Reason: failure.Message, At: domain.Micro(at)}})
	}
}

func (m *machine) report(r dispatch.Report, at time.Time) {
	if r.Ref.JobID == "" || len(r.Ref.JobID) > maxID || strings.ContainsFunc(r.Ref.JobID, func(c rune) bool { return c <= ' ' || c >= 0x7f }) {
		m.finish(violation("a report names no assignment"))
		return
	}
	m.do(Work{dispatch.Reported{Report: r, At: at}})
}

func (m *machine) result(r *agentpb.Result, at time.Time) {
	out := dispatch.Report{Ref: domain.JobRef{JobID: r.GetId(), Attempt: r.GetAttempt()}}
	switch v := r.GetOutcome().(type) {
	case *agentpb.Result_Deployed:
		out.Kind, out.Deployed = dispatch.ReportDeployed, deployedFrom(v.Deployed)
	case *agentpb.Result_Failure:
		out.Kind, out.Failure = dispatch.ReportFailed, failureFrom(v.Failure)
	default:
		m.finish(violation("a Result says neither Deployed nor Failure"))
		return
	}
	m.report(out, at)
}

const (
	// An agent may observe so many targets in a row, then one each observeEvery: what is beyond that is left out, and said again
	// when the agent looks the next time.
	observeBurst = 256
	observeEvery = time.Second
)

// observe takes what the agent found at a target by itself.
func (m *machine) observe(r *agentpb.Observed, at time.Time) {
	o, ok := observationFrom(r)
	if !ok {
		m.finish(violation("an observation names no placement, or holds what is no fingerprint"))
		return
	}
	if m.observed.Before(at) {
		m.observed = at
	}
	if m.observed.Sub(at) >= observeBurst*observeEvery {
		return
	}
	m.observed = m.observed.Add(observeEvery)
	o.AgentID, o.At = m.agentID, domain.Micro(at)
	m.do(Observe{o})
}

func (m *machine) identity(r *agentpb.IdentityCsr, at time.Time) {
	switch {
	case m.renewing:
		// The one that is being made answers this as well.
	case at.Before(m.nextIdentity):
		m.do(SendIdentity{Failure: dispatch.Failure{Class: fault.RateLimited,
			Message: "an identity was made a moment ago; ask again in " + m.identityGap.String()}})
	default:
		m.renewing, m.nextIdentity = true, at.Add(m.identityGap)
		m.do(RenewIdentity{CSR: r.GetCsr()})
	}
}

func labelsFrom(in map[string]string) map[string]string {
	out := map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(in)) {
		if len(out) == maxLabels {
			break
		}
		if name := clean(k, 64); name != "" {
			out[name] = clean(in[k], 256)
		}
	}
	return out
}
