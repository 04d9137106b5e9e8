package targettest

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Features that a connector may lack. The suite then tests that it says so properly.
const (
	// Atomic: readers never see a mixture.
	Atomic = "atomic"
	// UndoCommitted: Undo restores what Commit replaced.
	UndoCommitted = "undo committed"
)

// Place is somewhere to install to, that holds nothing yet. Every function may be nil where it makes no sense.
type Place struct {
	// Env is what the connector gets; Log and Now are the suite's.
	Env      target.Env
	Settings json.RawMessage
	// Start starts the service, once, after the first Commit; it must end with the test.
	Start func(t *testing.T)
	// Address is where the started service answers TLS.
	Address string
	// Read returns the certificate and key in place, as a reader resolves them: nil when there is none.
	Read func() (cert, key []byte, err error)
	// Former counts the former versions that are kept; Retention is how many there may be.
	Former    func(t *testing.T) int
	Retention int
}

// Suite is one connector, or one of its arrangements.
type Suite struct {
	Kind target.Kind
	// New makes an empty place.
	New func(t *testing.T) Place
	// Bad are settings that must be refused, besides what is garbage for every kind; each names the field at fault.
	Bad map[string]json.RawMessage
	// Unsupported names Features.
	Unsupported []string
}

type suite struct {
	Suite
	ca *CA
}

// Run runs all of the suite below t.
func Run(t *testing.T, s Suite) {
	t.Helper()
	r := &suite{s, NewCA(t)}
	for _, c := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"kind", r.kind}, {"settings", r.settings}, {"empty", r.empty}, {"install", r.install}, {"undo", r.undo}, {"repair", r.repair},
		{"double commit", r.doubleCommit}, {"cancel", r.cancel}, {"refuse", r.refuse}, {"secrets", r.secrets},
		{"former versions", r.former}, {"readers", r.readers}, {"parallel", r.parallel},
	} {
		old := goleak.IgnoreCurrent()
		t.Run(c.name, c.run)
		if err := goleak.Find(old); err != nil {
			t.Errorf("%s left goroutines: %v", c.name, err)
		}
	}
}

func (s *suite) lacks(feature string) bool { return slices.Contains(s.Unsupported, feature) }

// log collects what a connector logs.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// bench is an open target.
type bench struct {
	*suite
	place   Place
	target  target.Target
	log     *log
	started bool
}

