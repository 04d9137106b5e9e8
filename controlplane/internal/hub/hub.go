// Package hub spreads notices of change inside one node: "this resource is not what it was". A notice carries no
// content; whoever watches reads again what it shows. Publishing never blocks and never fails: what a subscriber has
// not taken yet is merged per resource, up to a bound, beyond which it is told that it has missed some (lagged) and
// reads everything again. However many subscribe, the store is asked by nobody on the hub's account.
//
// Of what happens on other nodes of a cluster it hears by Relay. Who carries notices between nodes subscribes by
// SubscribeOwn, which leaves those out, so that no notice goes round.
package hub

import (
	"slices"
	"sync"
)

// The kinds of resources.
const (
	Certificates = "certificates"
	Agents       = "agents"
	Jobs         = "jobs"
	Targets      = "targets"
	Issuers      = "issuers"
)

// Kinds lists them all.
var Kinds = []string{Certificates, Agents, Jobs, Targets, Issuers}

// pendingLimit is how many different resources wait for one slow subscriber before it is told that it lags: 256
// notices are about 20 KiB, and a client that missed that many reads its list again anyway.
const pendingLimit = 256

// Notice names a resource that has changed.
type Notice struct{ Kind, ID string }

// Hub is made by New.
type Hub struct {
	mu   sync.RWMutex
	subs map[*Subscription]struct{}
}

// New returns an empty hub.
func New() *Hub { return &Hub{subs: map[*Subscription]struct{}{}} }

// Publish tells every subscriber that cares. It may be called from anywhere, after the change is committed.
func (h *Hub) Publish(notices ...Notice) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	for s := range h.subs {
		s.add(notices)
	}
}

// Relay tells every subscriber but those of SubscribeOwn what another node has published; more says that some of it is
// not named, so that all of them lag.
func (h *Hub) Relay(notices []Notice, more bool) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	for s := range h.subs {
		if s.own {
			continue
		}
		s.add(notices)
		if more {
			s.lag()
		}
	}
}

// Subscribers is how many there are now.
func (h *Hub) Subscribers() int {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return len(h.subs)
}

// Subscribe returns a subscription to the given kinds (empty: all) and, unless id is empty, to that resource alone.
// The caller ends it by Close.
func (h *Hub) Subscribe(kinds []string, id string) *Subscription {
	return h.subscribe(&Subscription{kinds: kinds, id: id})
}

// SubscribeOwn returns a subscription to all that is published on this node, without what Relay brings from others.
func (h *Hub) SubscribeOwn() *Subscription { return h.subscribe(&Subscription{own: true}) }

func (h *Hub) subscribe(s *Subscription) *Subscription {
	s.hub, s.seen, s.wake = h, map[Notice]struct{}{}, make(chan struct{}, 1)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.subs[s] = struct{}{}
	return s
}

// Subscription is one watcher's set of notices.
type Subscription struct {
	hub   *Hub
	kinds []string
	id    string
	own   bool
	// wake coalesces: one token says "there is something to take", however much it is.
	wake chan struct{}

	mu      sync.Mutex
	pending []Notice
	seen    map[Notice]struct{}
	lagged  bool
}

func (s *Subscription) add(notices []Notice) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range notices {
		if s.id != "" && n.ID != s.id || len(s.kinds) > 0 && !slices.Contains(s.kinds, n.Kind) {
			continue
		}
		if _, ok := s.seen[n]; ok {
			continue
		}
		if len(s.pending) == pendingLimit {
			s.lagged = true
		} else {
			s.pending = append(s.pending, n)
			s.seen[n] = struct{}{}
		}
		s.signal()
	}
}

// lag has the subscriber read everything again.
func (s *Subscription) lag() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lagged = true
	s.signal()
}

func (s *Subscription) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Changed receives when there is something to Take.
func (s *Subscription) Changed() <-chan struct{} { return s.wake }

// Take returns what has changed since the last Take, in order of the first notice of each resource; lagged says that
// some notices were dropped.
func (s *Subscription) Take() (changes []Notice, lagged bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	changes, lagged = s.pending, s.lagged
	s.pending, s.lagged = nil, false
	clear(s.seen)
	return changes, lagged
}

// Close ends the subscription; twice is fine.
func (s *Subscription) Close() {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	delete(s.hub.subs, s)
}
