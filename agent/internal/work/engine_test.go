package work

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/big"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/certmesh/certmesh/agent/internal/journal"
	"github.com/certmesh/certmesh/agent/internal/keystore"
	"github.com/certmesh/certmesh/connectors/target"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

// site is a service with one configuration for many targets: one bad leaf in it makes every activation fail.
type site struct {
	mu          sync.Mutex
	held        map[string]target.Fingerprint // by target
	before      map[string]target.Fingerprint
	active      map[string]target.Fingerprint
	bad         map[target.Fingerprint]bool
	activations int
	undos       int
	// gate, if set, is received from before an activation.
	gate chan struct{}
}

func newSite() *site {
	return &site{held: map[string]target.Fingerprint{}, before: map[string]target.Fingerprint{},
		active: map[string]target.Fingerprint{}, bad: map[target.Fingerprint]bool{}}
}

func (s *site) kind() target.Kind {
	return target.Kind{Name: "fake", Version: 1, Check: func(json.RawMessage) []target.Problem { return nil },
		Open: func(_ context.Context, _ target.Env, settings json.RawMessage) (target.Target, error) {
			return &place{s, string(settings)}, nil
		}}
}

type place struct {
	s    *site
	name string
}

func (p *place) Current(context.Context) (target.Served, error) {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	return target.Served{Leaf: p.s.held[p.name]}, nil
}

func (p *place) Stage(_ context.Context, m target.Material) (target.Staged, error) {
	if _, err := m.KeyPEM(); err != nil {
		return nil, err
	}
	return &staged{p, m.Leaf()}, nil
}

func (p *place) Undo(context.Context, target.Receipt) error {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	p.s.undos++
	p.s.held[p.name] = p.s.before[p.name]
	return nil
}

func (p *place) Domain() string { return "site" }

func (p *place) Activate(ctx context.Context) error {
	if p.s.gate != nil {
		select {
		case <-p.s.gate:
		case <-ctx.Done():
			return fault.Wrap(fault.Retryable, ctx.Err(), "stopped")
		}
	}
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	p.s.activations++
	for _, l := range p.s.held {
		if p.s.bad[l] {
			return fault.New(fault.Invalid, "the configuration is bad")
		}
	}
	maps.Copy(p.s.active, p.s.held)
	return nil
}

type staged struct {
	p    *place
	leaf target.Fingerprint
}

func (s *staged) Receipt() target.Receipt { return target.Receipt(`{"v":1}`) }

func (s *staged) Commit(context.Context) error {
	s.p.s.mu.Lock()
	defer s.p.s.mu.Unlock()
	s.p.s.before[s.p.name] = s.p.s.held[s.p.name]
	s.p.s.held[s.p.name] = s.leaf
	return nil
}

// sink collects what is sent.
type sink struct{ c chan *agentpb.ConnectRequest }

func (s sink) Post(m *agentpb.ConnectRequest) { s.c <- m }

type rig struct {
	t    *testing.T
	e    *Engine
	s    *site
	jrn  journal.Journal
	keys keystore.Store
	out  sink
}

func newRig(t *testing.T, s *site, jrn journal.Journal, keys keystore.Store, edit func(*Config)) *rig {
	cfg := Config{Log: slog.New(slog.DiscardHandler), Now: time.Now, Journal: jrn, Keys: keys, Kinds: []target.Kind{s.kind()},
		KeyLimit: 4, DeployLimit: 64, MaxDeploys: 64, VerifyTimeout: func() time.Duration { return time.Second }}
	if edit != nil {
		edit(&cfg)
	}
	r := &rig{t, New(t.Context(), cfg), s, jrn, keys, sink{make(chan *agentpb.ConnectRequest, 4096)}}
	t.Cleanup(r.e.Stop)
	if err := r.e.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.e.Greet()
	r.e.Attach(r.out, nil)
	return r
}

