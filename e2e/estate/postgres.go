package estate

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
)

// Postgres is a PostgreSQL server of an estate's own, on a Unix socket.
type Postgres struct {
	// DSN is that of its database.
	DSN string
	// Socket is the path of the Unix socket.
	Socket string

	estate   *Estate
	bin, dir string
	as       *syscall.Credential
	durable  bool
	process  *Process
}

// StartPostgres runs a PostgreSQL of the estate's own on a Unix socket and returns the DSN of its database. It keeps its
// data through kills of certmeshd; being itself killed is not what is tried, so it does not wait for the disk.
func (e *Estate) StartPostgres(ctx context.Context) (dsn string, stop func(), err error) {
	p, err := e.NewPostgres(ctx, false)
	if err != nil {
		return "", nil, err
	}
	return p.DSN, p.Close, nil
}

// NewPostgres makes and starts a server; a durable one waits for the disk as in production, and may be crashed.
func (e *Estate) NewPostgres(ctx context.Context, durable bool) (*Postgres, error) {
	p := &Postgres{estate: e, durable: durable}
	var err error
	if p.bin, err = postgresPrograms(); err != nil {
		return nil, err
	}
	if p.as, err = postgresUser(); err != nil {
		return nil, err
	}
	// Not below the estate: a Unix socket's path has at most 107 bytes, and another user must reach it.
	if p.dir, err = os.MkdirTemp("", "cmpg"); err != nil {
		return nil, err
	}
	p.DSN, p.Socket = "postgres://postgres@/postgres?host="+url.QueryEscape(p.dir), filepath.Join(p.dir, ".s.PGSQL.5432")
	if err := p.create(ctx); err != nil {
		p.remove()
		return nil, err
	}
	if err := p.Start(ctx); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func (p *Postgres) remove() { _ = os.RemoveAll(p.dir) } // it lies in /tmp; what is left there is harmless

func (p *Postgres) data() string { return filepath.Join(p.dir, "data") }

func (p *Postgres) create(ctx context.Context) error {
	if p.as != nil {
		if err := os.Chown(p.dir, int(p.as.Uid), int(p.as.Gid)); err != nil {
			return err
		}
	}
	initdb := exec.CommandContext(ctx, filepath.Join(p.bin, "initdb"), "-D", p.data(), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
	initdb.Dir, initdb.SysProcAttr = p.dir, &syscall.SysProcAttr{Credential: p.as}
	if out, err := initdb.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, out)
	}
	return nil
}

// Start starts a server that does not run, and waits until it answers.
func (p *Postgres) Start(ctx context.Context) error {
	state := filepath.Join(p.data(), "postmaster.pid")
	if p.process != nil {
		// A crash leaves it behind, saying that the server is ready.
		if err := os.Remove(state); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	args := []string{"-D", p.data(), "-k", p.dir, "-c", "listen_addresses=", "-c", "shared_buffers=32MB", "-c", "max_connections=100"}
	if !p.durable {
		args = append(args, "-c", "fsync=off")
	}
	var err error
	if p.process, err = p.estate.start("postgres", filepath.Join(p.bin, "postgres"), nil, p.as, args...); err != nil {
		return err
	}
	return Wait(ctx, "PostgreSQL to answer", func(context.Context) error {
		select {
		case <-p.process.Exited():
			return Stop(fmt.Errorf("postgres ended:\n%s", p.process.Tail(20)))
		default:
		}
		// Its last line says how far the server is; it listens long before it answers.
		text, err := os.ReadFile(state)
		if err == nil && !strings.HasSuffix(strings.TrimSpace(string(text)), "ready") {
			err = errors.New("it is starting")
		}
		return err
	})
}

// Crash kills the server and all its backends with SIGKILL. What was committed must be there after Start, for which the
// server must be durable.
func (p *Postgres) Crash() error {
	if !p.durable {
		return errors.New("this PostgreSQL does not wait for the disk: what it loses by a crash proves nothing")
	}
	// The server first: it starts no more backends.
	if err := p.process.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	children, err := p.process.children()
	if err != nil {
		return err
	}
	for _, pid := range children {
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended meanwhile
	}
	p.process.Kill()
	return nil
}

// Signal reaches the server and its backends, each of which is in a process group of its own.
func (p *Postgres) Signal(s syscall.Signal) error {
	// The server first: it starts no more backends.
	if err := p.process.Signal(s); err != nil {
		return err
	}
	children, err := p.process.children()
	if err != nil {
		return err
	}
	for _, pid := range children {
		_ = syscall.Kill(pid, s) // it may have ended meanwhile
	}
	return nil
}

// Close ends the server and removes its data.
func (p *Postgres) Close() {
	if p.process != nil {
		_ = p.process.Signal(syscall.SIGQUIT) // it may have ended; either way nothing of it is kept
		<-p.process.Exited()
	}
	p.remove()
}

func postgresPrograms() (string, error) {
	dirs, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil {
		return "", err
	}
	sort.Sort(sort.Reverse(sort.StringSlice(dirs)))
	if p, err := exec.LookPath("initdb"); err == nil {
		dirs = append([]string{filepath.Dir(p)}, dirs...)
	}
	for _, d := range dirs {
		_, noInit := os.Stat(filepath.Join(d, "initdb"))
		_, noServer := os.Stat(filepath.Join(d, "postgres"))
		if noInit == nil && noServer == nil {
			return d, nil
		}
	}
	return "", errors.New("PostgreSQL is not installed: apt-get install postgresql")
}

// postgresUser is who runs the server, which refuses to run as root; nil is ourselves.
func postgresUser() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err := strconv.ParseUint(u.Uid, 10, 32)
		if err != nil {
			return nil, err
		}
		gid, err := strconv.ParseUint(u.Gid, 10, 32)
		if err != nil {
			return nil, err
		}
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
	}
	return nil, errors.New("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")
}
