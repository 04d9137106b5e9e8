package storetest_test

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestCreateCertificateRoundTrip(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		a, b := x.agent("web-1"), x.agent("web-2")
		t1, t2, t3 := x.target(a, "t1"), x.target(b, "t2"), x.target(a, "t3")
		n := x.order("site")
		n.TargetIDs = []string{t1.ID, "t2", t3.ID, t1.ID}
		n.Certificate.Names = domain.Names{CommonName: "b.example", DNS: []string{"b.example", "*.a.example", "b.example", "A.example"},
			IP: []string{"2001:db8::1", "192.0.2.1"}, Email: []string{"o@example.com"}, URI: []string{"spiffe://x/y"}}
		n.Certificate.Policy = domain.Policy{Fraction: 0.5, AlertThresholdsDays: []int{20, 3}, Disabled: true,
			Windows: []domain.Window{{Days: []int{0, 6}, Start: 60, End: 120}}}
		c, jobs, err := x.CreateCertificate(x.ctx, n)
		x.must(err)
		issuer, err := x.Issuer(x.ctx, "ca")
		x.must(err)
		profile, err := x.Profile(x.ctx, "server")
		x.must(err)
		want := n.Certificate
		want.Names = domain.Names{CommonName: "b.example", DNS: []string{"*.a.example", "A.example", "b.example"},
			IP: []string{"192.0.2.1", "2001:db8::1"}, Email: []string{"o@example.com"}, URI: []string{"spiffe://x/y"}}
		want.IssuerID, want.ProfileID, want.Status, want.Revision = issuer.ID, profile.ID, domain.CertificatePending, 1
		want.CreatedBy, want.CreatedAt, want.UpdatedAt = "operator:alice", domain.Micro(x.now), domain.Micro(x.now)
		same(t, "certificate", c, want)
		if len(jobs) != 2 {
			t.Fatalf("%d jobs", len(jobs))
		}
		for i, agent := range []domain.Agent{a, b} {
			same(t, "job", jobs[i], domain.Job{ID: jobs[i].ID, Kind: domain.JobIssuance, State: domain.JobAwaitingCSR, CertificateID: c.ID,
				AgentID: agent.ID, Generation: 1, MaxTries: domain.DefaultMaxTries, RunAt: domain.Micro(x.now), Reason: "ordered",
				RequestID: "req_1", CreatedAt: domain.Micro(x.now), UpdatedAt: domain.Micro(x.now)})
			read, err := x.Job(x.ctx, jobs[i].ID)
			x.must(err)
			same(t, "job as read", read, jobs[i])
		}
		view, err := x.CertificateView(x.ctx, c.ID)
		x.must(err)
		place := func(g domain.Target) domain.Placement {
			return domain.Placement{CertificateID: c.ID, TargetID: g.ID, AgentID: g.AgentID, State: domain.PlacementPending, UpdatedAt: domain.Micro(x.now)}
		}
		leaf := func(a domain.Agent) domain.Leaf {
			return domain.Leaf{CertificateID: c.ID, AgentID: a.ID, Generation: 1}
		}
		same(t, "view", view, domain.CertificateView{Certificate: want, Leaves: []domain.Leaf{leaf(a), leaf(b)},
			Placements: []domain.Placement{place(t1), place(t2), place(t3)}, TargetNames: map[string]string{t1.ID: "t1", t2.ID: "t2", t3.ID: "t3"}})
		same(t, "trail", x.actions("certificate/"+c.ID), []string{"certificate.created"})
		same(t, "trail of the job", x.actions("job/"+jobs[0].ID), []string{"job.created"})
		byName, err := x.CertificateView(x.ctx, "site")
		x.must(err)
		same(t, "view by name", byName, view)
	})
}

