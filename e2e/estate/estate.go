// Package estate runs a small certmesh installation from the built binaries on free loopback ports: a control plane, agents,
// and sites that serve what the agents deploy. The demonstration and the end-to-end tests use it; it knows nothing but
// what a user has: the binaries, their environment, the command line and TLS handshakes.
package estate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Config says where an estate lives.
type Config struct {
	// Dir holds all its files; the caller removes it.
	Dir string
	// Bin holds certmeshd, certmesh-agent and certmesh.
	Bin string
	// Env is added to every process, "K=V".
	Env []string
}

// Estate is a running installation.
type Estate struct {
	cfg Config

	API, GRPC, Mesh, PKI string

	mu    sync.Mutex
	procs []*Process
}

// New picks ports and makes directories; nothing runs yet.
func New(cfg Config) (*Estate, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	ports, err := FreeAddrs(4)
	if err != nil {
		return nil, err
	}
	return &Estate{cfg: cfg, API: ports[0], GRPC: ports[1], Mesh: ports[2], PKI: ports[3]}, nil
}

// FreeAddrs returns n distinct loopback addresses that nobody listens on.
func FreeAddrs(n int) ([]string, error) {
	var out []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // all at the end, so that they are distinct
		out = append(out, l.Addr().String())
	}
	return out, nil
}

// Path joins elem below the estate's directory.
func (e *Estate) Path(elem ...string) string {
	return filepath.Join(append([]string{e.cfg.Dir}, elem...)...)
}

// Process is a child with its output in a file.
type Process struct {
	Name    string
	LogPath string
	cmd     *exec.Cmd
	exited  chan struct{}
	err     error
}

// Start runs a binary of the estate (or an absolute path) with its output in <dir>/<name>.log.
func (e *Estate) Start(name, bin string, env []string, args ...string) (*Process, error) {
	if !filepath.IsAbs(bin) {
		bin = filepath.Join(e.cfg.Bin, bin)
	}
	logPath := e.Path(name + ".log")
	out, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	cmd := exec.Command(bin, args...)
	cmd.Dir = e.cfg.Dir
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = append(append(baseEnv(), e.cfg.Env...), env...)
	// A child must not outlive whoever started it, however that one ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p := &Process{Name: name, LogPath: logPath, cmd: cmd, exited: make(chan struct{})}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.exited)
	}()
	e.mu.Lock()
	e.procs = append(e.procs, p)
	e.mu.Unlock()
	return p, nil
}

// baseEnv passes on what programs need and nothing that would configure certmesh by accident.
func baseEnv() []string {
	var out []string
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "CERTMESH_") {
			out = append(out, kv)
		}
	}
	return out
}

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Exited is closed when the process has ended.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Kill sends SIGKILL and waits.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // it may have ended already
	<-p.exited
}

// Stop sends SIGTERM and waits at most patience, then kills.
func (p *Process) Stop(patience time.Duration) error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended already
	select {
	case <-p.exited:
		return p.err
	case <-time.After(patience):
		p.Kill()
		return fmt.Errorf("%s did not stop within %s of SIGTERM", p.Name, patience)
	}
}

