package cli_test

import (
	"bytes"
	"context"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/certmesh/certmesh/tui/cli"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/operatortest"
)

// screen collects output and lets a test wait for a part of it.
type screen struct {
	mu  sync.Mutex
	buf bytes.Buffer
	new chan struct{}
}

func newScreen() *screen { return &screen{new: make(chan struct{}, 1)} }

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case s.new <- struct{}{}:
	default:
	}
	return s.buf.Write(p)
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

// await waits until text was written n times.
func (s *screen) await(t *testing.T, text string, n int) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for strings.Count(s.String(), text) < n {
		select {
		case <-s.new:
		case <-deadline:
			t.Fatalf("%q was not written %d times:\n%s", text, n, s.String())
		}
	}
}

// running is a command that runs beside the test.
type running struct {
	out, err *screen
	stop     context.CancelFunc
	code     chan int
}

func start(t *testing.T, s *operatortest.Server, terminal bool, env map[string]string, args ...string) *running {
	t.Helper()
	profile := filepath.Join(t.TempDir(), "client.yaml")
	if err := (client.Profile{ServerURL: s.Address, APIKey: operatortest.Key, CACertificate: s.CA}).Save(profile); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r := &running{out: newScreen(), err: newScreen(), stop: cancel, code: make(chan int, 1)}
	app := &cli.App{
		In: strings.NewReader(""), Out: r.out, Err: r.err, Clock: newStill(), Version: "v9.9.9", Terminal: terminal,
		Env: func(name string) string {
			if name == "CERTMESH_CONFIG" {
				return profile
			}
			return env[name]
		},
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.code <- app.Run(ctx, args)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return r
}

func (r *running) ends(t *testing.T, want int) {
	t.Helper()
	select {
	case got := <-r.code:
		if got != want {
			t.Errorf("exit status %d, want %d: %s", got, want, r.err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("it does not end")
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	fail := func(d *operatortest.Data) { d.Certificate("web").Status = "Failed" }
	t.Run("a terminal is cleared", func(t *testing.T) {
		t.Parallel()
		s := operatortest.Start(t)
		r := start(t, s, true, nil, "certs", "list", "--watch")
		r.out.await(t, "\x1b[32mActive\x1b[0m", 1)
		s.Change(fail)
		r.out.await(t, "\x1b[31mFailed\x1b[0m", 1)
		if got := strings.Count(r.out.String(), "\x1b[H\x1b[2J"); got < 2 {
			t.Errorf("the screen was cleared %d times, want once a picture", got)
		}
		r.stop()
		r.ends(t, 0)
	})
	t.Run("anything else is printed to again", func(t *testing.T) {
		t.Parallel()
		s := operatortest.Start(t)
		r := start(t, s, false, nil, "certs", "get", "web", "--watch", "--format", "json")
		r.out.await(t, `"status": "Active"`, 1)
		s.Change(fail)
		r.out.await(t, `"status": "Failed"`, 1)
		if strings.Contains(r.out.String(), "\x1b") {
			t.Errorf("escape sequences without a terminal: %q", r.out)
		}
		r.stop()
		r.ends(t, 0)
	})
	t.Run("NO_COLOR", func(t *testing.T) {
		t.Parallel()
		s := operatortest.Start(t)
		r := start(t, s, true, map[string]string{"NO_COLOR": "1"}, "certs", "list")
		r.ends(t, 0)
		if strings.Contains(r.out.String(), "\x1b") || !strings.Contains(r.out.String(), "Active") {
			t.Errorf("painted: %q", r.out)
		}
	})
	t.Run("every view that can be watched", func(t *testing.T) {
		t.Parallel()
		s := operatortest.Start(t)
		job := "job_00000000000000000000000000000001"
		for _, args := range [][]string{
			{"status"}, {"certs", "why", "web"}, {"agents", "list"}, {"agents", "get", "web-1"}, {"jobs", "list"}, {"jobs", "get", job}, {"issuers", "list"},
			{"issuers", "get", "corp"}, {"targets", "list"}, {"targets", "get", "web-1-nginx"}, {"audit", "list"}, {"profiles", "list"},
		} {
			r := start(t, s, false, nil, append(args, "--watch", "--format", "yaml")...)
			s.Change(func(*operatortest.Data) {})
			r.out.await(t, "\n", 1)
			s.Change(func(*operatortest.Data) {})
			r.out.await(t, "---\n", 1)
			r.stop()
			r.ends(t, 0)
		}
	})
	t.Run("a lost connection is made again", func(t *testing.T) {
		t.Parallel()
		s := operatortest.Start(t)
		s.Fail("Watch", codes.Unavailable, "restarting", "")
		r := start(t, s, false, nil, "certs", "list", "--watch")
		r.err.await(t, "the connection is lost", 1)
		r.out.await(t, "Active", 1)
		r.stop()
		r.ends(t, 0)
	})
	t.Run("a refusal ends it", func(t *testing.T) {
		t.Parallel()
		s := operatortest.Start(t)
		s.Fail("Watch", codes.PermissionDenied, "not for you", "ask for more")
		r := start(t, s, false, nil, "certs", "list", "--watch")
		r.ends(t, 1)
		if got := r.err.String(); got != "certmesh: not for you; ask for more\n" {
			t.Errorf("said %q", got)
		}
	})
	t.Run("what is gone ends it", func(t *testing.T) {
		t.Parallel()
		s := operatortest.Start(t)
		r := start(t, s, false, nil, "certs", "get", "web", "--watch")
		r.out.await(t, "Active", 1)
		s.Change(func(d *operatortest.Data) { d.Certificates = d.Certificates[1:] })
		r.ends(t, 1)
		r.err.await(t, "there is no certificate", 1)
	})
}

// TestWaitIsToldByWatch: a change ends the wait at once, long before the next look.
func TestWaitIsToldByWatch(t *testing.T) {
	t.Parallel()
	s := operatortest.Start(t)
	r := start(t, s, false, nil, "certs", "create", "shop", "--dns", "a", "--issuer", "corp", "--target", "t", "--wait", "--wait-timeout", "1h")
	r.err.await(t, "Waiting until shop", 1)
	s.Change(func(d *operatortest.Data) { d.Issue("shop") })
	r.err.await(t, "issued for agent web-1", 1)
	s.Change(func(d *operatortest.Data) { d.Serve("shop") })
	r.ends(t, 0)
}

// TestWaitWithoutWatch: a server that refuses Watch is looked at now and then.
func TestWaitWithoutWatch(t *testing.T) {
	t.Parallel()
	s := operatortest.Start(t)
	s.Fail("Watch", codes.PermissionDenied, "no", "")
	r := start(t, s, false, nil, "certs", "create", "shop", "--dns", "a", "--issuer", "corp", "--target", "t", "--wait", "--wait-timeout", "1h")
	r.err.await(t, "Waiting until shop", 1)
	s.Change(func(d *operatortest.Data) { d.Issue("shop"); d.Serve("shop") })
	r.ends(t, 0)
}

func TestInterruptedWait(t *testing.T) {
	t.Parallel()
	s := operatortest.Start(t)
	r := start(t, s, false, nil, "certs", "create", "shop", "--dns", "a", "--issuer", "corp", "--target", "t", "--wait", "--wait-timeout", "1h")
	r.err.await(t, "Waiting until shop", 1)
	r.stop()
	r.ends(t, 1)
	r.err.await(t, "interrupted", 1)
}

// TestSecretIsAskedForUnseen: on a terminal the key is asked for, and neither it nor an interruption shows.
func TestSecretIsAskedForUnseen(t *testing.T) {
	t.Parallel()
	s := operatortest.Start(t)
	path := filepath.Join(t.TempDir(), "p", "client.yaml")
	var out, errs bytes.Buffer
	app := &cli.App{
		In: strings.NewReader(""), Out: &out, Err: &errs, Clock: newStill(), Version: "v", Env: func(string) string { return "" },
		ReadSecret: func(prompt func()) (string, error) { prompt(); return operatortest.Key + "\r\n", nil },
	}
	code := app.Run(t.Context(), []string{"login", "--server", s.Address, "--ca-fingerprint", client.Fingerprint(s.Root), "--config", path})
	if code != 0 || !strings.HasPrefix(errs.String(), "API key: \n") || strings.Contains(out.String()+errs.String(), operatortest.Key) {
		t.Errorf("status %d, out %q, err %q", code, out.String(), errs.String())
	}
	p, err := client.LoadProfile(path)
	if err != nil || string(p.APIKey) != operatortest.Key || p.ServerURL != s.Address {
		t.Errorf("profile %v, %v", p, err)
	}
}
