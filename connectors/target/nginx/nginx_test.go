package nginx_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/connectors/target/nginx"
	"github.com/certmesh/certmesh/connectors/target/targettest"
	"github.com/certmesh/certmesh/protocol/fault"
)

const program = "/usr/sbin/nginx"

// server is a real nginx with a configuration, port and folder of its own.
type server struct {
	root, config string
	addresses    []string
	proc         *exec.Cmd
	out          bytes.Buffer
	waited       chan struct{}
}

// newServer writes a configuration with one TLS site per certificate and key file; it does not start it.
func newServer(t *testing.T, root string, pairs ...[2]string) *server {
	t.Helper()
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("these tests run a real nginx, and there is none at %s: apt-get install nginx", program)
	}
	s := &server{root: root, config: root + "/nginx.conf"}
	var sites strings.Builder
	for _, p := range pairs {
		s.addresses = append(s.addresses, freeAddress(t))
		fmt.Fprintf(&sites, "  server { listen %s ssl; ssl_certificate %s; ssl_certificate_key %s; location / { return 204; } }\n",
			s.addresses[len(s.addresses)-1], p[0], p[1])
	}
	s.write(t, s.config, fmt.Sprintf(`
daemon off;
worker_processes 1;
user root;
pid %[1]s/nginx.pid;
error_log %[1]s/error.log notice;
events { worker_connections 64; }
http {
  access_log off;
  client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/fastcgi;
  uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
  include %[1]s/extra.conf;
%[2]s}
`, root, sites.String()))
	s.write(t, root+"/extra.conf", "")
	return s
}

func (s *server) write(t *testing.T, path, text string) {
	t.Helper()
	if os.Geteuid() != 0 {
		// Only root may name the workers' user.
		text = strings.Replace(text, "user root;\n", "", 1)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// start runs nginx until the test ends.
func (s *server) start(t *testing.T) {
	t.Helper()
	s.proc = exec.Command(program, "-c", s.config)
	s.proc.Stdout, s.proc.Stderr = &s.out, &s.out
	s.proc.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.proc.Start(); err != nil {
		t.Fatal(err)
	}
	s.waited = make(chan struct{})
	go func() {
		defer close(s.waited)
		_ = s.proc.Wait() // the state says how it ended
	}()
	t.Cleanup(func() { s.stop(t) })
	deadline := time.Now().Add(10 * time.Second)
	for _, a := range s.addresses {
		for targettest.ServesNow(t, a) == 0 {
			select {
			case <-s.waited:
				t.Fatalf("nginx ended: %s\n%s", s.proc.ProcessState, s.out.String())
			case <-time.After(10 * time.Millisecond):
			}
			if time.Now().After(deadline) {
				t.Fatalf("nginx does not answer at %s\n%s", a, s.out.String())
			}
		}
	}
}

func (s *server) stop(t *testing.T) {
	_ = s.proc.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.waited:
	case <-time.After(10 * time.Second):
		// Its own group: master and workers.
		_ = syscall.Kill(-s.proc.Process.Pid, syscall.SIGKILL)
		<-s.waited
		t.Error("nginx had to be killed")
	}
	if t.Failed() {
		b, _ := os.ReadFile(s.root + "/error.log")
		t.Logf("nginx: %s%s", s.out.String(), b)
	}
}

func (s *server) reloads(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(s.root + "/error.log")
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(b, []byte("(SIGHUP) received"))
}

func settings(t testing.TB, config string, more map[string]any) json.RawMessage {
	t.Helper()
	m := map[string]any{"nginx_path": program, "config_path": config}
	maps.Copy(m, more)
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func env(t testing.TB, root string, settings json.RawMessage) target.Env {
	t.Helper()
	cs, err := nginx.CommandsFor(settings)
	if err != nil {
		t.Fatal(err)
	}
	return target.Env{Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC) },
		Roots: []string{root}, Commands: cs, BackupRetention: 3}
}

func read(cert, key string) func() ([]byte, []byte, error) {
	return func() ([]byte, []byte, error) {
		c, err := os.ReadFile(cert)
		if os.IsNotExist(err) {
			return nil, nil, nil
		}
		if err != nil {
			return nil, nil, err
		}
		if key == cert {
			return c, c, nil
		}
		k, err := os.ReadFile(key)
		return c, k, err
	}
}

