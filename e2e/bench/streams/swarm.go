package streams

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// Swarm is a running agentswarm.
type Swarm struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	exited chan struct{}

	mu     sync.Mutex
	status SwarmStatus
	events map[string][]SwarmEvent
	wake   chan struct{}
}

// SwarmStatus is what agentswarm says of itself; see there.
type SwarmStatus struct {
	Healthy      int   `json:"healthy"`
	Joined       int64 `json:"joined"`
	Connected    int64 `json:"connected"`
	Failed       int64 `json:"failed"`
	Bad          int64 `json:"bad"`
	AllConnected int64 `json:"all_connected_us"`
	LastLost     int64 `json:"last_lost_us"`
	RSS          int64 `json:"rss_bytes"`
}

// SwarmEvent is anything else it says.
type SwarmEvent struct {
	Event          string           `json:"event"`
	Name           string           `json:"name"`
	Error          string           `json:"error"`
	Agents         int64            `json:"agents"`
	MS             int64            `json:"ms"`
	CallsMS        int64            `json:"calls_ms"`
	Acknowledged   int64            `json:"acknowledged"`
	AcknowledgedMS int64            `json:"acknowledged_ms"`
	Done           int64            `json:"done"`
	DoneMS         int64            `json:"done_ms"`
	Notes          map[string]int64 `json:"notes"`
}

func StartSwarm(ctx context.Context, bin, dir string, args ...string) (*Swarm, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "agentswarm"), append([]string{"--json", "--every", "100ms"}, args...)...)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &Swarm{cmd: cmd, in: in, exited: make(chan struct{}), events: map[string][]SwarmEvent{}, wake: make(chan struct{}, 1)}
	go func() {
		s.read(out)
		_ = cmd.Wait() // how it ended is in its output
		close(s.exited)
	}()
	return s, nil
}

// PID is its process id.
func (s *Swarm) PID() int { return s.cmd.Process.Pid }

func (s *Swarm) read(out io.Reader) {
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var e SwarmEvent
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			continue
		}
		s.mu.Lock()
		if e.Event == "status" {
			_ = json.Unmarshal(lines.Bytes(), &s.status) // it was decoded a moment ago
		} else {
			s.events[e.Event] = append(s.events[e.Event], e)
		}
		s.mu.Unlock()
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

func (s *Swarm) now() SwarmStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

// Wait returns once holds says so of the newest status, or says what was missing.
func (s *Swarm) Wait(ctx context.Context, what string, holds func(SwarmStatus) bool) (SwarmStatus, error) {
	for {
		st := s.now()
		if holds(st) {
			return st, nil
		}
		select {
		case <-s.wake:
		case <-s.exited:
			return st, fmt.Errorf("agentswarm ended while it was waited for %s", what)
		case <-ctx.Done():
			return st, fmt.Errorf("waited in vain for %s: %+v", what, st)
		}
	}
}

// Tell has the swarm carry out a command and returns its outcome.
func (s *Swarm) Tell(ctx context.Context, line string) (SwarmEvent, error) {
	s.mu.Lock()
	had := len(s.events["command"])
	s.mu.Unlock()
	if _, err := io.WriteString(s.in, line+"\n"); err != nil {
		return SwarmEvent{}, err
	}
	var e SwarmEvent
	_, err := s.Wait(ctx, line, func(SwarmStatus) bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		if all := s.events["command"]; len(all) > had {
			e = all[had]
			return true
		}
		return false
	})
	if err == nil && e.Error != "" {
		err = errors.New(line + ": " + e.Error)
	}
	return e, err
}

// Stop ends the swarm and returns what its agents noted.
func (s *Swarm) Stop(patience time.Duration) map[string]int64 {
	_ = s.cmd.Process.Signal(syscall.SIGTERM) // it may have ended already
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-s.exited:
	case <-t.C:
		_ = s.cmd.Process.Kill()
		<-s.exited
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if all := s.events["ended"]; len(all) > 0 {
		return all[len(all)-1].Notes
	}
	return nil
}
