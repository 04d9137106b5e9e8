package storetest_test

import (
	"sync"
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

// each runs fn on every engine, and again where every transaction stumbles: at each of its statements in turn, and at
// commits that give no answer, kept or not. What fn sees must be the same.
func each(t *testing.T, fn func(t *testing.T, x *estate)) {
	t.Parallel()
	for name, faults := range map[string]func() store.Faults{
		"calm":            func() store.Faults { return nil },
		"40001":           func() store.Faults { return &stumble{} },
		"kept and untold": func() store.Faults { return &stumble{commit: store.ErrCommitKept} },
		"lost and untold": func() store.Faults { return &stumble{commit: store.ErrCommitLost} },
	} {
		t.Run(name, func(t *testing.T) {
			storetest.Each(t, func(t *testing.T, e storetest.Engine) {
				fn(t, newEstate(t, e, func(c *store.Config) { c.Faults = faults() }))
			})
		})
	}
}

// stumble makes five of six runs of a transaction fail with 40001, each run one statement further on; or, with commit
// set, every other commit.
type stumble struct {
	commit error

	mu   sync.Mutex
	runs map[string]int
}

func (f *stumble) next(name string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.runs == nil {
		f.runs = map[string]int{}
	}
	f.runs[name]++
	return f.runs[name] - 1
}

// Before implements store.Faults. A run is over at its first failure, so its statement is remembered under its name.
func (f *stumble) Before(name string, n int) error {
	const tries, statements = 6, 16
	if n == 0 && f.commit == nil {
		f.next(name)
	}
	f.mu.Lock()
	run := f.runs[name] - 1
	f.mu.Unlock()
	if f.commit == nil && run%tries != tries-1 && n == (run-run/tries)%statements {
		return store.ErrSerialization
	}
	return nil
}

// Commit implements store.Faults.
func (f *stumble) Commit(name string) error {
	if f.commit != nil && f.next(name)%2 == 0 {
		return f.commit
	}
	return nil
}
