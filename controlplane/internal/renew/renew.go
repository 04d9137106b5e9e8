// Package renew decides when a leaf is due for renewal, and says why in words. All of it is pure: time, policy and
// history come in as values, so a whole year can be simulated in a test.
//
// A leaf is due after a fraction of its own lifetime, never because fewer than so many days are left: a rule in days
// renews short certificates far too often or, below that number of days, without end. The alert thresholds of a policy
// only tell operators; they decide nothing here. Each leaf's moment is moved by a jitter that follows from its own name,
// so leaves that were issued together do not come back together.
package renew

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"strconv"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// Decision says whether a leaf is due, why in words, and At: when it fell due, or, if it is not due, when to look again
// (zero: never).
type Decision struct {
	Due    bool
	Reason string
	At     time.Time
}

// DefaultFraction of its lifetime after which a leaf is due.
const DefaultFraction = 2.0 / 3

const (
	// maxJitter and maxMargin suffice for any number of leaves and any lifetime: a day each.
	maxJitter = 24 * time.Hour
	maxMargin = 24 * time.Hour
	// shortLife: below it a leaf's moment is its fraction alone. The spread would be seconds, and windows are for people.
	shortLife = time.Hour
	// openPause is when a leaf with an open job is looked at again if nobody looks earlier; the end of the job does.
	openPause = time.Hour
)

// Seed is the spread seed of a leaf.
func Seed(certificateID, agentID string) string { return certificateID + "/" + agentID }

// schedule is when a leaf falls due and the last moment at which a renewal should begin.
type schedule struct {
	due, safe time.Time
	capped    bool // the fraction alone would have been later than is safe
}

// margin before expiry is for the retries of a renewal that fails at first: a tenth of the lifetime, at most a day.
func margin(life time.Duration) time.Duration { return min(life/10, maxMargin) }

// spread is the width of the jitter: a twentieth of the lifetime, at most a day.
func spread(life time.Duration) time.Duration {
	if life < shortLife {
		return 0
	}
	return min(life/20, maxJitter)
}

func fraction(p domain.Policy) float64 {
	if p.Fraction > 0 && p.Fraction < 1 {
		return p.Fraction
	}
	return DefaultFraction
}

func plan(notBefore, notAfter time.Time, p domain.Policy, seed string) schedule {
	life := notAfter.Sub(notBefore)
	s := schedule{safe: notAfter.Add(-margin(life))}
	due := notBefore.Add(time.Duration(float64(life) * fraction(p)))
	// The whole spread lies before the safe moment, so that late fractions are spread too.
	if last := s.safe.Add(-spread(life)); due.After(last) {
		due, s.capped = last, true
	}
	s.due = domain.Micro(due.Add(jitter(seed, spread(life))))
	return s
}

// jitter is the same for the same seed, in [0, width).
func jitter(seed string, width time.Duration) time.Duration {
	if width <= 0 {
		return 0
	}
	sum := sha256.Sum256([]byte(seed))
	const steps = 1 << 32
	return time.Duration(float64(width) * (float64(binary.BigEndian.Uint32(sum[:4])) / steps))
}

// DueAt is the moment at which a leaf with this validity falls due: after the policy's fraction of its lifetime plus a
// jitter that follows from seed (see Seed), and never later than a safe time before it expires. Zero for a policy that
// renews nothing. Windows are not looked at: from this moment on Why waits for one.
func DueAt(notBefore, notAfter time.Time, p domain.Policy, seed string) time.Time {
	if p.Disabled {
		return time.Time{}
	}
	return plan(notBefore, notAfter, p, seed).due
}

