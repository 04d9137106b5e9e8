package streams

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	if Role() {
		return
	}
	os.Exit(m.Run())
}

// TestSmoke runs the whole measurement with a few agents: nothing is timed, all must work.
func TestSmoke(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	const n = 20
	f, err := Measure(ctx, Options{Agents: n, Bin: os.Getenv("STREAMS_BIN"), Dir: t.TempDir(), Profiles: t.TempDir(), Window: time.Second, Down: 100 * time.Millisecond, Say: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	if f.Bare.InUse <= 0 || f.Node.InUse <= 0 || f.Acknowledged <= 0 || f.Healthy.Done <= 0 || f.Disturbed.Agents == 0 || f.Misbehaving == 0 {
		t.Errorf("figures are missing: %+v", f)
	}
	if f.Errors > 0 {
		t.Errorf("%d errors in the log after the restart", f.Errors)
	}
}

// BenchmarkStreams measures once, whatever the number of iterations: one takes minutes.
func BenchmarkStreams(b *testing.B) {
	n := 10_000
	if text := os.Getenv("STREAMS_AGENTS"); text != "" {
		var err error
		if n, err = strconv.Atoi(text); err != nil || n < 1 {
			b.Fatalf("STREAMS_AGENTS=%s is not a number of agents", text)
		}
	}
	profiles := os.Getenv("STREAMS_PROFILES")
	if profiles != "" {
		if err := os.MkdirAll(profiles, 0o700); err != nil {
			b.Fatal(err)
		}
	}
	f, err := Measure(b.Context(), Options{Agents: n, Bin: os.Getenv("STREAMS_BIN"), Dir: b.TempDir(), Profiles: profiles,
		Window: 15 * time.Second, Down: 3 * time.Second,
		Say: func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }})
	if err != nil {
		b.Fatal(err)
	}
	fmt.Fprint(os.Stderr, f)
	b.ReportMetric(0, "ns/op") // it says nothing here
	for _, m := range f.metrics() {
		b.ReportMetric(m.value, m.unit)
	}
}
