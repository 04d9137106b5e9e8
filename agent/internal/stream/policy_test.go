package stream

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

// end draws how a connection ended.
func end(now time.Time) *rapid.Generator[End] {
	return rapid.Custom(func(t *rapid.T) End {
		var e End
		if rapid.Bool().Draw(t, "welcomed") {
			e.Welcomed = now.Add(-time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "lived")))
			e.Known = rapid.SampledFrom([][]string{nil, {}, {"n2:1"}, {"n1:1", "n2:1", "n3:1"}}).Draw(t, "known")
		}
		switch rapid.IntRange(0, 3).Draw(t, "how") {
		case 0:
			e.Err = fmt.Errorf("cut")
		case 1:
			e.Goodbye = &agentpb.Goodbye{Reason: rapid.SampledFrom([]agentpb.Goodbye_Reason{
				agentpb.Goodbye_REASON_SHUTDOWN, agentpb.Goodbye_REASON_SUPERSEDED, agentpb.Goodbye_REASON_OVERLOADED}).Draw(t, "reason"),
				ReconnectAfterMs: rapid.Int64().Draw(t, "asked")}
		case 2:
			e.Left, e.Welcomed = true, now
		case 3:
			e.Left, e.Welcomed = true, now
			e.Move = &agentpb.Move{Nodes: rapid.SampledFrom([][]string{nil, {"n9:1"}, {"n8:1", "n9:1"}}).Draw(t, "to")}
		}
		return e
	})
}

// TestRouteBounds: whatever servers say, the next address is a known one and the delay is within its bounds.
func TestRouteBounds(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		b := DefaultBackoff()
		now := time.Unix(1_800_000_000, 0)
		r, _ := Route{Seeds: []string{"n1:1", "s:1"}}.Start(func() float64 { return rapid.Float64Range(0, 0.999).Draw(t, "start") })
		for range rapid.IntRange(1, 40).Draw(t, "ends") {
			e := end(now).Draw(t, "end")
			before := r
			var addr string
			var delay time.Duration
			r, addr, delay = r.Next(b, now, e, func() float64 { return rapid.Float64Range(0, 0.999).Draw(t, "rnd") })
			known := slices.Concat(r.candidates(), e.Move.GetNodes(), before.Prefer, []string{before.Last})
			if !slices.Contains(known, addr) {
				t.Fatalf("%q is none of %v", addr, known)
			}
			most := b.Old
			if e.Goodbye != nil {
				most = max(most, maxAsked+maxAsked/4)
			}
			if delay < 0 || delay > most {
				t.Fatalf("waits %s", delay)
			}
			if e.Goodbye.GetReason() == agentpb.Goodbye_REASON_SUPERSEDED && delay < supersededWait {
				t.Fatalf("takes the stream back after %s", delay)
			}
			if e.Left && e.Move == nil && addr != before.Last {
				t.Fatalf("a renewed identity goes from %s to %s", before.Last, addr)
			}
			if !e.Left && len(r.Prefer) == 0 && !slices.Contains(before.Prefer, addr) && len(r.candidates()) > 1 && addr == before.Last {
				t.Fatalf("the node that failed is tried again before the others")
			}
			now = now.Add(delay + time.Duration(rapid.Int64Range(0, int64(time.Minute)).Draw(t, "passes")))
		}
	})
}

// TestRouteSpreads: a thousand agents that lose one node in the same instant do not come back in one instant, and not
// all at one other node.
func TestRouteSpreads(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(1, 2))
	b := DefaultBackoff()
	now := time.Unix(1_800_000_000, 0)
	slots := map[int64]int{}
	firsts, seconds := map[string]int{}, map[string]int{}
	for range 1000 {
		r, first := Route{Seeds: []string{"a:1", "b:1", "c:1"}}.Start(rnd.Float64)
		firsts[first]++
		_, second, d := r.Next(b, now, End{Err: fmt.Errorf("cut")}, rnd.Float64)
		if first == "a:1" {
			seconds[second]++
		}
		slots[d.Milliseconds()/10]++
	}
	for at, n := range slots {
		if n > 40 {
			t.Errorf("%d of 1000 agents return in the 10 ms after %d ms", n, at*10)
		}
	}
	for _, n := range firsts {
		if n < 250 {
			t.Errorf("first servers are %v", firsts)
		}
	}
	if seconds["a:1"] != 0 || seconds["b:1"] < 100 || seconds["c:1"] < 100 {
		t.Errorf("those that lost a go to %v", seconds)
	}
}

func TestBackoffGrows(t *testing.T) {
	t.Parallel()
	b := DefaultBackoff()
	for _, c := range []struct {
		failures int
		age      time.Duration
		want     time.Duration
	}{
		{0, 0, time.Second}, {1, 0, 2 * time.Second}, {2, 0, 4 * time.Second}, {3, 0, 5 * time.Second}, {1000, time.Minute, 5 * time.Second},
		{30, 2 * time.Minute, 10 * time.Second}, {30, 4 * time.Minute, 20 * time.Second}, {30, time.Hour, 2 * time.Minute}, {1 << 30, 1000 * time.Hour, 2 * time.Minute},
	} {
		if got := b.window(c.failures, c.age); got != c.want {
			t.Errorf("after %d failures in %s: %s, want %s", c.failures, c.age, got, c.want)
		}
	}
	// A stream that lived resets it; one that was cut at once does not.
	now := time.Unix(1_800_000_000, 0)
	r, _ := Route{Seeds: []string{"a:1"}, Failures: 7, Since: now.Add(-time.Hour)}.Start(func() float64 { return 0 })
	full := func() float64 { return 0.999 }
	if got, _, d := r.Next(b, now, End{Welcomed: now.Add(-time.Second)}, full); got.Failures != 8 || d < time.Minute {
		t.Errorf("a stream of a second counts as stable: %d failures, %s", got.Failures, d)
	}
	if got, _, d := r.Next(b, now, End{Welcomed: now.Add(-time.Minute)}, full); got.Failures != 1 || d > time.Second {
		t.Errorf("a stream of a minute counts as a failure: %d failures, %s", got.Failures, d)
	}
}
