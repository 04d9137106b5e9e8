package cluster

import (
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"github.com/jonboulle/clockwork"
)

// contact is what a node last answered to this one.
type contact struct {
	at          time.Time
	term, index uint64
}

// transport is Raft's, and remembers who answered when: Raft tells the leader about silence by observers that drop. Each
// heartbeat passes here.
type transport struct {
	*raft.NetworkTransport
	clk clockwork.Clock

	mu       sync.Mutex
	contacts map[raft.ServerID]contact
	// greeted is since when a node's silence counts.
	greeted map[raft.ServerID]time.Time
}

func newTransport(inner *raft.NetworkTransport, clk clockwork.Clock) *transport {
	return &transport{NetworkTransport: inner, clk: clk, contacts: map[raft.ServerID]contact{}, greeted: map[raft.ServerID]time.Time{}}
}

// AppendEntries implements raft.Transport.
func (t *transport) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if err := t.NetworkTransport.AppendEntries(id, target, args, resp); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.contacts[id] = contact{at: t.clk.Now(), term: resp.Term, index: resp.LastLog}
	return nil
}

// greet forgets what a node answered before it became a member, which may be long ago.
func (t *transport) greet(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.contacts, raft.ServerID(id))
	t.greeted[raft.ServerID(id)] = t.clk.Now()
}

// contact returns what a node last answered. If it has not answered since then, or since it was greeted, at is the later of
// the two.
func (t *transport) contact(id string, since time.Time) contact {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.contacts[raft.ServerID(id)]
	for _, begin := range []time.Time{since, t.greeted[raft.ServerID(id)]} {
		if c.at.Before(begin) {
			c.at = begin
		}
	}
	return c
}

// answered reports whether a node has answered within d.
func (t *transport) answered(id string, d time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	c, ok := t.contacts[raft.ServerID(id)]
	return ok && t.clk.Now().Sub(c.at) <= d
}