func TestCreateCertificateRefusals(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		a := x.agent("web")
		g := x.target(a, "t1")
		x.create(x.order("web", g))
		off := domain.Target{ID: id.New(id.Target), Name: "off", AgentID: a.ID, Kind: "file", CreatedAt: x.now}
		x.must(x.CreateTarget(x.ctx, off, x.op()))
		retired := x.agent("old")
		tr := x.target(retired, "tr")
		_, err := x.RetireAgent(x.ctx, retired.ID, "r", x.op())
		x.must(err)
		for name, c := range map[string]struct {
			change func(*domain.NewCertificate)
			class  fault.Class
			words  string
		}{
			"name taken":       {func(n *domain.NewCertificate) { n.Certificate.Name = "web" }, fault.Conflict, `certificate name "web" is taken; choose another or use certs get web`},
			"name like an id":  {func(n *domain.NewCertificate) { n.Certificate.Name = "cert_1" }, fault.Invalid, "name"},
			"no name":          {func(n *domain.NewCertificate) { n.Certificate.Name = "" }, fault.Invalid, "name"},
			"NUL in a name":    {func(n *domain.NewCertificate) { n.Certificate.Name = "a\x00" }, fault.Invalid, "name"},
			"broken UTF-8":     {func(n *domain.NewCertificate) { n.Certificate.Names.DNS = []string{"\xff"} }, fault.Invalid, "names.dns"},
			"no id":            {func(n *domain.NewCertificate) { n.Certificate.ID = "" }, fault.Invalid, "id"},
			"no targets":       {func(n *domain.NewCertificate) { n.TargetIDs = nil }, fault.Invalid, "at least one"},
			"too many targets": {func(n *domain.NewCertificate) { n.TargetIDs = make([]string, 1001) }, fault.Invalid, "1001"},
			"unknown target":   {func(n *domain.NewCertificate) { n.TargetIDs = []string{g.ID, "nope"} }, fault.Invalid, `no target "nope"`},
			"disabled target":  {func(n *domain.NewCertificate) { n.TargetIDs = []string{"off"} }, fault.Invalid, `"off" is disabled`},
			"retired agent":    {func(n *domain.NewCertificate) { n.TargetIDs = []string{tr.ID} }, fault.Invalid, "retired"},
			"unknown issuer":   {func(n *domain.NewCertificate) { n.Certificate.IssuerID = "iss_x" }, fault.Invalid, "issuer_id"},
			"no profile":       {func(n *domain.NewCertificate) { n.Certificate.ProfileID = "" }, fault.Invalid, "profile_id"},
		} {
			n := x.order("new", g)
			c.change(&n)
			_, _, err := x.CreateCertificate(x.ctx, n)
			if !fault.Is(err, c.class) {
				t.Errorf("%s: %v", name, err)
				continue
			}
			refused(t, err, c.class, c.words)
		}
		counts, err := x.Counts(x.ctx)
		x.must(err)
		same(t, "certificates", counts.Certificates, map[domain.CertificateStatus]int64{domain.CertificatePending: 1})
		same(t, "open jobs", counts.OpenJobs, map[domain.JobState]int64{domain.JobAwaitingCSR: 1})
		same(t, "agents", counts.Agents, map[domain.AgentState]int64{domain.AgentOffline: 1, domain.AgentRetired: 1})
	})
}

func TestTargetHoldsOneCertificate(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		a := x.agent("web")
		t1, t2, free := x.target(a, "t1"), x.target(a, "t2"), x.target(x.agent("web-b"), "free")
		old, _ := x.create(x.order("old", t1))
		x.create(x.order("other", free))
		_, _, err := x.CreateCertificate(x.ctx, x.order("both", t1, t2))
		refused(t, err, fault.Conflict, `target "t1" holds certificate "old"`)
		x.create(x.order("two", t2)) // the refused order took nothing
		_, _, err = x.RevokeCertificate(x.ctx, old.ID, 0, x.op())
		x.must(err)
		next, _ := x.create(x.order("next", t1))
		_, err = x.sql().ExecContext(x.ctx, "UPDATE certificate SET status = $1 WHERE id = $2", string(domain.CertificateArchived), next.ID)
		x.must(err)
		x.create(x.order("last", t1))
	})
}