func (r *rig) result() *agentpb.Result {
	r.t.Helper()
	for {
		select {
		case m := <-r.out.c:
			if m.GetResult() != nil {
				return m.GetResult()
			}
		case <-time.After(patience):
			r.t.Fatal("no result")
		}
	}
}

func certID(i int) string { return fmt.Sprintf("cert_%032x", i) }

// job makes a key, has it signed by itself, and returns its deployment.
func (r *rig) job(i int, generation int64) *agentpb.Assignment {
	k, err := r.keys.Ensure(certID(i), generation, "ECDSA-P256")
	if err != nil {
		r.t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(generation), Subject: pkix.Name{CommonName: certID(i)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Signer.Public(), k.Signer)
	if err != nil {
		r.t.Fatal(err)
	}
	return &agentpb.Assignment{Id: fmt.Sprintf("job_%d_%d", i, generation), Attempt: 1, Class: deployClass, Work: &agentpb.Assignment_Deploy{Deploy: &agentpb.DeployWork{
		CertificateId: certID(i), Generation: generation, Chain: [][]byte{der},
		Target: &agentpb.TargetSpec{Id: fmt.Sprintf("tgt_%d", i), Kind: "fake", Settings: fmt.Appendf(nil, "%d", i)}}}}
}

func leafOf(a *agentpb.Assignment) target.Fingerprint {
	return sha256.Sum256(a.GetDeploy().GetChain()[0])
}

// TestOneActivationForMany: what is due while an activation runs shares the next one.
func TestOneActivationForMany(t *testing.T) {
	t.Parallel()
	s := newSite()
	s.gate = make(chan struct{})
	r := newRig(t, s, journal.NewMemory(), keystore.NewMemory(), nil)
	const n = 20
	r.e.Assign(r.job(0, 1))
	waitFor(t, func() bool { return s.holds("0") })
	for i := 1; i <= n; i++ {
		r.e.Assign(r.job(i, 1))
	}
	waitFor(t, func() bool { return r.e.domains.waiting("domain:site") == n })
	close(s.gate)
	for range n + 1 {
		if res := r.result(); res.GetDeployed() == nil {
			t.Errorf("result %v", res)
		}
	}
	if s.activations != 2 {
		t.Errorf("%d activations for %d targets", s.activations, n+1)
	}
}

// TestCulpritsAlone: every bad leaf is found and undone, everything else ends up active.
func TestCulpritsAlone(t *testing.T) {
	t.Parallel()
	for _, culprits := range [][]int{{7}, {1, 16}, {3, 4, 11}} {
		t.Run(fmt.Sprint(culprits), func(t *testing.T) {
			t.Parallel()
			s := newSite()
			s.gate = make(chan struct{})
			r := newRig(t, s, journal.NewMemory(), keystore.NewMemory(), nil)
			const n = 16
			r.e.Assign(r.job(0, 1))
			waitFor(t, func() bool { return s.holds("0") })
			bad := map[string]bool{}
			for i := 1; i <= n; i++ {
				a := r.job(i, 1)
				for _, c := range culprits {
					if c == i {
						bad[a.GetId()] = true
						s.mu.Lock()
						s.bad[leafOf(a)] = true
						s.mu.Unlock()
					}
				}
				r.e.Assign(a)
			}
			waitFor(t, func() bool { return r.e.domains.waiting("domain:site") == n })
			close(s.gate)
			for range n + 1 {
				res := r.result()
				if ok := res.GetDeployed() != nil; ok == bad[res.GetId()] {
					t.Errorf("%s: deployed %v", res.GetId(), ok)
				}
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			for i := range n + 1 {
				name := fmt.Sprint(i)
				if isBad := bad["job_"+name+"_1"]; s.held[name].IsZero() != isBad || s.active[name] != s.held[name] {
					t.Errorf("target %d holds %s, active is %s", i, s.held[name], s.active[name])
				}
			}
			if most := 3 + 2*len(culprits)*5; s.activations > most {
				t.Errorf("%d activations, more than %d", s.activations, most)
			}
		})
	}
}

// TestVerifyFails: a service that goes on serving the old certificate gets the former material back.
func TestVerifyFails(t *testing.T) {
	t.Parallel()
	s := newSite()
	jrn, keys := journal.NewMemory(), keystore.NewMemory()
	r := newRig(t, s, jrn, keys, func(c *Config) {
		c.VerifyTimeout = func() time.Duration { return 50 * time.Millisecond }
		c.Probe = func(_ context.Context, addr, _ string) (target.Proof, error) {
			return target.Proof{Leaf: target.Fingerprint{9}, Address: addr}, nil
		}
	})
	a := r.job(1, 1)
	a.GetDeploy().GetTarget().VerifyAddress = "127.0.0.1:443"
	r.e.Assign(a)
	res := r.result()
	if res.GetFailure().GetClass() != string(fault.Conflict) || !strings.Contains(res.GetFailure().GetMessage(), "127.0.0.1:443 serves") {
		t.Errorf("result %v", res)
	}
	if s.holds("1") || s.undos != 1 || s.activations != 2 {
		t.Errorf("held %v, %d undos, %d activations", s.held, s.undos, s.activations)
	}
	es, _ := jrn.All()
	if len(es) != 1 || es[0].Receipt != nil || es[0].Result == nil {
		t.Errorf("journal %+v", es)
	}
}

// TestRecover: what was staged and not installed is undone at the start; what was installed stays and is verified.
func TestRecover(t *testing.T) {
	t.Parallel()
	for _, committed := range []bool{false, true} {
		t.Run(fmt.Sprint(committed), func(t *testing.T) {
			t.Parallel()
			s := newSite()
			jrn, keys := journal.NewMemory(), keystore.NewMemory()
			a := (&rig{t: t, keys: keys}).job(1, 1)
			if err := journal.Store(jrn, &journal.Entry{Assignment: a, Receipt: []byte(`{"v":1}`)}); err != nil {
				t.Fatal(err)
			}
			if committed {
				s.held["1"] = leafOf(a)
			}
			r := newRig(t, s, jrn, keys, nil)
			if res := r.result(); res.GetDeployed() == nil {
				t.Fatalf("result %v", res)
			}
			want := 1
			if committed {
				want = 0
			}
			if s.undos != want || s.activations != 1 || s.active["1"] != leafOf(a) {
				t.Errorf("%d undos, %d activations, active %v", s.undos, s.activations, s.active)
			}
		})
	}
}

// fullJournal fails while full is set.
type fullJournal struct {
	*journal.Memory
	mu   sync.Mutex
	full bool
}

func (f *fullJournal) set(full bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.full = full
}

func (f *fullJournal) err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.full {
		return fault.New(fault.Retryable, "no space left on device; free space")
	}
	return nil
}

func (f *fullJournal) Put(e *journal.Entry, stored func(error)) {
	if err := f.err(); err != nil {
		go stored(err)
		return
	}
	f.Memory.Put(e, stored)
}

func (f *fullJournal) Probe() error { return f.err() }

// TestFullDisk: nothing is accepted, nothing is lost, and credit comes back with the space.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	j := &fullJournal{Memory: journal.NewMemory()}
	sickened := make(chan struct{}, 8)
	r := newRig(t, newSite(), j, keystore.NewMemory(), func(c *Config) { c.Sickened = func() { sickened <- struct{}{} } })
	j.set(true)
	r.e.Assign(r.job(1, 1))
	m := <-r.out.c
	if f := m.GetRejected().GetFailure(); f.GetClass() != string(fault.Retryable) || !strings.Contains(f.GetMessage(), "free space") {
		t.Fatalf("got %v", m)
	}
	<-sickened
	if !r.e.Sick() || !r.e.Idle() {
		t.Error("it is not sick, or keeps what it rejected")
	}
	r.e.Heal()
	if !r.e.Sick() {
		t.Error("healed on a full disk")
	}
	j.set(false)
	r.e.Heal()
	if c := (<-r.out.c).GetCredit(); c.GetClass() != deployClass || c.GetAmount() != 1 || r.e.Sick() {
		t.Errorf("after the disk is free: %v", c)
	}
}

