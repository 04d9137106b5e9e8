package storetest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// ReportCPU reports, when the returned function is called, the processor time that each of n operations has taken since:
// of this process ("cpu-µs/op") and of the PostgreSQL that it started ("db-cpu-µs/op"). Unlike rates, these are hardly moved
// by what else runs on the machine.
func (e Engine) ReportCPU(b *testing.B) (report func(n int)) {
	own, db := ownCPU(), e.serverCPU()
	return func(n int) {
		each := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(n) }
		b.ReportMetric(each(ownCPU()-own), "cpu-µs/op")
		if e.Name == "postgres" {
			b.ReportMetric(each(e.serverCPU()-db), "db-cpu-µs/op")
		}
	}
}

func ownCPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// serverCPU is the processor time of the server's processes, those that ended included (/proc/pid/stat, proc(5)).
func (e Engine) serverCPU() time.Duration {
	server.Lock()
	defer server.Unlock()
	if e.Name != "postgres" || server.process == nil {
		return 0
	}
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0
	}
	var ticks int64
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		_, rest, ok := strings.Cut(string(text), ") ")
		f := strings.Fields(rest)
		const parent, user, waitedSystem = 1, 11, 14
		if !ok || len(f) <= waitedSystem {
			continue
		}
		mine := path == fmt.Sprintf("/proc/%d/stat", server.process.Pid)
		if !mine && f[parent] != strconv.Itoa(server.process.Pid) {
			continue
		}
		last := user + 1
		if mine {
			last = waitedSystem
		}
		for _, n := range f[user : last+1] {
			v, err := strconv.ParseInt(n, 10, 64)
			if err != nil {
				return 0
			}
			ticks += v
		}
	}
	const perSecond = 100 // USER_HZ on every Linux port of Go
	return time.Duration(ticks) * time.Second / perSecond
}