// TestOneOfManyOrdersTakesTheTarget: orders at once do not both find it free.
func TestOneOfManyOrdersTakesTheTarget(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		g := x.target(x.agent("web"), "t1")
		var won atomic.Int64
		var wg sync.WaitGroup
		for i := range 8 {
			n := x.order("c"+strconv.Itoa(i), g)
			wg.Go(func() {
				switch _, _, err := x.CreateCertificate(x.ctx, n); {
				case err == nil:
					won.Add(1)
				case !fault.Is(err, fault.Conflict):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		same(t, "orders that were taken", won.Load(), int64(1))
	})
}

// TestOrdersThatShareACommit: what is wrong with some of many orders at once leaves the others alone.
func TestOrdersThatShareACommit(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		a := x.agent("web")
		const all = 24
		errs := make([]error, all)
		orders := make([]domain.NewCertificate, all)
		for i := range all {
			orders[i] = x.order(fmt.Sprintf("c%d", i), x.target(a, fmt.Sprintf("t%d", i)))
			orders[i].RequestID = fmt.Sprintf("req-%d", i)
			switch i % 4 {
			case 1:
				orders[i].Certificate.ProfileID = "nobody"
			case 2:
				orders[i].Certificate.Name = "same"
			}
		}
		var wg sync.WaitGroup
		for i, n := range orders {
			wg.Go(func() { _, _, errs[i] = x.CreateCertificate(x.ctx, n) })
		}
		wg.Wait()
		same := 0
		for i, err := range errs {
			switch {
			case i%4 == 1:
				refused(t, err, fault.Invalid, `no profile "nobody"`)
			case i%4 == 2 && err != nil:
				refused(t, err, fault.Conflict, `name "same" is taken`)
			case i%4 == 2:
				same++
			case err != nil:
				t.Errorf("order %d: %v", i, err)
			}
		}
		if same != 1 {
			t.Errorf("%d certificates of one name", same)
		}
		if n := x.number("SELECT COUNT(*) FROM certificate"); n != all/2+1 {
			t.Errorf("%d certificates", n)
		}
		if n := x.number("SELECT COUNT(*) FROM job WHERE finished_at IS NULL"); n != all/2+1 {
			t.Errorf("%d jobs", n)
		}
	})
}

func TestCreateCertificateOncePerRequest(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		g, h := x.target(x.agent("web"), "t1"), x.target(x.agent("web-b"), "t2")
		n := x.order("site", g, h)
		n.RequestID = "req-7"
		var wg sync.WaitGroup
		var mu sync.Mutex
		ids := map[string]int{}
		for range 6 {
			again := n
			again.Certificate.ID = id.New(id.Certificate)
			wg.Go(func() {
				c, jobs, err := x.CreateCertificate(x.ctx, again)
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					ids[c.ID]++
					if len(jobs) != 2 {
						t.Errorf("%d jobs", len(jobs))
					}
				} else if !fault.Is(err, fault.Retryable) {
					t.Errorf("create: %v", err)
				}
			})
		}
		wg.Wait()
		if len(ids) != 1 {
			t.Fatalf("certificates %v", ids)
		}
		again := n
		again.Certificate.ID, again.TargetIDs = id.New(id.Certificate), []string{"t2", "t1"}
		again.Certificate.IssuerID = "ca"
		c, _, err := x.CreateCertificate(x.ctx, again)
		x.must(err)
		if ids[c.ID] == 0 {
			t.Fatalf("another certificate")
		}
		same(t, "trail", x.actions("certificate/"+c.ID), []string{"certificate.created"})
		for name, change := range map[string]func(*domain.NewCertificate){
			"name":    func(n *domain.NewCertificate) { n.Certificate.Name = "other" },
			"names":   func(n *domain.NewCertificate) { n.Certificate.Names.DNS = []string{"x.example"} },
			"owner":   func(n *domain.NewCertificate) { n.Certificate.Owner = "x" },
			"policy":  func(n *domain.NewCertificate) { n.Certificate.Policy.Disabled = true },
			"targets": func(n *domain.NewCertificate) { n.TargetIDs = n.TargetIDs[:1] },
			"actor":   func(n *domain.NewCertificate) { n.Op.Actor = "operator:mallory" },
		} {
			other := n
			other.Certificate.ID = id.New(id.Certificate)
			change(&other)
			_, _, err := x.CreateCertificate(x.ctx, other)
			if !fault.Is(err, fault.Conflict) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

func TestRenewCertificate(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		a, b := x.agent("web-1"), x.agent("web-2")
		c, first := x.create(x.order("site", x.target(a, "t1"), x.target(b, "t2")))
		jobs, err := x.RenewCertificate(x.ctx, "site", "hurry", x.op())
		x.must(err)
		same(t, "the jobs that are open", jobs, first)
		x.issue(c, a.ID, "01", 1, x.now.Add(time.Hour))
		_, err = x.sql().ExecContext(x.ctx, "UPDATE leaf SET due_at = 7, backoff_until = 9, failures = 2 WHERE certificate_id = $1 AND agent_id = $2", c.ID, a.ID)
		x.must(err)
		jobs, err = x.RenewCertificate(x.ctx, c.ID, "hurry", x.op(time.Minute))
		x.must(err)
		if len(jobs) != 2 || jobs[0].Kind != domain.JobRenewal || jobs[0].Generation != 2 || jobs[0].Reason != "hurry" || jobs[1].ID != first[1].ID {
			t.Fatalf("jobs %+v", jobs)
		}
		if _, ok := x.dueAt("leaf", c.ID, "agent_id", a.ID); ok {
			t.Fatal("the leaf is due while its job is open")
		}
		view, err := x.CertificateView(x.ctx, c.ID)
		x.must(err)
		l := view.Leaves[0]
		if l.Generation != 2 || !l.BackoffUntil.IsZero() || l.Failures != 2 || l.Current != 1 {
			t.Fatalf("leaf %+v", l)
		}
		again, err := x.RenewCertificate(x.ctx, c.ID, "hurry", x.op(time.Minute))
		x.must(err)
		same(t, "once more", again, jobs)
		x.issue(c, b.ID, "02", 1, x.now.Add(time.Hour))
		_, err = x.RenewCertificate(x.ctx, c.ID, "both", x.op(2*time.Minute))
		x.must(err)
		view, err = x.CertificateView(x.ctx, c.ID)
		x.must(err)
		same(t, "status", view.Certificate.Status, domain.CertificateRenewalInProgress)
		same(t, "not after", view.Certificate.NotAfter, domain.Micro(x.now.Add(time.Hour)))

		for _, status := range []domain.CertificateStatus{domain.CertificateRevoked, domain.CertificateArchived} {
			_, err = x.sql().ExecContext(x.ctx, "UPDATE certificate SET status = $1 WHERE id = $2", string(status), c.ID)
			x.must(err)
			_, err = x.RenewCertificate(x.ctx, c.ID, "r", x.op())
			refused(t, err, fault.Conflict, string(status), "certs create")
		}
	})
}

