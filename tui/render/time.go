package render

import (
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const day = 24 * time.Hour

// Time is a moment, absolute and relative: "2026-12-01 10:00 UTC (in 12d)"; absent: "".
func Time(t *timestamppb.Timestamp, now time.Time) string {
	if t == nil {
		return ""
	}
	return Absolute(t) + " (" + Relative(t, now) + ")"
}

// Absolute is a moment to the minute, in UTC; absent: "".
func Absolute(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().UTC().Format("2006-01-02 15:04 UTC")
}

// Relative is a moment seen from now: "in 12d", "3m ago", "now"; absent: "".
func Relative(t *timestamppb.Timestamp, now time.Time) string {
	if t == nil {
		return ""
	}
	d := t.AsTime().Sub(now)
	switch {
	case d >= time.Second:
		return "in " + Rough(d)
	case d <= -time.Second:
		return Rough(-d) + " ago"
	default:
		return "now"
	}
}

// Rough is a span in its greatest unit, rounded down: 45s, 12m, 30h, 89d, 10y.
func Rough(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 2*day:
		return fmt.Sprintf("%dh", d/time.Hour)
	case d < 1000*day:
		return fmt.Sprintf("%dd", d/day)
	default:
		return fmt.Sprintf("%dy", d/(365*day))
	}
}

// Exact is a span in all its units: 90d, 1d 12h, 1h 30m, 45s; absent: "".
func Exact(d *durationpb.Duration) string {
	if d == nil {
		return ""
	}
	rest := d.AsDuration()
	if rest < time.Second {
		return rest.String()
	}
	var parts []string
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{day, "d"}, {time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}} {
		if n := rest / u.unit; n > 0 {
			parts = append(parts, fmt.Sprintf("%d%s", n, u.name))
			rest %= u.unit
		}
	}
	return strings.Join(parts, " ")
}
