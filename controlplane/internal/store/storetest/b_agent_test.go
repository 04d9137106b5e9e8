package storetest_test

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

func (x *estate) uses(k domain.JoinToken) (n int) {
	x.t.Helper()
	x.must(x.sql().QueryRowContext(x.ctx, "SELECT uses FROM join_token WHERE id = $1", k.ID).Scan(&n))
	return n
}

func TestEnroll(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		k := x.token(2)
		first := x.enrollment(k, "k1", "web")
		first.Facts = domain.Facts{OS: "linux", Platform: "debian", Architecture: "amd64", IPAddress: "192.0.2.1", Hostname: "web", Version: "1"}
		a, err := x.Enroll(x.ctx, first)
		x.must(err)
		same(t, "agent", a, domain.Agent{ID: first.AgentID, Name: "web", State: domain.AgentOffline, Labels: k.Labels, Facts: first.Facts,
			Capabilities: []string{}, CreatedAt: domain.Micro(x.now), OfflineSince: domain.Micro(x.now)})
		got, err := x.Agent(x.ctx, "web")
		x.must(err)
		same(t, "agent as read", got, a)
		same(t, "uses", x.uses(k), 1)

		again := x.enrollment(k, "k1", "renamed")
		got, err = x.Enroll(x.ctx, again)
		x.must(err)
		same(t, "the same key again", got, a)
		same(t, "uses", x.uses(k), 1)

		b, err := x.Enroll(x.ctx, x.enrollment(k, "k2", "web"))
		x.must(err)
		same(t, "second name", b.Name, "web-2")
		_, err = x.Enroll(x.ctx, x.enrollment(k, "k3", "web"))
		refused(t, err, fault.Unauthorized, "used up")
		got, err = x.Enroll(x.ctx, again)
		x.must(err)
		same(t, "the same key on a token that is used up", got, a)

		wrong := x.enrollment(k, "k1", "web")
		wrong.TokenHash = digest("guess")
		_, err = x.Enroll(x.ctx, wrong)
		refused(t, err, fault.Unauthorized, "not known")
		text := err.Error()
		for _, tokenID := range []string{"jt_none", "", "\x00"} {
			wrong = first
			wrong.TokenID = tokenID
			_, err = x.Enroll(x.ctx, wrong)
			refused(t, err, fault.Unauthorized)
			same(t, "what a guesser learns", err.Error(), text)
		}
		wrong = first
		wrong.TokenID, wrong.TokenHash = "jt_none", make([]byte, 32)
		_, err = x.Enroll(x.ctx, wrong)
		refused(t, err, fault.Unauthorized, "not known")

		late := again
		late.Op.At = k.ExpiresAt
		_, err = x.Enroll(x.ctx, late)
		refused(t, err, fault.Unauthorized, "expired")
		_, err = x.sql().ExecContext(x.ctx, "UPDATE join_token SET revoked_at = 1 WHERE id = $1", k.ID)
		x.must(err)
		_, err = x.Enroll(x.ctx, again)
		refused(t, err, fault.Unauthorized, "revoked")
		same(t, "trail", x.actions("agent/"+a.ID), []string{"agent.enrolled"})

		bad := domain.JoinToken{ID: id.New(id.Token), Hash: digest("x"), ExpiresAt: x.now}
		refused(t, x.CreateJoinToken(x.ctx, bad, x.op()), fault.Invalid, "expires_at")
		bad.ExpiresAt, bad.MaxUses = x.now.Add(1), -1
		refused(t, x.CreateJoinToken(x.ctx, bad, x.op()), fault.Invalid, "max_uses")
	})
}

func TestEnrollAtOnce(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		k := x.token(6)
		var wg sync.WaitGroup
		var mu sync.Mutex
		names := map[string]string{}
		refusals := 0
		for i := range 16 {
			// Two calls a key, eight keys, six uses.
			in := x.enrollment(k, fmt.Sprintf("k%d", i/2), "golden")
			wg.Go(func() {
				a, err := x.Enroll(x.ctx, in)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil:
					names[a.Name] = a.ID
				case fault.Is(err, fault.Unauthorized):
					refusals++
				case !fault.Is(err, fault.Retryable):
					t.Errorf("enrol: %v", err)
				}
			})
		}
		wg.Wait()
		if n := x.uses(k); n != len(names) || n > 6 {
			t.Fatalf("%d uses counted, %d agents made, %d refusals", n, len(names), refusals)
		}
	})
}

func TestIdentities(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		a := x.agent("web")
		i := domain.Identity{Serial: "0a", AgentID: a.ID, SPKI: "s", NotBefore: x.now, NotAfter: x.now.Add(time.Hour), CreatedAt: x.now, Generation: 1}
		x.must(x.RecordIdentity(x.ctx, i, x.op()))
		x.must(x.RecordIdentity(x.ctx, i, x.op()))
		got, err := x.Identity(x.ctx, "0a")
		x.must(err)
		same(t, "identity", got, i)
		other := i
		other.SPKI = "t"
		refused(t, x.RecordIdentity(x.ctx, other, x.op()), fault.Conflict, "0a")
		other.Serial, other.AgentID = "0b", "agt_none"
		refused(t, x.RecordIdentity(x.ctx, other, x.op()), fault.NotFound)
		other.AgentID = a.ID
		x.must(x.RecordIdentity(x.ctx, other, x.op()))
		serials, err := x.RevokeIdentities(x.ctx, a.ID, x.op(time.Minute))
		x.must(err)
		same(t, "serials", serials, []string{"0a", "0b"})
		serials, err = x.RevokeIdentities(x.ctx, "web", x.op(time.Hour))
		x.must(err)
		same(t, "serials at the second time", len(serials), 0)
		got, err = x.Identity(x.ctx, "0a")
		x.must(err)
		same(t, "revoked at", got.RevokedAt, domain.Micro(x.now.Add(time.Minute)))
		same(t, "trail", x.actions("agent/"+a.ID), []string{"agent.enrolled", "identity.issued", "identity.issued", "identity.revoked", "identity.revoked"})
	})
}

