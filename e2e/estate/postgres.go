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

// StartPostgres runs a PostgreSQL of the estate's own on a Unix socket and returns the DSN of its database. It keeps its
// data through kills of certmeshd; being itself killed is not what is tried, so it does not wait for the disk.
func (e *Estate) StartPostgres(ctx context.Context) (dsn string, stop func(), err error) {
	bin, err := postgresPrograms()
	if err != nil {
		return "", nil, err
	}
	as, err := postgresUser()
	if err != nil {
		return "", nil, err
	}
	// Not below the estate: a Unix socket's path has at most 107 bytes, and another user must reach it.
	dir, err := os.MkdirTemp("", "cmpg")
	if err != nil {
		return "", nil, err
	}
	remove := func() { _ = os.RemoveAll(dir) } // it lies in /tmp; what is left there is harmless
	if as != nil {
		if err := os.Chown(dir, int(as.Uid), int(as.Gid)); err != nil {
			remove()
			return "", nil, err
		}
	}
	data := filepath.Join(dir, "data")
	initdb := exec.CommandContext(ctx, filepath.Join(bin, "initdb"), "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
	initdb.Dir, initdb.SysProcAttr = dir, &syscall.SysProcAttr{Credential: as}
	if out, err := initdb.CombinedOutput(); err != nil {
		remove()
		return "", nil, fmt.Errorf("initdb: %w\n%s", err, out)
	}
	p, err := e.start("postgres", filepath.Join(bin, "postgres"), nil, as, "-D", data, "-k", dir, "-c", "listen_addresses=",
		"-c", "fsync=off", "-c", "shared_buffers=32MB", "-c", "max_connections=100")
	if err != nil {
		remove()
		return "", nil, err
	}
	stop = func() {
		_ = p.Signal(syscall.SIGQUIT) // it may have ended; either way nothing of it is kept
		<-p.Exited()
		remove()
	}
	err = Wait(ctx, "PostgreSQL to answer", func(context.Context) error {
		select {
		case <-p.Exited():
			return Stop(fmt.Errorf("postgres ended:\n%s", p.Tail(20)))
		default:
		}
		// Its last line says how far the server is; it listens long before it answers.
		text, err := os.ReadFile(filepath.Join(data, "postmaster.pid"))
		if err == nil && !strings.HasSuffix(strings.TrimSpace(string(text)), "ready") {
			err = errors.New("it is starting")
		}
		return err
	})
	if err != nil {
		stop()
		return "", nil, err
	}
	return "postgres://postgres@/postgres?host=" + url.QueryEscape(dir), stop, nil
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
