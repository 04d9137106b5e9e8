package target

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	// MaxOutput bounds what is kept of a command's output, in bytes, counted from its end: that is where programs say
	// why they gave up.
	MaxOutput = 4 << 10
	// commandTimeout bounds one command. Validating the largest configurations takes some seconds.
	commandTimeout = 60 * time.Second
	// commandGrace is how long after it was killed a command's pipes may be held open by its children.
	commandGrace = 2 * time.Second

	maxArguments = 64
	maxArgument  = 4096
)

// String returns the command as JSON, the form in which an operator allows it.
func (c Command) String() string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if c == nil {
		c = Command{}
	}
	// Strings always encode.
	_ = e.Encode([]string(c))
	return strings.TrimSpace(b.String())
}

// shells are programs that would give metacharacters their meaning back.
func shells() []string {
	return []string{"sh", "bash", "dash", "ash", "zsh", "ksh", "mksh", "csh", "tcsh", "fish", "busybox", "env", "xargs", "eval", "cmd.exe", "powershell", "pwsh"}
}

const metacharacters = ";&|<>$`\"'\\(){}[]*?!~#"

// Problems reports what makes c unfit to be run, under the name field. It says nothing of permission: see Env.Allowed.
func (c Command) Problems(field string) []Problem {
	if len(c) == 0 {
		return []Problem{{field, "is empty; give a program and its arguments"}}
	}
	if len(c) > maxArguments {
		return []Problem{{field, fmt.Sprintf("has %d elements; at most %d are accepted", len(c), maxArguments)}}
	}
	var ps []Problem
	for i, a := range c {
		at := fmt.Sprintf("%s[%d]", field, i)
		switch j := strings.IndexAny(a, metacharacters); {
		case a == "":
			ps = append(ps, Problem{at, "is empty; leave it out"})
		case len(a) > maxArgument:
			ps = append(ps, Problem{at, fmt.Sprintf("has %d bytes; at most %d are accepted", len(a), maxArgument)})
		case clean(a, false) != a || strings.ContainsAny(a, "\n\t"):
			ps = append(ps, Problem{at, "contains a control character; commands are plain text"})
		case j >= 0:
			ps = append(ps, Problem{at, fmt.Sprintf("contains %q, which means something to a shell only; commands are run without one, so give the program and each argument as elements of the list", a[j])})
		}
	}
	prog := c[0]
	switch base := filepath.Base(prog); {
	case slices.Contains(shells(), base):
		ps = append(ps, Problem{field + "[0]", fmt.Sprintf("%q runs other commands; name the program itself", base)})
	case strings.ContainsAny(prog, " "):
		ps = append(ps, Problem{field + "[0]", "contains a space; the program and each argument are elements of the list"})
	case strings.Contains(prog, "/") && (!filepath.IsAbs(prog) || filepath.Clean(prog) != prog):
		ps = append(ps, Problem{field + "[0]", "must be an absolute path or the bare name of a program"})
	case strings.HasPrefix(prog, "-") || prog == "." || prog == "..":
		ps = append(ps, Problem{field + "[0]", "is not the name of a program"})
	}
	return ps
}

// Allowed says whether the agent's own configuration lets c be run: one of e.Commands must equal it, element by element.
// The error is Forbidden and shows what to allow.
func (e Env) Allowed(c Command) error {
	if ps := c.Problems("command"); len(ps) > 0 {
		return fault.InvalidField(ps[0].Field, "%s", ps[0].Message)
	}
	for _, a := range e.Commands {
		if slices.Equal(a, c) {
			return nil
		}
	}
	return fault.New(fault.Forbidden, "the command is not allowed on this host: add exactly %s to CERTMESH_ALLOW_COMMANDS there and restart the agent", c)
}

// CommandError is the cause of a command's failure, with the end of what it printed.
type CommandError struct {
	Command Command
	// ExitCode is -1 when the command did not end by itself or did not start.
	ExitCode int
	output   string
	err      error
}

func (e *CommandError) Error() string {
	s := e.err.Error()
	if e.output != "" {
		s += ": " + printable(e.output, MaxOutput)
	}
	return s
}

func (e *CommandError) Unwrap() error { return e.err }

// Output is the tail of standard output and error: at most MaxOutput bytes, valid UTF-8, no control characters but line
// ends and tabs.
func (e *CommandError) Output() string { return e.output }

// Run runs c without a shell, if it is Allowed: with an empty input, in the root directory, with PATH and LANG as its
// whole environment, for at most a minute. A bare program name is looked for in the system's directories only.
//
// Errors: Forbidden if it is not allowed, Unsupported if there is no such program, Retryable if ctx ended or it took too
// long, and Rejected with a *CommandError if it ended with a status other than 0.
func (e Env) Run(ctx context.Context, c Command) error {
	if err := e.Allowed(c); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return fault.Wrap(fault.Retryable, context.Cause(ctx), "%s was not run: it was stopped", c)
	}
	path, err := findProgram(c[0])
	if err != nil {
		return err
	}
	limit, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	var out tail
	cmd := exec.CommandContext(limit, path, c[1:]...) //nolint:gosec // allowed by the host's own configuration, element by element
	cmd.Args[0] = c[0]
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + strings.Join(programDirs(), ":"), "LANG=C.UTF-8"}
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = commandGrace
	ownGroup(cmd)
	err = cmd.Run()
	if err == nil || errors.Is(err, exec.ErrWaitDelay) {
		// The second: it ended well, but left a child that holds its output.
		return nil
	}
	ce := &CommandError{Command: c, ExitCode: -1, output: out.String(), err: err}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return fault.Wrap(fault.Retryable, errors.Join(context.Cause(ctx), ce), "%s was stopped before it ended", c)
	case limit.Err() != nil:
		return fault.Wrap(fault.Retryable, ce, "%s did not end within %s and was killed; run it by hand to see what it waits for", c, commandTimeout)
	case errors.As(err, &exit):
		ce.ExitCode = exit.ExitCode()
		msg := fmt.Sprintf("%s failed with %s", c, exit.ProcessState)
		if last := lastLine(ce.output); last != "" {
			msg += ": " + printable(last, 300)
		}
		return fault.Wrap(fault.Rejected, ce, "%s", msg)
	default:
		return fault.Wrap(fault.Unsupported, ce, "%s cannot be started (%s); correct the program's path or permissions", c, printable(err.Error(), 200))
	}
}

func programDirs() []string {
	return []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}
}

func findProgram(name string) (string, error) {
	if filepath.IsAbs(name) {
		if !isProgram(name) {
			return "", fault.New(fault.Unsupported, "there is no program %s on this host; install it or correct the path", name)
		}
		return name, nil
	}
	for _, d := range programDirs() {
		if p := filepath.Join(d, name); isProgram(p) {
			return p, nil
		}
	}
	return "", fault.New(fault.Unsupported, "there is no program %s in %s on this host; install it or give its absolute path", name, strings.Join(programDirs(), ", "))
}

func isProgram(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular() && fi.Mode().Perm()&0o111 != 0
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

// tail keeps the last MaxOutput bytes written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p[max(0, len(p)-MaxOutput):]...)
	if over := len(t.b) - MaxOutput; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string { return strings.TrimSpace(clean(string(t.b), true)) }
