package estate

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Process is a child with its output in a file.
type Process struct {
	Name    string
	LogPath string
	cmd     *exec.Cmd
	exited  chan struct{}
	err     error
}

// Start runs a binary of the estate (or an absolute path) with its output appended to <dir>/<name>.log.
func (e *Estate) Start(name, bin string, env []string, args ...string) (*Process, error) {
	return e.start(name, bin, env, nil, args...)
}

func (e *Estate) start(name, bin string, env []string, as *syscall.Credential, args ...string) (*Process, error) {
	if !filepath.IsAbs(bin) {
		bin = filepath.Join(e.cfg.Bin, bin)
	}
	logPath := e.Path(name + ".log")
	out, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = out.Close() }() // the child has its own
	cmd := exec.Command(bin, args...)
	cmd.Dir = e.cfg.Dir
	if as != nil {
		cmd.Dir = "/" // the estate's directory is ours alone
	}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = append(append(baseEnv(), e.cfg.Env...), env...)
	// A group of its own keeps a terminal's Ctrl-C from it, so that children stop in the order we choose; and it must not
	// outlive whoever started it, however that one ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true, Credential: as}
	p := &Process{Name: name, LogPath: logPath, cmd: cmd, exited: make(chan struct{})}
	started := make(chan error)
	go func() {
		// The kernel sends the signal when the thread that started the child is gone, not the process.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			close(p.exited)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
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

// ExitCode is the exit status of an ended process, -1 if a signal ended it.
func (p *Process) ExitCode() int {
	<-p.exited
	return p.cmd.ProcessState.ExitCode()
}

// Kill sends SIGKILL to the process and what it started, and waits.
func (p *Process) Kill() {
	select {
	case <-p.exited:
		return
	default:
	}
	_ = syscall.Kill(-p.PID(), syscall.SIGKILL) // it may have ended already
	<-p.exited
}

// Stop sends SIGTERM and waits at most patience, then kills. An error is how the process ended, or that it did not.
func (p *Process) Stop(patience time.Duration) error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended already
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-p.exited:
		return p.err
	case <-t.C:
		p.Kill()
		return fmt.Errorf("%s did not stop within %s of SIGTERM", p.Name, patience)
	}
}

// children are the ids of the processes that this one has started and that still live.
func (p *Process) children() ([]int, error) {
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.PID()))
	if err != nil {
		return nil, err
	}
	var all []int
	for _, list := range lists {
		text, err := os.ReadFile(list)
		if err != nil {
			return nil, err
		}
		for child := range strings.FieldsSeq(string(text)) {
			pid, err := strconv.Atoi(child)
			if err != nil {
				return nil, err
			}
			all = append(all, pid)
		}
	}
	return all, nil
}

// Running reports whether the process lives.
func (p *Process) Running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// Signal sends s.
func (p *Process) Signal(s os.Signal) error { return p.cmd.Process.Signal(s) }

// Log is all that the processes of this name have printed so far.
func (p *Process) Log() string {
	b, err := os.ReadFile(p.LogPath)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// Tail returns the end of the process's output.
func (p *Process) Tail(lines int) string {
	all := strings.Split(strings.TrimRight(p.Log(), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
