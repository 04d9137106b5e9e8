package permit

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
)

func limited(n int) func(string) Limits { return func(string) Limits { return Limits{InFlight: n} } }

func newPermits(tb testing.TB, leaser Leaser) *Permits {
	tb.Helper()
	p, err := New(context.Background(), Config{Leaser: leaser, Instance: "1", Clock: clockwork.NewRealClock(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(p.Close)
	return p
}

func BenchmarkPermitDo(b *testing.B) {
	p := newPermits(b, NewAlone(clockwork.NewRealClock(), limited(25)))
	ctx, cancel := context.WithTimeout(b.Context(), time.Hour)
	defer cancel()
	b.ReportAllocs()
	for b.Loop() {
		if err := p.Do(ctx, "iss_1", func(context.Context) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

func TestSmoke(t *testing.T) {
	p := newPermits(t, NewAlone(clockwork.NewRealClock(), limited(25)))
	if err := p.Do(t.Context(), "iss_1", func(context.Context) error { return nil }); err != nil {
		t.Fatal(err)
	}
}
