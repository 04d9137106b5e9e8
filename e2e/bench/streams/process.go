package streams

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/certmesh/certmesh/e2e/estate"
)

// fields splits the arguments of a role.
func fields(args string, n int) ([]string, error) {
	f := strings.Fields(args)
	if len(f) != n {
		return nil, fmt.Errorf("%d arguments instead of %d: %q", len(f), n, args)
	}
	return f, nil
}

// Memory is what a process takes.
type Memory struct {
	// Resident is what the kernel says.
	Resident int64
	// InUse is what the Go runtime has in use right after a collection: heap, stacks and its own structures. It does not
	// hang on when the last collection was and what was given back to the system.
	InUse int64
	// Heap and Stacks are its two largest parts.
	Heap, Stacks int64
}

func (m Memory) minus(o Memory) Memory {
	return Memory{m.Resident - o.Resident, m.InUse - o.InUse, m.Heap - o.Heap, m.Stacks - o.Stacks}
}

func (m Memory) over(n int) Memory {
	d := int64(n)
	return Memory{m.Resident / d, m.InUse / d, m.Heap / d, m.Stacks / d}
}

// MemoryOf collects the garbage of a process and reads its memory. Each collection halves the stacks that are far larger
// than what they hold, so that it takes some until they are as large as they stay.
func MemoryOf(ctx context.Context, pid int, debug string) (Memory, error) {
	var m Memory
	var text string
	for range 4 {
		var err error
		if text, err = get(ctx, "http://"+debug+"/debug/pprof/heap?gc=1&debug=1"); err != nil {
			return m, err
		}
	}
	stats := map[string]int64{}
	for line := range strings.SplitSeq(text, "\n") {
		if key, val, ok := strings.Cut(strings.TrimPrefix(line, "# "), " = "); ok {
			val, _, _ = strings.Cut(val, " ")
			if n, err := strconv.ParseInt(val, 10, 64); err == nil {
				stats[key] = n
			}
		}
	}
	if stats["HeapInuse"] == 0 {
		return m, fmt.Errorf("the heap profile of %s has no memory statistics", debug)
	}
	m.Heap, m.Stacks = stats["HeapInuse"], stats["Stack"]
	m.InUse = stats["Sys"] - stats["HeapIdle"]
	var err error
	m.Resident, err = resident(pid)
	return m, err
}

func resident(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0, fmt.Errorf("/proc/%d/statm: %q", pid, b)
	}
	pages, err := strconv.ParseInt(f[1], 10, 64)
	return pages * int64(os.Getpagesize()), err
}

// CPU is the CPU time a process has used.
func CPU(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The command in parentheses may hold blanks; the fields after it do not. utime and stime are the 14th and 15th of all.
	_, rest, ok := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	if !ok || len(f) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: %q", pid, b)
	}
	var ticks int64
	for _, t := range f[11:13] {
		n, err := strconv.ParseInt(t, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / 100), nil // USER_HZ is 100 on every Linux of today
}

func get(ctx context.Context, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return "", err
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = r.Body.Close() }() // only read
	b, err := io.ReadAll(io.LimitReader(r.Body, 64<<20))
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s", url, r.Status)
	}
	return string(b), err
}

// Metrics reads the node's metrics by their name and labels.
func Metrics(ctx context.Context, e *estate.Estate) (map[string]float64, error) {
	status, body, err := e.Get(ctx, "https://"+e.API+"/metrics")
	if err != nil {
		return nil, err
	}
	if status != http.StatusOK {
		return nil, fmt.Errorf("GET /metrics: %d", status)
	}
	out := map[string]float64{}
	lines := bufio.NewScanner(strings.NewReader(string(body)))
	for lines.Scan() {
		i := strings.LastIndexByte(lines.Text(), ' ')
		if i < 0 || strings.HasPrefix(lines.Text(), "#") {
			continue
		}
		if v, err := strconv.ParseFloat(lines.Text()[i+1:], 64); err == nil {
			out[lines.Text()[:i]] = v
		}
	}
	return out, lines.Err()
}

// Sum adds what begins with prefix.
func Sum(m map[string]float64, prefix string) float64 {
	var s float64
	for k, v := range m {
		if strings.HasPrefix(k, prefix) {
			s += v
		}
	}
	return s
}
