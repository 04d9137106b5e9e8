package cluster

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/certmesh/certmesh/e2e/bench/streams"
)

// patience bounds one measurement on a machine that is busy with other things.
const patience = 8 * time.Minute

func number(tb testing.TB, name string, usual int) int {
	tb.Helper()
	text := os.Getenv(name)
	if text == "" {
		return usual
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > 20_000 {
		tb.Fatalf("%s=%s is not a number from 1 to 20000", name, text)
	}
	return n
}

// built are the binaries of this run.
func built(tb testing.TB) string {
	tb.Helper()
	if dir := os.Getenv("CLUSTER_BIN"); dir != "" {
		return dir
	}
	dir := tb.TempDir()
	if err := streams.Build(tb.Context(), dir); err != nil {
		tb.Fatal(err)
	}
	return dir
}

// three opens three nodes.
func three(ctx context.Context, tb testing.TB, bin string) *scene {
	tb.Helper()
	s, err := open(ctx, bin, filepath.Join(tb.TempDir(), "three"), 3)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(s.close)
	return s
}

// TestSmoke runs every measurement with a few agents: nothing is timed, all must work.
func TestSmoke(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	bin := built(t)
	s := three(ctx, t, bin)
	positive := func(figures []figure, err error, units ...string) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]float64{}
		for _, f := range figures {
			got[f.unit] = f.value
		}
		for _, u := range units {
			if got[u] <= 0 {
				t.Errorf("%s is %v", u, got[u])
			}
		}
	}
	f, err := s.wake(ctx, 2)
	positive(f, err, "same-p50-ms", "other-p50-ms")
	f, err = s.costs(ctx, 6, 1, 3, time.Second)
	positive(f, err, "renewals/s", "db-conns/node") // differences of so little may be below zero
	f, err = s.failover(ctx, 1)
	positive(f, err, "leads-p50-ms", "duties-p50-ms")
	if err := s.whole(ctx); err != nil {
		t.Fatal(err)
	}
	f, err = s.reattach(ctx, 6)
	positive(f, err, "back-s")
	f, err = rates(ctx, bin, t.TempDir(), 6, 1)
	positive(f, err, "one-renewals/s", "three-renewals/s")
}

func report(b *testing.B, figures []figure, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(0, "ns/op") // it says nothing here
	for _, f := range figures {
		b.ReportMetric(f.value, f.unit)
	}
}

// BenchmarkCluster measures once, whatever the number of iterations.
func BenchmarkCluster(b *testing.B) {
	bin := built(b)
	agents := number(b, "CLUSTER_AGENTS", 600)
	for _, c := range []struct {
		name string
		run  func(ctx context.Context, b *testing.B) ([]figure, error)
	}{
		{"failover", func(ctx context.Context, b *testing.B) ([]figure, error) {
			return three(ctx, b, bin).failover(ctx, number(b, "CLUSTER_KILLS", 10))
		}},
		{"reattach", func(ctx context.Context, b *testing.B) ([]figure, error) {
			return three(ctx, b, bin).reattach(ctx, number(b, "CLUSTER_STREAMS", 3000))
		}},
		{"wake", func(ctx context.Context, b *testing.B) ([]figure, error) {
			return three(ctx, b, bin).wake(ctx, number(b, "CLUSTER_WAKES", 100))
		}},
		{"rate", func(ctx context.Context, b *testing.B) ([]figure, error) {
			return rates(ctx, bin, b.TempDir(), agents, 5)
		}},
		{"costs", func(ctx context.Context, b *testing.B) ([]figure, error) {
			return three(ctx, b, bin).costs(ctx, agents, 3, 99, 20*time.Second)
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			ctx, cancel := context.WithTimeout(b.Context(), patience)
			defer cancel()
			f, err := c.run(ctx, b)
			report(b, f, err)
		})
	}
}
