package storetest

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/protocol/fault"
)

// meshCA is the material of the mesh CA of a generation, with one key.
func meshCA(w *World, n byte) (domain.CA, []domain.SealedKey) {
	key := domain.SealedKey{ID: fmt.Sprintf("key_mesh%d", n), Purpose: "p", KEKID: "k", WrappedDEK: []byte{1}, Ciphertext: []byte{n}, CreatedAt: w.Now()}
	c := domain.CA{ID: domain.MeshCA, Chain: [][]byte{der(n)}, KeyURI: "sealed:" + key.ID, RootKeyURI: "sealed:" + key.ID, Generation: int64(n)}
	if n > 1 {
		c.Vouched = [][]byte{der(100 + n), der(n - 1)}
	}
	return c, []domain.SealedKey{key}
}

func install(t *testing.T, w *World) {
	t.Helper()
	c, keys := meshCA(w, 1)
	_, err := w.S.InstallCA(t.Context(), c, keys, c.Chain, w.Op())
	must(t, err)
}

func start(t *testing.T, w *World, n byte) domain.Rollover {
	t.Helper()
	c, keys := meshCA(w, n)
	r, err := w.S.StartRollover(t.Context(), c, keys, w.Op())
	must(t, err)
	return r
}

func wantFault(t *testing.T, err error, class fault.Class, part string) {
	t.Helper()
	if !fault.Is(err, class) || !strings.Contains(err.Error(), part) {
		t.Errorf("error is %v, want %s with %q", err, class, part)
	}
}

func wantMesh(t *testing.T, w *World, generation byte, vouched int, bundle int64, roots ...byte) domain.Mesh {
	t.Helper()
	m, err := w.S.Mesh(t.Context())
	must(t, err)
	var want [][]byte
	for _, r := range roots {
		want = append(want, der(r))
	}
	revision, err := w.S.MeshRevision(t.Context())
	must(t, err)
	if m.CA.Generation != int64(generation) || !bytes.Equal(m.CA.Chain[0], der(generation)) || len(m.CA.Vouched) != vouched || m.Bundle != bundle ||
		fmt.Sprint(m.Roots) != fmt.Sprint(want) || revision != m.Revision {
		t.Errorf("mesh %+v at revision %d; want generation %d, %d vouching, bundle %d of %v", m, revision, generation, vouched, bundle, roots)
	}
	return m
}

func (w *World) hasKey(t *testing.T, n byte) bool {
	t.Helper()
	_, err := w.S.SealedKey(t.Context(), fmt.Sprintf("key_mesh%d", n))
	if err != nil && !fault.Is(err, fault.NotFound) {
		t.Fatal(err)
	}
	return err == nil
}

