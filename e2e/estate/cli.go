package estate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// CLIEnv is the environment under which `certmesh` talks to this estate.
func (e *Estate) CLIEnv() []string {
	return []string{"CERTMESH_CONFIG=" + e.Path(e.node, "client.yaml")}
}

// CLIError is a command that failed.
type CLIError struct {
	Program string
	Args    []string
	Code    int
	Stderr  string
}

func (c *CLIError) Error() string {
	return fmt.Sprintf("%s %s: exit %d: %s", c.Program, strings.Join(c.Args, " "), c.Code, strings.TrimSpace(c.Stderr))
}

// Run runs one of the estate's binaries to its end with env added, and returns its standard output. A status other than 0
// is a *CLIError.
func (e *Estate) Run(ctx context.Context, bin string, env []string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(e.cfg.Bin, bin), args...)
	cmd.Env = append(append(baseEnv(), e.cfg.Env...), env...)
	cmd.Dir = e.cfg.Dir
	cmd.WaitDelay = time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			return stdout.Bytes(), &CLIError{Program: bin, Args: args, Code: exit.ExitCode(), Stderr: stderr.String()}
		}
		return stdout.Bytes(), fmt.Errorf("%s: %w", bin, err)
	}
	return stdout.Bytes(), nil
}

// CLI runs `certmesh args…` and returns its standard output.
func (e *Estate) CLI(ctx context.Context, args ...string) ([]byte, error) {
	return e.Run(ctx, "certmesh", e.CLIEnv(), args...)
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

// Token makes a join token; args are flags of `certmesh agents token create`.
func (e *Estate) Token(ctx context.Context, args ...string) (string, error) {
	b, err := e.CLI(ctx, append([]string{"agents", "token", "create"}, args...)...)
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(b))
	if token == "" || strings.ContainsAny(token, " \n") {
		return "", fmt.Errorf("certmesh agents token create printed %q instead of the token alone", token)
	}
	return token, nil
}

// Join makes a token, starts the agent that o describes and waits until it is online.
func (e *Estate) Join(ctx context.Context, o AgentOptions) (*Process, Agent, error) {
	token, err := e.Token(ctx)
	if err != nil {
		return nil, Agent{}, err
	}
	o.Token = token
	p, err := e.StartAgent(o)
	if err != nil {
		return nil, Agent{}, err
	}
	a, err := e.WaitAgent(ctx, p, o.Name, "Online")
	return p, a, err
}

// WaitAgent waits until the agent called name is in state; p, if given, must not end meanwhile.
func (e *Estate) WaitAgent(ctx context.Context, p *Process, name, state string) (Agent, error) {
	var a Agent
	err := Wait(ctx, "agent "+name+" to be "+state, func(ctx context.Context) error {
		if p != nil {
			select {
			case <-p.Exited():
				return Stop(fmt.Errorf("%s ended:\n%s", p.Name, p.Tail(20)))
			default:
			}
		}
		if err := e.JSON(ctx, &a, "agents", "get", name); err != nil {
			return err
		}
		if a.State != state {
			return fmt.Errorf("it is %s", a.State)
		}
		return nil
	})
	return a, err
}

// Certificate is `certs get`.
func (e *Estate) Certificate(ctx context.Context, name string) (Certificate, error) {
	var c Certificate
	err := e.JSON(ctx, &c, "certs", "get", name)
	return c, err
}

// Certificates is `certs list`, all pages; args are its flags.
func (e *Estate) Certificates(ctx context.Context, args ...string) ([]Certificate, error) {
	var out []Certificate
	err := e.pages(ctx, append([]string{"certs", "list"}, args...), func(b []byte) (string, error) {
		var l certificateList
		err := json.Unmarshal(b, &l)
		out = append(out, l.Certificates...)
		return l.NextCursor, err
	})
	return out, err
}

// Versions is `certs versions`, all pages.
func (e *Estate) Versions(ctx context.Context, name string) ([]Version, error) {
	var out []Version
	err := e.pages(ctx, []string{"certs", "versions", name}, func(b []byte) (string, error) {
		var l versionList
		err := json.Unmarshal(b, &l)
		out = append(out, l.Versions...)
		return l.NextCursor, err
	})
	return out, err
}

// Jobs is `jobs list`, all pages; args are its flags.
func (e *Estate) Jobs(ctx context.Context, args ...string) ([]Job, error) {
	var out []Job
	err := e.pages(ctx, append([]string{"jobs", "list"}, args...), func(b []byte) (string, error) {
		var l jobList
		err := json.Unmarshal(b, &l)
		out = append(out, l.Jobs...)
		return l.NextCursor, err
	})
	return out, err
}

// Audit is `audit list`, all pages; args are its flags.
func (e *Estate) Audit(ctx context.Context, args ...string) ([]AuditEvent, error) {
	var out []AuditEvent
	err := e.pages(ctx, append([]string{"audit", "list"}, args...), func(b []byte) (string, error) {
		var l eventList
		err := json.Unmarshal(b, &l)
		out = append(out, l.Events...)
		return l.NextCursor, err
	})
	return out, err
}

// pages runs a list until its last page.
func (e *Estate) pages(ctx context.Context, args []string, add func([]byte) (next string, err error)) error {
	args = append(args, "--format", "json", "--page-size", "200")
	page := args
	for {
		b, err := e.CLI(ctx, page...)
		if err != nil {
			return err
		}
		next, err := add(b)
		if err != nil {
			return fmt.Errorf("certmesh %s: %w in %s", strings.Join(page, " "), err, b)
		}
		if next == "" {
			return nil
		}
		page = append(slices.Clip(args), "--cursor", next)
	}
}
