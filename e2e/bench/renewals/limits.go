package renewals

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/certmesh/certmesh/e2e/estate"
)

// figure is one result of a measurement.
type figure struct {
	unit  string
	value float64
}

// quantile returns the q-th of all, which it sorts.
func quantile(all []time.Duration, q float64) time.Duration {
	slices.Sort(all)
	return all[min(int(q*float64(len(all))), len(all)-1)]
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// timed returns the middle of n times that f took.
func timed(n int, f func() error) (time.Duration, error) {
	var all []time.Duration
	for range n {
		began := time.Now()
		if err := f(); err != nil {
			return 0, err
		}
		all = append(all, time.Since(began))
	}
	return quantile(all, 0.5), nil
}

// fsyncTime is what it takes to append 2 KB to a file in dir and have it on disk.
func fsyncTime(dir string) (d time.Duration, err error) {
	f, err := os.Create(filepath.Join(dir, "fsync-probe"))
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close(); _ = os.Remove(f.Name()) }()
	page := make([]byte, 2<<10)
	return timed(50, func() error {
		if _, err := f.Write(page); err != nil {
			return err
		}
		return f.Sync()
	})
}

// handshakeTime is one TLS handshake with a site.
func handshakeTime(ctx context.Context, s *estate.Site) (time.Duration, error) {
	return timed(20, func() error {
		_, err := estate.Served(ctx, s.Addr, s.Host)
		return err
	})
}

// commandTimes are those of `nginx -t` and `nginx -s reload` by themselves.
func (f *farm) commandTimes(ctx context.Context, n int) (test, reload time.Duration, err error) {
	run := func(args ...string) func() error {
		return func() error {
			out, err := exec.CommandContext(ctx, f.bin, append(args, "-c", f.conf)...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("nginx %v: %w: %s", args, err, out)
			}
			return nil
		}
	}
	if test, err = timed(n, run("-t")); err != nil {
		return 0, 0, err
	}
	reload, err = timed(n, run("-s", "reload"))
	return test, reload, err
}