func TestRetireAgent(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		a, b := x.agent("web-1"), x.agent("web-2")
		x.must(x.RecordIdentity(x.ctx, domain.Identity{Serial: "0a", AgentID: a.ID, SPKI: "s", NotBefore: x.now, NotAfter: x.now.Add(time.Hour)}, x.op()))
		c, jobs := x.create(x.order("site", x.target(a, "t1"), x.target(b, "t2")))
		due, _ := x.create(x.order("due", x.target(a, "t3")))
		x.issue(due, a.ID, "01", 1, x.now.Add(time.Hour))
		_, err := x.sql().ExecContext(x.ctx, "UPDATE leaf SET due_at = 5 WHERE certificate_id = $1", due.ID)
		x.must(err)
		_, err = x.sql().ExecContext(x.ctx, "UPDATE placement SET due_at = 5 WHERE certificate_id = $1", due.ID)
		x.must(err)

		got, err := x.RetireAgent(x.ctx, "web-1", "decommissioned", x.op(time.Minute))
		x.must(err)
		if got.State != domain.AgentRetired || got.Reason != "decommissioned" {
			t.Fatalf("agent is %s (%s)", got.State, got.Reason)
		}
		read, err := x.Agent(x.ctx, a.ID)
		x.must(err)
		same(t, "agent", read, got)
		i, err := x.Identity(x.ctx, "0a")
		x.must(err)
		same(t, "identity revoked at", i.RevokedAt, domain.Micro(x.now.Add(time.Minute)))
		for _, j := range jobs {
			now, err := x.Job(x.ctx, j.ID)
			x.must(err)
			want := domain.JobAwaitingCSR
			if j.AgentID == a.ID {
				want = domain.JobCancelled
			}
			same(t, "state of the job", now.State, want)
		}
		for _, id := range []string{c.ID, due.ID} {
			if _, ok := x.dueAt("leaf", id, "agent_id", a.ID); ok {
				t.Errorf("a leaf of the retired agent is due")
			}
		}
		view, err := x.CertificateView(x.ctx, "due")
		x.must(err)
		same(t, "placements on record", len(view.Placements), 1)
		counts, err := x.Counts(x.ctx)
		x.must(err)
		same(t, "lagging", counts.PlacementsLagging, int64(0))

		got, err = x.RetireAgent(x.ctx, a.ID, "other reason", x.op(time.Hour))
		x.must(err)
		same(t, "a second time", got, read)
		refused(t, x.RecordIdentity(x.ctx, domain.Identity{Serial: "0c", AgentID: a.ID, SPKI: "s"}, x.op()), fault.Forbidden)
		refused(t, x.QuarantineAgent(x.ctx, a.ID, "r", x.op()), fault.Conflict)
		_, err = x.ReleaseAgent(x.ctx, a.ID, x.op())
		refused(t, err, fault.Conflict, "not quarantined")
		jobs, err = x.RenewCertificate(x.ctx, "site", "r", x.op())
		x.must(err)
		same(t, "renewals at live agents", len(jobs), 1)
		_, err = x.RenewCertificate(x.ctx, "due", "r", x.op())
		refused(t, err, fault.Conflict, "retired")
		trail := x.actions("agent/" + a.ID)
		same(t, "last action", trail[len(trail)-1], "agent.retired")
	})
}

func TestQuarantine(t *testing.T) {
	each(t, func(t *testing.T, x *estate) {
		a := x.agent("web")
		_, err := x.ReleaseAgent(x.ctx, a.ID, x.op())
		refused(t, err, fault.Conflict, "is Offline, not quarantined")
		x.must(x.QuarantineAgent(x.ctx, a.ID, "two boot ids", x.op()))
		x.must(x.QuarantineAgent(x.ctx, a.ID, "two boot ids", x.op()))
		got, err := x.Agent(x.ctx, a.ID)
		x.must(err)
		same(t, "reason", got.Reason, "two boot ids")
		list, _, err := x.Agents(x.ctx, domain.AgentQuarantined, domain.PageRequest{})
		x.must(err)
		same(t, "quarantined", list, []domain.Agent{got})
		got, err = x.ReleaseAgent(x.ctx, "web", x.op(time.Minute))
		x.must(err)
		read, err := x.Agent(x.ctx, a.ID)
		x.must(err)
		same(t, "released", read, got)
		same(t, "state", got.State, domain.AgentOffline)
		same(t, "reason", got.Reason, "")
		same(t, "trail", x.actions("agent/"+a.ID), []string{"agent.enrolled", "agent.quarantined", "agent.released"})
		x.agent("zed")
		all, next, err := x.Agents(x.ctx, "", domain.PageRequest{Size: 1})
		x.must(err)
		rest, next, err2 := x.Agents(x.ctx, "", domain.PageRequest{Size: 1, After: next})
		x.must(err2)
		if len(all) != 1 || len(rest) != 1 || next != "" || !slices.IsSorted([]string{all[0].ID, rest[0].ID}) {
			t.Fatalf("pages %v %v, next %q", all, rest, next)
		}
	})
}