func (s *suite) open(t *testing.T) *bench {
	t.Helper()
	b := &bench{suite: s, place: s.New(t), log: &log{}}
	b.place.Env.Log = slog.New(slog.NewTextHandler(b.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	b.place.Env.Now = fixedNow
	b.reopen(t)
	return b
}

// reopen is a new process: nothing but the place and the receipts is known.
func (b *bench) reopen(t *testing.T) {
	t.Helper()
	tg, err := b.Kind.Open(t.Context(), b.place.Env, b.place.Settings)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	b.target = tg
}

func (b *bench) holds(t *testing.T, want target.Fingerprint) {
	t.Helper()
	got, err := b.target.Current(t.Context())
	if err != nil {
		t.Fatalf("current: %v", err)
	}
	if got.Leaf != want {
		t.Fatalf("current: %s is held, want %s", got.Leaf, want)
	}
	if want.IsZero() != got.NotAfter.IsZero() {
		t.Fatalf("current: NotAfter is %v", got.NotAfter)
	}
	if b.place.Read == nil {
		return
	}
	cert, key, err := b.place.Read()
	switch {
	case err != nil:
		t.Fatalf("read: %v", err)
	case want.IsZero() && (cert != nil || key != nil):
		t.Fatal("something is in place where nothing should be")
	case !want.IsZero():
		if _, err := tls.X509KeyPair(cert, key); err != nil {
			t.Fatalf("what is in place is no pair: %v", err)
		}
	}
}

func (b *bench) stage(t *testing.T, m target.Material) target.Staged {
	t.Helper()
	st, err := b.target.Stage(t.Context(), m)
	if err != nil {
		t.Fatalf("stage: %v", err)
	}
	return st
}

func (b *bench) install(t *testing.T, m target.Material) target.Receipt {
	t.Helper()
	st := b.stage(t, m)
	if err := st.Commit(t.Context()); err != nil {
		t.Fatalf("commit: %v", err)
	}
	b.holds(t, m.Leaf())
	return st.Receipt()
}

// serve makes the service load what is installed, and waits until it does.
func (b *bench) serve(t *testing.T, m target.Material) {
	t.Helper()
	if !b.started && b.place.Start != nil {
		b.place.Start(t)
	}
	b.started = true
	if a, ok := b.target.(target.Activator); ok {
		if err := a.Activate(t.Context()); err != nil {
			t.Fatalf("activate: %v", err)
		}
	}
	if b.place.Address != "" {
		ServedAt(t, b.place.Address, m.Leaf())
	}
}

func (b *bench) undone(t *testing.T, r target.Receipt) {
	t.Helper()
	if err := b.target.Undo(t.Context(), r); err != nil {
		t.Fatalf("undo: %v", err)
	}
}

// classified checks that err is an error, and says what may be done about it.
func classified(t *testing.T, what string, err error) {
	t.Helper()
	var fe *fault.Error
	switch {
	case err == nil:
		t.Errorf("%s: accepted", what)
	case !errors.As(err, &fe):
		t.Errorf("%s: the error has no class: %v", what, err)
	case fe.Class == fault.Internal || fe.Message == "":
		t.Errorf("%s: the error says nothing: %v", what, err)
	}
}

func (s *suite) kind(t *testing.T) {
	k := s.Kind
	if k.Name == "" || strings.ToLower(k.Name) != k.Name || k.Version < 1 || k.Check == nil || k.Open == nil {
		t.Errorf("incomplete: %q version %d", k.Name, k.Version)
	}
	if len(k.Schema) == 0 {
		t.Error("no settings are described")
	}
	for _, d := range k.Schema {
		if d.Name == "" || d.Type == "" || !strings.HasSuffix(d.Doc, ".") {
			t.Errorf("the setting %+v is not described in a sentence", d)
		}
	}
	if s.lacks(Atomic) == k.Facts.Atomic && k.Facts.Atomic {
		t.Error("the kind claims to be atomic and is not")
	}
	b := s.open(t)
	if a, ok := b.target.(target.Activator); ok {
		first := a.Domain()
		b.reopen(t)
		if a, ok := b.target.(target.Activator); !ok || first == "" || a.Domain() != first {
			t.Errorf("the domain %q is not stable", first)
		}
	}
}

func (s *suite) settings(t *testing.T) {
	b := s.open(t)
	if ps := s.Kind.Check(b.place.Settings); len(ps) > 0 {
		t.Fatalf("good settings have problems: %v", ps)
	}
	bad := map[string]json.RawMessage{}
	for i, raw := range []string{`[]`, `"x"`, `1`, `true`, `{`, `{"a"`, `{"a":}`, `{} {}`, `{}x`, "\x00", `{"no_such_setting":1}`, `{"":1}`,
		strings.Repeat("[", 5000), `{"no_such_setting":"` + strings.Repeat("x", 1<<20) + `"}`, "{\"\xff\":1}", `{"no_such\u0007":1}`} {
		bad[fmt.Sprintf("garbage %d", i)] = json.RawMessage(raw)
	}
	var good map[string]json.RawMessage
	if err := json.Unmarshal(b.place.Settings, &good); err != nil {
		t.Fatal(err)
	}
	for _, d := range s.Kind.Schema {
		for i, wrong := range []string{`{"x":1}`, `[1]`, `[null]`, `1.5`} {
			m := map[string]json.RawMessage{}
			maps.Copy(m, good)
			m[d.Name] = json.RawMessage(wrong)
			raw, err := json.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			bad[fmt.Sprintf("%s %d", d.Name, i)] = raw
		}
	}
	maps.Copy(bad, s.Bad)
	for name, raw := range bad {
		ps := s.Kind.Check(raw)
		if len(ps) == 0 {
			t.Errorf("%s: %.100q is accepted", name, raw)
			continue
		}
		for _, p := range ps {
			if p.Message == "" || len(p.Message) > 2000 || strings.ContainsAny(p.Field+p.Message, "\x00\a\n") {
				t.Errorf("%s: the problem %.200q is not a sentence", name, p)
			}
		}
		if _, isBad := s.Bad[name]; isBad && !slices.ContainsFunc(ps, func(p target.Problem) bool {
			return p.Field == strings.Fields(name)[0] || strings.HasPrefix(p.Field, strings.Fields(name)[0]+"[")
		}) {
			t.Errorf("%s: another field is named: %v", name, ps)
		}
		_, err := s.Kind.Open(t.Context(), b.place.Env, raw)
		if !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: opened with %v", name, err)
		}
	}
}

func (s *suite) empty(t *testing.T) {
	b := s.open(t)
	b.holds(t, target.Fingerprint{})
	st := b.stage(t, s.ca.Material(t))
	b.holds(t, target.Fingerprint{})
	b.undone(t, st.Receipt())
	b.holds(t, target.Fingerprint{})
}

func (s *suite) install(t *testing.T) {
	b := s.open(t)
	first := s.ca.Material(t)
	b.install(t, first)
	b.serve(t, first)
	second := s.ca.Material(t)
	st := b.stage(t, second)
	b.holds(t, first.Leaf())
	if err := st.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.holds(t, second.Leaf())
	if _, ok := b.target.(target.Activator); ok && b.place.Address != "" {
		if got := ServesNow(t, b.place.Address); got != first.Chain[0].SerialNumber.Int64() {
			t.Errorf("commit alone made the service load: it serves serial %d", got)
		}
	}
	b.serve(t, second)
	v, ok := b.target.(target.Verifier)
	if !ok {
		return
	}
	p, err := v.Verify(t.Context(), second)
	if err != nil || p.Leaf != second.Leaf() || !p.At.Equal(fixedNow()) || p.Address == "" {
		t.Errorf("verify: %+v, %v", p, err)
	}
	// For a moment after a reload old workers may still answer beside the new ones.
	for range 20 {
		if _, err = v.Verify(t.Context(), first); err != nil {
			break
		}
	}
	classified(t, "verify what is not served", err)
	if err != nil && !strings.Contains(err.Error(), second.Leaf().String()) {
		t.Errorf("the error does not say what is served: %v", err)
	}
}

func (s *suite) undo(t *testing.T) {
	b := s.open(t)
	first, second := s.ca.Material(t), s.ca.Material(t)
	b.install(t, first)
	b.serve(t, first)

	// Before the commit, from a fresh process each time, twice.
	r := b.stage(t, second).Receipt()
	for range 2 {
		b.reopen(t)
		b.undone(t, r)
		b.holds(t, first.Leaf())
	}
	r = b.install(t, second)
	b.serve(t, second)
	if s.lacks(UndoCommitted) {
		b.reopen(t)
		err := b.target.Undo(t.Context(), r)
		classified(t, "undo of what cannot be undone", err)
		if !fault.Is(err, fault.Unsupported) {
			t.Errorf("undo: %v", err)
		}
		b.holds(t, second.Leaf())
		return
	}
	for range 2 {
		b.reopen(t)
		b.undone(t, r)
		b.holds(t, first.Leaf())
	}
	b.serve(t, first)
	// A receipt that lost its turn touches nothing.
	third := s.ca.Material(t)
	b.install(t, third)
	b.undone(t, r)
	b.holds(t, third.Leaf())

	// The very first installation is taken back to nothing.
	c := s.open(t)
	r = c.install(t, first)
	for range 2 {
		c.reopen(t)
		c.undone(t, r)
		c.holds(t, target.Fingerprint{})
	}
	c.install(t, first)
}

func (s *suite) repair(t *testing.T) {
	b := s.open(t)
	rep, ok := b.target.(target.Repairer)
	if !ok {
		return
	}
	first, second := s.ca.Material(t), s.ca.Material(t)
	b.install(t, first)
	st := b.stage(t, second)
	for range 2 {
		if err := rep.Repair(t.Context(), st.Receipt()); err != nil {
			t.Fatal(err)
		}
		b.holds(t, first.Leaf())
	}
	if err := st.Commit(t.Context()); err != nil {
		t.Fatalf("commit after a repair of what was only staged: %v", err)
	}
	for range 2 {
		if err := rep.Repair(t.Context(), st.Receipt()); err != nil {
			t.Fatal(err)
		}
		b.holds(t, second.Leaf())
	}
	classified(t, "repair with garbage", rep.Repair(t.Context(), target.Receipt("garbage")))
}

func (s *suite) doubleCommit(t *testing.T) {
	b := s.open(t)
	first, second := s.ca.Material(t), s.ca.Material(t)
	b.install(t, first)
	st := b.stage(t, second)
	for range 2 {
		if err := st.Commit(t.Context()); err != nil {
			t.Fatalf("commit: %v", err)
		}
		b.holds(t, second.Leaf())
	}
	if !s.lacks(UndoCommitted) {
		b.undone(t, st.Receipt())
		b.holds(t, first.Leaf())
		err := st.Commit(t.Context())
		classified(t, "commit after undo", err)
		b.holds(t, first.Leaf())
	}
}

func (s *suite) cancel(t *testing.T) {
	b := s.open(t)
	first, second := s.ca.Material(t), s.ca.Material(t)
	b.install(t, first)
	st := b.stage(t, second)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("stopped by the suite"))
	stopped := func(what string, err error) {
		t.Helper()
		classified(t, what, err)
		if !fault.Is(err, fault.Retryable) {
			t.Errorf("%s after its context ended: %v", what, err)
		}
	}
	_, err := b.target.Current(ctx)
	stopped("current", err)
	stopped("commit", st.Commit(ctx))
	b.holds(t, first.Leaf())
	_, err = b.target.Stage(ctx, s.ca.Material(t))
	stopped("stage", err)
	stopped("undo", b.target.Undo(ctx, st.Receipt()))
	if r, ok := b.target.(target.Repairer); ok {
		stopped("repair", r.Repair(ctx, st.Receipt()))
	}
	if a, ok := b.target.(target.Activator); ok {
		stopped("activate", a.Activate(ctx))
	}
	if v, ok := b.target.(target.Verifier); ok {
		_, err := v.Verify(ctx, first)
		stopped("verify", err)
	}
	b.holds(t, first.Leaf())
	if err := st.Commit(t.Context()); err != nil {
		t.Errorf("nothing was lost, and yet: %v", err)
	}
}

