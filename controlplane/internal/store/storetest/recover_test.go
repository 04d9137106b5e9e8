package storetest

import (
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// lostLeaf is what an agent holds of a generation that was issued after the backup.
func (w *World) lostLeaf(c domain.Certificate, agentID string, generation int64, serial string) domain.FoundLeaf {
	body := []byte("der " + serial)
	return domain.FoundLeaf{IssuerID: w.Issuer, Serial: serial, AgentID: agentID, CertificateID: c.ID, Generation: generation, Names: c.Names,
		DER: body, Chain: [][]byte{der(1)}, Fingerprint: domain.HashHex(body), SPKI: "key of " + serial, KeyAlgorithm: domain.ECDSAP256,
		NotBefore: w.Now().Add(-time.Hour), NotAfter: w.Now().Add(40 * 24 * time.Hour)}
}

func (w *World) adopt(t *testing.T, l domain.FoundLeaf, want domain.Adoption) string {
	t.Helper()
	outs, err := w.S.AdoptLeaves(t.Context(), []domain.FoundLeaf{l}, w.Op())
	must(t, err)
	if outs[0].Adoption != want {
		t.Errorf("serial %s: %+v, want %s", l.Serial, outs[0], want)
	}
	return outs[0].Reason
}

func (w *World) recover(t *testing.T) domain.Recovery {
	t.Helper()
	r, err := w.S.Recover(t.Context(), []string{"held", "never_held"}, w.Op())
	must(t, err)
	return r
}

// TestRecoverCutsOff: nothing that was minted before a recovery, or after the backup, writes afterwards.
func TestRecoverCutsOff(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		ctx := t.Context()
		a := w.Agent(t, "web1")
		g := w.Target(t, a.ID, "one")
		c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
		session := w.Open(t, a.ID, "n1")
		deployment := w.Issue(t, jobs[0], session.Epoch, "key-1")[0]
		deployAttempt := w.Dispatch(t, deployment.Job, session.Epoch)
		renewals, err := w.S.RenewCertificate(ctx, c.ID, "test", w.Op())
		must(t, err)
		renewal := renewals[0]
		attempt := w.Dispatch(t, renewal, session.Epoch)
		signed := w.S.RecordIntents(ctx, []domain.Intent{w.Intent(renewal, attempt, "key-2")})[0]
		must(t, signed.Err)
		fence := w.Duty(t, "held")
		w.Pass(time.Hour)

		r := w.recover(t)
		if r.Generation != w.Now().UnixMicro() || r.Leaves != 1 || r.Jobs != 2 || r.Abandoned != 1 || r.Sessions != 1 || r.Targets != 1 || r.Duties != 2 {
			t.Errorf("%+v", r)
		}
		if at, err := w.S.RecoveredAt(ctx); err != nil || !at.Equal(w.Now()) {
			t.Errorf("recovered at %v, %v", at, err)
		}
		conflict := func(what string, err error) {
			t.Helper()
			if !fault.Is(err, fault.Conflict) {
				t.Errorf("%s: %v", what, err)
			}
		}
		// What the node of before, or one of the time that was lost, still tries. Such a one may know any later epoch or
		// attempt, counted up from where the backup was.
		for n := range int64(100) {
			later := fence
			later.Epoch += domain.Epoch(n)
			conflict("a fenced write", w.S.PostponeLeaf(ctx, later, c.ID, a.ID, w.Now()))
			never := domain.Fence{Duty: "never_held", Holder: "n1", Epoch: domain.Epoch(n)}
			conflict("a fenced write under a duty that the backup does not know", w.S.PostponeLeaf(ctx, never, c.ID, a.ID, w.Now()))
			conflict("a dispatch", w.S.Dispatch(ctx, []domain.Dispatch{{JobID: renewal.ID, AgentID: a.ID, Attempt: attempt, Epoch: session.Epoch + domain.Epoch(n), At: w.Now()}})[0])
			conflict("an acceptance", w.S.Accept(ctx, []domain.Acceptance{{JobID: renewal.ID, AgentID: a.ID, Attempt: attempt + n, At: w.Now()}})[0])
			conflict("a result", w.S.CompleteDeployments(ctx, []domain.DeployResult{w.Deployed(deployment, deployAttempt+n)})[0].Err)
			conflict("an intent", w.S.RecordIntents(ctx, []domain.Intent{w.Intent(renewal, attempt+n, "key-2")})[0].Err)
		}
		conflict("a version", w.S.RecordIssued(ctx, []domain.Issued{w.Signed(signed.Intent)})[0].Err)
		conflict("the end of a session", w.S.CloseSession(ctx, a.ID, session.Epoch, w.Now()))
		w.Check(t)

		// The new history goes on above all of it.
		if f := w.Duty(t, "never_held"); int64(f.Epoch) <= r.Generation {
			t.Errorf("epoch %d of a duty that was never held", f.Epoch)
		}
		session = w.Open(t, a.ID, "n1")
		if int64(session.Epoch) <= r.Generation {
			t.Errorf("epoch %d", session.Epoch)
		}
		renewal = w.Job(t, renewal.ID)
		if renewal.Generation < w.Now().Unix() || renewal.Attempt < r.Generation || renewal.State != domain.JobAwaitingCSR {
			t.Errorf("renewal: %+v", renewal)
		}
		issued := w.Issue(t, renewal, session.Epoch, "key-3")
		if len(issued) != 1 || issued[0].Version.Generation != renewal.Generation || issued[0].Version.Serial == signed.Intent.Serial {
			t.Fatalf("issued: %+v", issued)
		}
		if out := w.Deploy(t, issued[0], session.Epoch); out.Settlement.RetireBelow != renewal.Generation {
			t.Errorf("%+v", out)
		}
		w.Check(t)

		// Again, at once and later: nothing is lost and nothing goes back.
		again := w.recover(t)
		if again.Generation != r.Generation+1 || again.Abandoned != 0 || again.Jobs != 0 {
			t.Errorf("again: %+v", again)
		}
		w.Pass(time.Minute)
		if third := w.recover(t); third.Generation != w.Now().UnixMicro() {
			t.Errorf("third: %+v", third)
		}
		w.Check(t)
	})
}