func TestRolloverStepByStep(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		ctx := t.Context()
		_, err := w.S.StartRollover(ctx, domain.CA{ID: domain.MeshCA, Chain: [][]byte{der(2)}, KeyURI: "sealed:x", Generation: 2}, nil, w.Op())
		wantFault(t, err, fault.NotFound, "")
		install(t, w)
		wantMesh(t, w, 1, 0, 1, 1)
		_, err = w.S.ActivateRollover(ctx, 0, 0, w.Op())
		wantFault(t, err, fault.Conflict, "no rollover")
		_, err = w.S.FinishRollover(ctx, 0, 0, w.Op())
		wantFault(t, err, fault.Conflict, "no rollover")
		_, err = w.S.AbortRollover(ctx, w.Op())
		wantFault(t, err, fault.Conflict, "no rollover")

		r := start(t, w, 2)
		wantMesh(t, w, 1, 0, 2, 1, 2)
		// The same again, by somebody who made another CA: the first one stays, and the other key is not kept.
		other, keys := meshCA(w, 2)
		other.Chain, other.KeyURI, keys[0].ID = [][]byte{der(77)}, "sealed:key_other", "key_other"
		again, err := w.S.StartRollover(ctx, other, keys, w.Op())
		must(t, err)
		if again.Revision != r.Revision || !bytes.Equal(again.Other.Chain[0], der(2)) || r.Bundle != 2 || r.Phase != domain.RolloverStarted {
			t.Errorf("started %+v, then %+v", r, again)
		}
		if _, err := w.S.SealedKey(ctx, "key_other"); !fault.Is(err, fault.NotFound) {
			t.Errorf("the loser's key: %v", err)
		}
		_, err = w.S.FinishRollover(ctx, r.Revision, 0, w.Op())
		wantFault(t, err, fault.Conflict, "activate comes first")
		_, err = w.S.ActivateRollover(ctx, r.Revision-1, 0, w.Op())
		wantFault(t, err, fault.Conflict, "somebody else")
		wantMesh(t, w, 1, 0, 2, 1, 2)

		r, err = w.S.AbortRollover(ctx, w.Op())
		must(t, err)
		wantMesh(t, w, 1, 0, 3, 1)
		if w.hasKey(t, 2) || !w.hasKey(t, 1) || r.Phase != domain.RolloverAborted || r.EndedAt.IsZero() {
			t.Errorf("aborted: %+v, key of the next CA kept: %v", r, w.hasKey(t, 2))
		}
		again, err = w.S.AbortRollover(ctx, w.Op())
		must(t, err)
		if again.Revision != r.Revision {
			t.Errorf("aborting again moved it from %d to %d", r.Revision, again.Revision)
		}

		r = start(t, w, 2)
		wantMesh(t, w, 1, 0, 4, 1, 2)
		r, err = w.S.ActivateRollover(ctx, r.Revision, 0, w.Op())
		must(t, err)
		wantMesh(t, w, 2, 2, 5, 2, 1)
		again, err = w.S.ActivateRollover(ctx, 1, 0, w.Op())
		must(t, err)
		if again.Revision != r.Revision || !bytes.Equal(r.Other.Chain[0], der(1)) || r.Bundle != 4 {
			t.Errorf("activated %+v, then %+v", r, again)
		}
		c, k := meshCA(w, 3)
		_, err = w.S.StartRollover(ctx, c, k, w.Op())
		wantFault(t, err, fault.Conflict, "finish it")
		_, err = w.S.AbortRollover(ctx, w.Op())
		wantFault(t, err, fault.Conflict, "cannot be taken back")
		_, err = w.S.FinishRollover(ctx, r.Revision+1, 0, w.Op())
		wantFault(t, err, fault.Conflict, "somebody else")

		r, err = w.S.FinishRollover(ctx, r.Revision, 0, w.Op())
		must(t, err)
		wantMesh(t, w, 2, 0, 6, 2)
		if w.hasKey(t, 1) || !w.hasKey(t, 2) {
			t.Error("the wrong keys are there at the end")
		}
		again, err = w.S.FinishRollover(ctx, 0, 0, w.Op())
		must(t, err)
		if again.Revision != r.Revision {
			t.Errorf("finishing again moved it from %d to %d", r.Revision, again.Revision)
		}
		start(t, w, 3)
		wantMesh(t, w, 2, 0, 7, 2, 3)
		events, _, err := w.S.AuditEvents(ctx, "ca/mesh", domain.PageRequest{Size: 100})
		must(t, err)
		var actions []string
		for _, ev := range events {
			actions = append(actions, strings.TrimPrefix(ev.Action, "mesh.rollover_"))
		}
		if got := strings.Join(actions, " "); got != "started finished activated started aborted started ca.installed" {
			t.Errorf("trail, the newest first: %s", got)
		}
	})
}

// Of several who take one step at the same time, one takes it.
func TestRolloverByManyAtOnce(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		install(t, w)
		ctx := t.Context()
		race := func(step func(i int) (domain.Rollover, error)) domain.Rollover {
			t.Helper()
			var wg sync.WaitGroup
			out, errs := make([]domain.Rollover, 4), make([]error, 4)
			for i := range out {
				wg.Go(func() { out[i], errs[i] = step(i) })
			}
			wg.Wait()
			must(t, errors.Join(errs...))
			for _, r := range out {
				if r.Revision != out[0].Revision || r.Phase != out[0].Phase {
					t.Errorf("two rollovers: %+v and %+v", out[0], r)
				}
			}
			return out[0]
		}
		r := race(func(i int) (domain.Rollover, error) {
			c, keys := meshCA(w, 2)
			c.KeyURI, keys[0].ID = fmt.Sprintf("sealed:key_%d", i), fmt.Sprintf("key_%d", i)
			return w.S.StartRollover(ctx, c, keys, w.Op())
		})
		r = race(func(int) (domain.Rollover, error) { return w.S.ActivateRollover(ctx, r.Revision, 0, w.Op()) })
		race(func(int) (domain.Rollover, error) { return w.S.FinishRollover(ctx, r.Revision, 0, w.Op()) })
		wantMesh(t, w, 2, 0, 4, 2)
		var keys int
		must(t, w.DB(t).QueryRowContext(ctx, "SELECT COUNT(*) FROM sealed_key WHERE id LIKE 'key_%'").Scan(&keys))
		if keys != 1 {
			t.Errorf("%d keys are kept, want the one of the CA that signs", keys)
		}
	})
}

