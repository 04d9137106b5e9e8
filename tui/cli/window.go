package cli

import (
	"slices"
	"strconv"
	"strings"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// maxAlertDays is the server's bound.
const maxAlertDays = 3650

var dayNames = []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}

// parseWindow reads "Mon-Fri,Sun 02:00-05:00": days or spans of days, then a span of the day in UTC, which crosses midnight
// where its end is below its beginning.
func parseWindow(text string) (*operatorpb.RenewalWindow, bool) {
	days, times, ok := strings.Cut(strings.TrimSpace(text), " ")
	if !ok {
		return nil, false
	}
	w := &operatorpb.RenewalWindow{}
	for part := range strings.SplitSeq(days, ",") {
		from, to, span := strings.Cut(part, "-")
		if !span {
			to = from
		}
		first, last := slices.Index(dayNames, strings.ToLower(from)), slices.Index(dayNames, strings.ToLower(to))
		if first < 0 || last < 0 {
			return nil, false
		}
		for d := first; ; d = (d + 1) % len(dayNames) {
			if !slices.Contains(w.GetDays(), int32(d)) { //nolint:gosec // 0 to 6
				w.Days = append(w.Days, int32(d)) //nolint:gosec // 0 to 6
			}
			if d == last {
				break
			}
		}
	}
	slices.Sort(w.Days)
	start, end, ok := strings.Cut(strings.TrimSpace(times), "-")
	if !ok {
		return nil, false
	}
	var okStart, okEnd bool
	w.StartMinute, okStart = minute(start)
	w.EndMinute, okEnd = minute(end)
	return w, okStart && okEnd && w.GetStartMinute() != w.GetEndMinute() && w.GetStartMinute() < 24*60
}

// minute reads HH:MM, 00:00 to 24:00.
func minute(text string) (int32, bool) {
	h, m, ok := strings.Cut(text, ":")
	if !ok || len(h) > 2 || len(m) != 2 {
		return 0, false
	}
	hours, err := strconv.ParseUint(h, 10, 8)
	minutes, err2 := strconv.ParseUint(m, 10, 8)
	if err != nil || err2 != nil || minutes > 59 || hours > 24 || hours == 24 && minutes > 0 {
		return 0, false
	}
	return int32(hours*60 + minutes), true
}
