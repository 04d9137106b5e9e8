// Package durable writes small files so that a crash at any moment leaves either the old or the new content.
//
// Everything the agent must not forget (identity, journal, keys, states) goes through it. It knows nothing of what the
// files mean.
package durable

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/certmesh/certmesh/protocol/fault"
)

// tempPrefix marks files that were being written when the process ended; they are removed by Sweep.
const tempPrefix = ".tmp-"

// WriteFile replaces path by data with mode, and returns once the content and the name are on disk. The directory must
// exist. Errors are Retryable: a full disk or a directory without permission is for the host's operator to cure.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	if err := writeFile(path, data, mode); err != nil {
		return fault.Wrap(fault.Retryable, err, "%s cannot be written (%s); free space or correct its permissions",
			path, Reason(err))
	}
	return nil
}

// Replace is WriteFile for what may be lost in a power cut: nothing is synced, and after one path may hold the old or the new
// content, or a part of it.
func Replace(path string, data []byte, mode fs.FileMode) error {
	if err := replace(path, data, mode, false); err != nil {
		return fault.Wrap(fault.Retryable, err, "%s cannot be written (%s); free space or correct its permissions",
			path, Reason(err))
	}
	return nil
}

func writeFile(path string, data []byte, mode fs.FileMode) error {
	if err := replace(path, data, mode, true); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

func replace(path string, data []byte, mode fs.FileMode, sync bool) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, tempPrefix+"*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	// CreateTemp makes 0600; a wider mode is set before the first byte, so that the name never appears with a wrong one.
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	if sync {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// Reason names the operating system's cause of err in a few words, without paths.
func Reason(err error) string {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err.Error()
	}
	if le, ok := errors.AsType[*os.LinkError](err); ok {
		return le.Err.Error()
	}
	return err.Error()
}

// SyncDir makes the names in dir durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	return d.Sync()
}

// PrivateDir makes dir with mode 0700, or narrows an existing one to it.
func PrivateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fault.Wrap(fault.Retryable, err, "the directory %s cannot be made (%s); correct the permissions of its parent",
			dir, Reason(err))
	}
	st, err := os.Stat(dir)
	if err != nil {
		return fault.Wrap(fault.Retryable, err, "the directory %s cannot be read (%s)", dir, Reason(err))
	}
	if st.Mode().Perm()&0o077 == 0 {
		return nil
	}
	if err := os.Chmod(dir, 0o700); err != nil { //nolint:gosec // a directory is entered by its x bits
		return fault.Wrap(fault.Retryable, err, "the directory %s is open to others (mode %04o) and cannot be closed (%s); make it 0700 and owned by the agent's user",
			dir, st.Mode().Perm(), Reason(err))
	}
	return nil
}

// Sweep removes what interrupted writes left in dir. A directory that does not exist is clean.
func Sweep(dir string) error {
	es, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fault.Wrap(fault.Retryable, err, "the directory %s cannot be read (%s)", dir, Reason(err))
	}
	for _, e := range es {
		if strings.HasPrefix(e.Name(), tempPrefix) && e.Type().IsRegular() {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fault.Wrap(fault.Retryable, err, "an interrupted write in %s cannot be removed (%s)", dir, Reason(err))
			}
		}
	}
	return nil
}

// Held looks at a lock by taking it for a moment, which must not end an agent that starts in that moment.
const (
	lockTries = 10
	lockPause = 20 * time.Millisecond
)

// Lock takes an exclusive lock on path for the life of the returned file; it is a Conflict when another process (or
// another agent of this one) holds it, and the context's error when ctx ends first. Closing the file gives it back; so does the end of the process.
func Lock(ctx context.Context, path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fault.Wrap(fault.Retryable, err, "the lock file %s cannot be opened (%s)", path, Reason(err))
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	for try := 0; errors.Is(err, unix.EWOULDBLOCK) && try < lockTries; try++ {
		select {
		case <-time.After(lockPause):
		case <-ctx.Done():
			_ = f.Close()
			return nil, ctx.Err()
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		_ = f.Close()
		return nil, fault.Wrap(fault.Conflict, err, "another agent uses %s; stop it, or give this one its own data directory",
			filepath.Dir(path))
	}
	return f, nil
}

// Held says whether somebody holds the lock at path, without taking it for longer than a look.
func Held(path string) (bool, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fault.Wrap(fault.Retryable, err, "the lock file %s cannot be opened (%s); run this as the agent's user", path, Reason(err))
	}
	defer func() { _ = f.Close() }()
	// Shared, so that two lookers do not see each other.
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
		return true, nil // being held is the answer
	}
	return false, nil
}

// Store keeps named blobs. Names are the agent's own constants, never text from elsewhere.
type Store interface {
	// Read returns the blob, or an error that is fs.ErrNotExist.
	Read(name string) ([]byte, error)
	// Write replaces the blob durably.
	Write(name string, data []byte) error
	// Remove deletes the blob; one that does not exist is removed.
	Remove(name string) error
	// List returns the names with the prefix, sorted.
	List(prefix string) ([]string, error)
}

// Dir is a Store of files with mode 0600 in one private directory.
type Dir struct {
	path   string
	frozen bool
}

// OpenDir makes the directory if needed and removes what interrupted writes left.
func OpenDir(path string) (*Dir, error) {
	if err := PrivateDir(path); err != nil {
		return nil, err
	}
	if err := Sweep(path); err != nil {
		return nil, err
	}
	return &Dir{path: path}, nil
}

// ReadOnlyDir returns a Dir for looking only, beside an agent that may be running: Write and Remove change nothing.
func ReadOnlyDir(path string) *Dir { return &Dir{path: path, frozen: true} }

func (d *Dir) Read(name string) ([]byte, error) { return os.ReadFile(filepath.Join(d.path, name)) }

func (d *Dir) Write(name string, data []byte) error {
	if d.frozen {
		return nil
	}
	return WriteFile(filepath.Join(d.path, name), data, 0o600)
}

func (d *Dir) Remove(name string) error {
	if d.frozen {
		return nil
	}
	err := os.Remove(filepath.Join(d.path, name))
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return fault.Wrap(fault.Retryable, err, "%s cannot be removed (%s)", filepath.Join(d.path, name), Reason(err))
}

func (d *Dir) List(prefix string) ([]string, error) {
	es, err := os.ReadDir(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(fault.Retryable, err, "the directory %s cannot be read (%s)", d.path, Reason(err))
	}
	var names []string
	for _, e := range es {
		if e.Type().IsRegular() && strings.HasPrefix(e.Name(), prefix) && !strings.HasPrefix(e.Name(), tempPrefix) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Memory is a Store that lives with the process; for load tools that run many agents.
type Memory struct {
	mu    sync.Mutex
	blobs map[string][]byte
}

// NewMemory returns an empty Memory.
func NewMemory() *Memory { return &Memory{blobs: map[string][]byte{}} }

func (m *Memory) Read(name string) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.blobs[name]
	if !ok {
		return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	return append([]byte(nil), b...), nil
}

func (m *Memory) Write(name string, data []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.blobs[name] = append([]byte(nil), data...)
	return nil
}

func (m *Memory) Remove(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.blobs, name)
	return nil
}

func (m *Memory) List(prefix string) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	for n := range m.blobs {
		if strings.HasPrefix(n, prefix) {
			names = append(names, n)
		}
	}
	sort.Strings(names)
	return names, nil
}
