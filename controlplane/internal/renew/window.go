package renew

import (
	"cmp"
	"slices"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

const (
	minutesADay  = 24 * 60
	minutesAWeek = 7 * minutesADay
)

// span is a part of the week in minutes after Sunday 00:00 UTC, its end excluded. start is in [0, minutesAWeek); end may
// lie beyond the week's end.
type span struct{ start, end int }

// week is a union of spans, sorted and merged; empty when no window has a length.
type week []span

// weekOf reads windows; what is malformed (CheckPolicy refuses it) is left out rather than guessed at.
func weekOf(windows []domain.Window) week {
	var spans week
	for _, w := range windows {
		length := lengthOf(w)
		for _, d := range w.Days {
			if length > 0 && d >= 0 && d < 7 {
				start := (d*minutesADay + w.Start) % minutesAWeek
				spans = append(spans, span{start, start + length})
			}
		}
	}
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.start, b.start) })
	var merged week
	for _, s := range spans {
		if n := len(merged); n > 0 && s.start <= merged[n-1].end {
			merged[n-1].end = max(merged[n-1].end, s.end)
			continue
		}
		merged = append(merged, s)
	}
	return merged
}

// next is the first moment at or after t at which a window is open; false: none ever is.
func (w week) next(t time.Time) (time.Time, bool) {
	if len(w) == 0 {
		return t, false
	}
	t = t.UTC()
	sunday := time.Date(t.Year(), t.Month(), t.Day()-int(t.Weekday()), 0, 0, 0, 0, time.UTC)
	at := t.Sub(sunday)
	// The former week's spans may reach into this one; the next week's come after all of this one's.
	for _, base := range []int{-minutesAWeek, 0, minutesAWeek} {
		for _, s := range w {
			start, end := time.Duration(base+s.start)*time.Minute, time.Duration(base+s.end)*time.Minute
			switch {
			case at >= end:
			case at >= start:
				return t, true
			default:
				return sunday.Add(start), true
			}
		}
	}
	return t, false
}

// gap is the longest time between two windows: the longest that one may have to wait.
func (w week) gap() time.Duration {
	if len(w) == 0 {
		return 0
	}
	longest, end := 0, w[0].end
	for _, s := range w[1:] {
		longest = max(longest, s.start-end)
		end = max(end, s.end)
	}
	longest = max(longest, w[0].start+minutesAWeek-end)
	return time.Duration(longest) * time.Minute
}

// lengthOf is a window's length in minutes, 0 if it has none or its bounds are not minutes of a day.
func lengthOf(w domain.Window) int {
	switch {
	case w.Start < 0 || w.Start >= minutesADay || w.End < 0 || w.End > minutesADay || w.Start == w.End:
		return 0
	case w.End < w.Start:
		return w.End + minutesADay - w.Start
	default:
		return w.End - w.Start
	}
}
