package issue

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Checking a request costs a tenth of a millisecond before anything of it is known to be good. An agent whose requests are
// bad may send carelessBurst of them at once and carelessRate a second: far more than the tries of any job, too few to take
// processors from others.
const (
	carelessRate  = 5
	carelessBurst = 20
	// carelessMax bounds the agents that are remembered. Beyond it all are forgotten, which costs one burst each.
	carelessMax = 4096
)

// careless remembers the agents that sent bad requests.
type careless struct {
	mu     sync.Mutex
	agents map[string]*rate.Limiter
}

// mayCheck reports whether a request of the agent may be looked at now.
func (c *careless) mayCheck(agentID string, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.agents[agentID]
	if l == nil {
		return true
	}
	tokens := l.TokensAt(now)
	if tokens >= carelessBurst {
		delete(c.agents, agentID) // forgiven
	}
	return tokens >= 1
}

// wasBad notes a bad request.
func (c *careless) wasBad(agentID string, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.agents[agentID]
	if l == nil {
		if c.agents == nil || len(c.agents) >= carelessMax {
			c.agents = map[string]*rate.Limiter{}
		}
		l = rate.NewLimiter(carelessRate, carelessBurst)
		c.agents[agentID] = l
	}
	l.AllowN(now, 1)
}
