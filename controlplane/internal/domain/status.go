package domain

import "time"

// DefaultAlertThresholdsDays are the days before expiry at which operators are told, greatest first.
var DefaultAlertThresholdsDays = []int{30, 14, 7, 0}

// ExpiringAt is when a leaf begins to count as Expiring: the greatest threshold that is at most half its lifetime
// before its end, so that a 6-day certificate is not Expiring from birth; without one, the last tenth of its lifetime.
func ExpiringAt(notBefore, notAfter time.Time, thresholdsDays []int) time.Time {
	if len(thresholdsDays) == 0 {
		thresholdsDays = DefaultAlertThresholdsDays
	}
	life := notAfter.Sub(notBefore)
	best := time.Duration(0)
	for _, d := range thresholdsDays {
		t := time.Duration(d) * 24 * time.Hour
		if t > best && t <= life/2 {
			best = t
		}
	}
	if best == 0 {
		best = life / 10
	}
	return notAfter.Add(-best)
}

// StatusOf derives a certificate's status from its leaves at now; renewing says whether an issuance or renewal job is
// open for any of them. It never looks at the former status except for the two that only an operator sets.
func StatusOf(former CertificateStatus, p Policy, leaves []Leaf, renewing bool, now time.Time) CertificateStatus {
	if former == CertificateRevoked || former == CertificateArchived {
		return former
	}
	var issued, failed, expired, expiring int
	for _, l := range leaves {
		if l.Failures > 0 {
			failed++
		}
		if l.Current == 0 {
			continue
		}
		issued++
		switch {
		case !now.Before(l.NotAfter):
			expired++
		case !now.Before(ExpiringAt(l.NotBefore, l.NotAfter, p.AlertThresholdsDays)):
			expiring++
		}
	}
	switch {
	case expired > 0:
		return CertificateExpired
	case renewing && issued == len(leaves) && issued > 0:
		return CertificateRenewalInProgress
	case failed > 0 && !renewing:
		return CertificateFailed
	case issued < len(leaves) || issued == 0:
		return CertificatePending
	case expiring > 0:
		return CertificateExpiring
	default:
		return CertificateActive
	}
}

// RetryDelay is the capped exponential back-off between the tries of one job: 2 s doubling to 5 min, times a factor
// in [0.5, 1) from jitter in [0, 1).
func RetryDelay(tries int, jitter float64) time.Duration {
	d := 2 * time.Second
	for i := 1; i < tries && d < 5*time.Minute; i++ {
		d *= 2
	}
	if d > 5*time.Minute {
		d = 5 * time.Minute
	}
	return time.Duration(float64(d) * (0.5 + jitter/2))
}

// FailureBackoff is how long a certificate (or placement) whose job failed for good rests before the duty makes the
// next one: 1 h doubling to 24 h. failures counts from 1.
func FailureBackoff(failures int) time.Duration {
	d := time.Hour
	for i := 1; i < failures && d < 24*time.Hour; i++ {
		d *= 2
	}
	return min(d, 24*time.Hour)
}

// DefaultMaxTries is how often one job is tried before it is Failed.
const DefaultMaxTries = 5
