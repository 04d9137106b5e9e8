package work

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/agent/internal/durable"
	"github.com/certmesh/certmesh/agent/internal/journal"
	"github.com/certmesh/certmesh/agent/internal/keystore"
	"github.com/certmesh/certmesh/connectors/target"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestDecide(t *testing.T) {
	t.Parallel()
	want, other, third := target.Fingerprint{1}, target.Fingerprint{2}, target.Fingerprint{3}
	down := fault.New(fault.Retryable, "no TLS handshake")
	well := finding{installed: want, served: want, probed: true}
	foreign := finding{installed: other, served: want, probed: true}
	unloaded := finding{installed: want, served: other, probed: true}
	silent := finding{installed: want, probed: true, unanswered: down}
	unread := finding{unread: fault.New(fault.Forbidden, "outside the roots"), probed: true}
	for name, c := range map[string]struct {
		looks []finding
		// says has a letter for each look: D differs, W well again, dash nothing.
		says string
	}{
		"as deployed":                     {[]finding{well, well}, "--"},
		"replaced, once":                  {[]finding{foreign, foreign, foreign}, "DDD"},
		"replaced differently":            {[]finding{foreign, {installed: third, probed: true}, {probed: true}}, "DDD"},
		"not loaded":                      {[]finding{unloaded, well, well}, "DW-"},
		"installed only":                  {[]finding{{installed: want}, {installed: other}, {}, {installed: want}}, "-DDW"},
		"a restart":                       {[]finding{silent, silent, well, silent, silent, well}, "------"},
		"down for long":                   {[]finding{silent, silent, silent, silent, well}, "--DDW"},
		"cannot be read":                  {[]finding{unread, unread, unread, unread, well}, "--DDW"},
		"replaced while nothing answers":  {[]finding{{installed: other, probed: true, unanswered: down}}, "D"},
		"removed while nothing answers":   {[]finding{{probed: true, unanswered: down}}, "D"},
		"differs, is down, differs still": {[]finding{unloaded, silent, silent, unloaded, well}, "D--DW"},
	} {
		p := &placed{spec: &agentpb.TargetSpec{Id: "tgt_1"}, certificateID: "cert_1", generation: 3, leaf: want}
		var got strings.Builder
		for _, f := range c.looks {
			var say *agentpb.Observed
			p, say = decide(p, f)
			switch {
			case say == nil:
				got.WriteByte('-')
				continue
			case say.GetProblem() == nil:
				got.WriteByte('W')
			default:
				got.WriteByte('D')
			}
			if say.GetTargetId() != "tgt_1" || say.GetCertificateId() != "cert_1" || say.GetGeneration() != 3 {
				t.Errorf("%s: %v", name, say)
			}
		}
		if got.String() != c.says {
			t.Errorf("%s: says %s, want %s", name, got.String(), c.says)
		}
	}
}

// probes is what a service at a verify address would answer.
type probes struct {
	mu   sync.Mutex
	leaf target.Fingerprint
	err  error
}

func (p *probes) set(leaf target.Fingerprint, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.leaf, p.err = leaf, err
}

func (p *probes) probe(_ context.Context, address, _ string) (target.Proof, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return target.Proof{Leaf: p.leaf, Address: address, At: time.Now()}, p.err
}

func (s *site) put(name string, leaf target.Fingerprint) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[name] = leaf
}

func (r *rig) observed() *agentpb.Observed {
	r.t.Helper()
	for {
		select {
		case m := <-r.out.c:
			if o := m.GetObserved(); o != nil {
				return o
			}
		case <-time.After(patience):
			r.t.Fatal("nothing was observed")
		}
	}
}

// silent fails if anything was observed so far.
func (r *rig) silent() {
	r.t.Helper()
	for {
		select {
		case m := <-r.out.c:
			if o := m.GetObserved(); o != nil {
				r.t.Fatalf("observed %v", o)
			}
		default:
			return
		}
	}
}

