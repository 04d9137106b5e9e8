package cluster

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/certmesh/certmesh/cluster/internal/fsm"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// maxSnapshot bounds what is read as a snapshot; a real one has kilobytes.
const maxSnapshot = 64 << 20

// machine hangs the pure state under Raft. Raft calls Apply, Snapshot and Restore from one goroutine.
type machine struct {
	log *slog.Logger
	// tooOld is called once, when the log holds what this version does not know. The state stands still from then on, and
	// no snapshot is made of it, so that a newer program finds everything.
	tooOld func(error)
	// changed is called after each change of the state; it must not block.
	changed func()

	mu     sync.Mutex
	state  *clusterpb.Snapshot
	frozen bool
}

func (m *machine) current() *clusterpb.Snapshot {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state
}

// Apply implements raft.FSM. The response is an error or nil.
func (m *machine) Apply(l *raft.Log) any {
	if m.frozen {
		return fsm.ErrUnknown
	}
	next, err := fsm.Apply(m.state, l.Data)
	switch {
	case errors.Is(err, fsm.ErrUnknown):
		m.frozen = true
		m.tooOld(fault.Wrap(fault.Unsupported, err, "this program is too old for the cluster: install the version that the other nodes run"))
		return err
	case errors.Is(err, fsm.ErrMalformed):
		m.log.Warn("an entry of the Raft log was skipped", "index", l.Index, "error", err)
		return err
	case err != nil:
		return err
	}
	m.set(next)
	return nil
}

func (m *machine) set(next *clusterpb.Snapshot) {
	m.mu.Lock()
	m.state = next
	m.mu.Unlock()
	m.changed()
}

// Snapshot implements raft.FSM.
func (m *machine) Snapshot() (raft.FSMSnapshot, error) {
	if m.frozen {
		return nil, fsm.ErrUnknown
	}
	return frozen{m.state}, nil
}

// Restore implements raft.FSM.
func (m *machine) Restore(r io.ReadCloser) error {
	defer r.Close() // Only read.
	data, err := io.ReadAll(io.LimitReader(r, maxSnapshot+1))
	if err != nil {
		return fmt.Errorf("read the snapshot: %w", err)
	}
	if len(data) > maxSnapshot {
		return fmt.Errorf("the snapshot has more than %d bytes", maxSnapshot)
	}
	state, err := fsm.Decode(data)
	if err != nil {
		return err
	}
	m.frozen = false
	m.set(state)
	return nil
}

// frozen is a state on its way to the disk.
type frozen struct{ state *clusterpb.Snapshot }

// Persist implements raft.FSMSnapshot.
func (f frozen) Persist(sink raft.SnapshotSink) error {
	data, err := fsm.Encode(f.state)
	if err == nil {
		_, err = sink.Write(data)
	}
	if err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// Release implements raft.FSMSnapshot.
func (frozen) Release() {}
