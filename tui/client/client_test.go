package client_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jonboulle/clockwork"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
	"github.com/certmesh/certmesh/tui/client"
	"github.com/certmesh/certmesh/tui/operatortest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func config(s *operatortest.Server) client.Config {
	return client.Config{
		Server: s.Address, Key: operatortest.Key, CA: s.CA, Timeout: 20 * time.Second, Version: "v",
		Now: func() time.Time { return operatortest.Now },
	}
}

func connect(t *testing.T, cfg client.Config) *client.Client {
	t.Helper()
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func ask(t *testing.T, c *client.Client) error {
	_, err := c.System.GetStatus(t.Context(), &operatorpb.GetStatusRequest{})
	return err
}

func TestErrorsAreOneLineWithANextStep(t *testing.T) {
	t.Parallel()
	s := operatortest.Start(t)
	c := connect(t, config(s))
	with := func(code codes.Code, message string, next string, retry time.Duration) *status.Status {
		st, err := status.New(code, message).WithDetails(
			&errdetails.ErrorInfo{Domain: "certmesh", Metadata: map[string]string{"next": next}}, &errdetails.RetryInfo{RetryDelay: durationpb.New(retry)})
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	for want, st := range map[string]*status.Status{
		"name: is taken; choose another name":                             with(codes.Aborted, "name: is taken; choose another name", "read the resource again, then decide", 0),
		"no such thing; look at the list":                                 with(codes.NotFound, "no such thing", "look at the list", 0),
		"too fast; try again in 12s":                                      with(codes.ResourceExhausted, "too fast", "try again after the time given", 12*time.Second),
		"plain; compare the versions of certmesh and certmeshd":           status.New(codes.Unimplemented, "plain"),
		"who are you; log in with certmesh login or set CERTMESH_API_KEY": status.New(codes.Unauthenticated, "who are you"),
	} {
		s.FailWith("GetStatus", st)
		err := ask(t, c)
		if err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
		if client.Code(err) != st.Code() {
			t.Errorf("%s: code %s, want %s", want, client.Code(err), st.Code())
		}
	}
}

// TestOnlyReadsAreRepeated: whether a change was carried out before the connection broke is not known.
func TestOnlyReadsAreRepeated(t *testing.T) {
	t.Parallel()
	s := operatortest.Start(t)
	c := connect(t, config(s))
	s.Fail("GetStatus", codes.Unavailable, "away", "")
	if err := ask(t, c); err != nil {
		t.Errorf("a read is not repeated: %v", err)
	}
	s.Fail("RevokeCertificate", codes.Unavailable, "away", "")
	if _, err := c.Certificates.RevokeCertificate(t.Context(), &operatorpb.RevokeCertificateRequest{Id: "web"}); client.Code(err) != codes.Unavailable {
		t.Errorf("got %v", err)
	}
	if got := len(s.Calls("RevokeCertificate")); got != 1 {
		t.Errorf("a change was sent %d times", got)
	}
}

// TestEveryReadIsRepeated holds the retry policy to the protocol: a new read must be added to it.
func TestEveryReadIsRepeated(t *testing.T) {
	t.Parallel()
	for _, svc := range []string{"CertificatesService", "AgentsService", "JobsService", "IssuersService", "TargetsService", "SystemService"} {
		d := operatorpb.File_operator_v1_operator_proto.Services()
		for i := range d.Len() {
			if string(d.Get(i).Name()) != svc {
				continue
			}
			for j := range d.Get(i).Methods().Len() {
				m := d.Get(i).Methods().Get(j)
				name := string(m.Name())
				read := (strings.HasPrefix(name, "Get") || strings.HasPrefix(name, "List") || strings.HasPrefix(name, "Explain")) && !m.IsStreamingServer()
				listed := strings.Contains(client.ServiceConfig, fmt.Sprintf(`{"service": %q, "method": %q}`, d.Get(i).FullName(), name))
				if read != listed {
					t.Errorf("%s: a read is %v, repeated is %v", m.FullName(), read, listed)
				}
			}
		}
	}
}

func TestUntrustedServers(t *testing.T) {
	t.Parallel()
	s, other := operatortest.Start(t), operatortest.Start(t)
	plain, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			conn, err := plain.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("SSH-2.0-OpenSSH_9.2p1\r\n"))
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() { _ = plain.Close(); <-served })
	for _, c := range []struct {
		name string
		edit func(*client.Config)
		want string
	}{
		{"another CA", func(c *client.Config) { c.CA = other.CA }, "is not of the CA that the profile trusts: its chain ends in " + client.Fingerprint(s.Root)},
		{"another name", func(c *client.Config) { c.Server = strings.Replace(c.Server, "127.0.0.1", "localhost", 1) }, "is for mesh.test, 127.0.0.1, not for localhost"},
		{"expired", func(c *client.Config) { c.Now = func() time.Time { return operatortest.Now.AddDate(1, 0, 0) } }, "check the clocks"},
		{"no TLS", func(c *client.Config) { c.Server = plain.Addr().String() }, "does not speak TLS"},
		{"nobody", func(c *client.Config) { c.Server = "127.0.0.1:1" }, "nothing listens at 127.0.0.1:1"},
		{"no such host", func(c *client.Config) { c.Server = "nowhere.invalid:8442" }, "nowhere.invalid"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cfg := config(s)
			c.edit(&cfg)
			err := ask(t, connect(t, cfg))
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "; ") || strings.Contains(err.Error(), operatortest.Key) {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
	t.Cleanup(func() {
		if got := len(s.Calls("GetStatus")); got != 0 {
			t.Errorf("%d calls, with the key, reached a server that was not trusted", got)
		}
	})
}

func TestPin(t *testing.T) {
	t.Parallel()
	s := operatortest.Start(t)
	chain, err := client.Presented(t.Context(), s.Address)
	if err != nil || len(chain) != 2 {
		t.Fatalf("presented %d certificates, %v", len(chain), err)
	}
	root := client.Fingerprint(s.Root)
	if ca, err := client.Pin(s.Address, chain, root, operatortest.Now); err != nil || !ca.Equal(s.Root) {
		t.Errorf("the right pin: %v", err)
	}
	for name, f := range map[string]func() ([]*x509.Certificate, string, string){
		"another fingerprint": func() ([]*x509.Certificate, string, string) { return chain, strings.Repeat("0", 64), s.Address },
		"the leaf pinned as if it were CA": func() ([]*x509.Certificate, string, string) {
			return chain[:1], client.Fingerprint(chain[0]), s.Address
		},
		"the leaf's fingerprint": func() ([]*x509.Certificate, string, string) { return chain, client.Fingerprint(chain[0]), s.Address },
		"a stranger's leaf with our root": func() ([]*x509.Certificate, string, string) {
			stranger := operatortest.Start(t)
			theirs, err := client.Presented(t.Context(), stranger.Address)
			if err != nil {
				t.Fatal(err)
			}
			return []*x509.Certificate{theirs[0], s.Root}, root, stranger.Address
		},
		"another name": func() ([]*x509.Certificate, string, string) { return chain, root, "localhost:1" },
	} {
		c, fp, address := f()
		if _, err := client.Pin(address, c, fp, operatortest.Now); err == nil || !strings.Contains(err.Error(), "; ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := client.Presented(ctx, s.Address); err == nil {
		t.Error("a cancelled look succeeded")
	}
}

func TestAddress(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"mesh.test:9000": "mesh.test:9000", "mesh.test": "mesh.test:8442", "https://mesh.test:9000/": "mesh.test:9000", "10.0.0.1": "10.0.0.1:8442", "[::1]:9000": "[::1]:9000",
		"::1": "[::1]:8442", "[::1]": "[::1]:8442",
	} {
		if got, err := client.Address(in); err != nil || got != want {
			t.Errorf("Address(%q) = %q, %v, want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"", ":9000", "http://mesh.test:1", "mesh.test:0", "mesh.test:99999", "mesh.test:what", "a b:1", "a@b:1", "mesh.test/x", "a:b:c"} {
		if got, err := client.Address(in); err == nil {
			t.Errorf("Address(%q) = %q", in, got)
		}
	}
}

func TestParseFingerprint(t *testing.T) {
	t.Parallel()
	want := strings.Repeat("ab", 32)
	for _, in := range []string{want, strings.ToUpper(want), strings.TrimSuffix(strings.Repeat("AB:", 32), ":"), "SHA256:" + want, "sha256 Fingerprint=" + want} {
		if got, err := client.ParseFingerprint(in); err != nil || got != want {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "ab", want + "ab", strings.Repeat("zz", 32), want[:62]} {
		if _, err := client.ParseFingerprint(in); err == nil {
			t.Errorf("%q is taken", in)
		}
	}
}

func TestProfile(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "a", "b")
	path := filepath.Join(dir, "client.yaml")
	p := client.Profile{ServerURL: "h:1", APIKey: "secret", CACertificate: "pem\nlines\n"}
	for range 2 { // the second replaces the first
		if err := p.Save(path); err != nil {
			t.Fatal(err)
		}
	}
	got, err := client.LoadProfile(path)
	if err != nil || got != p {
		t.Errorf("%v, %v", got, err)
	}
	for name, want := range map[string]fs.FileMode{path: 0o600, dir: 0o700 | fs.ModeDir, filepath.Dir(dir): 0o700 | fs.ModeDir} {
		if info, err := os.Stat(name); err != nil || info.Mode() != want {
			t.Errorf("%s: mode %v, %v", name, info.Mode(), err)
		}
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 1 {
		t.Errorf("leftovers: %v, %v", files, err)
	}
	for _, mode := range []fs.FileMode{0o640, 0o604, 0o620, 0o610, 0o700, 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := client.LoadProfile(path); err == nil || !strings.Contains(err.Error(), "chmod 600 ") {
			t.Errorf("mode %04o: %v", mode, err)
		}
	}
	if _, err := client.LoadProfile(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	if _, err := client.LoadProfile(dir); err == nil {
		t.Error("a directory is a profile")
	}
	if err := p.Save(filepath.Join(path, "below", "a file")); err == nil {
		t.Error("saved below a file")
	}
}

func TestKeyDoesNotPrint(t *testing.T) {
	t.Parallel()
	cfg := client.Config{Key: "topsecret"}
	p := client.Profile{APIKey: "topsecret"}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if s := fmt.Sprintf(verb+verb, cfg, p); strings.Contains(s, "topsecret") {
			t.Errorf("%s shows the key: %s", verb, s)
		}
	}
	for _, bad := range []client.Key{"", "two words", "line\nbreak", "ümlaut", client.Key(strings.Repeat("x", 2000))} {
		if err := bad.Check(); err == nil || bad != "" && strings.Contains(err.Error(), string(bad)) {
			t.Errorf("%q: %v", string(bad), err)
		}
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	s := operatortest.Start(t)
	c := connect(t, config(s))
	ctx, cancel := context.WithCancel(t.Context())
	feed := c.Watch(ctx, clockwork.NewRealClock(), []string{"certificates"}, "cert_1")
	wait := func(what string) bool {
		t.Helper()
		select {
		case _, open := <-feed.C:
			return open
		case <-time.After(20 * time.Second):
			t.Fatalf("no %s", what)
			return false
		}
	}
	if !wait("first value") || feed.Lost() != nil {
		t.Fatalf("ended: %v", feed.Err())
	}
	s.Change(func(*operatortest.Data) {})
	if !wait("value after a change") {
		t.Fatalf("ended: %v", feed.Err())
	}
	req, ok := s.Calls("Watch")[0].(*operatorpb.WatchRequest)
	if !ok || req.GetId() != "cert_1" || len(req.GetKinds()) != 1 {
		t.Errorf("asked %v", req)
	}
	// The server goes away: the feed tells, and ends with its context only.
	s.Stop()
	if !wait("value after the loss") || feed.Lost() == nil {
		t.Errorf("lost: %v, err: %v", feed.Lost(), feed.Err())
	}
	cancel()
	for range feed.C { // until it is closed
	}
	if feed.Err() != nil {
		t.Errorf("ended with %v", feed.Err())
	}
}
