package target_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestCommandProblems(t *testing.T) {
	t.Parallel()
	for _, good := range []target.Command{{"nginx"}, {"/usr/sbin/nginx", "-t"}, {"systemctl", "reload", "haproxy@a.service"}, {"docker", "exec", "web", "nginx", "-s", "reload"},
		{"touch", "/run/a b"}, {"x", "--opt=a,b:c%d+e@f"}, {"héllo"}} {
		if ps := good.Problems("c"); len(ps) > 0 {
			t.Errorf("%s: %v", good, ps)
		}
	}
	for _, c := range []struct {
		command target.Command
		says    string
	}{
		{nil, "is empty"}, {target.Command{""}, "is empty"}, {target.Command{"nginx", ""}, "is empty"},
		{target.Command{"nginx -t"}, "contains a space"}, {target.Command{"sbin/nginx"}, "absolute path"}, {target.Command{"../nginx"}, "absolute path"},
		{target.Command{"/usr/../bin/nginx"}, "absolute path"}, {target.Command{"-c"}, "not the name"}, {target.Command{".."}, "not the name"},
		{target.Command{"sh", "-c", "nginx"}, "runs other commands"}, {target.Command{"/bin/bash"}, "runs other commands"}, {target.Command{"/usr/bin/env", "nginx"}, "runs other commands"},
		{target.Command{"busybox", "nginx"}, "runs other commands"}, {target.Command{"xargs", "nginx"}, "runs other commands"},
		{target.Command{"nginx", "a\x00b"}, "control character"}, {target.Command{"nginx", "a\nb"}, "control character"}, {target.Command{"nginx", "\u202e"}, "control character"}, {target.Command{"nginx", "\xff"}, "control character"},
		{target.Command{"nginx", strings.Repeat("x", 5000)}, "at most"}, {target.Command(strings.Split(strings.Repeat("x ", 100), " ")), "at most"},
	} {
		if ps := c.command.Problems("c"); len(ps) == 0 || !strings.Contains(ps[0].Message, c.says) || !strings.HasPrefix(ps[0].Field, "c") {
			t.Errorf("%s: %v", c.command, ps)
		}
	}
	for _, meta := range []string{"; reboot", "| sh", "& x", "&& x", "|| x", "> /x", "< /x", "$(x)", "${x}", "$x", "`x`", "'x'", `"x"`, `\x`, "*", "?", "[a]", "{a,b}", "!x", "~x", "#x", "(x)"} {
		for _, c := range []target.Command{{"nginx", meta}, {"nginx" + meta}, {"nginx", "-s", "reload" + meta}} {
			if ps := c.Problems("c"); len(ps) == 0 || !strings.Contains(ps[0].Message, "a shell only") {
				t.Errorf("%s: %v", c, ps)
			}
			// Even an operator who allowed it by mistake does not get it run.
			e := target.Env{Commands: []target.Command{c}}
			if err := e.Run(t.Context(), c); !fault.Is(err, fault.Invalid) {
				t.Errorf("%s: %v", c, err)
			}
		}
	}
}

func TestAllowed(t *testing.T) {
	t.Parallel()
	e := target.Env{Commands: []target.Command{{"touch", "/a"}, {"true"}, {"ls", "a b"}}}
	for _, c := range e.Commands {
		if err := e.Allowed(c); err != nil {
			t.Error(err)
		}
	}
	for _, c := range []target.Command{{"touch"}, {"touch", "/a", "/b"}, {"touch", "/A"}, {"/usr/bin/touch", "/a"}, {"true", "x"}, {"ls", "a", "b"}, {"false"}, {"TRUE"}} {
		err := e.Allowed(c)
		if !fault.Is(err, fault.Forbidden) || !strings.Contains(err.Error(), c.String()) || !strings.Contains(err.Error(), "command is not allowed") {
			t.Errorf("%s: %v", c, err)
		}
		if err := e.Run(t.Context(), c); !fault.Is(err, fault.Forbidden) {
			t.Errorf("%s ran: %v", c, err)
		}
	}
	if err := (target.Env{}).Allowed(target.Command{"true"}); !fault.Is(err, fault.Forbidden) {
		t.Error(err)
	}
}

