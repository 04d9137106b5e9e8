package renew

import (
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

const day = 24 * time.Hour

var start = time.Date(2026, 10, 2, 10, 0, 0, 0, time.UTC) // a Friday

func leaf(life time.Duration) domain.Leaf {
	return domain.Leaf{CertificateID: "cert_1", AgentID: "agt_1", Generation: 1, Current: 1, NotBefore: start, NotAfter: start.Add(life)}
}

func profile(ttl time.Duration) domain.Profile { return domain.Profile{TTL: ttl, MaxTTL: ttl} }

func TestWhySaysEachReason(t *testing.T) {
	t.Parallel()
	sunday := domain.Policy{Windows: []domain.Window{{Days: []int{0}, Start: 22 * 60, End: 2 * 60}}}
	ninety := leaf(90 * day)
	dueAt := DueAt(ninety.NotBefore, ninety.NotAfter, domain.Policy{}, Seed("cert_1", "agt_1"))
	with := func(change func(*domain.Leaf)) domain.Leaf {
		l := ninety
		change(&l)
		return l
	}
	failed := with(func(l *domain.Leaf) { l.Failures, l.BackoffUntil, l.LastError = 3, start.Add(5*time.Hour), "no" })
	for _, c := range []struct {
		name   string
		leaf   domain.Leaf
		policy domain.Policy
		status domain.CertificateStatus
		open   bool
		now    time.Time
		due    bool
		at     time.Time
		reason string
	}{
		{name: "archived", leaf: ninety, status: domain.CertificateArchived, now: start.Add(89 * day), reason: "archived"},
		{name: "certificate revoked", leaf: ninety, status: domain.CertificateRevoked, now: start.Add(89 * day), reason: "revoked"},
		{name: "leaf revoked", leaf: with(func(l *domain.Leaf) { l.Revoked = true }), now: start.Add(89 * day), reason: "revoked"},
		{name: "open job", leaf: ninety, open: true, now: start.Add(89 * day), at: start.Add(89*day + time.Hour), reason: "open already"},
		{name: "disabled", leaf: ninety, policy: domain.Policy{Disabled: true}, now: start.Add(89 * day), reason: "expires on 2026-12-31 10:00 UTC unless"},
		{name: "disabled and expired", leaf: ninety, policy: domain.Policy{Disabled: true}, now: start.Add(91 * day), reason: "disables"},
		{name: "nothing issued", leaf: domain.Leaf{}, policy: domain.Policy{Disabled: true}, now: start, due: true, at: start, reason: "nothing is issued yet"},
		{name: "nothing issued, resting", leaf: domain.Leaf{Failures: 1, BackoffUntil: start.Add(time.Hour)}, now: start, at: start.Add(time.Hour), reason: "failed (once); it rests until 2026-10-02 11:00 UTC"},
		{name: "nothing issued, rested", leaf: domain.Leaf{Failures: 2, BackoffUntil: start}, now: start, due: true, at: start, reason: "the last attempt failed (2 times in a row)"},
		{name: "resting", leaf: failed, now: start.Add(4 * time.Hour), at: start.Add(5 * time.Hour), reason: "failed (3 times in a row); it rests until 2026-10-02 15:00 UTC"},
		{name: "rested: lesson 4, what failed stays due", leaf: failed, now: start.Add(5 * time.Hour), due: true, at: start.Add(5 * time.Hour), reason: "because the last renewal failed"},
		{name: "cancelled", leaf: with(func(l *domain.Leaf) { l.BackoffUntil = start.Add(70*day + time.Hour) }), now: start.Add(70 * day), at: start.Add(70*day + time.Hour), reason: "was cancelled"},
		{name: "early", leaf: ninety, now: start.Add(day), at: dueAt, reason: "it renews at 2/3 of its lifetime, on " + dueAt.Format("2006-01-02 15:04 UTC")},
		{name: "due", leaf: ninety, now: dueAt, due: true, at: dueAt, reason: "at 2/3 of its lifetime, since"},
		{name: "expired", leaf: ninety, now: start.Add(90 * day), due: true, at: ninety.NotAfter, reason: "it expired on 2026-12-31 10:00 UTC"},
		{name: "expired, window shut", leaf: ninety, policy: sunday, now: start.Add(90 * day), due: true, at: ninety.NotAfter, reason: "it expired"},
		{name: "own fraction", leaf: ninety, policy: domain.Policy{Fraction: 0.5}, now: start, at: DueAt(start, ninety.NotAfter, domain.Policy{Fraction: .5}, "cert_1/agt_1"), reason: "at 50 % of its lifetime"},
		{name: "late fraction", leaf: ninety, policy: domain.Policy{Fraction: 0.999}, now: start, at: DueAt(start, ninety.NotAfter, domain.Policy{Fraction: .999}, "cert_1/agt_1"), reason: "a safe time before it expires"},
		{name: "before its window", leaf: ninety, policy: sunday, now: start, at: time.Date(2026, 12, 6, 22, 0, 0, 0, time.UTC), reason: "in the renewal window that is open on 2026-12-06 22:00 UTC"},
		{name: "due, window shut", leaf: ninety, policy: sunday, now: dueAt.Add(time.Hour), at: time.Date(2026, 12, 6, 22, 0, 0, 0, time.UTC), reason: "in the renewal window"},
		{name: "due, window open past midnight", leaf: ninety, policy: sunday, now: time.Date(2026, 12, 7, 1, 59, 0, 0, time.UTC), due: true, at: dueAt, reason: "a renewal window is open"},
		{name: "due, window just shut", leaf: ninety, policy: sunday, now: time.Date(2026, 12, 7, 2, 0, 0, 0, time.UTC), at: time.Date(2026, 12, 13, 22, 0, 0, 0, time.UTC), reason: "in the renewal window"},
		{name: "no window in time", leaf: leaf(3 * day / 2), policy: sunday, now: start.Add(day + 2*time.Hour), due: true, at: DueAt(start, start.Add(3*day/2), sunday, "cert_1/agt_1"), reason: "no renewal window opens in time before it expires on 2026-10-03 22:00 UTC"},
		{name: "no window in time, early", leaf: leaf(3 * day / 2), policy: sunday, now: start, at: DueAt(start, start.Add(3*day/2), sunday, "cert_1/agt_1"), reason: "no renewal window opens between"},
		{name: "short-lived", leaf: leaf(15 * time.Minute), now: start.Add(9 * time.Minute), at: start.Add(10 * time.Minute), reason: "on 2026-10-02 10:10:00 UTC"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if c.status == "" {
				c.status = domain.CertificateActive
			}
			d := Why(c.leaf, c.policy, profile(90*day), c.status, c.now, c.open)
			if d.Due != c.due || !d.At.Equal(c.at) || !strings.Contains(d.Reason, c.reason) {
				t.Errorf("got %v at %s: %q\nwant %v at %s: …%q…", d.Due, d.At, d.Reason, c.due, c.at, c.reason)
			}
		})
	}
}

