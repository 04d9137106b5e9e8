package renew

import (
	"errors"
	"math"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestLesson8WindowsAreProvedSatisfiable(t *testing.T) {
	t.Parallel()
	window := func(start, end int, days ...int) []domain.Window {
		return []domain.Window{{Days: days, Start: start, End: end}}
	}
	every := []int{0, 1, 2, 3, 4, 5, 6}
	for _, c := range []struct {
		name   string
		policy domain.Policy
		ttl    time.Duration
		field  string
	}{
		{"empty", domain.Policy{}, 90 * day, ""},
		{"one", domain.Policy{Fraction: 1}, 90 * day, "policy.fraction"},
		{"negative", domain.Policy{Fraction: -0.1}, 90 * day, "policy.fraction"},
		{"no number", domain.Policy{Fraction: math.NaN()}, 90 * day, "policy.fraction"},
		{"renews without end", domain.Policy{Fraction: 0.01}, 10 * time.Minute, "policy.fraction"},
		{"thresholds", domain.Policy{AlertThresholdsDays: []int{30, 14, 7, 0}}, 6 * day, ""},
		{"negative threshold", domain.Policy{AlertThresholdsDays: []int{30, -1}}, 90 * day, "policy.alert_thresholds_days[1]"},
		{"threshold twice", domain.Policy{AlertThresholdsDays: []int{7, 7}}, 90 * day, "policy.alert_thresholds_days[1]"},
		{"Sundays", domain.Policy{Windows: window(60, 120, 0)}, 90 * day, ""},
		{"Sundays, disabled", domain.Policy{Windows: window(60, 120, 0), Disabled: true}, day, ""},
		{"Sundays for a week", domain.Policy{Windows: window(60, 120, 0)}, 7 * day, "policy.windows"},
		{"Sundays, late fraction", domain.Policy{Fraction: 0.95, Windows: window(60, 120, 0)}, 90 * day, "policy.windows"},
		{"nights for six days", domain.Policy{Windows: window(1320, 240, every...)}, 6 * day, ""},
		{"nights for a day", domain.Policy{Windows: window(1320, 240, every...)}, day, "policy.windows"},
		{"always, short-lived", domain.Policy{Windows: window(0, 1440, every...)}, 15 * time.Minute, ""},
		{"no days", domain.Policy{Windows: window(60, 120)}, 90 * day, "policy.windows[0].days"},
		{"eighth day", domain.Policy{Windows: window(60, 120, 7)}, 90 * day, "policy.windows[0].days"},
		{"day twice", domain.Policy{Windows: window(60, 120, 1, 1)}, 90 * day, "policy.windows[0].days"},
		{"start", domain.Policy{Windows: window(1440, 120, 1)}, 90 * day, "policy.windows[0].start_minute"},
		{"end", domain.Policy{Windows: window(0, 1441, 1)}, 90 * day, "policy.windows[0].end_minute"},
		{"no length", domain.Policy{Windows: window(60, 60, 1)}, 90 * day, "policy.windows[0].end_minute"},
		{"too short", domain.Policy{Windows: window(60, 70, 1)}, 90 * day, "policy.windows[0].end_minute"},
	} {
		err := CheckPolicy(c.policy, profile(c.ttl))
		var f *fault.Error
		switch {
		case c.field == "" && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.field != "" && (!errors.As(err, &f) || f.Class != fault.Invalid || f.Field != c.field):
			t.Errorf("%s: %v, want a fault of %s", c.name, err, c.field)
		}
	}
}
