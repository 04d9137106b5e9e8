package session

import (
	"testing"
	"time"
)

func TestBeatInterval(t *testing.T) {
	t.Parallel()
	const base, most = 30 * time.Second, 54 * time.Second
	for _, c := range []struct {
		agents     int
		base, most time.Duration
		want       time.Duration
	}{
		{0, base, most, base},
		{1, base, most, base},
		{3000, base, most, base},
		{3001, base, most, 31 * time.Second},
		{5000, base, most, 50 * time.Second},
		{5400, base, most, most},
		{10_000, base, most, most},
		{1_000_000, base, time.Hour, time.Hour},
		{1_000_000, base, 5 * time.Hour, 10_000 * time.Second},
		// An agent that may be silent only shortly beats as often as it must, however many there are.
		{1_000_000, time.Second, 0, time.Second},
	} {
		if got := BeatInterval(c.base, c.most, c.agents); got != c.want {
			t.Errorf("%d agents, %s to %s: %s, not %s", c.agents, c.base, c.most, got, c.want)
		}
	}
}

// TestBeatStretches: an agent that connects is told an interval that fits how many there are.
func TestBeatStretches(t *testing.T) {
	t.Parallel()
	p := newPlane(t, func(c *Config) { c.BeatInterval, c.MaxBeat = time.Millisecond, 10*time.Second })
	if w := p.host("a").connect().welcome(); w.GetBeatIntervalMs() != 1000 {
		t.Errorf("beat interval %d ms", w.GetBeatIntervalMs())
	}
}
