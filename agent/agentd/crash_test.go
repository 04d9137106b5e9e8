package agentd_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/certmesh/certmesh/agent/agentd"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

// plane drives a certificate through generations 1 and 2 as the control plane would: by attempt, level-triggered, with
// a verdict for everything that Hello lists. It is the memory that an agent's crash does not touch.
type plane struct {
	mu     sync.Mutex
	issuer *authority
	spec   *agentpb.TargetSpec

	job        int // 0: key 1, 1: deploy 1, 2: key 2, 3: deploy 2; 4: done
	attempt    int64
	leaves     map[int64][]byte // by generation
	keys       map[int64]string // the CSR's key by generation; another one for the same generation is a lost key
	violations []string
	last       *agentpb.Hello
	done       chan struct{}
}

func (p *plane) id() string { return fmt.Sprintf("job_%d", p.job) }

func (p *plane) generation() int64 { return int64(p.job/2 + 1) }

// settled is what Settled says about job j.
func settledJob(j int, attempt int64) *agentpb.Settled {
	s := &agentpb.Settled{Id: fmt.Sprintf("job_%d", j), Attempt: attempt, Outcome: agentpb.Settled_OUTCOME_OK, CertificateId: certID}
	if j%2 == 0 {
		s.Generation = int64(j/2 + 1)
	} else {
		s.RetireBelow = int64(j/2 + 1)
	}
	return s
}

func (p *plane) assignment() *agentpb.Assignment {
	if p.job%2 == 0 {
		return keyJob(p.id(), p.attempt, p.generation())
	}
	return deployJob(p.id(), p.attempt, p.generation(), [][]byte{p.leaves[p.generation()]}, p.spec)
}

// settle is a state whose answer says that everything before it was handled.
func settle() *agentpb.State {
	return &agentpb.State{Version: &agentpb.StateVersion{Kind: "settings", Version: time.Now().UnixNano()},
		Body: &agentpb.State_Settings{Settings: &agentpb.Settings{}}}
}

// serve holds one stream to its end.
func (p *plane) serve(s *stream) {
	p.mu.Lock()
	var verdicts []*agentpb.Verdict
	held := false
	for _, o := range s.hello.GetOpen() {
		switch {
		case o.GetId() == p.id() && o.GetAttempt() == p.attempt && p.job < 4:
			held = true
			verdicts = append(verdicts, verdict(o, agentpb.Verdict_DECISION_CONTINUE, nil))
		default:
			var j int
			if _, err := fmt.Sscanf(o.GetId(), "job_%d", &j); err != nil || j > p.job {
				p.violations = append(p.violations, "an assignment of the future is open: "+o.GetId())
			}
			verdicts = append(verdicts, verdict(o, agentpb.Verdict_DECISION_FORGET, settledJob(j, o.GetAttempt())))
		}
	}
	s.welcome(verdicts...)
	p.last = s.hello
	if p.job == 4 {
		s.state(settle())
	}
	if !held && p.job < 4 {
		p.attempt++
		s.assign(p.assignment())
	}
	p.mu.Unlock()
	for m := range s.in {
		p.receive(s, m)
	}
}

func (p *plane) receive(s *stream, m *agentpb.ConnectRequest) {
	p.mu.Lock()
	defer p.mu.Unlock()
	current := func(id string, attempt int64) bool { return id == p.id() && attempt == p.attempt && p.job < 4 }
	next := func() {
		j, a := p.job, p.attempt
		p.job++
		p.attempt = 0
		s.settle(settledJob(j, a))
		if p.job == 4 {
			// Answered when the agent has handled what was settled.
			s.state(settle())
			return
		}
		p.attempt++
		s.assign(p.assignment())
	}
	switch {
	case m.GetCsr() != nil:
		c := m.GetCsr()
		if !current(c.GetId(), c.GetAttempt()) {
			s.settle(&agentpb.Settled{Id: c.GetId(), Attempt: c.GetAttempt(), Outcome: agentpb.Settled_OUTCOME_IGNORED})
			return
		}
		g := p.generation()
		leaf := p.issuer.leaf(c.GetCsr())
		spki := keyOf(leaf)
		if old := p.keys[g]; old != "" && old != spki {
			p.violations = append(p.violations, "two keys of one generation reached the server")
		}
		p.keys[g], p.leaves[g] = spki, leaf
		next()
	case m.GetResult() != nil:
		r := m.GetResult()
		switch {
		case !current(r.GetId(), r.GetAttempt()):
			s.settle(&agentpb.Settled{Id: r.GetId(), Attempt: r.GetAttempt(), Outcome: agentpb.Settled_OUTCOME_IGNORED})
		case r.GetDeployed() == nil:
			p.violations = append(p.violations, "failed: "+r.GetFailure().GetMessage())
			next()
		default:
			if h := sha256.Sum256(p.leaves[p.generation()]); string(h[:]) != string(r.GetDeployed().GetInstalledFingerprint()) {
				p.violations = append(p.violations, "another leaf was reported")
			}
			next()
		}
	case m.GetRejected().GetAssignmentId() != "":
		p.violations = append(p.violations, "rejected: "+m.GetRejected().GetFailure().GetMessage())
	case m.GetApplied() != nil && p.job == 4:
		select {
		case <-p.done:
		default:
			close(p.done)
		}
	}
}

