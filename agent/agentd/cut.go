package agentd

import (
	"context"
	"encoding/json"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/agent/internal/durable"
	"github.com/certmesh/certmesh/agent/internal/journal"
	"github.com/certmesh/certmesh/agent/internal/keystore"
	"github.com/certmesh/certmesh/connectors/target"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

// life is the seam at which a test ends an agent as a kill would: every effect passes it first. Without Config.Cut the
// wrappers below are not even made.
type life struct {
	cut func(point string) error

	mu    sync.Mutex
	err   error
	onEnd func(error)
}

// pass says whether the agent still lives at point. The lock makes "nothing after the cut" exact.
func (l *life) pass(point string) error {
	if l.cut == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	if l.err = l.cut(point); l.err != nil && l.onEnd != nil {
		l.onEnd(l.err)
	}
	return l.err
}

// onDeath sets what is done at the cut.
func (l *life) onDeath(f func(error)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.onEnd = f
}

// dead returns why the agent was cut; nil while it lives.
func (l *life) dead() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

func (l *life) files(s durable.Store, dir string) durable.Store {
	if l.cut == nil {
		return s
	}
	return cutFiles{s, l, dir + "/"}
}

type cutFiles struct {
	durable.Store
	l   *life
	dir string
}

func (c cutFiles) Write(name string, data []byte) error {
	if err := c.l.pass("write " + c.dir + name); err != nil {
		return err
	}
	return c.Store.Write(name, data)
}

func (c cutFiles) Remove(name string) error {
	if err := c.l.pass("remove " + c.dir + name); err != nil {
		return err
	}
	return c.Store.Remove(name)
}

func (l *life) journal(j journal.Journal) journal.Journal {
	if l.cut == nil {
		return j
	}
	return cutJournal{j, l}
}

type cutJournal struct {
	journal.Journal
	l *life
}

// Put passes once before the entry is handed on, and once when it is stored and nobody has been told.
func (c cutJournal) Put(e *journal.Entry, stored func(error)) {
	if err := c.l.pass("journal put"); err != nil {
		go stored(err)
		return
	}
	c.Journal.Put(e, func(err error) {
		if dead := c.l.pass("journal stored"); dead != nil {
			err = dead
		}
		stored(err)
	})
}

func (c cutJournal) Drop(id string) {
	if c.l.pass("journal drop") == nil {
		c.Journal.Drop(id)
	}
}

func (c cutJournal) Probe() error {
	if err := c.l.pass("journal probe"); err != nil {
		return err
	}
	return c.Journal.Probe()
}

func (l *life) keys(s keystore.Store) keystore.Store {
	if l.cut == nil {
		return s
	}
	return cutKeys{s, l}
}

type cutKeys struct {
	keystore.Store
	l *life
}

func (c cutKeys) Ensure(id string, generation int64, algorithm string) (keystore.Key, error) {
	if err := c.l.pass("key ensure"); err != nil {
		return keystore.Key{}, err
	}
	return c.Store.Ensure(id, generation, algorithm)
}

func (c cutKeys) Relabel(id string, spki keystore.SPKI, generation int64) error {
	if err := c.l.pass("key relabel"); err != nil {
		return err
	}
	return c.Store.Relabel(id, spki, generation)
}

func (c cutKeys) Retire(id string, below int64) (int, error) {
	if err := c.l.pass("key retire"); err != nil {
		return 0, err
	}
	return c.Store.Retire(id, below)
}

func (c cutKeys) PutLeaf(id string, spki keystore.SPKI, leaf []byte) error {
	if err := c.l.pass("key leaf"); err != nil {
		return err
	}
	return c.Store.PutLeaf(id, spki, leaf)
}

func (l *life) client(c agentpb.AgentServiceClient) agentpb.AgentServiceClient {
	if l.cut == nil {
		return c
	}
	return cutClient{c, l}
}

type cutClient struct {
	agentpb.AgentServiceClient
	l *life
}

func (c cutClient) Enroll(ctx context.Context, in *agentpb.EnrollRequest, opts ...grpc.CallOption) (*agentpb.EnrollResponse, error) {
	return call(ctx, c.l, "enroll", c.AgentServiceClient.Enroll, in, opts)
}

func (c cutClient) Reidentify(ctx context.Context, in *agentpb.ReidentifyRequest, opts ...grpc.CallOption) (*agentpb.ReidentifyResponse, error) {
	return call(ctx, c.l, "reidentify", c.AgentServiceClient.Reidentify, in, opts)
}

func call[In, Out any](ctx context.Context, l *life, what string, f func(context.Context, *In, ...grpc.CallOption) (*Out, error), in *In, opts []grpc.CallOption) (*Out, error) {
	if err := l.pass("send " + what); err != nil {
		return nil, err
	}
	out, err := f(ctx, in, opts...)
	if err != nil {
		return nil, err
	}
	return out, l.pass("receive " + what)
}

func (c cutClient) Connect(ctx context.Context, opts ...grpc.CallOption) (agentpb.AgentService_ConnectClient, error) {
	st, err := c.AgentServiceClient.Connect(ctx, opts...)
	if err != nil {
		return nil, err
	}
	return cutStream{st, c.l}, nil
}

func (c cutClient) Report(ctx context.Context, opts ...grpc.CallOption) (agentpb.AgentService_ReportClient, error) {
	st, err := c.AgentServiceClient.Report(ctx, opts...)
	if err != nil {
		return nil, err
	}
	return cutReport{st, c.l}, nil
}

type cutReport struct {
	agentpb.AgentService_ReportClient
	l *life
}

func (c cutReport) Send(m *agentpb.ReportRequest) error {
	if err := c.l.pass("send report"); err != nil {
		return err
	}
	return c.AgentService_ReportClient.Send(m)
}

type cutStream struct {
	agentpb.AgentService_ConnectClient
	l *life
}

func (c cutStream) Send(m *agentpb.ConnectRequest) error {
	if err := c.l.pass("send " + kindOf(m)); err != nil {
		return err
	}
	return c.AgentService_ConnectClient.Send(m)
}

func (c cutStream) Recv() (*agentpb.ConnectResponse, error) {
	m, err := c.AgentService_ConnectClient.Recv()
	if err != nil {
		return nil, err
	}
	if err := c.l.pass("receive " + kindOf(m)); err != nil {
		return nil, err
	}
	return m, nil
}

// kindOf names the message in m's oneof.
func kindOf(m proto.Message) string {
	r := m.ProtoReflect()
	if f := r.WhichOneof(r.Descriptor().Oneofs().ByName("message")); f != nil {
		return string(f.Name())
	}
	return "unknown"
}

func (l *life) kinds(ks []target.Kind) []target.Kind {
	if l.cut == nil {
		return ks
	}
	out := make([]target.Kind, len(ks))
	for i, k := range ks {
		open := k.Open
		k.Open = func(ctx context.Context, env target.Env, settings json.RawMessage) (target.Target, error) {
			t, err := open(ctx, env, settings)
			if err != nil {
				return nil, err
			}
			return l.target(t), nil
		}
		out[i] = k
	}
	return out
}

// target wraps t and keeps its abilities: the engine asks for them by type.
func (l *life) target(t target.Target) target.Target {
	base := cutTarget{t, l}
	a, isA := t.(target.Activator)
	v, isV := t.(target.Verifier)
	r, isR := t.(target.Repairer)
	ca, cr := cutActivator{a, l}, cutRepairer{r, l}
	switch {
	case isA && isV && isR:
		return struct {
			cutTarget
			cutActivator
			target.Verifier
			cutRepairer
		}{base, ca, v, cr}
	case isA && isV:
		return struct {
			cutTarget
			cutActivator
			target.Verifier
		}{base, ca, v}
	case isA && isR:
		return struct {
			cutTarget
			cutActivator
			cutRepairer
		}{base, ca, cr}
	case isV && isR:
		return struct {
			cutTarget
			target.Verifier
			cutRepairer
		}{base, v, cr}
	case isA:
		return struct {
			cutTarget
			cutActivator
		}{base, ca}
	case isV:
		return struct {
			cutTarget
			target.Verifier
		}{base, v}
	case isR:
		return struct {
			cutTarget
			cutRepairer
		}{base, cr}
	default:
		return base
	}
}

type cutTarget struct {
	t target.Target
	l *life
}

func (c cutTarget) Current(ctx context.Context) (target.Served, error) { return c.t.Current(ctx) }

func (c cutTarget) Stage(ctx context.Context, m target.Material) (target.Staged, error) {
	if err := c.l.pass("target stage"); err != nil {
		return nil, err
	}
	s, err := c.t.Stage(ctx, m)
	if err != nil {
		return nil, err
	}
	return cutStaged{s, c.l}, nil
}

func (c cutTarget) Undo(ctx context.Context, r target.Receipt) error {
	if err := c.l.pass("target undo"); err != nil {
		return err
	}
	return c.t.Undo(ctx, r)
}

type cutStaged struct {
	target.Staged
	l *life
}

func (c cutStaged) Commit(ctx context.Context) error {
	if err := c.l.pass("target commit"); err != nil {
		return err
	}
	return c.Staged.Commit(ctx)
}

type cutActivator struct {
	target.Activator
	l *life
}

func (c cutActivator) Activate(ctx context.Context) error {
	if err := c.l.pass("target activate"); err != nil {
		return err
	}
	return c.Activator.Activate(ctx)
}

type cutRepairer struct {
	target.Repairer
	l *life
}

func (c cutRepairer) Repair(ctx context.Context, r target.Receipt) error {
	if err := c.l.pass("target repair"); err != nil {
		return err
	}
	return c.Repairer.Repair(ctx, r)
}
