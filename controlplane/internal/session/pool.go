package session

import (
	"context"
	"sync"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/dispatch"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/fair"
)

// ownWork is the lane of what the server does for all: loads, flushes, trails. Agents' reports to the store have a lane for
// each agent, requests to the issuer one for each owner.
const ownWork = ""

// pool runs functions, at most so many at once. Those that wait stand in lanes, which take turns; within a lane they run in
// the order they came. Idle it has no goroutine.
type pool struct {
	most int

	mu      sync.Mutex
	queue   fair.Queue[func()]
	running int
	idle    chan struct{} // closed when nothing runs; nil: nobody waits
}

func newPool(most int) *pool { return &pool{most: most} }

// do runs f soon; it never blocks. f contains its own panics.
func (p *pool) do(lane string, f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running >= p.most {
		p.queue.Push(lane, f)
		return
	}
	p.running++
	go p.run(f)
}

func (p *pool) run(f func()) {
	for f != nil {
		f()
		f = p.next()
	}
}

func (p *pool) next() func() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f, ok := p.queue.Pop(); ok {
		return f
	}
	if p.running--; p.running == 0 && p.idle != nil {
		close(p.idle)
		p.idle = nil
	}
	return nil
}

// wait returns when nothing runs, or with ctx's error.
func (p *pool) wait(ctx context.Context) error {
	p.mu.Lock()
	if p.running == 0 {
		p.mu.Unlock()
		return nil
	}
	if p.idle == nil {
		p.idle = make(chan struct{})
	}
	idle := p.idle
	p.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// loader reads open work for many agents with one question: what wants loading while a read runs goes into the next.
type loader struct {
	s *Server

	mu      sync.Mutex
	want    []load
	running int
}

type load struct {
	st   *stream
	want dispatch.Load
}

const (
	loadBatch  = 100
	loadersMax = 2
)

func newLoader(s *Server) *loader { return &loader{s: s} }

func (l *loader) add(st *stream, want dispatch.Load) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.want = append(l.want, load{st, want})
	if l.running < loadersMax {
		l.running++
		l.s.store.do(ownWork, l.run)
	}
}

func (l *loader) take() []load {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := min(len(l.want), loadBatch)
	batch := l.want[:n:n]
	if l.want = l.want[n:]; len(l.want) == 0 {
		l.want = nil
	}
	if n == 0 {
		l.running--
	}
	return batch
}

func (l *loader) run() {
	for batch := l.take(); len(batch) > 0; batch = l.take() {
		l.load(batch)
	}
}

func (l *loader) load(batch []load) {
	s := l.s
	ctx, cancel := context.WithTimeout(s.ctx, storeTimeout)
	defer cancel()
	queries := make([]domain.WorkQuery, len(batch))
	var doubted []string
	for i, b := range batch {
		id := b.st.who.agentID
		queries[i] = domain.WorkQuery{AgentID: id, Out: b.want.Out, After: b.want.After}
		if b.want.Verify {
			doubted = append(doubted, id)
		}
	}
	if len(doubted) > 0 {
		l.verify(ctx, batch, doubted)
	}
	var work []domain.OpenWork
	err := contain(s.cfg.Log, "load open work", func() error {
		var err error
		work, err = s.cfg.Store.OpenWork(ctx, queries)
		return err
	})
	if err != nil {
		s.cfg.Log.Warn("open work not loaded; it is tried again", "agents", len(queries), "err", err)
		work = make([]domain.OpenWork, len(queries))
	}
	now := s.now()
	for i, b := range batch {
		b.st.answer(dispatch.Loaded{Work: work[i], Err: err, At: now})
	}
}

// verify ends the streams whose session is another's by now.
func (l *loader) verify(ctx context.Context, batch []load, doubted []string) {
	var holders map[string]domain.Session
	err := contain(l.s.cfg.Log, "read holders", func() error {
		var err error
		holders, err = l.s.cfg.Store.SessionHolders(ctx, doubted)
		return err
	})
	if err != nil {
		l.s.cfg.Log.Warn("holders of streams not read", "err", err)
		return
	}
	for _, b := range batch {
		if h, ok := holders[b.st.who.agentID]; b.want.Verify && ok && (h.Epoch != b.st.epochNow() || h.Holder != l.s.cfg.NodeID) {
			b.st.end(endSuperseded())
		}
	}
}

// microTime is a time in an atomic; 0 is none.
func microTime(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}
