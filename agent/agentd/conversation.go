package agentd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/agent/internal/identity"
	"github.com/certmesh/certmesh/agent/internal/keystore"
	"github.com/certmesh/certmesh/agent/internal/state"
	"github.com/certmesh/certmesh/agent/internal/stream"
	"github.com/certmesh/certmesh/agent/internal/work"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// maxStates is how many states a Hello lists; of more none is.
const maxStates = 512

// conversation is the agent behind one stream.
type conversation struct {
	a       *agent
	id      *identity.Identity
	client  agentpb.AgentServiceClient
	session *stream.Session
	out     *stream.Outbox

	// ctx and wg hold what runs beside the stream.
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	// asked numbers the requests for a renewed identity, so that an older timer does nothing.
	asked atomic.Int64
}

// Hello implements stream.Handler.
func (c *conversation) Hello() *agentpb.Hello {
	a := c.a
	h := &agentpb.Hello{
		Protocol: protocolMax, ProtocolMin: protocolMin,
		AgentId: c.id.AgentID, IdentitySerial: c.id.Serial, BootId: a.bootID,
		Facts: a.facts, Labels: a.cfg.Labels,
		States: a.states(),
	}
	for _, k := range a.cfg.Kinds {
		h.Capabilities = append(h.Capabilities, fmt.Sprintf("target/%s@%d", k.Name, k.Version))
	}
	h.Open, h.Credits = a.engine.Greet()
	leaves := a.leaves()
	h.LeafCount, h.LeavesHash = int32(min(len(leaves), math.MaxInt32)), hashLeaves(leaves)
	if len(h.States) > maxStates || proto.Size(h) > stream.MaxMessage {
		// The server then sends every state again; what is open must not be left out.
		h.States = nil
	}
	return h
}

// states lists what is in force. The trust bundle may have come with the identity instead of as a state.
func (a *agent) states() []*agentpb.StateVersion {
	held := a.keeper.Versions()
	v := a.ids.Bundle()
	i := slices.IndexFunc(held, func(s *agentpb.StateVersion) bool { return s.GetKind() == state.KindTrustBundle })
	switch {
	case i < 0:
		held = append(held, &agentpb.StateVersion{Kind: state.KindTrustBundle, Version: v})
	case held[i].GetVersion() < v:
		held[i] = &agentpb.StateVersion{Kind: state.KindTrustBundle, Version: v}
	}
	return held
}

// leaves returns the deployed leaves held; none if the key store cannot be read, which the log says.
func (a *agent) leaves() []keystore.Info {
	infos, err := a.keys.List()
	if err != nil {
		a.cfg.Log.Error("keys cannot be listed", "err", err)
		return nil
	}
	return slices.DeleteFunc(infos, func(i keystore.Info) bool { return len(i.Leaf) == 0 })
}

// hashLeaves is SHA-256 over the sorted hex fingerprints, each followed by a line feed.
func hashLeaves(leaves []keystore.Info) []byte {
	var prints []string
	for _, l := range leaves {
		h := sha256.Sum256(l.Leaf)
		prints = append(prints, hex.EncodeToString(h[:]))
	}
	slices.Sort(prints)
	var b bytes.Buffer
	for _, p := range prints {
		b.WriteString(p + "\n")
	}
	h := sha256.Sum256(b.Bytes())
	return h[:]
}

// Welcomed implements stream.Handler.
func (c *conversation) Welcomed(w *agentpb.Welcome, out *stream.Outbox) error {
	a := c.a
	if p := w.GetProtocol(); p < protocolMin || p > protocolMax {
		return fault.New(fault.Rejected, "the server chose protocol version %d; this agent speaks %d to %d", p, protocolMin, protocolMax)
	}
	c.out = out
	a.ids.Worked(c.id)
	a.cfg.Log.Info("connected", "agent_id", c.id.AgentID, "epoch", w.GetEpoch())
	a.engine.Attach(out, w.GetVerdicts())
	a.rememberNodes(w.GetNodes())
	c.renewAfter(a.untilRenewal(c.id))
	if w.GetReportLeaves() {
		c.wg.Go(c.report)
	}
	if a.cfg.Welcomed != nil {
		a.cfg.Welcomed(c.id.AgentID)
	}
	return nil
}

// Received implements stream.Handler.
func (c *conversation) Received(m *agentpb.ConnectResponse) {
	switch v := m.GetMessage().(type) {
	case *agentpb.ConnectResponse_Assignment:
		c.a.engine.Assign(v.Assignment)
	case *agentpb.ConnectResponse_Cancel:
		c.a.engine.Cancel(v.Cancel)
	case *agentpb.ConnectResponse_Settled:
		c.a.engine.Settle(v.Settled)
	case *agentpb.ConnectResponse_State:
		c.state(v.State)
	case *agentpb.ConnectResponse_IdentityIssued:
		c.issued(v.IdentityIssued)
	}
}

// Closed implements stream.Handler.
func (c *conversation) Closed() {
	c.a.engine.Detach()
	c.cancel()
}