func TestConformance(t *testing.T) {
	bad := map[string]json.RawMessage{
		"dir none":                  json.RawMessage(`{}`),
		"nginx_path relative":       json.RawMessage(`{"dir":"/a/b","nginx_path":"sbin/nginx"}`),
		"nginx_path shell":          json.RawMessage(`{"dir":"/a/b","nginx_path":"/bin/sh"}`),
		"nginx_path metacharacters": json.RawMessage(`{"dir":"/a/b","nginx_path":"/usr/sbin/nginx;reboot"}`),
		"config_path relative":      json.RawMessage(`{"dir":"/a/b","config_path":"nginx.conf"}`),
		"config_path substitution":  json.RawMessage(`{"dir":"/a/b","config_path":"/etc/$(reboot)"}`),
		"prefix dots":               json.RawMessage(`{"dir":"/a/b","prefix":"/etc/../root"}`),
		"verify_address port":       json.RawMessage(`{"dir":"/a/b","verify_address":"127.0.0.1:0"}`),
		"reload_command foreign":    json.RawMessage(`{"dir":"/a/b","reload_command":["true"]}`),
	}
	for _, l := range []struct {
		name        string
		files       func(root string) (settings map[string]any, cert, key string)
		unsupported []string
	}{
		{"versions", func(root string) (map[string]any, string, string) {
			return map[string]any{"dir": root + "/site"}, root + "/site/current/fullchain.pem", root + "/site/current/key.pem"
		}, []string{targettest.Atomic}},
		{"separate", func(root string) (map[string]any, string, string) {
			return map[string]any{"cert_path": root + "/c.pem", "key_path": root + "/k.pem", "chain_path": root + "/i.pem"}, root + "/c.pem", root + "/k.pem"
		}, []string{targettest.Atomic}},
		{"combined", func(root string) (map[string]any, string, string) {
			return map[string]any{"pem_path": root + "/p.pem"}, root + "/p.pem", root + "/p.pem"
		}, nil},
	} {
		t.Run(l.name, func(t *testing.T) {
			targettest.Run(t, targettest.Suite{Kind: nginx.Kind(), Bad: bad, Unsupported: l.unsupported, New: func(t *testing.T) targettest.Place {
				root := t.TempDir()
				files, cert, key := l.files(root)
				s := newServer(t, root, [2]string{cert, key})
				files["verify_address"], files["server_name"] = s.addresses[0], "site.example.test"
				doc := settings(t, s.config, files)
				return targettest.Place{Env: env(t, root, doc), Settings: doc, Start: s.start, Address: s.addresses[0], Read: read(cert, key)}
			}})
		})
	}
}

func open(t *testing.T, e target.Env, doc json.RawMessage) target.Target {
	t.Helper()
	tg, err := nginx.Kind().Open(t.Context(), e, doc)
	if err != nil {
		t.Fatal(err)
	}
	return tg
}