// A step that dies at any statement, or whose commit is not answered, has happened or has not, and taken again it is
// taken once.
func TestRolloverCutAnywhere(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		for cut := 1; cut <= 80; cut++ {
			f := &Cutter{}
			w := NewWorld(t, e, func(c *store.Config) { c.Faults = f })
			install(t, w)
			ctx := t.Context()
			f.Arm(cut)
			fired := false
			bundle := int64(1)
			again := func(step func() (domain.Rollover, error)) domain.Rollover {
				t.Helper()
				r, err := step()
				if f.Dead() {
					fired = true
					f.Arm(0)
					r, err = step()
				}
				must(t, err)
				bundle++
				m, err := w.S.Mesh(ctx)
				if f.Dead() {
					fired = true
					f.Arm(0)
					m, err = w.S.Mesh(ctx)
				}
				must(t, err)
				if m.Bundle != bundle {
					t.Fatalf("cut at %d: bundle %d after %s, want %d", cut, m.Bundle, r.Phase, bundle)
				}
				return r
			}
			r := again(func() (domain.Rollover, error) {
				c, keys := meshCA(w, 2)
				return w.S.StartRollover(ctx, c, keys, w.Op())
			})
			r = again(func() (domain.Rollover, error) { return w.S.ActivateRollover(ctx, r.Revision, 0, w.Op()) })
			again(func() (domain.Rollover, error) { return w.S.FinishRollover(ctx, r.Revision, 0, w.Op()) })
			if !fired {
				return // every statement had its turn
			}
			wantMesh(t, w, 2, 0, 4, 2)
			if w.hasKey(t, 1) || !w.hasKey(t, 2) {
				t.Errorf("cut at %d: the wrong keys are there", cut)
			}
		}
		t.Error("there were more statements than cuts")
	})
}

// move gives an agent an identity of a generation, and uses it.
func (w *World) move(t *testing.T, a domain.Agent, serial string, generation int64) {
	t.Helper()
	op := w.Op()
	must(t, w.S.RecordIdentity(t.Context(), domain.Identity{Serial: serial, AgentID: a.ID, SPKI: "spki-" + serial, NotBefore: op.At,
		NotAfter: op.At.Add(7 * 24 * time.Hour), Generation: generation}, op))
	h := w.Hello(a.ID, "n1")
	h.IdentitySerial = serial
	must(t, w.S.OpenSessions(t.Context(), []domain.SessionOpen{h})[0].Err)
}

