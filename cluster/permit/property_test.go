package permit

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// number reads a variable. CERTMESH_PERMIT_SEED=n tries world n alone, CERTMESH_PERMIT_SEEDS=n the first n.
func number(t *testing.T, variable string) (uint64, bool) {
	t.Helper()
	s := os.Getenv(variable)
	if s == "" {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return n, true
}

// TestNeverAboveTheCap: whatever happens to nodes, clocks, network and Raft, no more calls are in flight than allowed, none
// begin faster, and none before a pause is over; and when all is well again everybody gets to call.
func TestNeverAboveTheCap(t *testing.T) {
	t.Parallel()
	first, last := uint64(1), uint64(seeds)
	if n, ok := number(t, "CERTMESH_PERMIT_SEEDS"); ok {
		last = n
	}
	if n, ok := number(t, "CERTMESH_PERMIT_SEED"); ok {
		first, last = n, n
	}
	calls, full, pauses := 0, 0, 0
	for seed := first; seed <= last; seed++ {
		w := simulate(seed, intact)
		if w.failure != "" {
			t.Fatalf("CERTMESH_PERMIT_SEED=%d: %s", seed, tell(seed, intact))
		}
		calls += w.begun
		pauses += w.pauses
		if w.most == w.limits.InFlight {
			full++
		}
	}
	t.Logf("%d calls, %d pauses; the cap was reached in %d of %d worlds", calls, pauses, full, last-first+1)
}

// TestASeedReplays: the same seed is the same world, event by event.
func TestASeedReplays(t *testing.T) {
	t.Parallel()
	for seed := uint64(1); seed <= 20; seed++ {
		var histories [2]string
		for i := range histories {
			w := newWorld(seed, intact)
			w.tells = true
			w.run()
			histories[i] = strings.Join(w.history, "\n")
		}
		if histories[0] != histories[1] {
			t.Errorf("world %d went two ways:\n%s\n\n%s", seed, histories[0], histories[1])
		}
	}
}

// TestTheTestNotices: each rule is needed, and breaking it is found.
func TestTheTestNotices(t *testing.T) {
	t.Parallel()
	for m, notice := range map[mutation]string{
		noWait: "in flight", noMax: "in flight", countFromAnswer: "in flight", wholeLease: "in flight", noInstance: "in flight",
		hastyReturn: "in flight", noDeadline: "in flight", noCommit: "in flight", fullBucket: "begin faster", deafToPause: "pause",
	} {
		t.Run(string(m), func(t *testing.T) {
			t.Parallel()
			for seed := uint64(1); seed <= 2000; seed++ {
				if w := simulate(seed, m); w.failure != "" {
					what, _, _ := strings.Cut(w.failure, "\n")
					t.Logf("found by world %d: %s", seed, what)
					if strings.Contains(what, notice) {
						return
					}
				}
			}
			t.Error("nobody noticed")
		})
	}
}

func TestShares(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		permits := rapid.IntRange(0, 40).Draw(t, "permits")
		wants := rapid.SliceOfN(rapid.IntRange(0, 30), 0, 9).Draw(t, "wants")
		got := shares(permits, wants)
		sum, wanted, least, most := 0, 0, 1<<30, 0
		for i, n := range got {
			sum += n
			wanted += wants[i]
			if n > wants[i] || n < 0 {
				t.Fatalf("%d wants %d and gets %d", i, wants[i], n)
			}
			most = max(most, n)
			if n < wants[i] {
				least = min(least, n)
			}
		}
		if sum != min(permits, wanted) {
			t.Fatalf("%v of %d permits for %v", got, permits, wants)
		}
		// Who wants more has no less than anybody, give or take one.
		if least < most-1 {
			t.Fatalf("%v of %d permits for %v", got, permits, wants)
		}
	})
}
