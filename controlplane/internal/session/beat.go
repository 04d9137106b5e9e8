package session

import "time"

// beatRate is how many beats a second a node takes from all its agents before it asks for fewer: each costs some ten
// microseconds of CPU and, once per flush, a row, so that a hundred stay far below one percent of a core.
const beatRate = 100

// BeatInterval is how often each of so many agents is to beat: at least base apart, stretched so that all together beat
// at most beatRate times a second, but never beyond most, from which on the rate rises again. A most below base does not
// stretch. Whole seconds, so that one agent more or less makes no difference.
func BeatInterval(base, most time.Duration, agents int) time.Duration {
	stretched := time.Duration((agents+beatRate-1)/beatRate) * time.Second
	return max(base, min(stretched, most))
}

// beat is the interval for an agent that connects now. Agents that wait at the gate count, so that those that come back
// to a node that was started are told what is right for all of them.
func (s *Server) beat() time.Duration {
	s.mu.RLock()
	n := len(s.agents)
	s.mu.RUnlock()
	return BeatInterval(s.cfg.BeatInterval, s.cfg.MaxBeat, n)
}
