// Package estate runs a small certmesh installation from the built binaries on free loopback ports: a control plane, agents,
// and sites that serve what the agents deploy. The demonstration and the end-to-end tests use it; it knows nothing but
// what a user has: the binaries, their environment, the command line and TLS handshakes.
package estate

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
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

	API, GRPC, Mesh, PKI, Raft string

	// node names the control plane's directory and process.
	node string

	mu    sync.Mutex
	procs []*Process
}

// New picks ports and makes directories; nothing runs yet.
func New(cfg Config) (*Estate, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	return newNode(cfg, "server")
}

func newNode(cfg Config, node string) (*Estate, error) {
	ports, err := FreeAddrs(5)
	if err != nil {
		return nil, err
	}
	return &Estate{cfg: cfg, API: ports[0], GRPC: ports[1], Mesh: ports[2], PKI: ports[3], Raft: ports[4], node: node}, nil
}

// Path joins elem below the estate's directory.
func (e *Estate) Path(elem ...string) string {
	return filepath.Join(append([]string{e.cfg.Dir}, elem...)...)
}

// Close stops everything, the last started first.
func (e *Estate) Close() {
	e.mu.Lock()
	procs := e.procs
	e.procs = nil
	e.mu.Unlock()
	for _, p := range slices.Backward(procs) {
		_ = p.Stop(5 * time.Second) // the estate is going; a killed child is as good as a stopped one
	}
}

// ServerEnv is the environment that puts certmeshd on the estate's ports.
func (e *Estate) ServerEnv() []string {
	return []string{
		"CERTMESH_DATA_DIR=" + e.Path(e.node),
		"CERTMESH_LISTEN_API=" + e.API,
		"CERTMESH_LISTEN_GRPC=" + e.GRPC,
		"CERTMESH_LISTEN_MESH=" + e.Mesh,
		"CERTMESH_LISTEN_PKI=" + e.PKI,
		"CERTMESH_LISTEN_RAFT=" + e.Raft,
	}
}

// StartServer runs `certmeshd dev` and waits until it is ready.
func (e *Estate) StartServer(ctx context.Context, env ...string) (*Process, error) {
	return e.startServer(ctx, env, "dev")
}

// Serve runs `certmeshd serve`, for which env has to bring what dev makes up, and waits until it is ready.
func (e *Estate) Serve(ctx context.Context, env ...string) (*Process, error) {
	return e.startServer(ctx, env, "serve")
}

func (e *Estate) startServer(ctx context.Context, env []string, mode string) (*Process, error) {
	p, err := e.launch(env, mode)
	if err != nil {
		return nil, err
	}
	return p, e.awaitServer(ctx, p)
}

func (e *Estate) launch(env []string, mode string) (*Process, error) {
	name := "certmeshd"
	if e.node != "server" {
		name += "-" + e.node
	}
	return e.Start(name, "certmeshd", append(e.ServerEnv(), env...), mode)
}

func (e *Estate) awaitServer(ctx context.Context, p *Process) error {
	return Wait(ctx, "certmeshd to be ready", func(ctx context.Context) error {
		select {
		case <-p.Exited():
			return Stop(fmt.Errorf("certmeshd ended:\n%s", p.Tail(20)))
		default:
		}
		return e.Ready(ctx)
	})
}

// Ready asks the api listener whether the node takes work.
func (e *Estate) Ready(ctx context.Context) error {
	status, body, err := e.Get(ctx, "https://"+e.API+"/ready")
	switch {
	case err != nil:
		return err
	case status != http.StatusOK:
		return fmt.Errorf("GET /ready: %d %s", status, body)
	}
	return nil
}

// Get fetches url as a monitor or relying party would: what matters is what it says, not who signed the listener.
func (e *Estate) Get(ctx context.Context, url string) (status int, body []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return 0, nil, err
	}
	c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	r, err := c.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer r.Body.Close()
	body, err = io.ReadAll(io.LimitReader(r.Body, 16<<20))
	return r.StatusCode, body, err
}

// AgentOptions are what an agent of the estate may touch.
type AgentOptions struct {
	Name  string
	Token string // empty: it has joined before
	// Commands are the argument vectors it may run.
	Commands [][]string
	Env      []string
}

// AgentDir is the data directory of the agent called name.
func (e *Estate) AgentDir(name string) string { return e.Path("agents", name) }

// SiteDir is the one directory the agent called name may write certificates in.
func (e *Estate) SiteDir(name string) string { return e.Path("sites", name) }

// KeyFiles lists the private keys that the agent called name keeps for a certificate.
func (e *Estate) KeyFiles(name, certificateID string) []string {
	found, _ := filepath.Glob(filepath.Join(e.AgentDir(name), "keys", certificateID, "*.pem")) // the pattern is well-formed
	return found
}

// StartAgent runs `certmesh-agent run`; its data is below agents/<name>.
func (e *Estate) StartAgent(o AgentOptions) (*Process, error) {
	dir := e.AgentDir(o.Name)
	roots := e.SiteDir(o.Name)
	for _, d := range []string{dir, roots} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	env, err := e.AgentEnv(o)
	if err != nil {
		return nil, err
	}
	return e.Start("agent-"+o.Name, "certmesh-agent", env, "run")
}

// AgentEnv is the environment of the agent that o describes.
func (e *Estate) AgentEnv(o AgentOptions) ([]string, error) {
	dir, roots := e.AgentDir(o.Name), e.SiteDir(o.Name)
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
	return append(env, o.Env...), nil
}

type stop struct{ error }

func (s stop) Unwrap() error { return s.error }

// Stop marks an error after which waiting is pointless.
func Stop(err error) error { return stop{err} }

// pollFirst and pollLast bound the pauses of Wait: most conditions hold at once, and asking is not free for those that
// do not, because the tool is a process.
const (
	pollFirst = 20 * time.Millisecond
	pollLast  = 300 * time.Millisecond
)

// Wait calls check until it succeeds, ctx ends, or check returns a Stop error. The last error says what was missing.
func Wait(ctx context.Context, what string, check func(context.Context) error) error {
	var last error
	for pause := pollFirst; ; pause = min(pause*3/2, pollLast) {
		err := check(ctx)
		if err == nil {
			return nil
		}
		if _, ok := errors.AsType[stop](err); ok {
			return fmt.Errorf("waiting for %s: %w", what, err)
		}
		if last == nil || ctx.Err() == nil {
			// What fails because time is up tells nothing.
			last = err
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("waited in vain for %s: %w", what, last)
		case <-t.C:
		}
	}
}

// Build compiles the shipped binaries into dir. With -race among the flags it needs a C compiler; without, it builds
// what is shipped: pure Go.
func Build(ctx context.Context, root, dir string, out io.Writer, flags ...string) error {
	args := append([]string{"build", "-o", dir + string(filepath.Separator)}, flags...)
	args = append(args, "./controlplane/cmd/certmeshd", "./agent/cmd/certmesh-agent", "./tui/cmd/certmesh")
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = root, out, out
	cgo := "CGO_ENABLED=0"
	if slices.Contains(flags, "-race") {
		cgo = "CGO_ENABLED=1"
	}
	cmd.Env = append(os.Environ(), cgo)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// Root is the folder of go.mod at or above the working directory.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("there is no go.mod at or above %s: run it inside the repository", dir)
		}
	}
}

// Pause waits for d, or until ctx ends: then false.
func Pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
