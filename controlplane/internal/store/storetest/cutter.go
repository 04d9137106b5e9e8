package storetest

import (
	"sync"

	"github.com/certmesh/certmesh/controlplane/internal/store"
)

// Cutter is a store.Faults under which the process dies at one chosen event: a statement, the moment before a commit, or
// the moment after it. Once dead it stays dead, as a process does, until it is armed again.
type Cutter struct {
	mu     sync.Mutex
	at     int
	events int
	dead   bool
	onCut  func()
}

// Arm brings the process to life; it will die at the at-th event from now on, or never if at is 0.
func (c *Cutter) Arm(at int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at, c.events, c.dead = at, 0, false
}

// OnCut sets what is called, once and without a lock of the store's held open, at the cut.
func (c *Cutter) OnCut(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.onCut = f
}

// Dead reports whether the process has died.
func (c *Cutter) Dead() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dead
}

// Events is how many events there have been since Arm.
func (c *Cutter) Events() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.events
}

func (c *Cutter) eventLocked() bool {
	c.events++
	if !c.dead && c.at > 0 && c.events == c.at {
		c.dead = true
		if c.onCut != nil {
			go c.onCut()
		}
	}
	return c.dead
}

// Before implements store.Faults.
func (c *Cutter) Before(string, int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.eventLocked() {
		return store.ErrCut
	}
	return nil
}

// Commit implements store.Faults.
func (c *Cutter) Commit(string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.eventLocked() {
		return store.ErrCut
	}
	if c.eventLocked() {
		return store.ErrCutAfterCommit
	}
	return nil
}