func TestRevokeCertificateAndCRL(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		a, b := x.agent("web-1"), x.agent("web-2")
		c, _ := x.create(x.order("site", x.target(a, "t1"), x.target(b, "t2")))
		other, _ := x.create(x.order("other", x.target(a, "t3")))
		x.issue(c, a.ID, "0c", 1, x.now.Add(-time.Second))
		x.issue(c, a.ID, "0b", 2, x.now.Add(time.Hour))
		x.issue(c, b.ID, "0a", 1, x.now.Add(2*time.Hour))
		x.issue(other, a.ID, "0d", 1, x.now.Add(time.Hour))
		jobs, err := x.RenewCertificate(x.ctx, c.ID, "r", x.op())
		x.must(err)
		_, err = x.sql().ExecContext(x.ctx, `INSERT INTO intent (id, certificate_id, agent_id, generation, job_id, attempt, issuer_id, serial, tbs, order_key,
ref, spki, state, recovery, created_at) VALUES ('int_1', $1, $2, 3, $3, 1, $4, '0f', NULL, '', '', '', 'Open', 0, 1)`, c.ID, a.ID, jobs[0].ID, c.IssuerID)
		x.must(err)
		got, serials, err := x.RevokeCertificate(x.ctx, "site", 6, x.op(time.Minute))
		x.must(err)
		same(t, "serials", serials, []string{"0a", "0b"})
		view, err := x.CertificateView(x.ctx, c.ID)
		x.must(err)
		same(t, "certificate", view.Certificate, got)
		same(t, "status", got.Status, domain.CertificateRevoked)
		for _, l := range view.Leaves {
			if !l.Revoked || !l.DueAt.IsZero() {
				t.Errorf("leaf %+v", l)
			}
		}
		for _, j := range jobs {
			j, err = x.Job(x.ctx, j.ID)
			x.must(err)
			same(t, "job", j.State, domain.JobCancelled)
		}
		var state string
		x.must(x.sql().QueryRowContext(x.ctx, "SELECT state FROM intent WHERE id = 'int_1'").Scan(&state))
		same(t, "intent", state, string(domain.IntentAbandoned))
		again, serials2, err := x.RevokeCertificate(x.ctx, c.ID, 1, x.op(30*time.Minute))
		x.must(err)
		same(t, "certificate at the second time", again, got)
		same(t, "serials at the second time", serials2, serials)
		same(t, "trail", x.actions("certificate/"+c.ID), []string{"certificate.created", "certificate.renewal_ordered", "certificate.revoked"})

		entries, err := x.Revoked(x.ctx, c.IssuerID, x.now.Add(time.Minute))
		x.must(err)
		at := domain.Micro(x.now.Add(time.Minute))
		same(t, "entries", entries, []domain.RevokedEntry{
			{Serial: "0a", RevokedAt: at, Reason: 6, NotAfter: domain.Micro(x.now.Add(2 * time.Hour))},
			{Serial: "0b", RevokedAt: at, Reason: 6, NotAfter: domain.Micro(x.now.Add(time.Hour))}})
		entries, err = x.Revoked(x.ctx, c.IssuerID, x.now.Add(time.Hour))
		x.must(err)
		same(t, "entries that have not expired", len(entries), 1)

		versions, next, err := x.Versions(x.ctx, "site", domain.PageRequest{Size: 2})
		x.must(err)
		rest, last, err := x.Versions(x.ctx, "site", domain.PageRequest{Size: 2, After: next})
		x.must(err)
		versions = append(versions, rest...)
		var seen []string
		for _, v := range versions {
			seen = append(seen, fmt.Sprintf("%t %d %s", v.AgentID == b.ID, v.Generation, v.Serial))
		}
		same(t, "versions", seen, []string{"true 1 0a", "false 2 0b", "false 1 0c"})
		same(t, "cursor after the last page", last, "")
		same(t, "version", versions[1], domain.Version{IssuerID: c.IssuerID, Serial: "0b", CertificateID: c.ID, AgentID: a.ID, Generation: 2, DER: der(300, 9),
			Chain: [][]byte{der(130, 1), der(3, 2)}, Fingerprint: "fp0b", SPKI: "spki", KeyAlgorithm: domain.ECDSAP256, NotBefore: domain.Micro(x.now),
			NotAfter: domain.Micro(x.now.Add(time.Hour)), RevokedAt: at, RevocationReason: 6, CreatedAt: domain.Micro(x.now)})

		f, err := x.TakeDuty(x.ctx, "crl", "n1", x.now)
		x.must(err)
		crl := domain.CRL{IssuerID: c.IssuerID, Shard: 0, Number: 5, DER: der(400, 7), ThisUpdate: x.now, NextUpdate: x.now.Add(time.Hour), Revoked: 2}
		x.must(x.SaveCRL(x.ctx, f, crl))
		read, err := x.CRL(x.ctx, c.IssuerID, 0)
		x.must(err)
		crl.ThisUpdate, crl.NextUpdate = domain.Micro(crl.ThisUpdate), domain.Micro(crl.NextUpdate)
		same(t, "CRL", read, crl)
		refused(t, x.SaveCRL(x.ctx, f, crl), fault.Conflict, "number 5")
		crl.Number, crl.DER = 6, der(10, 8)
		newer, err := x.TakeDuty(x.ctx, "crl", "n2", x.now)
		x.must(err)
		refused(t, x.SaveCRL(x.ctx, f, crl), fault.Conflict)
		x.must(x.SaveCRL(x.ctx, newer, crl))
		read, err = x.CRL(x.ctx, c.IssuerID, 0)
		x.must(err)
		same(t, "CRL", read, crl)
	})
}

