package cluster

import (
	"log/slog"
	"sync"

	clusterlog "github.com/certmesh/certmesh/cluster/internal/log"
)

// disk remembers whether the Raft log can be written.
type disk struct {
	log  *slog.Logger
	poke func()
	// stuck delivers when Raft waits for the disk and cannot step down by itself.
	stuck chan struct{}

	mu    sync.Mutex
	cause error
}

func newDisk(log *slog.Logger, poke func()) *disk {
	return &disk{log: log, poke: poke, stuck: make(chan struct{}, 1)}
}

func (d *disk) note(w clusterlog.Write, err error) {
	d.mu.Lock()
	before := d.cause
	d.cause = err
	d.mu.Unlock()
	switch {
	case err != nil && before == nil:
		d.log.Error("the Raft log cannot be written: this node neither leads nor votes until that is over", "error", err)
		d.poke()
	case err == nil && before != nil:
		d.log.Info("the Raft log can be written again")
		d.poke()
	}
	if err != nil && w == clusterlog.WriteTerm {
		poke(d.stuck)
	}
}

func (d *disk) err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cause
}

func (d *disk) failing() bool { return d.err() != nil }
