package log_test

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	clusterlog "github.com/certmesh/certmesh/cluster/internal/log"
)

var errFull = errors.New("full")

// disk fails to write as often as fails says; below zero: always.
type disk struct {
	*raft.InmemStore
	fails atomic.Int32
}

func (d *disk) err() error {
	switch n := d.fails.Load(); {
	case n < 0:
		return errFull
	case n > 0:
		d.fails.Add(-1)
		return errFull
	}
	return nil
}

func (d *disk) SetUint64(key []byte, v uint64) error {
	if err := d.err(); err != nil {
		return err
	}
	return d.InmemStore.SetUint64(key, v)
}

func (d *disk) StoreLogs(l []*raft.Log) error {
	if err := d.err(); err != nil {
		return err
	}
	return d.InmemStore.StoreLogs(l)
}

func TestStoreWaitsWithTheTerm(t *testing.T) {
	t.Parallel()
	d := &disk{InmemStore: raft.NewInmemStore()}
	var failed, succeeded atomic.Int32
	s := clusterlog.NewStore(d, time.Millisecond, func(w clusterlog.Write, err error) {
		switch {
		case err != nil && w == clusterlog.WriteTerm:
			failed.Add(1)
		case err == nil:
			succeeded.Add(1)
		}
	})
	d.fails.Store(3)
	if err := s.SetUint64([]byte("CurrentTerm"), 7); err != nil {
		t.Fatal(err)
	}
	if v, err := s.GetUint64([]byte("CurrentTerm")); err != nil || v != 7 || failed.Load() != 3 || succeeded.Load() != 1 {
		t.Errorf("term %d, %v; %d failed, %d succeeded", v, err, failed.Load(), succeeded.Load())
	}
	// A vote that is not on the disk is not given, an entry not acknowledged.
	d.fails.Store(-1)
	if err := s.SetUint64([]byte("LastVoteTerm"), 7); !errors.Is(err, errFull) {
		t.Errorf("%v", err)
	}
	if err := s.StoreLogs([]*raft.Log{{Index: 1}}); !errors.Is(err, errFull) {
		t.Errorf("%v", err)
	}
	done := make(chan error)
	go func() { done <- s.SetUint64([]byte("CurrentTerm"), 8) }()
	s.Release()
	s.Release()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("Raft would panic: %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("it waits for ever")
	}
}

func TestOneProcessADirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f, err := clusterlog.Open(dir, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	if !clusterlog.InUse(dir) {
		t.Error("an open log is not in use")
	}
	if _, err := clusterlog.Open(dir, hclog.NewNullLogger()); err == nil {
		t.Error("two have it open")
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if clusterlog.InUse(dir) {
		t.Error("a closed log is in use")
	}
}
