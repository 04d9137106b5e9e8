package permit

import (
	"time"
)

// Limits are what is allowed toward one issuer, by the whole cluster together.
type Limits struct {
	// InFlight is how many calls may be in flight at once; 0 or less counts as 1.
	InFlight int
	// Rate is how many calls may be begun a second; 0: as many as the permits allow.
	Rate float64
	// Pending is how many orders may be open at the issuer, however long they take; 0: any number. See Pending.
	Pending int
}

func (l Limits) inFlight() int { return max(l.InFlight, 1) }

// DefaultLease is how long a lease lasts on the leader's clock, in a cluster that says nothing else.
const DefaultLease = 10 * time.Second

// Clocks tell durations wrongly, and two of them differently. All bounds hold as long as no clock runs more than 10 %
// fast or slow; real ones are wrong by some millionths, and what is left of the margin is for messages and scheduling:
//
//   - A holder uses 4/5 of its lease. If its clock is slow by a tenth and the leader's fast by a tenth, 4/5 of a lease on the
//     one are 0.98 of it on the other.
//   - A holder begins calls at 9/10 of its rate: 0.99 of it if its clock is fast by a tenth.
//   - Whoever counts a pause counts 10/9 of it and a little: 1.01 of it on a fast clock.
//
// Only the monotonic clock counts; the time of day may jump as it likes.
const paceShare = 0.9

// usable is the part of a lease that its holder uses.
func usable(lease time.Duration) time.Duration { return lease / 5 * 4 }

// stretched is what is counted of a pause.
func stretched(pause time.Duration) time.Duration { return pause + pause/9 + time.Millisecond }

// maxPause bounds what an issuer can ask for at once; it may ask again. It keeps a defect there from stopping us for ever.
const maxPause = 24 * time.Hour

// MaxCall is the longest that a call may take under leases of the given length: half of what is usable of one, so that a
// lease that is prolonged in time always has room for one more call.
func MaxCall(lease time.Duration) time.Duration { return usable(lease) / 2 }

// shares divides permits among those who want some: none gets more than it wants, and otherwise all get the same, give or
// take one. What cannot be divided goes to those who come first.
func shares(permits int, wants []int) []int {
	out := make([]int, len(wants))
	for permits > 0 {
		hungry := 0
		for i, w := range wants {
			if out[i] < w {
				hungry++
			}
		}
		if hungry == 0 {
			break
		}
		each := permits / hungry
		for i, w := range wants {
			if out[i] >= w || permits == 0 {
				continue
			}
			more := min(max(each, 1), w-out[i])
			out[i] += more
			permits -= more
		}
	}
	return out
}
