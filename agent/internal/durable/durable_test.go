package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/certmesh/certmesh/protocol/fault"
)

// stores are the two implementations, which must not differ.
func stores(t *testing.T) map[string]Store {
	d, err := OpenDir(filepath.Join(t.TempDir(), "a", "b"))
	if err != nil {
		t.Fatal(err)
	}
	return map[string]Store{"disk": d, "memory": NewMemory()}
}

func TestStore(t *testing.T) {
	t.Parallel()
	for name, s := range stores(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := s.Read("x"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a blob that is not there: %v", err)
			}
			if err := s.Remove("x"); err != nil {
				t.Error(err)
			}
			var wg sync.WaitGroup
			for _, n := range []string{"p-2", "p-1", "q"} {
				wg.Go(func() {
					for _, v := range []string{"old", "new"} {
						if err := s.Write(n, []byte(v)); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			if b, err := s.Read("p-1"); err != nil || string(b) != "new" {
				t.Errorf("%q, %v", b, err)
			}
			if l, err := s.List("p-"); err != nil || !slices.Equal(l, []string{"p-1", "p-2"}) {
				t.Errorf("%v, %v", l, err)
			}
		})
	}
}

// TestModes: private from the first byte, and an open directory is closed.
func TestModes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	d, err := OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Write("x", nil); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]fs.FileMode{dir: 0o700, filepath.Join(dir, "x"): 0o600} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", path, st.Mode(), err)
		}
	}
}

// TestInterruptedWrite: what a killed write leaves is swept, and never listed.
func TestInterruptedWrite(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	left := filepath.Join(dir, tempPrefix+"123")
	if err := os.WriteFile(left, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := ReadOnlyDir(dir).List(""); err != nil || len(l) != 0 {
		t.Errorf("%v, %v", l, err)
	}
	if _, err := OpenDir(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left); !errors.Is(err, fs.ErrNotExist) {
		t.Error("it stayed")
	}
}

// TestUnwritable: the error names the path and the cause, can be retried, and leaves the old content and no litter.
func TestUnwritable(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	inPlace := filepath.Join(dir, "file")
	if err := os.WriteFile(inPlace, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// A directory with something in it cannot be replaced by a file: the last step of a write fails.
	if err := os.MkdirAll(filepath.Join(dir, "x", "y"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{WriteFile(filepath.Join(inPlace, "x"), nil, 0o600), PrivateDir(inPlace + "/sub"), WriteFile(filepath.Join(dir, "x"), []byte("1"), 0o600)} {
		if !fault.Is(err, fault.Retryable) || !strings.Contains(err.Error(), dir) {
			t.Errorf("got %v", err)
		}
	}
	if l, _ := filepath.Glob(filepath.Join(dir, tempPrefix+"*")); len(l) != 0 {
		t.Errorf("litter: %v", l)
	}
}

func TestReadOnlyDir(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	d, _ := OpenDir(dir)
	if err := d.Write("x", []byte("1")); err != nil {
		t.Fatal(err)
	}
	r := ReadOnlyDir(dir)
	if r.Write("x", []byte("2")) != nil || r.Remove("x") != nil {
		t.Error("a look fails")
	}
	if b, _ := r.Read("x"); string(b) != "1" {
		t.Error("a look changed something")
	}
}

func TestLock(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "lock")
	if held, err := Held(path); held || err != nil {
		t.Errorf("%v, %v", held, err)
	}
	l, err := Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(t.Context(), path); !fault.Is(err, fault.Conflict) {
		t.Errorf("locked twice: %v", err)
	}
	if held, err := Held(path); !held || err != nil {
		t.Errorf("%v, %v", held, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	// Looks do not keep an agent from starting.
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 50 {
				if _, err := Held(path); err != nil {
					t.Error(err)
				}
			}
		})
	}
	l, err = Lock(t.Context(), path)
	wg.Wait()
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close() // the test is over
}