func TestRolloverWaitsForAgents(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		install(t, w)
		ctx := t.Context()
		long, revoked := w.Agent(t, "long-gone"), w.Agent(t, "revoked")
		w.Pass(40 * 24 * time.Hour)
		web, off, bare, retired := w.Agent(t, "web"), w.Agent(t, "off"), w.Agent(t, "bare"), w.Agent(t, "retired")
		w.Open(t, web.ID, "n1")
		_, err := w.S.RetireAgent(ctx, retired.ID, "gone", w.Op())
		must(t, err)
		w.move(t, revoked, "again", 1)
		_, err = w.S.RevokeIdentities(ctx, revoked.ID, w.Op())
		must(t, err)
		progress := func(most int) domain.RolloverProgress {
			t.Helper()
			p, err := w.S.RolloverProgress(ctx, w.Op(), most)
			must(t, err)
			return p
		}
		lagging := func(p domain.RolloverProgress) string {
			var names []string
			for _, l := range p.Lags {
				names = append(names, fmt.Sprintf("%s %v %v", l.Name, l.Acknowledged, l.Moved))
			}
			return strings.Join(names, ", ")
		}
		if p := progress(9); p.Rollover.Phase != "" || p.Lagging != 0 {
			t.Errorf("without a rollover: %+v", p)
		}
		r := start(t, w, 2)
		if p := progress(9); p.Agents != 3 || p.Lagging != 3 || lagging(p) != "bare false false, off false false, web false true" {
			t.Errorf("started: %d agents, %d lag: %s", p.Agents, p.Lagging, lagging(p))
		}
		ack := func(a domain.Agent, version int64) {
			t.Helper()
			must(t, w.S.AcknowledgeTrust(ctx, []domain.TrustAck{{AgentID: a.ID, Version: version, At: w.Now()}}))
		}
		ack(web, 2)
		ack(web, 1) // late, and of no effect
		must(t, w.S.AcknowledgeTrust(ctx, []domain.TrustAck{{AgentID: off.ID, Version: 1, At: w.Now()}, {AgentID: "agt_0", Version: 1, At: w.Now()},
			{AgentID: off.ID, Version: 0, At: w.Now()}}))
		ack(long, 1)
		must(t, w.S.RecordRejection(ctx, domain.StateRejection{AgentID: bare.ID, Kind: "trust_bundle", Version: 2, Reason: "no", At: w.Now()}))
		p := progress(1)
		if p.Lagging != 2 || lagging(p) != "bare false false" || p.Lags[0].Refusal != "no" || p.Lags[0].State != domain.AgentOffline {
			t.Errorf("one acknowledged: %d lag: %s (%+v)", p.Lagging, lagging(p), p.Lags)
		}
		ack(off, 2)
		ack(bare, 2)
		if p := progress(9); p.Lagging != 0 {
			t.Errorf("all acknowledged: %s lag", lagging(p))
		}

		r, err = w.S.ActivateRollover(ctx, r.Revision, 0, w.Op())
		must(t, err)
		err = w.S.RecordIdentity(ctx, domain.Identity{Serial: "late", AgentID: web.ID, SPKI: "s", NotAfter: w.Now().Add(time.Hour), Generation: 1}, w.Op())
		wantFault(t, err, fault.Conflict, "does not sign any more")
		// What is recorded again after a restore was signed long ago.
		must(t, w.S.RecordIdentity(ctx, domain.Identity{Serial: "known", AgentID: web.ID, SPKI: "s", NotAfter: w.Now().Add(-time.Hour), FirstUsedAt: w.Now(), Generation: 1}, w.Op()))
		if p := progress(9); p.Lagging != 3 || p.FormerIdentities != 3 {
			t.Errorf("activated: %s lag, %d former identities", lagging(p), p.FormerIdentities)
		}
		w.move(t, web, "web-2", 2)
		must(t, w.S.RecordIdentity(ctx, domain.Identity{Serial: "off-2", AgentID: off.ID, SPKI: "s", NotBefore: w.Now(), NotAfter: w.Now().Add(time.Hour), Generation: 2}, w.Op()))
		if p := progress(9); lagging(p) != "bare true false, off true false" {
			t.Errorf("an identity that was never used counts: %s", lagging(p))
		}
		// An identity that has ended can still be renewed for a while: its agent must not be forgotten.
		w.Pass(20 * 24 * time.Hour)
		if p := progress(9); lagging(p) != "bare true false, off true false" || p.FormerIdentities != 0 {
			t.Errorf("after the end of the identities: %s, %d former ones", lagging(p), p.FormerIdentities)
		}
		w.Pass(20 * 24 * time.Hour)
		if p := progress(9); p.Agents != 0 || p.Lagging != 0 {
			t.Errorf("when nobody can come back by itself: %d agents, %s", p.Agents, lagging(p))
		}
		_, err = w.S.FinishRollover(ctx, r.Revision, 0, w.Op())
		must(t, err)
	})
}

func TestRolloverKnowsTheTokensOfTheFormerRoot(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		install(t, w)
		ctx := t.Context()
		token := func(name string, ttl time.Duration) {
			t.Helper()
			must(t, w.S.CreateJoinToken(ctx, domain.JoinToken{ID: "jt_" + name, Hash: bytes.Repeat([]byte{1}, 32), ExpiresAt: w.Now().Add(ttl)}, w.Op()))
		}
		token("early", 24*time.Hour)
		token("short", time.Minute)
		token("revoked", 24*time.Hour)
		_, err := w.S.RevokeJoinToken(ctx, "jt_revoked", w.Op())
		must(t, err)
		w.Agent(t, "used-up")
		w.Pass(time.Hour)
		r := start(t, w, 2)
		w.Pass(time.Hour)
		token("between", 24*time.Hour)
		w.Pass(time.Hour)
		_, err = w.S.ActivateRollover(ctx, r.Revision, 0, w.Op())
		must(t, err)
		w.Pass(time.Second)
		token("new", 24*time.Hour)
		p, err := w.S.RolloverProgress(ctx, w.Op(), 1)
		must(t, err)
		if p.TokensTotal != 2 || len(p.Tokens) != 1 || p.Tokens[0].ID != "jt_between" || p.Tokens[0].Hash != nil {
			t.Errorf("%d tokens of the former root: %+v", p.TokensTotal, p.Tokens)
		}
	})
}