func (s *suite) refuse(t *testing.T) {
	b := s.open(t)
	first := s.ca.Material(t)
	b.install(t, first)
	other := s.ca.Material(t)
	noChain, noKey, wrongKey, badKey, failing := other, other, other, other, other
	noChain.Chain = nil
	noKey.KeyPEM = nil
	wrongKey.KeyPEM = first.KeyPEM
	badKey.KeyPEM = func() ([]byte, error) { return []byte("no key"), nil }
	failing.KeyPEM = func() ([]byte, error) { return nil, fault.New(fault.NotFound, "the key is gone") }
	bad := map[string]target.Material{"no chain": noChain}
	if s.Kind.Facts.NeedsKey {
		bad["no key"], bad["another's key"], bad["damaged key"] = noKey, wrongKey, badKey
		_, err := b.target.Stage(t.Context(), failing)
		if !fault.Is(err, fault.NotFound) {
			t.Errorf("a key that cannot be had: %v", err)
		}
	}
	for what, m := range bad {
		_, err := b.target.Stage(t.Context(), m)
		classified(t, what, err)
		if !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
		b.holds(t, first.Leaf())
	}
	for _, r := range []string{"", "null", "{}", "[]", "garbage", `{"v":99}`, `{"v":1,"files":[{"role":"cert","path":"/etc/passwd","tag":"x","new":"y"}]}`, strings.Repeat("[", 1000)} {
		classified(t, "undo with the receipt "+r, b.target.Undo(t.Context(), target.Receipt(r)))
	}
	b.holds(t, first.Leaf())
}