// TestRecoverKeepsWaiting: what waits for approval goes on to wait, and a CRL gets a number above those of before.
func TestRecoverKeepsWaiting(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		ctx := t.Context()
		a := w.Agent(t, "web1")
		_, jobs := w.Order(t, "a.test", domain.Policy{RequireApproval: true}, w.Target(t, a.ID, "one").ID)
		fence := w.Duty(t, "crl")
		number := w.Now().UnixMilli()
		must(t, w.S.SaveCRL(ctx, fence, domain.CRL{IssuerID: w.Issuer, Number: number, DER: []byte{1}, ThisUpdate: w.Now(), NextUpdate: w.Now().Add(time.Hour)}))
		w.Pass(time.Second)
		w.recover(t)
		if j := w.Job(t, jobs[0].ID); j.State != domain.JobAwaitingApproval {
			t.Errorf("%+v", j)
		}
		crl, err := w.S.CRL(ctx, w.Issuer, 0)
		if err != nil || crl.Number < w.Now().UnixMilli() || !crl.ThisUpdate.IsZero() {
			t.Errorf("%+v %v", crl, err)
		}
		// A host whose clock is behind raises it all the same.
		w.Pass(-24 * time.Hour)
		w.recover(t)
		if again, err := w.S.CRL(ctx, w.Issuer, 0); err != nil || again.Number != crl.Number+1 {
			t.Errorf("%+v %v", again, err)
		}
	})
}

