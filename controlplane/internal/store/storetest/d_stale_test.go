package storetest

import (
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// TestStaleIntentIsNotSigned: bytes of which much of the validity has gone by are abandoned, and the same key gets the next
// generation; younger ones are what a retry signs.
func TestStaleIntentIsNotSigned(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		a := w.Agent(t, "web1")
		epoch := w.Open(t, a.ID, "n1").Epoch
		_, jobs := w.Order(t, "c.test", domain.Policy{}, w.Target(t, a.ID, "one").ID)
		attempt := w.Dispatch(t, jobs[0], epoch)
		record := func(staleBefore time.Time) domain.IntentOutcome {
			it := w.Intent(jobs[0], attempt, "spki")
			it.StaleBefore = staleBefore
			out := w.S.RecordIntents(t.Context(), []domain.Intent{it})[0]
			must(t, out.Err)
			return out
		}
		first := record(time.Time{})
		made := w.Now()
		w.Pass(time.Hour)
		if again := record(made); !again.Existing || again.Intent.ID != first.Intent.ID {
			t.Fatalf("a young intent was not taken again: %+v", again)
		}
		next := record(made.Add(time.Second))
		if next.Existing || next.Intent.ID == first.Intent.ID || next.Intent.Generation != first.Intent.Generation+1 {
			t.Fatalf("a stale intent was taken again: %+v", next)
		}
		must(t, w.S.RecordIssued(t.Context(), []domain.Issued{w.Signed(next.Intent)})[0].Err)
		if out := w.S.RecordIssued(t.Context(), []domain.Issued{w.Signed(first.Intent)})[0]; out.Err == nil {
			t.Fatal("what was abandoned was recorded")
		}
		w.Check(t)
	})
}
