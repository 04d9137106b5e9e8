package renew

import (
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	// maxThresholdDays is ten years: longer than anything is issued for.
	maxThresholdDays = 3650
	// minWindow leaves time for a whole renewal and its first retries.
	minWindow = 15 * time.Minute
	// minInterval between two renewals of one leaf, counted from its issuance.
	minInterval = 10 * time.Second
	// backdate is the most by which a leaf's validity begins before it was issued, or a tenth of its validity.
	backdate = time.Minute
)

// CheckPolicy refuses (Invalid, with the field's path) what can never be met under the profile: a fraction outside
// (0, 1), thresholds that are no days, windows that are malformed, or windows so far apart that a leaf could expire
// without one having been open between the moment it falls due and a safe time before its end.
func CheckPolicy(p domain.Policy, profile domain.Profile) error {
	life := profile.TTL
	if profile.MaxTTL > 0 {
		life = min(life, profile.MaxTTL)
	}
	if err := checkFraction(p, life); err != nil {
		return err
	}
	for i, d := range p.AlertThresholdsDays {
		field := fmt.Sprintf("policy.alert_thresholds_days[%d]", i)
		if d < 0 || d > maxThresholdDays {
			return fault.InvalidField(field, "%d is not a number of days from 0 to %d", d, maxThresholdDays)
		}
		if slices.Index(p.AlertThresholdsDays, d) < i {
			return fault.InvalidField(field, "%d days are given twice", d)
		}
	}
	for i, w := range p.Windows {
		if err := checkWindow(fmt.Sprintf("policy.windows[%d]", i), w); err != nil {
			return err
		}
	}
	return checkGap(p, life)
}

func checkFraction(p domain.Policy, life time.Duration) error {
	if math.IsNaN(p.Fraction) || p.Fraction < 0 || p.Fraction >= 1 {
		return fault.InvalidField("policy.fraction", "%v is not a fraction of the lifetime; use a number between 0 and 1, or 0 for 2/3", p.Fraction)
	}
	back := min(backdate, life/10)
	if after := time.Duration(float64(life+back)*fraction(p)) - back; after < minInterval {
		return fault.InvalidField("policy.fraction", "%v of %s falls due less than %s after each issuance; use a greater fraction or a profile that lives longer",
			fraction(p), life, minInterval)
	}
	return nil
}

func checkWindow(field string, w domain.Window) error {
	if len(w.Days) == 0 {
		return fault.InvalidField(field+".days", "name one to seven days; 0 is Sunday")
	}
	for i, d := range w.Days {
		if d < 0 || d > 6 {
			return fault.InvalidField(field+".days", "%d is not a day; 0 is Sunday and 6 is Saturday", d)
		}
		if slices.Index(w.Days, d) < i {
			return fault.InvalidField(field+".days", "day %d is named twice", d)
		}
	}
	switch {
	case w.Start < 0 || w.Start >= minutesADay:
		return fault.InvalidField(field+".start_minute", "%d is not a minute of the day; use 0 to %d", w.Start, minutesADay-1)
	case w.End < 0 || w.End > minutesADay:
		return fault.InvalidField(field+".end_minute", "%d is not a minute of the day; use 0 to %d", w.End, minutesADay)
	case w.Start == w.End:
		return fault.InvalidField(field+".end_minute", "the window has no length; for a whole day use 0 to %d", minutesADay)
	case time.Duration(lengthOf(w))*time.Minute < minWindow:
		return fault.InvalidField(field+".end_minute", "a window of %d minutes is too short for a renewal; use %d or more", lengthOf(w), int(minWindow.Minutes()))
	}
	return nil
}

// checkGap proves that whenever a leaf of this lifetime is issued, a window opens between its due time, the latest its
// jitter allows, and its safe time.
func checkGap(p domain.Policy, life time.Duration) error {
	if len(p.Windows) == 0 || p.Disabled {
		return nil
	}
	var zero time.Time
	s := plan(zero, zero.Add(life), p, "")
	latest := zero.Add(time.Duration(float64(life) * fraction(p)))
	if last := s.safe.Add(-spread(life)); latest.After(last) {
		latest = last
	}
	room, gap := s.safe.Sub(latest.Add(spread(life))), weekOf(p.Windows).gap()
	if gap < room {
		return nil
	}
	return fault.InvalidField("policy.windows", "up to %s pass between two windows, but a certificate of this profile (%s) must be renewed within %s once it is due; "+
		"add windows, lower policy.fraction or use a profile that lives longer", days(gap), days(life), days(room))
}

// days writes a duration for people: in days and hours from a day on.
func days(d time.Duration) string {
	const day = 24 * time.Hour
	d = d.Round(time.Minute)
	if d < day {
		s := d.String()
		if len(s) > 2 && s[len(s)-2:] == "0s" && d >= time.Minute {
			s = s[:len(s)-2]
		}
		return s
	}
	if h := d % day / time.Hour; h > 0 {
		return fmt.Sprintf("%dd%dh", d/day, h)
	}
	return fmt.Sprintf("%dd", d/day)
}