// TestAdopt: leaves of the lost time become versions again, or are found and can be revoked.
func TestAdopt(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		ctx := t.Context()
		a, b := w.Agent(t, "web1"), w.Agent(t, "web2")
		g := w.Target(t, a.ID, "one")
		c, jobs := w.Order(t, "a.test", domain.Policy{}, g.ID)
		session := w.Open(t, a.ID, "n1")
		w.Deploy(t, w.Issue(t, jobs[0], session.Epoch, "key-1")[0], session.Epoch)
		revoked, jobs := w.Order(t, "revoked.test", domain.Policy{}, w.Target(t, a.ID, "two").ID)
		w.Issue(t, jobs[0], session.Epoch, "key-r")
		_, _, err := w.S.RevokeCertificate(ctx, revoked.ID, domain.RevocationReason(1), w.Op())
		must(t, err)
		open, jobs := w.Order(t, "open.test", domain.Policy{}, w.Target(t, a.ID, "three").ID)
		attempt := w.Dispatch(t, jobs[0], session.Epoch)
		intended := w.S.RecordIntents(ctx, []domain.Intent{w.Intent(jobs[0], attempt, "key of beef05")})[0]
		must(t, intended.Err)
		w.Pass(2 * time.Hour)

		// Never recovered: nobody can have issued it.
		if reason := w.adopt(t, w.lostLeaf(c, a.ID, 2, "beef01"), domain.AdoptionFound); reason == "" {
			t.Error("no reason is given")
		}
		w.recover(t)
		w.adopt(t, w.lostLeaf(c, a.ID, 2, "beef02"), domain.AdoptionVersion)
		w.adopt(t, w.lostLeaf(c, a.ID, 2, "beef02"), domain.AdoptionKnown)
		w.Check(t)
		v := w.View(t, c.ID)
		if l := v.Leaves[0]; l.Current != 2 || l.Serial != "beef02" || l.Generation < w.Now().Unix() {
			t.Errorf("%+v", l)
		}
		if due, err := w.S.DuePlacements(ctx, domain.ShardOf(c.ID), w.Now(), 10); err != nil || len(due) != 1 || due[0].Wanted != 2 {
			t.Errorf("due: %+v %v", due, err)
		}
		// Older and newer ones, in any order; the newest is the leaf's.
		w.adopt(t, w.lostLeaf(c, a.ID, 9, "beef09"), domain.AdoptionVersion)
		w.adopt(t, w.lostLeaf(c, a.ID, 3, "beef03"), domain.AdoptionVersion)
		if l := w.View(t, c.ID).Leaves[0]; l.Current != 9 || l.Serial != "beef09" {
			t.Errorf("%+v", l)
		}
		w.Check(t)
		// An intent of the backup was signed after it.
		early := w.lostLeaf(open, a.ID, 1, "beef05")
		early.Serial = intended.Intent.Serial
		w.adopt(t, early, domain.AdoptionVersion)
		if n := w.count(t, "SELECT COUNT(*) FROM intent WHERE state = 'Consumed' AND id = '"+intended.Intent.ID+"'"); n != 1 {
			t.Error("its intent is not consumed")
		}
		// What is revoked stays so, for the same reason.
		w.adopt(t, w.lostLeaf(revoked, a.ID, 2, "beef06"), domain.AdoptionVersion)
		w.Check(t)

		// What cannot be a version is found.
		other, late, high, zero := w.lostLeaf(c, a.ID, 4, "cafe01"), w.lostLeaf(c, a.ID, 5, "cafe02"), w.lostLeaf(c, a.ID, 1<<40, "cafe03"), w.lostLeaf(c, a.ID, 0, "cafe04")
		other.Names = domain.Names{CommonName: "other.test", DNS: []string{"other.test"}}
		late.NotBefore = w.Now().Add(time.Minute)
		noOrder, notHere, taken := w.lostLeaf(c, a.ID, 1, "cafe05"), w.lostLeaf(c, b.ID, 2, "cafe06"), w.lostLeaf(c, a.ID, 9, "cafe07")
		noOrder.CertificateID = "cert_gone"
		for _, l := range []domain.FoundLeaf{other, late, high, zero, noOrder, notHere, taken} {
			if reason := w.adopt(t, l, domain.AdoptionFound); reason == "" {
				t.Errorf("%s: no reason is given", l.Serial)
			}
			w.adopt(t, l, domain.AdoptionKnown)
		}
		found, err := w.S.FoundLeaves(ctx)
		if err != nil || len(found) != 8 {
			t.Fatalf("%d found, %v", len(found), err)
		}
		must(t, w.S.RevokeFoundLeaf(ctx, "cafe05", domain.RevocationReason(1), w.Op()))
		must(t, w.S.RevokeFoundLeaf(ctx, "cafe05", domain.RevocationReason(4), w.Op()))
		if err := w.S.RevokeFoundLeaf(ctx, "cafe", 1, w.Op()); !fault.Is(err, fault.NotFound) {
			t.Errorf("revoke what is not there: %v", err)
		}
		entries, err := w.S.Revoked(ctx, w.Issuer, w.Now())
		must(t, err)
		listed := map[string]domain.RevocationReason{}
		for _, x := range entries {
			listed[x.Serial] = x.Reason
		}
		if len(listed) != 3 || listed["cafe05"] != 1 || listed["beef06"] != 1 {
			t.Errorf("revoked: %v", listed)
		}
		w.Check(t)
	})
}