// TestCrashAnywhere ends the agent dead at its k-th message, durable write or step at a target, for every k, starts
// another on the same storage and lets it finish: one key and one leaf per generation, the last one installed, the old
// key retired, nothing open.
func TestCrashAnywhere(t *testing.T) {
	t.Parallel()
	mesh := newAuthority()
	total := 0
	died := errors.New("died")
	for k := 1; ; k++ {
		points := crashRun(t, mesh, k, died)
		if points < k {
			total = points
			break
		}
	}
	if total < 40 {
		t.Errorf("only %d points were met; the seam misses most of the flow", total)
	}
}

// crashRun returns how many points the first life passed, k if it was cut.
func crashRun(t *testing.T, mesh *authority, k int, died error) int {
	t.Helper()
	f := newFake(t, mesh, nil)
	root := t.TempDir()
	p := &plane{issuer: mesh, spec: fileTarget(root), leaves: map[int64][]byte{}, keys: map[int64]string{}, done: make(chan struct{})}
	quit := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case s := <-f.streams:
				wg.Go(func() { p.serve(s) })
			case <-quit:
				return
			}
		}
	})
	cfg := config(t, f)
	cfg.TargetRoots = []string{root}
	disk := k%8 == 1
	if !disk {
		// The same seam without the syncs, so that every k can be tried.
		cfg.DataDir, cfg.Memory = "", agentd.NewMemory()
	}
	n, last := 0, ""
	dead := false
	first := cfg
	first.Cut = func(point string) error {
		if dead {
			t.Errorf("k=%d: %q after the death at %q", k, point, last)
		}
		n++
		last = point
		if n == k {
			dead = true
			return died
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	life, end := context.WithCancel(ctx)
	go func() {
		select {
		case <-p.done:
		case <-life.Done():
		}
		end()
	}()
	err := agentd.Run(life, first)
	end()
	if dead && !errors.Is(err, died) || !dead && err != nil {
		t.Errorf("k=%d: cut at %q, Run returned %v", k, last, err)
	}
	select {
	case <-p.done:
	default:
		second, stop := context.WithCancel(ctx)
		go func() {
			select {
			case <-p.done:
			case <-second.Done():
			}
			stop()
		}()
		if err := agentd.Run(second, cfg); err != nil {
			t.Errorf("k=%d: cut at %q, the second life ended with %v", k, last, err)
		}
		stop()
	}
	// A last, short life settles what the stop interrupted; then nothing may be open.
	welcomed, stop := context.WithCancel(ctx)
	third := cfg
	third.Welcomed = func(string) { stop() }
	if err := agentd.Run(welcomed, third); err != nil {
		t.Errorf("k=%d: %v", k, err)
	}
	close(quit)
	for _, s := range drain(f) {
		s.end <- status.Error(codes.Unavailable, "over")
	}
	wg.Wait()
	if ctx.Err() != nil {
		t.Fatalf("k=%d: cut at %q, it never finished; job %d", k, last, p.job)
	}
	for _, v := range p.violations {
		t.Errorf("k=%d: cut at %q: %s", k, last, v)
	}
	if installed(t, root) != sha256.Sum256(p.leaves[2]) {
		t.Errorf("k=%d: cut at %q: the target does not hold the last leaf", k, last)
	}
	if len(p.last.GetOpen()) != 0 || p.last.GetLeafCount() != 1 {
		t.Errorf("k=%d: cut at %q: the last Hello is %v", k, last, p.last)
	}
	if left := must(filepath.Glob(filepath.Join(root, "site", ".*"))); len(left) != 0 {
		t.Errorf("k=%d: cut at %q: left beside the target: %v", k, last, left)
	}
	if !disk {
		return n
	}
	rep := must(agentd.Status(cfg))
	if len(rep.Open) != 0 || len(rep.Keys) != 1 || rep.Keys[0].Generation != 2 {
		t.Errorf("k=%d: cut at %q: open %v, keys %v", k, last, rep.Open, rep.Keys)
	}
	return n
}

func drain(f *fake) []*stream {
	var out []*stream
	for {
		select {
		case s := <-f.streams:
			out = append(out, s)
		default:
			return out
		}
	}
}