// TestPanickingTarget costs the assignment, not the agent.
func TestPanickingTarget(t *testing.T) {
	t.Parallel()
	r := newRig(t, newSite(), journal.NewMemory(), keystore.NewMemory(), func(c *Config) {
		c.Kinds[0].Open = func(context.Context, target.Env, json.RawMessage) (target.Target, error) { panic("boom") }
	})
	r.e.Assign(r.job(1, 1))
	if f := r.result().GetFailure(); f.GetClass() != string(fault.Internal) || strings.Contains(f.GetMessage(), "boom") {
		t.Errorf("failure %v", f)
	}
}

// TestSettledKeys: only keys of the settled certificate are touched, and never the one just deployed.
func TestSettledKeys(t *testing.T) {
	t.Parallel()
	r := newRig(t, newSite(), journal.NewMemory(), keystore.NewMemory(), nil)
	for g := int64(1); g <= 3; g++ {
		r.job(1, g)
	}
	r.job(2, 1)
	a := r.job(1, 3)
	r.e.Assign(a)
	r.result()
	r.e.Settle(&agentpb.Settled{Id: a.GetId(), Attempt: 1, Outcome: agentpb.Settled_OUTCOME_OK, RetireBelow: 1 << 40})
	infos, _ := r.keys.List()
	got := ""
	for _, i := range infos {
		got += fmt.Sprintf("%s/%d ", i.CertificateID[36:], i.Generation)
	}
	if got != "1/3 2/1 " {
		t.Errorf("keys left: %s", got)
	}
}