// TestReadmit: identities of before the recovery are known again when they are shown, others are not.
func TestReadmit(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		ctx := t.Context()
		a, retired := w.Agent(t, "web1"), w.Agent(t, "web2")
		_, err := w.S.RetireAgent(ctx, retired.ID, "test", w.Op())
		must(t, err)
		lost := domain.Identity{Serial: "1057", AgentID: a.ID, SPKI: "key", NotBefore: w.Now(), NotAfter: w.Now().Add(time.Hour), Generation: 2}
		if err := w.S.ReadmitIdentity(ctx, lost, w.Op()); !fault.Is(err, fault.Conflict) {
			t.Errorf("without a recovery: %v", err)
		}
		w.Pass(time.Minute)
		w.recover(t)
		must(t, w.S.ReadmitIdentity(ctx, lost, w.Op()))
		if i, err := w.S.Identity(ctx, lost.Serial); err != nil || i.AgentID != a.ID || i.Generation != 2 {
			t.Errorf("%+v %v", i, err)
		}
		hello := w.Hello(a.ID, "n1")
		hello.IdentitySerial = lost.Serial
		must(t, w.S.OpenSessions(ctx, []domain.SessionOpen{hello})[0].Err)
		for what, change := range map[string]func(*domain.Identity){
			"a known one":          func(*domain.Identity) {},
			"one of after":         func(i *domain.Identity) { i.Serial, i.NotBefore = "1", w.Now().Add(time.Second) },
			"a retired agent's":    func(i *domain.Identity) { i.Serial, i.AgentID = "2", retired.ID },
			"one of nobody's here": func(i *domain.Identity) { i.Serial, i.AgentID = "3", "agt_gone" },
		} {
			i := lost
			change(&i)
			if err := w.S.ReadmitIdentity(ctx, i, w.Op()); err == nil {
				t.Errorf("%s is readmitted", what)
			}
		}
	})
}

// TestRelist: a CRL of the lost time brings its revocations back.
func TestRelist(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		ctx := t.Context()
		a := w.Agent(t, "web1")
		session := w.Open(t, a.ID, "n1")
		issue := func(name string) (domain.Certificate, domain.Version) {
			c, jobs := w.Order(t, name, domain.Policy{}, w.Target(t, a.ID, name).ID)
			return c, w.Issue(t, jobs[0], session.Epoch, "key of "+name)[0].Version
		}
		kept, keptVersion := issue("kept.test")
		lost, lostVersion := issue("lost.test")
		w.recover(t)
		end := w.Now().AddDate(5, 0, 0)
		entries := []domain.RevokedEntry{{Serial: lostVersion.Serial, RevokedAt: w.Now(), Reason: 1}, {Serial: keptVersion.Serial, RevokedAt: w.Now(), Reason: 4},
			{Serial: "dead01", RevokedAt: w.Now(), Reason: 5}}
		number := w.Now().AddDate(1, 0, 0).UnixMilli()
		must(t, w.S.SaveCRL(ctx, w.Duty(t, "crl"), domain.CRL{IssuerID: w.Issuer, Number: 1, DER: []byte{1}, ThisUpdate: w.Now(), NextUpdate: w.Now()}))
		r, err := w.S.Relist(ctx, w.Issuer, number, entries, end, w.Op())
		must(t, err)
		if len(r.Certificates) != 1 || r.Certificates[0] != "lost.test" || r.Versions != 1 || r.Unknown != 1 {
			t.Errorf("%+v", r)
		}
		if again, err := w.S.Relist(ctx, w.Issuer, number, entries, end, w.Op()); err != nil || len(again.Certificates)+int(again.Versions+again.Unknown) != 0 {
			t.Errorf("again: %+v %v", again, err)
		}
		if v := w.View(t, lost.ID); v.Certificate.Status != domain.CertificateRevoked {
			t.Errorf("%+v", v.Certificate)
		}
		if v := w.View(t, kept.ID); v.Certificate.Status == domain.CertificateRevoked {
			t.Errorf("%+v", v.Certificate)
		}
		listed, err := w.S.Revoked(ctx, w.Issuer, w.Now())
		if err != nil || len(listed) != 3 {
			t.Errorf("%+v %v", listed, err)
		}
		if crl, err := w.S.CRL(ctx, w.Issuer, 0); err != nil || crl.Number != number {
			t.Errorf("%+v %v", crl, err)
		}
		// Whoever has the unknown one says so, and it stays revoked.
		w.adopt(t, w.lostLeaf(kept, a.ID, 2, "dead01"), domain.AdoptionKnown)
		found, err := w.S.FoundLeaves(ctx)
		if err != nil || len(found) != 1 || found[0].AgentID != a.ID || found[0].RevokedAt.IsZero() {
			t.Errorf("%+v %v", found, err)
		}
		w.Check(t)
	})
}
