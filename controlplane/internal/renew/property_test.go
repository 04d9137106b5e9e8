package renew

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

func drawPolicy(t *rapid.T) domain.Policy {
	p := domain.Policy{Fraction: rapid.SampledFrom([]float64{0, 0, 0.3, 0.5, 0.8, 0.95, 0.999}).Draw(t, "fraction")}
	for range rapid.IntRange(0, 3).Draw(t, "windows") {
		p.Windows = append(p.Windows, domain.Window{
			Days:  rapid.SliceOfNDistinct(rapid.IntRange(0, 6), 1, 7, rapid.ID[int]).Draw(t, "days"),
			Start: rapid.IntRange(0, 1439).Draw(t, "start"), End: rapid.IntRange(0, 1440).Draw(t, "end"),
		})
	}
	return p
}

func drawLife(t *rapid.T) time.Duration {
	return rapid.SampledFrom([]time.Duration{10 * time.Minute, time.Hour, 6 * time.Hour, day, 6 * day, 47 * day, 90 * day, 398 * day}).Draw(t, "life")
}

// TestLesson6RenewalsAreBoundedByTheLifetime simulates a year of one leaf, as the duty runs it: it looks only when the
// last answer said so, issues take a while, and some fail.
func TestLesson6RenewalsAreBoundedByTheLifetime(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p, life := drawPolicy(t), drawLife(t)
		year := 365 * day
		if life < day {
			year = 200 * life // the same arithmetic, fewer steps
		}
		prof := profile(life)
		if CheckPolicy(p, prof) != nil {
			p.Windows = nil // refused when saved; a window that cannot be met is tried on its own below
		}
		l, now := leaf(life), start
		look := DueAt(l.NotBefore, l.NotAfter, p, Seed(l.CertificateID, l.AgentID))
		renewals, failures := 0, 0
		for now.Before(start.Add(year)) {
			if look.IsZero() {
				t.Fatal("an active leaf is never looked at again")
			}
			if look.After(now) {
				now = look
			}
			d := Why(l, p, prof, domain.CertificateActive, now, false)
			if d.Reason == "" {
				t.Fatal("no reason")
			}
			if !d.Due {
				if !d.At.After(now) {
					t.Fatalf("not due at %s, and to be looked at again at %s: this spins", now, d.At)
				}
				look = d.At
				continue
			}
			if l.Failures == 0 && !now.Before(l.NotAfter) {
				t.Fatalf("fell due only at %s, after its expiry at %s", now, l.NotAfter)
			}
			if rapid.IntRange(0, 9).Draw(t, "luck") == 0 {
				failures++
				l.Failures++
				l.BackoffUntil = now.Add(domain.FailureBackoff(l.Failures))
				look = l.BackoffUntil
			} else {
				renewals++
				l.Current, l.NotBefore, l.NotAfter, l.Failures, l.BackoffUntil = l.Current+1, now, now.Add(life), 0, time.Time{}
				look = DueAt(l.NotBefore, l.NotAfter, p, Seed(l.CertificateID, l.AgentID))
			}
			if again := Why(l, p, prof, domain.CertificateActive, now, false); again.Due {
				t.Fatalf("due again at once: %s", again.Reason)
			}
		}
		s := plan(start, start.Add(life), p, Seed(l.CertificateID, l.AgentID))
		if most := int(year/s.due.Sub(start)) + failures + 1; renewals > most {
			t.Fatalf("%d renewals in %s of a leaf that lives %s, at most %d are justified", renewals, year, life, most)
		}
	})
}

// TestDueBeforeExpiryAlways looks at one leaf under any windows, satisfiable or not.
func TestDueBeforeExpiryAlways(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p, life := drawPolicy(t), drawLife(t)
		l := leaf(life)
		l.NotBefore = start.Add(time.Duration(rapid.Int64Range(0, int64(7*day)).Draw(t, "issued")))
		l.NotAfter = l.NotBefore.Add(life)
		satisfiable := CheckPolicy(p, profile(life)) == nil
		now := l.NotBefore
		for range 10 {
			d := Why(l, p, profile(life), domain.CertificateActive, now, false)
			if d.Due {
				if !now.Before(l.NotAfter) {
					t.Fatalf("due at %s, after expiry at %s: %s", now, l.NotAfter, d.Reason)
				}
				if s := plan(l.NotBefore, l.NotAfter, p, Seed(l.CertificateID, l.AgentID)); now.Before(s.due) {
					t.Fatalf("due at %s, before %s", now, s.due)
				}
				if w := weekOf(p.Windows); satisfiable && len(w) > 0 {
					if opens, _ := w.next(now); !opens.Equal(now) {
						t.Fatalf("CheckPolicy accepted windows that are not met: %s", d.Reason)
					}
				}
				return
			}
			if !d.At.After(now) {
				t.Fatalf("not due at %s, look again at %s", now, d.At)
			}
			now = d.At
		}
		t.Fatal("ten looks and still not due")
	})
}

func TestJitterIsBoundedStableAndSpread(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p, life := drawPolicy(t), drawLife(t)
		seed := rapid.String().Draw(t, "seed")
		end := start.Add(life)
		at := DueAt(start, end, p, seed)
		if !at.Equal(DueAt(start, end, p, seed)) {
			t.Fatal("the same leaf has two due times")
		}
		earliest := start.Add(time.Duration(float64(life) * fraction(p)))
		if last := end.Add(-margin(life) - spread(life)); earliest.After(last) {
			earliest = last
		}
		if at.Before(domain.Micro(earliest)) || at.After(earliest.Add(spread(life))) || at.After(end.Add(-margin(life))) {
			t.Fatalf("due at %s, outside [%s, +%s]", at, earliest, spread(life))
		}
		if life < shortLife && !at.Equal(domain.Micro(earliest)) {
			t.Fatal("a short-lived leaf has jitter")
		}
	})
	days := map[time.Time]int{}
	for i := range 240 {
		days[DueAt(start, start.Add(90*day), domain.Policy{}, Seed("cert_1", string(rune('a'+i)))).Truncate(time.Hour)]++
	}
	for hour, n := range days {
		if n > 30 {
			t.Errorf("%d of 240 leaves fall due in the hour of %s", n, hour)
		}
	}
}