// Tail returns the end of the process's output.
func (p *Process) Tail(lines int) string {
	b, err := os.ReadFile(p.LogPath)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Close stops everything, the last started first.
func (e *Estate) Close() {
	e.mu.Lock()
	procs := e.procs
	e.procs = nil
	e.mu.Unlock()
	for i := len(procs) - 1; i >= 0; i-- {
		_ = procs[i].Stop(5 * time.Second) // the estate is going; a killed child is as good as a stopped one
	}
}

// ServerEnv is the environment that puts certmeshd on the estate's ports.
func (e *Estate) ServerEnv() []string {
	return []string{
		"CERTMESH_DATA_DIR=" + e.Path("server"),
		"CERTMESH_LISTEN_API=" + e.API,
		"CERTMESH_LISTEN_GRPC=" + e.GRPC,
		"CERTMESH_LISTEN_MESH=" + e.Mesh,
		"CERTMESH_LISTEN_PKI=" + e.PKI,
	}
}

// StartServer runs `certmeshd dev` and waits until it is ready.
func (e *Estate) StartServer(ctx context.Context, env ...string) (*Process, error) {
	p, err := e.Start("certmeshd", "certmeshd", append(e.ServerEnv(), env...), "dev")
	if err != nil {
		return nil, err
	}
	err = Wait(ctx, "certmeshd to be ready", func(ctx context.Context) error {
		select {
		case <-p.Exited():
			return Stop(fmt.Errorf("certmeshd ended:\n%s", p.Tail(20)))
		default:
		}
		_, err := e.CLI(ctx, "status", "--format", "json")
		return err
	})
	return p, err
}

// AgentOptions are what an agent of the estate may touch.
type AgentOptions struct {
	Name  string
	Token string // empty: it has joined before
	// Commands are the argument vectors it may run.
	Commands [][]string
	Env      []string
}

// StartAgent runs `certmesh-agent run`; its data is below agents/<name>.
func (e *Estate) StartAgent(o AgentOptions) (*Process, error) {
	dir := e.Path("agents", o.Name)
	roots := e.Path("sites", o.Name)
	for _, d := range []string{dir, roots} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	env := []string{
		"CERTMESH_SERVER_URL=" + e.Mesh,
		"CERTMESH_DATA_DIR=" + dir,
		"CERTMESH_KEY_DIR=" + filepath.Join(dir, "keys"),
		"CERTMESH_AGENT_NAME=" + o.Name,
		"CERTMESH_TARGET_ROOTS=" + roots,
	}
	if o.Token != "" {
		env = append(env, "CERTMESH_JOIN_TOKEN="+o.Token)
	}
	if len(o.Commands) > 0 {
		b, err := json.Marshal(o.Commands)
		if err != nil {
			return nil, err
		}
		env = append(env, "CERTMESH_ALLOW_COMMANDS="+string(b))
	}
	return e.Start("agent-"+o.Name, "certmesh-agent", append(env, o.Env...), "run")
}

// CLIEnv is the environment under which `certmesh` talks to this estate.
func (e *Estate) CLIEnv() []string {
	return []string{"CERTMESH_CONFIG=" + e.Path("server", "client.yaml")}
}

// CLIError is a command that failed.
type CLIError struct {
	Args   []string
	Code   int
	Stderr string
}

func (c *CLIError) Error() string {
	return fmt.Sprintf("certmesh %s: exit %d: %s", strings.Join(c.Args, " "), c.Code, strings.TrimSpace(c.Stderr))
}

// CLI runs `certmesh args…` and returns its standard output.
func (e *Estate) CLI(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(e.cfg.Bin, "certmesh"), args...)
	cmd.Env = append(append(baseEnv(), e.cfg.Env...), e.CLIEnv()...)
	cmd.WaitDelay = time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return stdout.Bytes(), &CLIError{Args: args, Code: exit.ExitCode(), Stderr: stderr.String()}
		}
		return stdout.Bytes(), err
	}
	return stdout.Bytes(), nil
}

// JSON runs `certmesh args… --format json` and decodes the answer into out.
func (e *Estate) JSON(ctx context.Context, out any, args ...string) error {
	b, err := e.CLI(ctx, append(args, "--format", "json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("certmesh %s: %w in %s", strings.Join(args, " "), err, b)
	}
	return nil
}

type stop struct{ error }

func (s stop) Unwrap() error { return s.error }

// Stop marks an error after which waiting is pointless.
func Stop(err error) error { return stop{err} }

// Wait calls check until it succeeds, ctx ends, or check returns a Stop error. The last error says what was missing.
func Wait(ctx context.Context, what string, check func(context.Context) error) error {
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		var s stop
		if errors.As(err, &s) {
			return fmt.Errorf("waiting for %s: %w", what, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited in vain for %s: %w", what, err)
		case <-time.After(25 * time.Millisecond):
		}
	}
}

// Build compiles the shipped binaries into dir.
func Build(ctx context.Context, root, dir string, out io.Writer, flags ...string) error {
	args := append([]string{"build", "-o", dir + string(filepath.Separator)}, flags...)
	args = append(args, "./controlplane/cmd/certmeshd", "./agent/cmd/certmesh-agent", "./tui/cmd/certmesh")
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = root, out, out
	return cmd.Run()
}
