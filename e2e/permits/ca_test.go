package permits

import (
	"cmp"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"
)

// What a node says of a call, in headers.
const (
	headerNode   = "X-Node"
	headerCall   = "X-Call"
	headerBegun  = "X-Begun" // UnixNano, of the one machine's clock
	headerLeader = "X-Leader"
)

// ca stands in for an issuer: each call takes a moment.
type ca struct {
	inFlight int
	rate     float64
	// call is how long the nth call takes, and pause for how long the issuer wants to be left alone, then; 0: it does not.
	call func(n int) (takes, pause time.Duration)

	mu       sync.Mutex
	now      map[string]bool
	most     int
	begun    []begun
	told     []told
	leader   string
	problems []string
}

// begun is a call as its node began it; told is a node that was told to wait.
type begun struct {
	node string
	at   time.Time
}

type told struct {
	node        string
	from, until time.Time
}

func (c *ca) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id := r.Header.Get(headerCall)
	if r.Method == http.MethodGet {
		c.mu.Lock()
		defer c.mu.Unlock()
		fmt.Fprint(w, c.now[id])
		return
	}
	takes, pause := c.enter(id, r)
	timer := time.NewTimer(takes)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-r.Context().Done():
	}
	c.leave(id, r.Header.Get(headerNode), pause)
	if pause > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(pause/time.Second)))
		w.WriteHeader(http.StatusTooManyRequests)
	}
}

func (c *ca) enter(id string, r *http.Request) (takes, pause time.Duration) {
	ns, err := strconv.ParseInt(r.Header.Get(headerBegun), 10, 64)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.problems = append(c.problems, err.Error())
	}
	c.now[id] = true
	c.most = max(c.most, len(c.now))
	if len(c.now) > c.inFlight {
		c.problems = append(c.problems, fmt.Sprintf("%d calls in flight, %d allowed", len(c.now), c.inFlight))
	}
	c.begun = append(c.begun, begun{r.Header.Get(headerNode), time.Unix(0, ns)})
	if leader := r.Header.Get(headerLeader); leader != "" {
		c.leader = leader
	}
	return c.call(len(c.begun))
}

// leave comes before the answer: whoever has the answer may begin the next call.
func (c *ca) leave(id, node string, pause time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.now, id)
	if pause > 0 {
		now := time.Now()
		c.told = append(c.told, told{node, now, now.Add(pause)})
	}
}

func (c *ca) calls() (total int, byNode map[string]int, leader string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	byNode = map[string]int{}
	for _, b := range c.begun {
		byNode[b.node]++
	}
	return len(c.begun), byNode, c.leader
}

// jitter is how late a process of a busy machine notes when it began.
const jitter = 500 * time.Millisecond

// verdict lists what was wrong.
func (c *ca) verdict(nodes int) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := slices.Clone(c.problems)
	slices.SortFunc(c.begun, func(a, b begun) int { return cmp.Compare(a.at.UnixNano(), b.at.UnixNano()) })
	// In a bucket that leaks at the rate, each node may have one call in advance.
	level, allowed := 0.0, float64(nodes)+c.rate*jitter.Seconds()
	for i, b := range c.begun {
		if i > 0 {
			level = max(0, level-c.rate*b.at.Sub(c.begun[i-1].at).Seconds())
		}
		if level++; level > allowed {
			out = append(out, fmt.Sprintf("call %d was begun too early: %.1f calls beyond %.0f a second", i, level, c.rate))
		}
		for _, t := range c.told {
			if b.node == t.node && b.at.After(t.from.Add(jitter)) && b.at.Before(t.until) {
				out = append(out, fmt.Sprintf("%s called %v before the end of the pause it was asked for", b.node, t.until.Sub(b.at)))
			}
		}
	}
	return out
}
