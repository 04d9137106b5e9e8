package log

import (
	"bytes"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// keyTerm is where Raft keeps the term that it is in.
var keyTerm = []byte("CurrentTerm")

// Backend is what a Store writes to: raft-boltdb, or in tests one that fails.
type Backend interface {
	raft.LogStore
	raft.StableStore
}

// Store is a log and stable store that outlives a full disk. Raft panics when it cannot write its term; here that write is
// tried again until it succeeds, and meanwhile the node takes part in nothing. An entry that cannot be written is an error
// that Raft lives with: a leader steps down, a follower refuses.
type Store struct {
	Backend
	note  func(Write, error)
	retry time.Duration
	done  chan struct{}
	once  sync.Once
}

// Write says what was written.
type Write int

const (
	// WriteTerm is the term; nothing goes on before it is written.
	WriteTerm Write = iota + 1
	// WriteOther is a vote or an entry.
	WriteOther
)

// NewStore returns a Store on backend. note is called with the outcome of every write; it must not block.
func NewStore(backend Backend, retry time.Duration, note func(Write, error)) *Store {
	return &Store{Backend: backend, note: note, retry: retry, done: make(chan struct{})}
}

// Release ends all waiting; what could not be written is not written. Raft must be shutting down.
func (s *Store) Release() { s.once.Do(func() { close(s.done) }) }

// StoreLog implements raft.LogStore.
func (s *Store) StoreLog(l *raft.Log) error { return s.wrote(s.Backend.StoreLog(l)) }

// StoreLogs implements raft.LogStore.
func (s *Store) StoreLogs(l []*raft.Log) error { return s.wrote(s.Backend.StoreLogs(l)) }

// DeleteRange implements raft.LogStore.
func (s *Store) DeleteRange(low, high uint64) error { return s.wrote(s.Backend.DeleteRange(low, high)) }

// Set implements raft.StableStore.
func (s *Store) Set(key, value []byte) error { return s.wrote(s.Backend.Set(key, value)) }

// SetUint64 implements raft.StableStore.
func (s *Store) SetUint64(key []byte, value uint64) error {
	if !bytes.Equal(key, keyTerm) {
		return s.wrote(s.Backend.SetUint64(key, value))
	}
	for {
		err := s.Backend.SetUint64(key, value)
		s.note(WriteTerm, err)
		if err == nil {
			return nil
		}
		timer := time.NewTimer(s.retry)
		select {
		case <-timer.C:
		case <-s.done:
			timer.Stop()
			// Raft is shutting down and acts on nothing any more; an error would be a panic.
			return nil
		}
	}
}

func (s *Store) wrote(err error) error {
	s.note(WriteOther, err)
	return err
}
