package streams

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// The bars: what the figures are held against.
const (
	maxOverBare = 12 << 10 // bytes a stream may take above a bare one
	maxIdleCPU  = 0.05     // of one core
	maxBack     = 20 * time.Second
	maxAck      = 5 * time.Second
	maxDisturb  = 1.2
)

type metric struct {
	unit  string
	value float64
}

// metrics are the figures as the benchmark's own.
func (f *Figures) metrics() []metric {
	return []metric{
		{"bare-B/stream", float64(f.Bare.InUse)}, {"bare-rss-B/stream", float64(f.Bare.Resident)},
		{"node-B/agent", float64(f.Node.InUse)}, {"node-rss-B/agent", float64(f.Node.Resident)},
		{"join-s", f.Joined.Seconds()}, {"idle-cpu-%", 100 * f.CPU}, {"back-s", f.Back.Seconds()},
		{"ack-s", f.Acknowledged.Seconds()}, {"done-s", f.Done.Seconds()}, {"disturbed-ratio", f.disturbance()},
	}
}

// disturbance is how much longer a command takes beside agents that misbehave.
func (f *Figures) disturbance() float64 {
	if f.Healthy.Done == 0 {
		return 0
	}
	return float64(f.Disturbed.Done) / float64(f.Healthy.Done)
}

// String is the table for people; each line has its bar beside it.
func (f *Figures) String() string {
	var b strings.Builder
	line := func(what, figure, bar string, holds bool) {
		mark := "ok  "
		if !holds {
			mark = "OVER"
		}
		if bar == "" {
			mark = ""
		}
		fmt.Fprintf(&b, "%-46s %-34s %-4s %s\n", what, figure, mark, bar)
	}
	kib := func(n int64) string { return fmt.Sprintf("%.1f KiB", float64(n)/1024) }
	mem := func(m Memory) string {
		return fmt.Sprintf("%s (heap %s, stacks %s)", kib(m.InUse), kib(m.Heap), kib(m.Stacks))
	}
	fmt.Fprintf(&b, "%d agents on one node\n", f.Agents)
	line("bare grpc-go stream, in use", mem(f.Bare), "", true)
	line("certmeshd per agent, in use", mem(f.Node), "at most bare + 12 KiB = "+kib(f.Bare.InUse+maxOverBare), f.Node.InUse <= f.Bare.InUse+maxOverBare)
	line("bare grpc-go stream, resident", kib(f.Bare.Resident), "", true)
	line("certmeshd per agent, resident", kib(f.Node.Resident), "at most bare + 12 KiB = "+kib(f.Bare.Resident+maxOverBare), f.Node.Resident <= f.Bare.Resident+maxOverBare)
	line("agentswarm per agent, resident", kib(f.Swarm), "", true)
	line("all joined (two TLS handshakes, one identity)", fmt.Sprintf("%.1f s, %.0f/s", f.Joined.Seconds(), float64(f.Agents)/f.Joined.Seconds()), "", true)
	line("idle CPU", fmt.Sprintf("%.1f %% of one core", 100*f.CPU), "under 5 %", f.CPU < maxIdleCPU)
	var tx []string
	for _, k := range slices.Sorted(maps.Keys(f.Writes)) {
		tx = append(tx, fmt.Sprintf("%s %.0f", k, f.Writes[k]))
	}
	line(fmt.Sprintf("transactions in %.0f s of idling", f.Window.Seconds()), strings.Join(tx, ", "), "", true)
	line(fmt.Sprintf("all back after %.1f s of downtime", f.Down.Seconds()), fmt.Sprintf("%.1f s", f.Back.Seconds()), "within 20 s", f.Back <= maxBack)
	line("  asked to come back later, errors, warnings", fmt.Sprintf("%.0f, %d, %d", f.Refused, f.Errors, f.Warnings), "no errors", f.Errors == 0)
	line("a command to all, last acknowledged", fmt.Sprintf("%.2f s (the calls %.2f s)", f.Acknowledged.Seconds(), f.Called.Seconds()), "within 5 s", f.Acknowledged <= maxAck)
	line("  and carried out (key, CSR, issued, deployed)", fmt.Sprintf("%.1f s, %.0f/s", f.Done.Seconds(), float64(f.Agents)/f.Done.Seconds()), "", true)
	line(fmt.Sprintf("renewal on %d agents, alone", f.Healthy.Agents), command(f.Healthy), "", true)
	line(fmt.Sprintf("  while %d others misbehave", f.Misbehaving), fmt.Sprintf("%s, × %.2f", command(f.Disturbed), f.disturbance()), "at most × 1.2", f.disturbance() <= maxDisturb)
	return b.String()
}

func command(c Command) string {
	return fmt.Sprintf("acknowledged %.2f s, done %.2f s", c.Acknowledged.Seconds(), c.Done.Seconds())
}