func TestCancelJob(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		a := x.agent("web")
		g := x.target(a, "t1")
		c, jobs := x.create(x.order("site", g))
		j, err := x.CancelJob(x.ctx, jobs[0].ID, x.op(time.Minute))
		x.must(err)
		read, err := x.Job(x.ctx, j.ID)
		x.must(err)
		same(t, "job", read, j)
		if j.State != domain.JobCancelled || !j.FinishedAt.Equal(domain.Micro(x.now.Add(time.Minute))) {
			t.Fatalf("job %+v", j)
		}
		due, ok := x.dueAt("leaf", c.ID, "agent_id", a.ID)
		if want := domain.Micro(x.now.Add(61 * time.Minute)); !ok || !due.Equal(want) {
			t.Fatalf("leaf due at %v, want %v", due, want)
		}
		view, err := x.CertificateView(x.ctx, c.ID)
		x.must(err)
		same(t, "failures", view.Leaves[0].Failures, 0)
		again, err := x.CancelJob(x.ctx, j.ID, x.op(time.Hour))
		x.must(err)
		same(t, "a second time", again, j)
		same(t, "trail", x.actions("job/"+j.ID), []string{"job.created", "job.cancelled"})

		jobs, err = x.RenewCertificate(x.ctx, c.ID, "r", x.op())
		x.must(err)
		same(t, "next generation", jobs[0].Generation, int64(2))
		same(t, "kind", jobs[0].Kind, domain.JobIssuance)
		x.issue(c, a.ID, "01", 2, x.now.Add(24*time.Hour))
		_, err = x.CancelJob(x.ctx, jobs[0].ID, x.op())
		refused(t, err, fault.Conflict, "Completed")

		f, err := x.TakeDuty(x.ctx, "deploy", "n1", x.now)
		x.must(err)
		outs, err := x.CreateDeployments(x.ctx, f, []domain.NewJob{{CertificateID: c.ID, TargetID: g.ID, Reason: "new"}}, x.op())
		x.must(err)
		x.must(outs[0].Err)
		counts, err := x.Counts(x.ctx)
		x.must(err)
		same(t, "lagging", counts.PlacementsLagging, int64(1))
		_, err = x.CancelJob(x.ctx, outs[0].Job.ID, x.op())
		x.must(err)
		due, ok = x.dueAt("placement", c.ID, "target_id", g.ID)
		if want := domain.Micro(x.now.Add(time.Hour)); !ok || !due.Equal(want) {
			t.Fatalf("placement due at %v, want %v", due, want)
		}
		counts, err = x.Counts(x.ctx)
		x.must(err)
		same(t, "lagging", counts.PlacementsLagging, int64(1))
	})
}