// TestWatch: what changes at a target is found by itself, told at every look, on a new stream and after a restart, and its
// end is told too. While a deployment is open nothing is.
func TestWatch(t *testing.T) {
	t.Parallel()
	s, served, clk := newSite(), &probes{}, clockwork.NewFakeClock()
	keys, jrn, kept := keystore.NewMemory(), journal.NewMemory(), durable.NewMemory()
	config := func(c *Config) {
		c.Placed, c.Clock, c.Probe, c.VerifyLimit = kept, clk, served.probe, 2
		c.VerifyTimeout = func() time.Duration { return time.Millisecond }
		c.WatchInterval = func() time.Duration { return time.Hour }
	}
	r := newRig(t, s, jrn, keys, config)
	a := r.job(1, 1)
	a.GetDeploy().Target.VerifyAddress = "127.0.0.1:443"
	served.set(leafOf(a), nil)
	r.e.Assign(a)
	if res := r.result(); res.GetDeployed() == nil {
		t.Fatal(res)
	}
	look := func(r *rig) { t.Helper(); r.e.observe(t.Context(), "tgt_1") }
	s.put("1", target.Fingerprint{9})
	look(r)
	r.silent() // the deployment is not settled
	r.e.Settle(&agentpb.Settled{Id: a.GetId(), Attempt: 1, Outcome: agentpb.Settled_OUTCOME_OK})
	s.put("1", leafOf(a))
	look(r)
	r.silent()

	// By itself, within two intervals.
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); r.e.Watch(ctx) }()
	if err := clk.BlockUntilContext(ctx, 1); err != nil {
		t.Fatal(err)
	}
	s.put("1", target.Fingerprint{9})
	clk.Advance(time.Hour)
	o := r.observed()
	if o.GetProblem().GetClass() != string(fault.Conflict) || o.GetGeneration() != 1 || o.GetInstalledFingerprint()[0] != 9 || len(o.GetServedFingerprint()) == 0 {
		t.Fatal(o)
	}
	stop()
	<-done
	look(r)
	if again := r.observed(); again.GetProblem() == nil {
		t.Fatal(again)
	}
	r.e.Detach()
	r.e.Attach(r.out, nil)
	if o := r.observed(); o.GetProblem() == nil {
		t.Fatal(o)
	}
	r.e.Stop()

	r = newRig(t, s, jrn, keys, config)
	if o := r.observed(); o.GetProblem() == nil {
		t.Fatal(o)
	}
	s.put("1", leafOf(a))
	look(r)
	if o := r.observed(); o.GetProblem() != nil || o.GetInstalledFingerprint() == nil {
		t.Fatal(o)
	}
	r.e.Detach()
	r.e.Attach(r.out, nil)
	if o := r.observed(); o.GetProblem() != nil {
		t.Fatal(o)
	}
	r.e.Detach()
	r.e.Attach(r.out, nil)
	r.silent()

	// The server took the target away.
	r.e.Forget("tgt_1")
	s.put("1", target.Fingerprint{9})
	look(r)
	r.silent()
	if names, err := kept.List(""); err != nil || len(names) != 0 {
		t.Fatal(names, err)
	}
}

// TestTheSameDriftAgain: what was put right is not told any more, not even on a new stream. When the same foreign certificate is
// put there once more it is.
func TestTheSameDriftAgain(t *testing.T) {
	t.Parallel()
	s, served := newSite(), &probes{}
	r := newRig(t, s, journal.NewMemory(), keystore.NewMemory(), func(c *Config) {
		c.Probe = served.probe
		c.VerifyTimeout = func() time.Duration { return time.Millisecond }
	})
	a := r.job(1, 1)
	a.GetDeploy().Target.VerifyAddress = "127.0.0.1:443"
	want := leafOf(a)
	served.set(want, nil)
	deploy := func(id string) {
		t.Helper()
		a := proto.CloneOf(a)
		a.Id = id
		r.e.Assign(a)
		if res := r.result(); res.GetDeployed() == nil {
			t.Fatal(res)
		}
		r.e.Settle(&agentpb.Settled{Id: id, Attempt: 1, Outcome: agentpb.Settled_OUTCOME_OK})
	}
	deploy("job_1")
	for i := range 2 {
		s.put("1", target.Fingerprint{9})
		r.e.observe(t.Context(), "tgt_1")
		if o := r.observed(); o.GetProblem() == nil {
			t.Fatal(o)
		}
		deploy("job_again" + string(rune('a'+i)))
		r.e.Detach()
		r.e.Attach(r.out, nil)
		if o := r.observed(); o.GetProblem() != nil || !bytes.Equal(o.GetInstalledFingerprint(), want[:]) || !bytes.Equal(o.GetServedFingerprint(), want[:]) {
			t.Fatal(o)
		}
		r.e.observe(t.Context(), "tgt_1")
		r.silent()
	}
}

func TestDamagedRecordIsDropped(t *testing.T) {
	t.Parallel()
	kept := durable.NewMemory()
	if err := kept.Write(shelfFile("tgt_1"), []byte("{")); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, newSite(), journal.NewMemory(), keystore.NewMemory(), func(c *Config) { c.Placed = kept })
	if all := r.e.shelf.all(); len(all) != 0 {
		t.Fatal(all)
	}
}