// secrets: neither receipts, logs nor errors hold anything of a private key.
func (s *suite) secrets(t *testing.T) {
	b := s.open(t)
	first, second := s.ca.Material(t), s.ca.Material(t)
	wrong := second
	wrong.KeyPEM = first.KeyPEM
	seen := map[string]string{"first receipt": string(b.install(t, first)), "second receipt": string(b.install(t, second))}
	if _, err := b.target.Stage(t.Context(), wrong); err != nil {
		seen["error"] = fmt.Sprintf("%v %+v", err, err)
	}
	seen["log"] = b.log.String()
	for _, m := range []target.Material{first, second} {
		doc, err := m.KeyPEM()
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(doc)
		// The last 32 bytes of a PKCS#8 P-256 key are its public point; the private value begins at 36.
		private := block.Bytes[36:68]
		for what, text := range seen {
			for form, secret := range map[string]string{"PEM": string(doc[40:80]), "raw": string(private), "hex": hex.EncodeToString(private),
				"base64": base64.StdEncoding.EncodeToString(private)[:40], "base64 of all": base64.StdEncoding.EncodeToString(doc)[40:80]} {
				if strings.Contains(text, secret) {
					t.Errorf("the %s holds the private key as %s", what, form)
				}
			}
		}
	}
	for what, text := range seen {
		if strings.HasSuffix(what, "receipt") && !json.Valid([]byte(text)) {
			t.Errorf("the %s is not JSON: %s", what, text)
		}
	}
}

