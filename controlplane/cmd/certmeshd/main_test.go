package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestScripts runs the command line in process, each script with a data directory of its own.
func TestScripts(t *testing.T) {
	t.Parallel()
	reference, err := os.ReadFile(filepath.Join("..", "..", "..", "docs", "configuration.md"))
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"), RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("CERTMESH_DATA_DIR", filepath.Join(e.WorkDir, "data"))
			return os.WriteFile(filepath.Join(e.WorkDir, "configuration.md"), reference, 0o600)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
	})
}

// exits STATUS ARGS… must end with that status and, unless it is 0, say why in lines that begin with the program's name.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	if neg || err != nil {
		ts.Fatalf("usage: exits STATUS ARGS…")
	}
	args = args[1:]
	for i, a := range args {
		if rest, found := strings.CutPrefix(a, "./"); found {
			args[i] = ts.MkAbs(rest)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var said bytes.Buffer
	getenv := func(k string) (string, bool) { v := ts.Getenv(k); return v, v != "" }
	code := run(ctx, args, ts.Stdout(), &said, getenv)
	_, _ = ts.Stderr().Write(said.Bytes())
	if code != want {
		ts.Fatalf("certmeshd %s: exit status %d, want %d: %s", strings.Join(args, " "), code, want, said.String())
	}
	if code == 0 {
		return
	}
	for line := range strings.Lines(said.String()) {
		if !strings.HasPrefix(line, "certmeshd: ") || strings.Contains(line, "config.") || strings.Contains(line, "goroutine") {
			ts.Fatalf("not a sentence of ours: %q", line)
		}
	}
	if said.Len() == 0 {
		ts.Fatalf("no reason is given")
	}
}

// output is what a running node says.
type output struct {
	mu  sync.Mutex
	b   bytes.Buffer
	got chan struct{}
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	defer func() {
		select {
		case o.got <- struct{}{}:
		default:
		}
	}()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// TestDevStartsAndStops, and an API key made afterwards comes with the way to log in.
func TestDevStartsAndStops(t *testing.T) {
	t.Parallel()
	env := map[string]string{"CERTMESH_DATA_DIR": filepath.Join(t.TempDir(), "data"), "CERTMESH_LISTEN_API": "127.0.0.1:0",
		"CERTMESH_LISTEN_GRPC": "127.0.0.1:0", "CERTMESH_LISTEN_MESH": "127.0.0.1:0", "CERTMESH_LISTEN_PKI": "127.0.0.1:0"}
	getenv := func(k string) (string, bool) { v, ok := env[k]; return v, ok }
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, log := &output{got: make(chan struct{}, 1)}, &output{got: make(chan struct{}, 1)}
	done := make(chan int, 1)
	go func() { done <- run(ctx, []string{"dev"}, out, log, getenv) }()
	for !strings.Contains(out.String(), "is ready.") {
		select {
		case <-out.got:
		case code := <-done:
			t.Fatalf("exit status %d: %s", code, log)
		case <-ctx.Done():
			t.Fatalf("not ready: %s", log)
		}
	}
	cancel()
	if code := <-done; code != 0 {
		t.Fatalf("exit status %d: %s", code, log)
	}
	var key, hint bytes.Buffer
	env["CERTMESH_LISTEN_GRPC"], env["CERTMESH_NODE_NAMES"] = ":9442", "cp.example.com"
	if code := run(t.Context(), []string{"apikey", "create", "--name", "eve", "--role", "approver"}, &key, &hint, getenv); code != 0 {
		t.Fatalf("exit status %d: %s", code, &hint)
	}
	if !strings.HasPrefix(key.String(), "cmk1.") || strings.Count(key.String(), "\n") != 1 {
		t.Errorf("standard output: %q", &key)
	}
	words := strings.Fields(hint.String())
	if !strings.HasPrefix(hint.String(), "Log in with: certmesh login --server cp.example.com:9442 --ca-fingerprint ") || len(words[len(words)-1]) != 64 {
		t.Errorf("standard error: %q", &hint)
	}
}