// Why decides whether a leaf is due at now. status is its certificate's; openJob says that an issuance or renewal of the
// leaf is open. A leaf that is not due is never to be looked at again before At.
func Why(l domain.Leaf, p domain.Policy, profile domain.Profile, status domain.CertificateStatus, now time.Time, openJob bool) Decision {
	issued := l.Current > 0
	say := teller{fine: profile.ShortLived() || issued && l.NotAfter.Sub(l.NotBefore) < shortLife}
	switch {
	case status == domain.CertificateArchived:
		return never("the certificate is archived and no longer managed")
	case l.Revoked, status == domain.CertificateRevoked:
		return never("it is revoked; a revoked certificate is not renewed, order a new one")
	case openJob:
		return Decision{Reason: "a job for it is open already", At: now.Add(openPause)}
	case issued && p.Disabled:
		return never("its policy disables automatic renewal; it expires on " + say.time(l.NotAfter) + " unless it is renewed on request")
	case now.Before(l.BackoffUntil):
		return Decision{Reason: resting(l, say), At: l.BackoffUntil}
	case !issued && l.Failures > 0:
		return due(l.BackoffUntil, "nothing is issued yet and the last attempt failed (%s): it is tried again", times(l.Failures))
	case !issued:
		return due(now, "nothing is issued yet")
	case !now.Before(l.NotAfter):
		return due(l.NotAfter, "it expired on %s", say.time(l.NotAfter))
	}
	s := plan(l.NotBefore, l.NotAfter, p, Seed(l.CertificateID, l.AgentID))
	rule := "at " + fractionText(p) + " of its lifetime"
	if s.capped {
		rule = "a safe time before it expires on " + say.time(l.NotAfter)
	}
	at := s.due
	if l.Failures > 0 {
		// What failed for good stays due, whoever asked for it: the back-off alone bounds it.
		at, rule = later(l.BackoffUntil, l.NotBefore), "again because the last renewal failed ("+times(l.Failures)+")"
	}
	return open(decide{at: at, rule: rule, schedule: s, policy: p, leaf: l, say: say}, now)
}

// decide is what is left to decide once a leaf falls due at a known moment.
type decide struct {
	at   time.Time
	rule string
	schedule
	policy domain.Policy
	leaf   domain.Leaf
	say    teller
}

// open applies the windows: a renewal starts inside one, unless none opens in time.
func open(d decide, now time.Time) Decision {
	start := d.at
	if start.Before(now) {
		start = now
	}
	w := weekOf(d.policy.Windows)
	opens, found := w.next(start)
	windowed := found && len(d.policy.Windows) > 0
	switch {
	case !windowed && !now.Before(d.at):
		return due(d.at, "it renews %s, since %s", d.rule, d.say.time(d.at))
	case !windowed:
		return Decision{Reason: "it renews " + d.rule + ", on " + d.say.time(d.at), At: d.at}
	case !opens.After(now) && !now.Before(d.at):
		return due(d.at, "it renews %s, since %s, and a renewal window is open", d.rule, d.say.time(d.at))
	case opens.After(d.safe) && !now.Before(d.at):
		return due(d.at, "it renews %s, since %s, and no renewal window opens in time before it expires on %s",
			d.rule, d.say.time(d.at), d.say.time(d.leaf.NotAfter))
	case opens.After(d.safe):
		return Decision{At: d.at, Reason: "it renews " + d.rule + ", on " + d.say.time(d.at) +
			": no renewal window opens between then and a safe time before it expires on " + d.say.time(d.leaf.NotAfter)}
	default:
		return Decision{At: opens, Reason: "it renews " + d.rule + " (" + d.say.time(d.at) + "), in the renewal window that is open on " + d.say.time(opens)}
	}
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func never(reason string) Decision { return Decision{Reason: reason} }

func due(at time.Time, format string, args ...any) Decision {
	return Decision{Due: true, Reason: fmt.Sprintf(format, args...), At: at}
}

func resting(l domain.Leaf, say teller) string {
	if l.Failures == 0 {
		return "its last job was cancelled; it rests until " + say.time(l.BackoffUntil)
	}
	return "its last job failed (" + times(l.Failures) + "); it rests until " + say.time(l.BackoffUntil)
}

func times(failures int) string {
	if failures == 1 {
		return "once"
	}
	return strconv.Itoa(failures) + " times in a row"
}

func fractionText(p domain.Policy) string {
	f := fraction(p)
	if f == DefaultFraction {
		return "2/3"
	}
	return strconv.FormatFloat(f*100, 'g', 4, 64) + " %"
}

// teller writes times for people: to the minute, or to the second where a whole life is less than an hour.
type teller struct{ fine bool }

func (t teller) time(at time.Time) string {
	if t.fine {
		return at.UTC().Format("2006-01-02 15:04:05 UTC")
	}
	return at.UTC().Format("2006-01-02 15:04 UTC")
}
