// Package log keeps a node's Raft log, its votes and its snapshots on disk.
//
// Open looks at all of it before Raft does, because Raft answers damage with a panic or, worse, with a gap that nobody
// notices. Store stands between Raft and a disk that fails: see there.
package log

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	file = "raft.db"
	// Where raft.FileSnapshotStore keeps its snapshots.
	snapshots = "snapshots"
	// The newest, and one for the time in which it is written.
	retained = 2
	// A lock that is not free after that is held by a process that lives.
	lockTimeout = 500 * time.Millisecond
)

// Files is what lies in a node's Raft directory.
type Files struct {
	Bolt      *raftboltdb.BoltStore
	Snapshots *raft.FileSnapshotStore
	// Logs are the entries of the log, oldest first, as they lay there at the start.
	Logs []*raft.Log
	// Newest is the newest snapshot's content, nil if there is none.
	Newest []byte
}

// Open opens the Raft directory dir and creates it where there is none. Damage is an error of class Rejected that says
// what to do.
func Open(dir string, log hclog.Logger) (*Files, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create the Raft directory: %w", err)
	}
	f := &Files{}
	store, err := raft.NewFileSnapshotStoreWithLogger(dir, retained, log)
	if err != nil {
		return nil, fmt.Errorf("open the Raft snapshots: %w", err)
	}
	f.Snapshots = store
	last, err := f.readSnapshots(dir)
	if err != nil {
		return nil, err
	}
	if err := armed(func() error { return f.readLog(dir) }); err != nil {
		return nil, err
	}
	if first := f.first(); first > last+1 {
		_ = f.Close() // Only read.
		return nil, damaged(dir, fmt.Errorf("the log begins at %d, the newest snapshot ends at %d", first, last))
	}
	return f, nil
}

// Close closes the log. The snapshots need no closing.
func (f *Files) Close() error { return f.Bolt.Close() }

func (f *Files) first() uint64 {
	if len(f.Logs) == 0 {
		return 0
	}
	return f.Logs[0].Index
}

// readSnapshots reads every snapshot, with its checksum, keeps the newest, and returns its index. Raft would pass over one
// that it cannot read and go on from an older state than the one this node has acknowledged.
func (f *Files) readSnapshots(dir string) (uint64, error) {
	entries, err := os.ReadDir(filepath.Join(dir, snapshots))
	if err != nil {
		return 0, fmt.Errorf("read the Raft snapshots: %w", err)
	}
	whole := 0
	for _, e := range entries {
		// Unfinished ones are Raft's to sweep.
		if e.IsDir() && !strings.HasSuffix(e.Name(), ".tmp") {
			whole++
		}
	}
	list, err := f.Snapshots.List()
	if err != nil {
		return 0, fmt.Errorf("list the Raft snapshots: %w", err)
	}
	if len(list) < min(whole, retained) {
		return 0, damaged(dir, errors.New("the description of a snapshot cannot be read"))
	}
	var last uint64
	for i, meta := range list {
		_, r, err := f.Snapshots.Open(meta.ID)
		if err != nil {
			return 0, damaged(dir, fmt.Errorf("snapshot %s: %w", meta.ID, err))
		}
		data, err := io.ReadAll(r)
		_ = r.Close() // Only read.
		if err != nil {
			return 0, damaged(dir, fmt.Errorf("snapshot %s: %w", meta.ID, err))
		}
		if i == 0 {
			f.Newest, last = data, meta.Index
		}
	}
	return last, nil
}

// readLog opens the log and reads all of it.
func (f *Files) readLog(dir string) (err error) {
	path := filepath.Join(dir, file)
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return fmt.Errorf("open the Raft log: %w", err)
	case info.Size() == 0 && f.Newest != nil:
		return damaged(dir, errors.New("the log is empty beside a snapshot"))
	case info.Size() > 0:
		if err := whole(path, info.Size()); errors.Is(err, bolterrors.ErrTimeout) {
			return inUse(dir)
		} else if err != nil {
			return damaged(dir, err)
		}
	}
	var opened *os.File
	defer contain(&err, dir, func() { _ = opened.Close() })
	f.Bolt, err = raftboltdb.New(raftboltdb.Options{Path: path, BoltOptions: &bbolt.Options{
		Timeout: lockTimeout,
		OpenFile: func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
			opened, err = os.OpenFile(name, flag, mode)
			return opened, err
		},
	}})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return inUse(dir)
	}
	if err != nil {
		return fmt.Errorf("open the Raft log: %w", err)
	}
	if f.Logs, err = entries(f.Bolt); err != nil {
		_ = f.Close() // Only read.
		return damaged(dir, err)
	}
	return nil
}

// whole reports whether every page that the log refers to lies in the file, and can be walked. Reading beyond a file's
// end in mapped memory kills the process, so it is looked at before anything is read.
func whole(path string, size int64) (err error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: lockTimeout})
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }() // Only read.
	defer contain(&err, "", nil)
	return db.View(func(tx *bbolt.Tx) error {
		if tx.Size() > size {
			return fmt.Errorf("the log is cut off: %d of %d bytes", size, tx.Size())
		}
		return tx.ForEach(func(_ []byte, b *bbolt.Bucket) error {
			return b.ForEach(func(_, _ []byte) error { return nil })
		})
	})
}

func entries(bolt *raftboltdb.BoltStore) ([]*raft.Log, error) {
	first, err := bolt.FirstIndex()
	if err != nil {
		return nil, err
	}
	last, err := bolt.LastIndex()
	if err != nil || last == 0 {
		return nil, err
	}
	if first == 0 || last < first || last-first > 1<<24 {
		return nil, fmt.Errorf("the log reaches from %d to %d", first, last)
	}
	var all []*raft.Log
	for i := first; i <= last; i++ {
		l := &raft.Log{}
		if err := bolt.GetLog(i, l); err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
		if l.Index != i {
			return nil, fmt.Errorf("entry %d says that it is entry %d", i, l.Index)
		}
		all = append(all, l)
	}
	return all, nil
}

// contain turns a panic over damaged pages into an error.
func contain(err *error, dir string, release func()) {
	r := recover()
	if r == nil {
		return
	}
	if release != nil {
		release()
	}
	*err = fmt.Errorf("a page cannot be read: %v", r)
	if dir != "" {
		*err = damaged(dir, *err)
	}
}

// armed makes a fault while f reads mapped memory a panic, which contain catches.
func armed(f func() error) error {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	return f()
}

// InUse reports whether a process holds the log in dir open.
func InUse(dir string) bool {
	path := filepath.Join(dir, file)
	if _, err := os.Stat(path); err != nil {
		return false
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: lockTimeout})
	if err == nil {
		_ = db.Close() // Only read.
	}
	return errors.Is(err, bolterrors.ErrTimeout)
}

func damaged(dir string, err error) error {
	return fault.Wrap(fault.Rejected, err, "the Raft files in %s are damaged: run \"certmeshd cluster recover\" on this node and start it "+
		"again; it loses nothing but what the other nodes tell it anew", dir)
}

func inUse(dir string) error {
	return fault.New(fault.Rejected, "the Raft files in %s are in use: another certmeshd runs with this data directory", dir)
}
