package renewals

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/e2e/estate"
)

// patience bounds one measurement on a machine that is busy with other things.
const patience = 5 * time.Minute

func number(tb testing.TB, name string, usual int) int {
	tb.Helper()
	text := os.Getenv(name)
	if text == "" {
		return usual
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > 5000 {
		tb.Fatalf("%s=%s is not a number from 1 to 5000", name, text)
	}
	return n
}

// built are the binaries of this run.
func built(tb testing.TB) string {
	tb.Helper()
	if dir := os.Getenv("RENEWALS_BIN"); dir != "" {
		return dir
	}
	dir := tb.TempDir()
	if err := build(tb.Context(), dir); err != nil {
		tb.Fatal(err)
	}
	return dir
}

// begin starts a control plane and one agent.
func begin(ctx context.Context, tb testing.TB, bin, agent string, commands ...[]string) *scene {
	tb.Helper()
	profiles := os.Getenv("RENEWALS_PROFILES")
	if profiles != "" {
		if err := os.MkdirAll(profiles, 0o700); err != nil {
			tb.Fatal(err)
		}
	}
	s, err := open(ctx, bin, filepath.Join(tb.TempDir(), "estate"), profiles)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(s.close)
	if agent == "" {
		return s
	}
	allowed := commands
	if estate.NginxPath() != "" && len(commands) == 0 {
		allowed = s.NginxCommands(agent, farmName)
	}
	if s.agent, _, err = s.Join(ctx, estate.AgentOptions{Name: agent, Commands: allowed}); err != nil {
		tb.Fatal(err)
	}
	return s
}

func report(b *testing.B, figures []figure) {
	b.Helper()
	b.ReportMetric(0, "ns/op") // it says nothing here
	for _, f := range figures {
		b.ReportMetric(f.value, f.unit)
	}
}

// latency renews one certificate n times at a file target or an nginx.
func latency(ctx context.Context, tb testing.TB, bin string, nginx bool, n int) []figure {
	tb.Helper()
	const agent = "latency"
	s := begin(ctx, tb, bin, agent)
	var sites []*estate.Site
	var limits []figure
	if nginx {
		f, err := serveNginx(ctx, s.Estate, agent, agent, 1)
		if err != nil {
			tb.Fatal(err)
		}
		test, reload, err := f.commandTimes(ctx, 10)
		if err != nil {
			tb.Fatal(err)
		}
		sites, limits = f.sites, []figure{{"nginx-test-ms", ms(test)}, {"nginx-reload-ms", ms(reload)}}
	} else {
		var stop func()
		var err error
		if sites, stop, err = serveFiles(s.Estate, agent, agent, 1); err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(stop)
	}
	ids, err := s.place(ctx, agent, sites)
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := s.oneByOne(ctx, ids[0], min(n, 5)); err != nil { // first times are not like others
		tb.Fatal(err)
	}
	name := "file"
	if nginx {
		name = "nginx"
	}
	stop := s.profile(ctx, name)
	used, err := s.used(n)
	if err != nil {
		tb.Fatal(err)
	}
	all, err := s.oneByOne(ctx, ids[0], n)
	stop()
	if err != nil {
		tb.Fatal(err)
	}
	cpu, err := used()
	if err != nil {
		tb.Fatal(err)
	}
	limits = append(limits, cpu...)
	sync, err := fsyncTime(s.Path())
	if err != nil {
		tb.Fatal(err)
	}
	shake, err := handshakeTime(ctx, sites[0])
	if err != nil {
		tb.Fatal(err)
	}
	return append([]figure{{"p50-ms", ms(quantile(all, 0.5))}, {"p99-ms", ms(quantile(all, 0.99))},
		{"fsync-ms", ms(sync)}, {"handshake-ms", ms(shake)}}, limits...)
}

func burstOf(ctx context.Context, tb testing.TB, bin string, nginx bool, n int) []figure {
	tb.Helper()
	const agent = "burst"
	s := begin(ctx, tb, bin, agent)
	var sites []*estate.Site
	var f *farm
	if nginx {
		var err error
		if f, err = serveNginx(ctx, s.Estate, agent, agent, n); err != nil {
			tb.Fatal(err)
		}
		sites = f.sites
	} else {
		var stop func()
		var err error
		if sites, stop, err = serveFiles(s.Estate, agent, agent, n); err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(stop)
	}
	ids, err := s.place(ctx, agent, sites)
	if err != nil {
		tb.Fatal(err)
	}
	before := 0
	name := "burst-file"
	if nginx {
		name = "burst-nginx"
		if before, err = f.reloads(); err != nil {
			tb.Fatal(err)
		}
	}
	stop := s.profile(ctx, name)
	used, err := s.used(n)
	if err != nil {
		tb.Fatal(err)
	}
	called, done, err := s.burst(ctx, ids)
	stop()
	if err != nil {
		tb.Fatal(err)
	}
	cpu, err := used()
	if err != nil {
		tb.Fatal(err)
	}
	out := []figure{{"s", done.Seconds()}, {"calls-s", called.Seconds()}, {"renewals/s", float64(n) / done.Seconds()}}
	out = append(out, cpu...)
	if nginx {
		after, err := f.reloads()
		if err != nil {
			tb.Fatal(err)
		}
		out = append(out, figure{"reloads", float64(after - before)})
		test, reload, err := f.commandTimes(ctx, 3)
		if err != nil {
			tb.Fatal(err)
		}
		out = append(out, figure{"nginx-test-ms", ms(test)}, figure{"nginx-reload-ms", ms(reload)})
	}
	if err := s.renewed(ctx, ids, sites, 2); err != nil {
		tb.Fatal(err)
	}
	sync, err := fsyncTime(s.Path())
	if err != nil {
		tb.Fatal(err)
	}
	shake, err := handshakeTime(ctx, sites[0])
	if err != nil {
		tb.Fatal(err)
	}
	return append(out, figure{"fsync-ms", ms(sync)}, figure{"handshake-ms", ms(shake)})
}

// footprint measures what is there when nothing happens, and starts on an existing database.
func footprint(ctx context.Context, tb testing.TB, bin string, starts int, idle time.Duration) []figure {
	tb.Helper()
	const mib = 1 << 20
	s := begin(ctx, tb, bin, "")
	agent, _, err := s.Join(ctx, estate.AgentOptions{Name: "idle"})
	if err != nil {
		tb.Fatal(err)
	}
	st, err := os.Stat(filepath.Join(bin, "certmesh-agent"))
	if err != nil {
		tb.Fatal(err)
	}
	select {
	case <-time.After(idle): // nothing is what is measured
	case <-ctx.Done():
	}
	agentRSS, err := resident(agent.PID())
	if err != nil {
		tb.Fatal(err)
	}
	serverRSS, err := resident(s.server.PID())
	if err != nil {
		tb.Fatal(err)
	}
	if err := agent.Stop(10 * time.Second); err != nil {
		tb.Fatal(err)
	}
	var all []time.Duration
	for range starts {
		if err := s.server.Stop(10 * time.Second); err != nil {
			tb.Fatal(err)
		}
		began := time.Now()
		if s.server, err = s.Start("certmeshd", "certmeshd", append(s.ServerEnv(), "CERTMESH_LISTEN_DEBUG="+s.debug), "dev"); err != nil {
			tb.Fatal(err)
		}
		for s.Ready(ctx) != nil {
			if ctx.Err() != nil {
				tb.Fatal("certmeshd is not ready: " + s.server.Tail(10))
			}
			select {
			case <-ctx.Done():
			case <-time.After(2 * time.Millisecond):
			}
		}
		all = append(all, time.Since(began))
	}
	return []figure{{"agent-MB", float64(st.Size()) / 1e6}, {"agent-MiB", float64(agentRSS) / mib}, {"server-MiB", float64(serverRSS) / mib},
		{"ready-ms", ms(quantile(all, 0.5))}, {"ready-max-ms", ms(quantile(all, 1))}}
}

// TestSmoke runs every measurement with a few renewals: nothing is timed, all must work.
func TestSmoke(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	bin := built(t)
	nginx := []bool{false}
	if estate.NginxPath() != "" {
		nginx = append(nginx, true)
	}
	for _, x := range nginx {
		for _, f := range append(latency(ctx, t, bin, x, 2), burstOf(ctx, t, bin, x, 5)...) {
			// Processor time is counted in hundredths of a second.
			if f.value < 0 || f.value == 0 && !strings.HasSuffix(f.unit, "cpu-ms/op") {
				t.Errorf("%s is %v", f.unit, f.value)
			}
		}
	}
	for _, f := range footprint(ctx, t, bin, 1, 0) {
		if f.value <= 0 {
			t.Errorf("%s is %v", f.unit, f.value)
		}
	}
}

func BenchmarkRenewal(b *testing.B) {
	bin := built(b)
	for _, c := range []struct {
		name  string
		nginx bool
		run   func(ctx context.Context, tb testing.TB, bin string, nginx bool, n int) []figure
		env   string
		n     int
	}{
		{"file", false, latency, "RENEWALS_LATENCY", 200}, {"nginx", true, latency, "RENEWALS_NGINX", 60},
		{"burst-file", false, burstOf, "RENEWALS_BURST", 1000}, {"burst-nginx", true, burstOf, "RENEWALS_BURST", 1000},
	} {
		b.Run(c.name, func(b *testing.B) {
			if c.nginx && estate.NginxPath() == "" {
				b.Skip("nginx is not installed")
			}
			ctx, cancel := context.WithTimeout(b.Context(), patience)
			defer cancel()
			report(b, c.run(ctx, b, bin, c.nginx, number(b, c.env, c.n)))
		})
	}
}

func BenchmarkFootprint(b *testing.B) {
	ctx, cancel := context.WithTimeout(b.Context(), patience)
	defer cancel()
	report(b, footprint(ctx, b, built(b), 10, 5*time.Second))
}