func (s *suite) former(t *testing.T) {
	b := s.open(t)
	if b.place.Former == nil {
		return
	}
	most := 0
	for range b.place.Retention + 4 {
		b.install(t, s.ca.Material(t))
		most = max(most, b.place.Former(t))
	}
	if got := b.place.Former(t); got != max(b.place.Retention, 0) || most > max(b.place.Retention, 0) {
		t.Errorf("%d former versions are kept, at most %d were, want %d", got, most, b.place.Retention)
	}
}

// readers watch while versions are switched.
func (s *suite) readers(t *testing.T) {
	b := s.open(t)
	if s.lacks(Atomic) || b.place.Read == nil {
		return
	}
	b.install(t, s.ca.Material(t))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				cert, key, err := b.place.Read()
				if err != nil {
					t.Errorf("a reader met %v", err)
					return
				}
				if _, err := tls.X509KeyPair(cert, key); err != nil {
					t.Errorf("a reader met a mixture: %v", err)
					return
				}
			}
		})
	}
	for range 20 {
		r := b.install(t, s.ca.Material(t))
		if !s.lacks(UndoCommitted) {
			b.undone(t, r)
		}
	}
	close(stop)
	wg.Wait()
}

// parallel works on different targets at once.
func (s *suite) parallel(t *testing.T) {
	var wg sync.WaitGroup
	var benches []*bench
	for range 4 {
		benches = append(benches, s.open(t))
	}
	for _, b := range benches {
		ms := []target.Material{s.ca.Material(t), s.ca.Material(t), s.ca.Material(t)}
		wg.Go(func() {
			for _, m := range ms {
				st, err := b.target.Stage(t.Context(), m)
				if err == nil {
					err = st.Commit(t.Context())
				}
				if err != nil {
					t.Error(err)
					return
				}
				if cur, err := b.target.Current(t.Context()); err != nil || cur.Leaf != m.Leaf() {
					t.Errorf("%s is held, want %s: %v", cur.Leaf, m.Leaf(), err)
				}
			}
		})
	}
	wg.Wait()
}