func TestJobLists(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		a, b := x.agent("web-1"), x.agent("web-2")
		c1, j1 := x.create(x.order("one", x.target(a, "t1"), x.target(b, "t2")))
		_, j2 := x.create(x.order("two", x.target(a, "t3")))
		_, err := x.CancelJob(x.ctx, j1[0].ID, x.op())
		x.must(err)
		ids := func(f domain.JobFilter) []string {
			var out []string
			page := domain.PageRequest{Size: 1}
			for {
				jobs, next, err := x.Jobs(x.ctx, f, page)
				x.must(err)
				for _, j := range jobs {
					out = append(out, j.ID)
				}
				if next == "" {
					return out
				}
				page.After = next
			}
		}
		all := []string{j2[0].ID, j1[1].ID, j1[0].ID}
		slices.SortFunc(all, func(a, b string) int { return strings.Compare(b, a) })
		same(t, "all", ids(domain.JobFilter{}), all)
		only := func(keep ...string) []string {
			return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return !slices.Contains(keep, s) })
		}
		same(t, "open", ids(domain.JobFilter{Open: true}), only(j1[1].ID, j2[0].ID))
		same(t, "by state", ids(domain.JobFilter{State: domain.JobCancelled}), only(j1[0].ID))
		same(t, "by certificate", ids(domain.JobFilter{CertificateID: "one"}), only(j1[0].ID, j1[1].ID))
		same(t, "by agent", ids(domain.JobFilter{AgentID: "web-1"}), only(j1[0].ID, j2[0].ID))
		same(t, "open by agent", ids(domain.JobFilter{AgentID: a.ID, Open: true}), only(j2[0].ID))
		same(t, "finished by agent", ids(domain.JobFilter{AgentID: a.ID, State: domain.JobCancelled}), only(j1[0].ID))
		same(t, "open by certificate", ids(domain.JobFilter{CertificateID: c1.ID, Open: true}), only(j1[1].ID))
		same(t, "open said twice", ids(domain.JobFilter{Open: true, State: domain.JobAwaitingCSR}), only(j1[1].ID, j2[0].ID))
		for field, f := range map[string]domain.JobFilter{"agent_id": {AgentID: a.ID, CertificateID: c1.ID}, "open": {Open: true, State: domain.JobCancelled},
			"state": {AgentID: a.ID, State: domain.JobRunning}} {
			_, _, err := x.Jobs(x.ctx, f, domain.PageRequest{})
			refused(t, err, fault.Invalid, field+":", "open")
		}
		_, _, err = x.Jobs(x.ctx, domain.JobFilter{AgentID: "nobody"}, domain.PageRequest{})
		refused(t, err, fault.NotFound, "nobody")
	})
}