// script writes an executable; a shell script stands for any program here, the vector that runs it holds no shell.
func script(t *testing.T, text string) target.Command {
	t.Helper()
	path := t.TempDir() + "/program"
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o700); err != nil {
		t.Fatal(err)
	}
	return target.Command{path}
}

func TestRun(t *testing.T) {
	t.Setenv("CERTMESH_JOIN_TOKEN", "a secret of the agent")
	run := func(c target.Command) error {
		return target.Env{Commands: []target.Command{c}}.Run(t.Context(), c)
	}
	if err := run(target.Command{"true"}); err != nil {
		t.Error(err)
	}
	for _, c := range []target.Command{{"no-such-program-anywhere"}, {"/no/such/program"}, {"/etc"}, {"/etc/passwd"}} {
		if err := run(c); !fault.Is(err, fault.Unsupported) {
			t.Errorf("%s: %v", c, err)
		}
	}
	// Arguments arrive as they are, the environment is clean, input is empty, and the working directory is the root.
	out := t.TempDir() + "/out"
	c := append(script(t, `{ printf '%s|' "$@"; env | sort; pwd; cat; } > "$1"`), out, "a b", "-x", "c=d")
	if err := run(c); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(b); !strings.HasPrefix(got, out+"|a b|-x|c=d|") || strings.Contains(got, "secret") || strings.Contains(got, "HOME=") || !strings.HasSuffix(got, "\n/\n") {
		t.Errorf("%q", got)
	}
	// Output: the end of it, bounded and clean, and never more than that in memory.
	err = run(script(t, `i=0; while [ $i -lt 3000 ]; do echo "line $i"; i=$((i+1)); done; printf 'bad\033[31m\000\302\205 thing\377\n' >&2; exit 3`))
	var ce *target.CommandError
	if !fault.Is(err, fault.Rejected) || !errors.As(err, &ce) || ce.ExitCode != 3 {
		t.Fatal(err)
	}
	o := ce.Output()
	if len(o) > target.MaxOutput || !strings.HasSuffix(o, "bad[31m thing") || !strings.Contains(o, "line 2999\n") || strings.Contains(o, "line 100\n") ||
		strings.ContainsFunc(o, func(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\t' }) {
		t.Errorf("%d %q", len(o), o)
	}
	if s := target.Sentence(err); !strings.Contains(s, "exit status 3") || !strings.Contains(s, "bad[31m thing") || strings.Contains(s, "line 2999") {
		t.Errorf("%q", s)
	}
	// Killed by a signal.
	if err := run(script(t, "kill -9 $$")); !fault.Is(err, fault.Rejected) || !strings.Contains(err.Error(), "signal: killed") {
		t.Error(err)
	}
}

// TestRunStopped: a command that hangs ends with its context, and its children with it.
func TestRunStopped(t *testing.T) {
	t.Parallel()
	pid := t.TempDir() + "/pid"
	c := append(script(t, `sleep 600 & echo $! > "$1.new"; mv "$1.new" "$1"; wait`), pid)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- target.Env{Commands: []target.Command{c}}.Run(ctx, c) }()
	deadline := time.After(10 * time.Second)
	var child string
	for child == "" {
		select {
		case <-deadline:
			t.Fatal("the command did not start")
		case <-time.After(5 * time.Millisecond):
		}
		b, err := os.ReadFile(pid)
		if err == nil {
			child = strings.TrimSpace(string(b))
		}
	}
	cancel()
	select {
	case err := <-done:
		if !fault.Is(err, fault.Retryable) {
			t.Error(err)
		}
	case <-deadline:
		t.Fatal("it does not end")
	}
	for {
		b, err := os.ReadFile("/proc/" + child + "/stat")
		if err != nil || strings.Contains(string(b), ") Z ") {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("its child %s lives on", child)
		case <-time.After(5 * time.Millisecond):
		}
	}
}