func (c *conversation) state(st *agentpb.State) {
	v := st.GetVersion()
	answer := &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Applied{Applied: &agentpb.Applied{Version: v}}}
	if err := c.a.keeper.Apply(st); err != nil {
		c.a.cfg.Log.Warn("state rejected; the former version stays in force", "kind", clip(v.GetKind()), "name", clip(v.GetName()), "version", v.GetVersion(), "err", err)
		answer = &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_Rejected{Rejected: &agentpb.Rejected{Version: v, Failure: work.FailureOf(err)}}}
	} else if st.GetRemoved() != nil && v.GetKind() == state.KindTarget {
		c.a.engine.Forget(v.GetName())
	} else if st.GetTrustBundle() != nil {
		c.renewAfter(c.a.untilRenewal(c.id)) // another CA may sign now
	} else if s := st.GetSettings(); s.GetBeatIntervalMs() > 0 {
		c.session.SetBeat(time.Duration(min(s.GetBeatIntervalMs(), int64(time.Hour/time.Millisecond))) * time.Millisecond)
	}
	c.out.Latest("state "+v.GetKind()+"\x00"+v.GetName(), answer)
}

const (
	// renewPatience is how long an answer to IdentityCsr is awaited before it is asked for again.
	renewPatience = 10 * time.Minute
	// renewRetry is the usual delay after a refusal; renewShare of the identity's life caps it for short lives.
	renewRetry = 10 * time.Minute
	renewShare = 8
)

// untilRenewal is how long the identity need not be renewed.
func (a *agent) untilRenewal(id *identity.Identity) time.Duration {
	at := a.ids.RenewAt(id)
	if soonest := a.renewed.Add(retryAfter(id)); at.Before(soonest) {
		at = soonest
	}
	return at.Sub(a.cfg.Clock.Now())
}

func retryAfter(id *identity.Identity) time.Duration {
	return min(renewRetry, id.NotAfter.Sub(id.NotBefore)/renewShare)
}

func (c *conversation) renewAfter(d time.Duration) {
	n := c.asked.Add(1)
	c.session.After(max(d, 0), func() {
		if c.asked.Load() == n {
			c.renew()
		}
	})
}

func (c *conversation) renew() {
	csr, err := c.a.ids.NextCSR()
	if err != nil {
		c.a.cfg.Log.Error("identity cannot be renewed yet", "err", err)
		c.renewAfter(retryAfter(c.id))
		return
	}
	c.out.Latest("identity", &agentpb.ConnectRequest{Message: &agentpb.ConnectRequest_IdentityCsr{IdentityCsr: &agentpb.IdentityCsr{Csr: csr}}})
	c.renewAfter(renewPatience)
}

func (c *conversation) issued(m *agentpb.IdentityIssued) {
	if f := m.GetFailure(); f != nil {
		c.a.cfg.Log.Warn("identity not renewed; it will be asked for again", "class", clip(f.GetClass()), "reason", clip(f.GetMessage()))
		c.renewAfter(spread(retryAfter(c.id)))
		return
	}
	if err := c.a.ids.Issued(m.GetChain()); err != nil {
		c.a.cfg.Log.Error("renewed identity not taken", "err", err)
		c.renewAfter(spread(retryAfter(c.id)))
		return
	}
	c.asked.Add(1)
	c.a.renewed = c.a.cfg.Clock.Now()
	c.a.cfg.Log.Info("identity renewed", "not_after", c.a.ids.Current().NotAfter.UTC().Format(time.RFC3339))
	c.session.Leave()
}

// spread keeps agents that were refused together from asking together.
func spread(d time.Duration) time.Duration {
	return d + time.Duration(rand.Float64()*float64(d)) //nolint:gosec // spreads agents, hides nothing
}

const (
	// reportChunk leaves room for a message's frame below the limit; leaves have one to three KiB.
	reportChunk   = 48 << 10
	reportTimeout = 2 * time.Minute
)

// report sends the list of held leaves beside the stream. A failure needs no retry: the next Welcome asks again.
func (c *conversation) report() {
	ctx, cancel := context.WithTimeout(c.ctx, reportTimeout)
	defer cancel()
	if err := c.reportLeaves(ctx, c.a.leaves()); err != nil && c.ctx.Err() == nil {
		c.a.cfg.Log.Warn("held leaves not reported", "err", clip(err.Error()))
	}
}

func (c *conversation) reportLeaves(ctx context.Context, leaves []keystore.Info) error {
	st, err := c.client.Report(ctx)
	if err != nil {
		return err
	}
	chunk, size := &agentpb.HeldLeaves{}, 0
	send := func() error {
		err := st.Send(&agentpb.ReportRequest{Body: &agentpb.ReportRequest_Leaves{Leaves: chunk}})
		chunk, size = &agentpb.HeldLeaves{}, 0
		return err
	}
	for _, l := range leaves {
		if size+len(l.Leaf) > reportChunk && len(chunk.Leaves) > 0 {
			if err := send(); err != nil {
				return err
			}
		}
		chunk.Leaves = append(chunk.Leaves, &agentpb.HeldLeaf{CertificateId: l.CertificateID, Generation: l.Generation, Certificate: l.Leaf})
		size += len(l.Leaf) + 128
	}
	chunk.Last = true
	if err := send(); err != nil {
		return err
	}
	_, err = st.CloseAndRecv()
	return err
}