// TestCancelBeforeInstall: a deployment that waits for its domain is taken out; nothing is installed.
func TestCancelBeforeInstall(t *testing.T) {
	t.Parallel()
	s := newSite()
	s.gate = make(chan struct{})
	r := newRig(t, s, journal.NewMemory(), keystore.NewMemory(), nil)
	r.e.Assign(r.job(0, 1))
	waitFor(t, func() bool { return s.holds("0") })
	a := r.job(1, 1)
	r.e.Assign(a)
	waitFor(t, func() bool { return r.e.domains.waiting("domain:site") == 1 })
	r.e.Cancel(&agentpb.Cancel{Id: a.GetId(), Attempt: 1})
	if res := r.result(); res.GetId() != a.GetId() || !strings.Contains(res.GetFailure().GetMessage(), "cancelled") || s.holds("1") {
		t.Errorf("result %v", res)
	}
	close(s.gate)
	if res := r.result(); res.GetDeployed() == nil {
		t.Errorf("result %v", res)
	}
}

func TestClean(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"a\x1b[31mb\x00":                  "a[31mb",
		"x\u202ey":                        "xy",
		"-----BEGIN PRIVATE KEY-----\nMI": "(withheld: the text contains a private key)",
		"\xff\xfeok":                      "ok",
	} {
		if got := clean(in, 100, false); got != want {
			t.Errorf("%q became %q", in, got)
		}
	}
	if got := clean(strings.Repeat("a", 9)+"é", 10, false); got != strings.Repeat("a", 9) {
		t.Errorf("cut inside a rune: %q", got)
	}
	if f := FailureOf(errors.New("dsn=secret")); f.GetClass() != string(fault.Internal) || strings.Contains(f.GetMessage(), "secret") {
		t.Errorf("an unclassified error reaches the wire as %v", f)
	}
}

func (s *site) holds(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.held[name].IsZero()
}

func (d *domains) waiting(key string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if q := d.byKey[key]; q != nil {
		return len(q.steps)
	}
	return 0
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal("the condition was not met in time")
		}
		time.Sleep(time.Millisecond) //nolint:forbidigo // polls a condition under a deadline
	}
}
