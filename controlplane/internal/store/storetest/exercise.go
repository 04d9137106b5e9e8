package storetest

import (
	"errors"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/store"
)

type scenario struct {
	name string
	run  func(*testing.T, *World)
}

// scenarios are the suite of the hot flow; each begins in a world of its own.
var scenarios = []scenario{
	{"wholeFlow", wholeFlow},
	{"staleWriters", staleWriters},
	{"oneOfMany", oneOfMany},
	{"failures", failures},
	{"lostKey", lostKey},
	{"restored", restored},
	{"movedDeployment", movedDeployment},
	{"disabledTarget", disabledTarget},
	{"sessions", sessions},
	{"rejections", rejections},
	{"acceptedAtLast", acceptedAtLast},
	{"fences", fences},
	{"postponing", postponing},
	{"statuses", statuses},
	{"reaping", reaping},
	{"retaining", retaining},
}

// crowd is many at once. It takes as long as the others together and meets each fault at random anyway, so it is run
// without faults and with refused commits.
var crowd = scenario{"herd", herd}

// Exercise runs the suite on e. change alters the configuration of every store that is opened.
func Exercise(t *testing.T, e Engine, change ...func(*store.Config)) {
	exercise(t, e, append(slices.Clone(scenarios), crowd), change...)
}

func exercise(t *testing.T, e Engine, list []scenario, change ...func(*store.Config)) {
	for _, sc := range list {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			sc.run(t, NewWorld(t, e, change...))
		})
	}
}

// stumble is a store.Faults that makes every other run of a transaction fail once: at a statement with 40001, or at its
// commit.
type stumble struct {
	statement int // negative: none
	commit    error

	mu   sync.Mutex
	hits map[string]int
}

func (f *stumble) odd(name string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.hits == nil {
		f.hits = map[string]int{}
	}
	f.hits[name]++
	return f.hits[name]%2 == 1
}

// Before implements store.Faults.
func (f *stumble) Before(name string, n int) error {
	if n == f.statement && f.odd(name) {
		return store.ErrSerialization
	}
	return nil
}

// Commit implements store.Faults.
func (f *stumble) Commit(name string) error {
	if f.commit != nil && f.odd(name) {
		return f.commit
	}
	return nil
}

// stumbles are the ways in which the suite is made to stumble: 40001 at the n-th statement, n from 0 (BEGIN), and commits
// that are refused or answer nothing.
func stumbles(e Engine) map[string]func() store.Faults {
	// As many as the longest ordinary transaction has. What is run again is the same code on every engine; SQLite, on which
	// the race detector makes each statement slow, meets the beginnings, where most transactions end, and some later ones.
	at := []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13}
	if e.Name == "sqlite" {
		at = []int{0, 1, 2, 3, 5, 8, 12}
	}
	all := map[string]func() store.Faults{}
	for _, n := range at {
		all["40001 at "+strconv.Itoa(n)] = func() store.Faults { return &stumble{statement: n} }
	}
	for name, err := range map[string]error{"40001 at commit": store.ErrSerialization, "kept and untold": store.ErrCommitKept,
		"lost and untold": store.ErrCommitLost} {
		all[name] = func() store.Faults { return &stumble{statement: -1, commit: err} }
	}
	return all
}

// ExerciseStumbling runs the suite again under every fault.
func ExerciseStumbling(t *testing.T, e Engine) {
	for name, fresh := range stumbles(e) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			list := scenarios
			if f, ok := fresh().(*stumble); ok && errors.Is(f.commit, store.ErrSerialization) {
				list = append(slices.Clone(list), crowd)
			}
			exercise(t, e, list, func(c *store.Config) { c.Faults = fresh() })
		})
	}
}