func commit(t *testing.T, tg target.Target, m target.Material) target.Receipt {
	t.Helper()
	st, err := tg.Stage(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	return st.Receipt()
}

func activate(t *testing.T, tg target.Target) error {
	t.Helper()
	a, ok := tg.(target.Activator)
	if !ok {
		t.Fatal("no Activator")
	}
	return a.Activate(t.Context())
}

// TestOneReload: what is committed together on one nginx is validated and reloaded once.
func TestOneReload(t *testing.T) {
	t.Parallel()
	ca := targettest.NewCA(t)
	root := t.TempDir()
	const n = 4
	var pairs [][2]string
	for i := range n {
		d := fmt.Sprintf("%s/site%d/current/", root, i)
		pairs = append(pairs, [2]string{d + "fullchain.pem", d + "key.pem"})
	}
	s := newServer(t, root, pairs...)
	var ts []target.Target
	for i := range n {
		doc := settings(t, s.config, map[string]any{"dir": fmt.Sprintf("%s/site%d", root, i), "verify_address": s.addresses[i]})
		ts = append(ts, open(t, env(t, root, doc), doc))
		commit(t, ts[i], ca.Material(t))
	}
	s.start(t)
	before := s.reloads(t)
	ms := make([]target.Material, n)
	receipts := make([]target.Receipt, n)
	for i := range n {
		ms[i] = ca.Material(t)
		receipts[i] = commit(t, ts[i], ms[i])
	}
	g := target.Group{
		Activate: ts[0].(target.Activator).Activate,
		Undo:     func(ctx context.Context, i int) error { return ts[i].Undo(ctx, receipts[i]) },
		Redo: func(ctx context.Context, i int) error {
			st, err := ts[i].Stage(ctx, ms[i])
			if err != nil {
				return err
			}
			receipts[i] = st.Receipt()
			return st.Commit(ctx)
		},
	}
	for i, err := range g.Settle(t.Context(), n) {
		if err != nil {
			t.Errorf("%d: %v", i, err)
		}
		targettest.ServedAt(t, s.addresses[i], ms[i].Leaf())
	}
	if got := s.reloads(t) - before; got != 1 {
		t.Errorf("%d reloads, want 1", got)
	}

	// One of the next four is refused: a file that nginx cannot use, though the pair was good.
	old := ms
	ms = make([]target.Material, n)
	for i := range n {
		ms[i] = ca.Material(t)
	}
	redo := g.Redo
	const culprit = 2
	g.Redo = func(ctx context.Context, i int) error {
		if err := redo(ctx, i); err != nil || i != culprit {
			return err
		}
		return os.WriteFile(pairs[i][0], []byte("not PEM"), 0o600)
	}
	for i := range n {
		if err := g.Redo(t.Context(), i); err != nil {
			t.Fatal(err)
		}
	}
	for i, err := range g.Settle(t.Context(), n) {
		want := ms[i]
		if i == culprit {
			want = old[i]
			if !fault.Is(err, fault.Rejected) || !strings.Contains(err.Error(), "site2") {
				t.Errorf("the culprit: %v", err)
			}
		} else if err != nil {
			t.Errorf("%d: %v", i, err)
		}
		targettest.ServedAt(t, s.addresses[i], want.Leaf())
		if cur, err := ts[i].Current(t.Context()); err != nil || cur.Leaf != want.Leaf() {
			t.Errorf("%d: %v, %v", i, cur, err)
		}
	}
}

// TestBadConfiguration: nginx -t's refusal is Rejected with a bounded, clean tail of its output, and nothing is
// reloaded; an nginx that is not there is not the certificate's fault.
func TestBadConfiguration(t *testing.T) {
	t.Parallel()
	ca := targettest.NewCA(t)
	root := t.TempDir()
	s := newServer(t, root, [2]string{root + "/p.pem", root + "/p.pem"})
	doc := settings(t, s.config, map[string]any{"pem_path": root + "/p.pem", "verify_address": s.addresses[0]})
	tg := open(t, env(t, root, doc), doc)
	first, second := ca.Material(t), ca.Material(t)
	commit(t, tg, first)
	if err := activate(t, tg); !fault.Is(err, fault.Retryable) || !strings.Contains(err.Error(), "check that it runs") {
		t.Errorf("an nginx that does not run: %v", err)
	}
	s.start(t)
	before := s.reloads(t)
	r := commit(t, tg, second)
	s.write(t, root+"/extra.conf", "\x1b[31mno_such_directive "+strings.Repeat("x", 500)+";\n")
	err := activate(t, tg)
	var out interface{ Output() string }
	if !fault.Is(err, fault.Rejected) || !errors.As(err, &out) {
		t.Fatalf("a bad configuration: %v", err)
	}
	if o := out.Output(); o == "" || len(o) > 4<<10 || strings.ContainsAny(o, "\x1b\x00\r") || !strings.Contains(o, "test failed") {
		t.Errorf("output: %q", o)
	}
	if !strings.Contains(target.Sentence(err), "nginx refuses its configuration") {
		t.Errorf("the sentence: %q", target.Sentence(err))
	}
	if err := tg.Undo(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	s.write(t, root+"/extra.conf", "")
	if got := s.reloads(t); got != before {
		t.Errorf("%d reloads", got-before)
	}
	if got := targettest.ServesNow(t, s.addresses[0]); got != first.Chain[0].SerialNumber.Int64() {
		t.Errorf("serial %d is served", got)
	}
}

// TestCommandsAreAllowedExactly: nothing runs that the host does not allow, element by element.
func TestCommandsAreAllowedExactly(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	doc := settings(t, root+"/nginx.conf", map[string]any{"dir": root + "/site", "prefix": root})
	good := env(t, root, doc)
	want := fmt.Sprintf(`[[%q,"-t","-c",%q,"-p",%q] [%q,"-s","reload","-c",%q,"-p",%q]]`, program, root+"/nginx.conf", root, program, root+"/nginx.conf", root)
	if got := fmt.Sprint(good.Commands); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	for name, cs := range map[string][]target.Command{
		"none": nil, "validation alone": good.Commands[:1], "reload alone": good.Commands[1:],
		"a prefix":       {good.Commands[0][:4], good.Commands[1][:5]},
		"one word more":  {append(slices.Clip(good.Commands[0]), "-q"), good.Commands[1]},
		"one joined":     {{strings.Join(good.Commands[0], " ")}, good.Commands[1]},
		"another binary": {append(target.Command{"/usr/local/sbin/nginx"}, good.Commands[0][1:]...), good.Commands[1]},
	} {
		e := good
		e.Commands = cs
		_, err := nginx.Kind().Open(t.Context(), e, doc)
		if !fault.Is(err, fault.Forbidden) || !strings.Contains(err.Error(), "CERTMESH_ALLOW_COMMANDS") || !strings.Contains(err.Error(), `"-c"`) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := nginx.CommandsFor(json.RawMessage(`{"dir":1}`)); !fault.Is(err, fault.Invalid) {
		t.Error(err)
	}
	cs, err := nginx.CommandsFor(json.RawMessage(`{"dir":"/etc/nginx/tls/site"}`))
	if err != nil || fmt.Sprint(cs) != `[["nginx","-t","-c","/etc/nginx/nginx.conf"] ["nginx","-s","reload","-c","/etc/nginx/nginx.conf"]]` {
		t.Errorf("%v, %v", cs, err)
	}
}