func TestVerifyWork(t *testing.T) {
	t.Parallel()
	s, served := newSite(), &probes{}
	r := newRig(t, s, journal.NewMemory(), keystore.NewMemory(), func(c *Config) {
		c.Probe, c.VerifyLimit = served.probe, 4
		c.VerifyTimeout = func() time.Duration { return time.Millisecond }
	})
	want, other := target.Fingerprint{1}, target.Fingerprint{2}
	n := 0
	verify := func(address string) *agentpb.Result {
		t.Helper()
		n++
		a := &agentpb.Assignment{Id: "job_v" + string(rune('a'+n)), Attempt: 1, Class: agentpb.WorkClass_WORK_CLASS_VERIFY, Work: &agentpb.Assignment_Verify{
			Verify: &agentpb.VerifyWork{CertificateId: certID(1), Generation: 1, Fingerprint: want[:],
				Target: &agentpb.TargetSpec{Id: "tgt_1", Kind: "fake", Settings: []byte("1"), VerifyAddress: address}}}}
		r.e.Assign(a)
		res := r.result()
		r.e.Settle(&agentpb.Settled{Id: a.GetId(), Attempt: 1, Outcome: agentpb.Settled_OUTCOME_OK, CertificateId: certID(1)})
		return res
	}
	s.put("1", want)
	if d := verify("").GetDeployed(); d == nil || len(d.GetServedFingerprint()) != 0 || d.GetInstalledFingerprint()[0] != 1 {
		t.Fatal(d)
	}
	served.set(want, nil)
	if d := verify("h:1").GetDeployed(); d == nil || d.GetServedFingerprint()[0] != 1 || d.GetAddress() != "h:1" {
		t.Fatal(d)
	}
	served.set(other, nil)
	if f := verify("h:1").GetFailure(); f.GetClass() != string(fault.Conflict) || !strings.Contains(f.GetMessage(), other.String()) {
		t.Fatal(f)
	}
	served.set(target.Fingerprint{}, fault.New(fault.Retryable, "nobody there"))
	if f := verify("h:1").GetFailure(); f.GetClass() != string(fault.Retryable) {
		t.Fatal(f)
	}
	s.put("1", other)
	if f := verify("h:1").GetFailure(); f.GetClass() != string(fault.Conflict) {
		t.Fatal(f)
	}
	if s.activations != 0 || s.undos != 0 {
		t.Fatal("something was changed")
	}
}

// TestSharedPaths: two targets of one host cannot write one path, however it is spelled.
func TestSharedPaths(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	real := filepath.Join(root, "real")
	if err := os.Mkdir(real, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	kinds := []target.Kind{{Name: "file", Paths: func(s json.RawMessage) []string { return strings.Split(string(s), "|") }}, {Name: "api"}}
	spec := func(id, kind, paths string) *agentpb.TargetSpec {
		return &agentpb.TargetSpec{Id: id, Name: "name-" + id, Kind: kind, Settings: []byte(paths)}
	}
	now := time.Now()
	paths := newClaims(kinds, func() time.Time { return now })
	held := []*agentpb.TargetSpec{spec("1", "file", real+"/a.pem|"+real+"/a.key"), spec("2", "api", real+"/b.pem")}
	for name, c := range map[string]struct {
		t    *agentpb.TargetSpec
		want string
	}{
		"itself":             {spec("1", "file", real+"/a.pem"), ""},
		"another path":       {spec("3", "file", real+"/c.pem"), ""},
		"of a kind without":  {spec("3", "file", real+"/b.pem"), ""},
		"the same":           {spec("3", "file", real+"/c.pem|"+real+"/a.key"), "name-1"},
		"unclean":            {spec("3", "file", real+"//x/../a.pem"), "name-1"},
		"by a link":          {spec("3", "file", root+"/link/a.pem"), "name-1"},
		"not there, by link": {spec("3", "file", root+"/link/new/a.pem"), ""},
	} {
		err := paths.shared(c.t, held)
		switch {
		case c.want == "" && err != nil, c.want != "" && (!fault.Is(err, fault.Rejected) || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v", name, err)
		}
	}
	// Where a path leads may change, and is looked up again after a while.
	if err := os.Rename(filepath.Join(root, "link"), filepath.Join(root, "other")); err != nil {
		t.Fatal(err)
	}
	moved := append(held, spec("4", "file", root+"/link/a.pem"))
	if err := paths.shared(spec("5", "file", root+"/elsewhere/a.pem"), moved); err != nil {
		t.Errorf("another path: %v", err)
	}
	if err := os.Symlink(filepath.Join(root, "elsewhere"), filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(root, "elsewhere"), 0o700); err != nil {
		t.Fatal(err)
	}
	now = now.Add(claimAge + time.Second)
	if err := paths.shared(spec("5", "file", root+"/elsewhere/a.pem"), moved); !fault.Is(err, fault.Rejected) {
		t.Errorf("after a link was changed: %v", err)
	}
	if err := os.Remove(filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(root, "other"), filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	later := []*agentpb.TargetSpec{spec("1", "file", real+"/new/a.pem")}
	if err := paths.shared(spec("3", "file", root+"/link/new/a.pem"), later); !fault.Is(err, fault.Rejected) {
		t.Errorf("in a directory that does not exist yet: %v", err)
	}
}
