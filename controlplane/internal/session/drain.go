package session

import (
	"context"
	"math/rand/v2"
	"slices"
	"time"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	// A node that drains moves its agents in waves, one a second, each spread over its second: so many a wave that all
	// are asked within drainMost, however many they are, and no fewer than waveLeast, which the other nodes admit easily.
	drainMost = 12 * time.Second
	waveEvery = time.Second
	waveLeast = 200
	// linger is how long agents that were asked are waited for, and what is signed for them; who has not gone by then is
	// told Goodbye by Stop.
	linger = 5 * time.Second
	// stopShare of the time that Stop has is for the drain, but no more than drainMost and linger.
	stopShare = 0.6
)

// Drain moves all agents to other nodes (mesh addresses): in waves, and each when what is being issued or recorded for it
// has been finished. Hellos are refused meanwhile and afterwards, until Accept. It returns when no stream is left; with
// Retryable, when some agents did not go in time or ctx has ended. Where there is no other node they are told Goodbye.
func (s *Server) Drain(ctx context.Context, elsewhere []string) error {
	s.mu.Lock()
	s.draining = true
	streams := s.listLocked()
	emptied := s.emptiedLocked()
	s.mu.Unlock()
	if len(elsewhere) == 0 {
		for _, st := range streams {
			st.drain()
		}
		return s.gone(ctx, emptied)
	}
	s.cfg.Log.Info("moving agents to other nodes", "agents", len(streams), "nodes", len(elsewhere))
	most := drainMost
	if end, ok := ctx.Deadline(); ok {
		most = min(most, max(s.cfg.Clock.Until(end)-linger, s.cfg.Clock.Until(end)/2))
	}
	size := waveSize(len(streams), most)
	for wave := range slices.Chunk(streams, size) {
		// A small wave takes as much of its second as a full one's agents would.
		window := max(waveEvery*time.Duration(len(wave))/time.Duration(size), 50*time.Millisecond)
		for _, st := range wave {
			st.moveTo(&agentpb.Move{Nodes: shuffled(elsewhere), WindowMs: window.Milliseconds()})
		}
		if !s.pause(ctx, emptied, window) {
			break
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	late := s.cfg.Clock.AfterFunc(linger, func() { cancel(errLate) })
	defer late.Stop()
	return s.gone(ctx, emptied)
}

// waveSize is how many agents are moved a second, so that all are asked within most.
func waveSize(agents int, most time.Duration) int {
	waves := max(int(most/waveEvery), 1)
	return max((agents+waves-1)/waves, waveLeast)
}

var errLate = fault.New(fault.Retryable, "they were asked to and stayed")

// Accept ends what Drain began: agents are taken again.
func (s *Server) Accept() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining = false
}

func (s *Server) isDraining() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.draining
}

func shuffled(nodes []string) []string {
	nodes = slices.Clone(nodes)
	//nolint:gosec // spreads agents, hides nothing
	rand.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
	return nodes
}

// pause waits for d; false: nothing is left to wait for.
func (s *Server) pause(ctx context.Context, emptied <-chan struct{}, d time.Duration) bool {
	t := s.cfg.Clock.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.Chan():
		return true
	case <-emptied:
		return false
	case <-ctx.Done():
		return false
	}
}

// emptiedLocked is closed when there is no stream, and none leaving.
func (s *Server) emptiedLocked() <-chan struct{} {
	if len(s.all)+s.leaving == 0 {
		none := make(chan struct{})
		close(none)
		return none
	}
	if s.emptied == nil {
		s.emptied = make(chan struct{})
	}
	return s.emptied
}

// gone waits until there is no stream.
func (s *Server) gone(ctx context.Context, emptied <-chan struct{}) error {
	select {
	case <-emptied:
		return nil
	default:
	}
	select {
	case <-emptied:
		return nil
	case <-ctx.Done():
		s.mu.RLock()
		n := len(s.all)
		s.mu.RUnlock()
		return fault.Wrap(fault.Retryable, context.Cause(ctx), "%d agents' streams have not ended in time", n)
	}
}

// Stop ends all streams: agents are moved to other nodes, if there are any. Then nothing more is dispatched, what is being
// issued or recorded is finished and told, and every agent that is left gets Goodbye. It closes the sessions, writes the
// last beats and returns nil, or Retryable if ctx ended before. Twice is fine.
func (s *Server) Stop(ctx context.Context) error {
	var nodes []string
	if s.cfg.Reachable != nil {
		nodes = s.cfg.Reachable()
	}
	if len(nodes) > 0 && !s.isStopping() {
		budget := drainMost + linger
		if end, ok := ctx.Deadline(); ok {
			budget = min(budget, time.Duration(stopShare*float64(s.cfg.Clock.Until(end))))
		}
		moving, cancel := context.WithTimeout(ctx, budget)
		if err := s.Drain(moving, nodes); err != nil {
			s.cfg.Log.Warn("not all agents have moved; they are told to go", "err", err)
		}
		cancel()
	}
	s.mu.Lock()
	s.stopping = true
	streams := s.listLocked()
	emptied := s.emptiedLocked()
	s.mu.Unlock()
	for _, st := range streams {
		st.drain()
	}
	err := s.gone(ctx, emptied)
	if err != nil {
		for _, st := range streams {
			st.cut(endShutdown())
		}
	}
	for _, p := range []*pool{s.store, s.issuing} {
		if werr := p.wait(ctx); werr != nil && err == nil {
			err = fault.Wrap(fault.Retryable, werr, "what is under way for agents has not ended in time")
		}
	}
	s.flush(ctx)
	s.cancel()
	s.wg.Wait()
	return err
}
