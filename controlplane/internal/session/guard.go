package session

import (
	"sync"
	"time"

	"github.com/jonboulle/clockwork"
	"golang.org/x/time/rate"
)

const (
	// A peer may fail this often in a row, then once per failEvery: enough for a mistyped token, too little to search.
	failBurst = 10
	failEvery = 6 * time.Second
	// maxPeers bounds what is remembered; when it is full everyone starts anew.
	maxPeers = 4096
	// Refusals are written to the trail at most so often, whoever causes them; the log and the metrics have them all.
	auditBurst = 50
	auditRate  = 10
	// helloRetry is around when an agent that was not admitted is asked to come back.
	helloRetry = 4 * time.Second
	// helloWait is how long a Hello waits to be worked on, well below an agent's patience (60 s); helloQueue how many wait,
	// each at the price of an open stream.
	helloWait  = 15 * time.Second
	helloQueue = 1 << 15
)

// guard bounds what strangers can cause.
type guard struct {
	clk    clockwork.Clock
	audits *rate.Limiter

	mu    sync.Mutex
	peers map[string]*rate.Limiter
}

func newGuard(clk clockwork.Clock) *guard {
	return &guard{clk: clk, audits: rate.NewLimiter(auditRate, auditBurst), peers: map[string]*rate.Limiter{}}
}

// mayTry reports whether peer may try, or from when on it may.
func (g *guard) mayTry(peer string) (time.Time, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	l := g.peers[peer]
	now := g.clk.Now()
	if l == nil || l.TokensAt(now) >= 1 {
		return time.Time{}, true
	}
	return now.Add(failEvery), false
}

// failed counts a failure of peer.
func (g *guard) failed(peer string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	l := g.peers[peer]
	if l == nil {
		if len(g.peers) >= maxPeers {
			clear(g.peers)
		}
		l = rate.NewLimiter(rate.Every(failEvery), failBurst)
		g.peers[peer] = l
	}
	l.AllowN(g.clk.Now(), 1)
}

// mayAudit takes one of the rows that strangers may cause.
func (g *guard) mayAudit() bool { return g.audits.AllowN(g.clk.Now(), 1) }