func TestDueAtOfADisabledPolicyIsNever(t *testing.T) {
	t.Parallel()
	if at := DueAt(start, start.Add(day), domain.Policy{Disabled: true}, "x"); !at.IsZero() {
		t.Fatal(at)
	}
}

func TestWindowsOfTheWeek(t *testing.T) {
	t.Parallel()
	at := func(d, h, m int) time.Time { return time.Date(2026, 10, 4+d, h, m, 0, 0, time.UTC) } // the 4th is a Sunday
	for _, c := range []struct {
		name string
		w    []domain.Window
		t    time.Time
		want time.Time
		gap  time.Duration
	}{
		{"inside", []domain.Window{{Days: []int{3}, Start: 60, End: 120}}, at(3, 1, 30), at(3, 1, 30), 7*day - time.Hour},
		{"end excluded", []domain.Window{{Days: []int{3}, Start: 60, End: 120}}, at(3, 2, 0), at(10, 1, 0), 7*day - time.Hour},
		{"from Saturday into Sunday", []domain.Window{{Days: []int{6}, Start: 23 * 60, End: 60}}, at(0, 0, 30), at(0, 0, 30), 7*day - 2*time.Hour},
		{"until midnight", []domain.Window{{Days: []int{6}, Start: 23 * 60, End: 0}}, at(0, 0, 0), at(6, 23, 0), 7*day - time.Hour},
		{"always", []domain.Window{{Days: []int{0, 1, 2, 3, 4, 5, 6}, Start: 0, End: 1440}}, at(2, 3, 4), at(2, 3, 4), 0},
		{"nights", []domain.Window{{Days: []int{0, 1, 2, 3, 4, 5, 6}, Start: 22 * 60, End: 4 * 60}}, at(2, 5, 0), at(2, 22, 0), 18 * time.Hour},
		{"two that overlap", []domain.Window{{Days: []int{1}, Start: 0, End: 600}, {Days: []int{1}, Start: 300, End: 900}}, at(1, 12, 0), at(1, 12, 0), 7*day - 15*time.Hour},
	} {
		w := weekOf(c.w)
		if got, ok := w.next(c.t); !ok || !got.Equal(c.want) {
			t.Errorf("%s: next is %s, want %s", c.name, got, c.want)
		}
		if got := w.gap(); got != c.gap {
			t.Errorf("%s: gap %s, want %s", c.name, got, c.gap)
		}
	}
	if _, ok := weekOf([]domain.Window{{Days: []int{9}, Start: 3, End: 5}}).next(start); ok {
		t.Error("a window on no day opened")
	}
}
