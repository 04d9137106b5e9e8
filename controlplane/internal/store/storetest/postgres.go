package storetest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"sort"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/store"
)

// server is the PostgreSQL of this test binary.
var server struct {
	sync.Mutex
	base     string // URL of the database "postgres"
	err      error
	template bool
	free     []string // emptied databases
	foreign  []string // names of databases on a server that is not ours
	dir      string
	process  *os.Process
	done     chan struct{}
}

// template is the database of which the others are copies; its name is this process's own, because a server that was
// named by CERTMESH_TEST_POSTGRES is shared.
var template = "certmesh_template_" + strconv.Itoa(os.Getpid())

// Main runs the tests and stops what they started.
func Main(m *testing.M) {
	code := m.Run()
	stopCockroach()
	//nolint:forbidigo // the tests' contexts have ended
	if err := stopPostgres(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "storetest:", err)
		code = max(code, 1)
	}
	os.Exit(code) //nolint:forbidigo // it is the main of test binaries
}

func newPostgres(t testing.TB) string {
	t.Helper()
	server.Lock()
	defer server.Unlock()
	if server.base == "" && server.err == nil {
		server.base, server.err = startPostgres(t.Context())
	}
	if server.err != nil {
		t.Fatalf("no PostgreSQL to test on: %v; install postgresql or set CERTMESH_TEST_POSTGRES", server.err)
	}
	if !server.template {
		makeTemplate(t)
		server.template = true
	}
	// Making and dropping a database costs 250 ms, emptying one 10: they are used again.
	var dsn string
	if n := len(server.free); n > 0 {
		dsn, server.free = server.free[n-1], server.free[:n-1]
	} else {
		var name string
		dsn, name = newDatabase(t, server.base, template)
		if server.process == nil {
			server.foreign = append(server.foreign, name)
		}
	}
	t.Cleanup(func() {
		if err := empty(context.WithoutCancel(t.Context()), dsn); err != nil {
			t.Errorf("the database cannot be used again: %v", err)
			return
		}
		server.Lock()
		defer server.Unlock()
		server.free = append(server.free, dsn)
	})
	return dsn
}

// empty deletes all rows but those that say what was migrated.
func empty(ctx context.Context, dsn string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	db, err := sql.Open("pgx", dsn)
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }()
	var tables string
	err = db.QueryRowContext(ctx, "SELECT string_agg(tablename, ', ') FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'schema_migration'").Scan(&tables)
	if err == nil {
		_, err = db.ExecContext(ctx, "TRUNCATE "+tables)
	}
	return err
}

// makeTemplate makes the database with the migrated schema of which each test gets a copy.
func makeTemplate(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := administer(ctx, server.base, "CREATE DATABASE "+template); err != nil {
		t.Fatal(err)
	}
	if server.process == nil {
		server.foreign = append(server.foreign, template)
	}
	u, err := url.Parse(server.base)
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/" + template
	s, err := store.Open(ctx, store.Config{DSN: u.String(), Observe: observe})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Migrate(ctx), s.Close()); err != nil {
		t.Fatal(err)
	}
}

func programs() (string, error) {
	dirs, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil {
		return "", err
	}
	sort.Sort(sort.Reverse(sort.StringSlice(dirs)))
	if p, err := exec.LookPath("initdb"); err == nil {
		dirs = append([]string{filepath.Dir(p)}, dirs...)
	}
	for _, d := range dirs {
		if _, err := os.Stat(filepath.Join(d, "initdb")); err != nil {
			continue
		}
		if _, err := os.Stat(filepath.Join(d, "postgres")); err == nil {
			return d, nil
		}
	}
	return "", errors.New("initdb and postgres are neither in PATH nor in /usr/lib/postgresql/*/bin")
}

// credential is the user for the server, which refuses to run as root.
func credential() (*syscall.Credential, error) {
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

func startPostgres(ctx context.Context) (string, error) {
	if base := os.Getenv("CERTMESH_TEST_POSTGRES"); base != "" {
		return base, nil
	}
	bin, err := programs()
	if err != nil {
		return "", err
	}
	cred, err := credential()
	if err != nil {
		return "", err
	}
	// Not in the test's folder: a Unix socket's path has at most 107 bytes.
	if server.dir, err = os.MkdirTemp("", "cmpg"); err != nil {
		return "", err
	}
	if cred != nil {
		if err := os.Chown(server.dir, int(cred.Uid), int(cred.Gid)); err != nil {
			return "", err
		}
	}
	data := filepath.Join(server.dir, "data")
	initdb := exec.CommandContext(ctx, filepath.Join(bin, "initdb"), "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
	initdb.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	initdb.Dir = server.dir
	if out, err := initdb.CombinedOutput(); err != nil {
		return "", fmt.Errorf("initdb: %w\n%s", err, out)
	}
	log, err := os.Create(filepath.Join(server.dir, "log"))
	if err != nil {
		return "", err
	}
	// It serves the tests after this one too.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), filepath.Join(bin, "postgres"), "-D", data, "-k", server.dir, "-c", "listen_addresses=",
		"-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off", "-c", "max_connections=300",
		"-c", "shared_buffers=64MB", "-c", "autovacuum=off", "-c", "wal_level=minimal", "-c", "max_wal_senders=0")
	cmd.Dir = server.dir
	cmd.Stdout, cmd.Stderr = log, log
	// The server ends with this process, however that ends: the kernel signals it when its parent thread is gone.
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred, Pdeathsig: syscall.SIGQUIT, Setpgid: true}
	started := make(chan error)
	server.done = make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer close(server.done)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return "", err
	}
	server.process = cmd.Process
	base := "postgres://postgres@/postgres?host=" + url.QueryEscape(server.dir)
	if err := answers(ctx, base); err != nil {
		text, _ := os.ReadFile(log.Name())
		return "", fmt.Errorf("%w\n%s", err, text)
	}
	return base, nil
}

// answers waits until the server does.
func answers(ctx context.Context, base string) error {
	db, err := sql.Open("pgx", base)
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(30 * time.Second)
	for {
		if err = db.PingContext(ctx); err == nil {
			return nil
		}
		select {
		case <-server.done:
			return errors.New("postgres ended at once")
		case <-deadline:
			return fmt.Errorf("postgres does not answer: %w", err)
		case <-tick.C:
		}
	}
}

func stopPostgres(ctx context.Context) error {
	server.Lock()
	defer server.Unlock()
	for _, name := range server.foreign {
		if err := dropDatabase(ctx, server.base, name); err != nil {
			return err
		}
	}
	if server.process == nil {
		if server.dir != "" {
			return os.RemoveAll(server.dir)
		}
		return nil
	}
	if err := server.process.Signal(syscall.SIGQUIT); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-server.done:
	case <-time.After(20 * time.Second):
		return errors.New("postgres does not stop")
	}
	return os.RemoveAll(server.dir)
}
