package badinput

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/e2e/estate"
	"github.com/certmesh/certmesh/e2e/estate/estatetest"
)

func TestMain(m *testing.M) { estatetest.Main(m) }

// bench is what the tests share.
type bench struct {
	*estatetest.Lab
	host estate.Agent
	ca   estate.Issuer
	// allowed is a command that the agent may run; it makes the file ran.
	allowed []string
	ran     string
}

func (b *bench) with(t *testing.T) *bench {
	t.Parallel()
	c := *b
	c.Lab = b.With(t)
	return &c
}

// settings of the control plane that keep waiting short: nothing here is about how long it is.
func brisk() []string {
	return []string{"CERTMESH_VERIFY_TIMEOUT=3s", "CERTMESH_SCHEDULER_RETRY_INTERVAL=1s", "CERTMESH_SCHEDULER_JOB_PROCESSOR_INTERVAL=1s"}
}

func TestBadInput(t *testing.T) {
	t.Parallel()
	b := &bench{Lab: estatetest.Start(t, brisk()...)}
	b.ran = filepath.Join(b.SiteDir("host"), "ran")
	b.allowed = []string{"/usr/bin/touch", b.ran}
	_, b.host = b.Join(estate.AgentOptions{Name: "host", Commands: append(b.NginxCommands("host", "shared"), b.allowed)})
	b.ca = b.Issuer("ca")
	t.Run("tokens", func(t *testing.T) { b.with(t).tokens() })
	t.Run("expired token", func(t *testing.T) { b.with(t).expiredToken() })
	t.Run("foreign identity", func(t *testing.T) { b.with(t).foreignIdentity() })
	t.Run("garbage", func(t *testing.T) { b.with(t).garbage() })
	t.Run("tool", func(t *testing.T) { b.with(t).tool() })
	t.Run("paths", func(t *testing.T) { b.with(t).paths() })
	t.Run("commands", func(t *testing.T) { b.with(t).commands() })
	t.Run("full disk", func(t *testing.T) { b.with(t).fullDisk() })
	t.Run("read-only directory", func(t *testing.T) { b.with(t).readOnly() })
	t.Run("full disk below the agent", func(t *testing.T) { b.with(t).fullAgent() })
	t.Run("nginx", func(t *testing.T) { b.with(t).nginx() })
	t.Run("verify address", func(t *testing.T) { b.with(t).verifyAddress() })
}

// enroll runs `certmesh-agent enroll` for a host of its own.
func (b *bench) enroll(name, token string) error {
	b.T.Helper()
	env, err := b.AgentEnv(estate.AgentOptions{Name: name, Token: token})
	b.OK(err)
	// Its log would be more lines.
	_, err = b.Run(b.Ctx, "certmesh-agent", append(env, "CERTMESH_LOG_LEVEL=error"), "enroll", "--timeout", "20s")
	return err
}

// flipped changes one character in the middle of s for another of the same kind.
func flipped(s string) string {
	c, i := byte('a'), len(s)/2
	if s[i] == c {
		c = 'b'
	}
	return s[:i] + string(c) + s[i+1:]
}

func (b *bench) tokens() {
	token, err := b.Token(b.Ctx)
	b.OK(err)
	parts := strings.Split(token, ".")
	if len(parts) != 4 {
		b.T.Fatalf("a token has four parts, not %d", len(parts))
	}
	b.IsRefusal(b.enroll("t-none", ""), 2, "CERTMESH_JOIN_TOKEN")
	b.IsRefusal(b.enroll("t-text", "let me in; rm -rf /"), 2, "token")
	unknown := strings.Join([]string{parts[0], parts[1], flipped(parts[2]), parts[3]}, ".")
	line := b.IsRefusal(b.enroll("t-secret", unknown), 1, "token")
	if strings.Contains(line, parts[2]) || strings.Contains(line, flipped(parts[2])) {
		b.T.Errorf("the error shows a token's secret: %s", line)
	}
	b.IsRefusal(b.enroll("t-id", strings.Join([]string{parts[0], flipped(parts[1]), parts[2], parts[3]}, ".")), 1, "token")
	foreign := strings.Repeat("0123456789abcdef", 4)
	b.IsRefusal(b.enroll("t-mesh", strings.Join([]string{parts[0], parts[1], parts[2], foreign}, ".")), 1, "token")
	// The right one is still good for its one use, and for no second host.
	b.OK(b.enroll("t-good", token))
	b.IsRefusal(b.enroll("t-second", token), 1, "token")
	for _, name := range []string{"t-none", "t-text", "t-secret", "t-id", "t-mesh", "t-second"} {
		b.Refused(1, []string{name}, "agents", "get", name)
	}
	b.refusedEnrolments()
	b.Refused(2, []string{"ttl"}, "agents", "token", "create", "--ttl", "1s")
	b.Refused(2, []string{"use"}, "agents", "token", "create", "--uses", "1000001")
}

// refusedEnrolments checks that the trail has refused enrolments.
func (b *bench) refusedEnrolments() {
	b.T.Helper()
	b.Until("the trail to tell of refused enrolments", func() error {
		events, err := b.Audit(b.Ctx)
		if err != nil {
			return err
		}
		for _, e := range events {
			if strings.Contains(e.Action, "enrol") && e.Outcome != "ok" {
				return nil
			}
		}
		return errors.New("it has none")
	})
}

// expiredToken takes a minute, the shortest life of a token.
func (b *bench) expiredToken() {
	token, err := b.Token(b.Ctx, "--ttl", "1m")
	b.OK(err)
	end := time.Now().Add(time.Minute + time.Second)
	b.Until("the token to expire", func() error {
		if left := time.Until(end); left > 0 {
			return fmt.Errorf("%s are left", left)
		}
		return nil
	})
	b.IsRefusal(b.enroll("t-late", token), 1, "expired")
	b.Refused(1, []string{"t-late"}, "agents", "get", "t-late")
}

func (b *bench) foreignIdentity() {
	conf := b.File("foreign/id.cnf", `[req]
distinguished_name = dn
prompt = no
x509_extensions = id
[dn]
CN = stranger
[id]
subjectAltName = URI:spiffe://certmesh.local/agent/`+b.host.ID+`
extendedKeyUsage = clientAuth
keyUsage = critical,digitalSignature
`)
	key, cert := b.Path("foreign", "id.key"), b.Path("foreign", "id.pem")
	b.Tool("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-config", conf)
	pair, err := tls.LoadX509KeyPair(cert, key)
	b.OK(err)
	c, err := tls.Dial("tcp", b.Mesh, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"},
		// Not by Certificates: those are shown only to servers that ask for their CA.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }})
	if err == nil {
		// With TLS 1.3 the refusal comes after the client believes that it is connected.
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second)) // a live connection takes deadlines
		// The HTTP/2 preface with empty settings makes a server that accepts us answer.
		_, _ = c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")) // the answer tells
		_, err = io.ReadFull(c, make([]byte, 1))
	}
	var alert *net.OpError
	if err == nil || !errors.As(err, &alert) || !strings.Contains(alert.Err.Error(), "tls:") {
		b.T.Errorf("a certificate of another CA is not refused in the handshake: %v", err)
	}
	b.fine()
}

// fine checks that control plane and agent go on.
func (b *bench) fine() {
	b.T.Helper()
	b.OK(b.Ready(b.Ctx))
	b.Do("status")
	var a estate.Agent
	b.Get(&a, "agents", "get", "host")
	if a.State != "Online" {
		b.T.Errorf("the agent is %s", a.State)
	}
}

func (b *bench) garbage() {
	noise := make([]byte, 64<<10)
	_, _ = rand.Read(noise) // never fails
	inputs := map[string][]byte{
		"noise":         noise,
		"nothing":       nil,
		"HTTP":          []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"endless line":  []byte("GET /" + strings.Repeat("a", 2<<20)),
		"half a hello":  {0x16, 0x03, 0x01, 0x02, 0x00, 0x01},
		"empty records": []byte(strings.Repeat("\x16\x03\x03\x00\x00", 1000)),
		"old SSL":       {0x80, 0x2e, 0x01, 0x00, 0x02},
	}
	for _, addr := range []string{b.API, b.GRPC, b.Mesh, b.PKI} {
		for name, data := range inputs {
			b.OK(throw(b.Ctx, addr, nil, data))
			if addr != b.PKI {
				if err := throw(b.Ctx, addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}}, data); err != nil {
					b.T.Errorf("%s inside TLS at %s: %v", name, addr, err)
				}
				frames := append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), data...)
				b.OK(throw(b.Ctx, addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}, frames))
			}
		}
	}
	for _, path := range []string{"/.well-known/pki/crl/../../../../etc/passwd", "/.well-known/pki/crl/iss_x/-1", "/.well-known/pki/crl/%00/0",
		"/.well-known/pki/ca/mesh%2f..%2fx", "/.well-known/pki/crl/" + strings.Repeat("x", 5000), "/"} {
		status, body, err := b.Estate.Get(b.Ctx, "http://"+b.PKI+path)
		b.OK(err)
		if status != 404 && status != 400 {
			b.T.Errorf("GET %.60s: %d %.200s", path, status, body)
		}
	}
	b.fine()
}

// throw sends data to addr, inside TLS if conf is set, and reads what comes until the end or a short while.
func throw(ctx context.Context, addr string, conf *tls.Config, data []byte) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("%s takes no connections: %w", addr, err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(300 * time.Millisecond)) // a live connection takes deadlines
	if conf != nil {
		c = tls.Client(c, conf)
	}
	_, _ = c.Write(data)                                 // it may hang up at any time, and should
	_, _ = io.Copy(io.Discard, io.LimitReader(c, 1<<20)) // the same
	return nil
}

func (b *bench) tool() {
	for _, args := range [][]string{{"agents", "get", "nobody"}, {"certs", "why", "nobody"}, {"jobs", "get", "job_nobody"}, {"issuers", "get", "nobody"},
		{"targets", "get", "nobody"}, {"agents", "retire", "nobody", "--reason", "x"}, {"certs", "revoke", "nobody"}} {
		b.Refused(1, []string{"nobody"}, args...)
	}
	b.Refused(1, []string{"nobody"}, "targets", "create", "x", "--agent", "nobody", "--kind", "file", "--settings", `{"pem_path":"/tmp/x"}`)
	order := func(words []string, args ...string) {
		b.T.Helper()
		_, err := b.CLI(b.Ctx, append([]string{"certs", "create"}, args...)...)
		var ce *estate.CLIError
		if !errors.As(err, &ce) || ce.Code != 1 && ce.Code != 2 {
			b.T.Errorf("%v: not refused: %v", args, err)
			return
		}
		b.IsRefusal(err, ce.Code, words...)
	}
	path := filepath.Join(b.SiteDir("host"), "tool.pem")
	b.Do("targets", "create", "tool", "--agent", "host", "--kind", "file", "--settings", fmt.Sprintf(`{"pem_path":%q}`, path))
	base := []string{"--issuer", "ca", "--target", "tool"}
	order([]string{"name"}, append([]string{"bad-none"}, base...)...)
	order([]string{"under_score"}, append([]string{"bad-dns", "--dns", "under_score..x"}, base...)...)
	order([]string{"ip"}, append([]string{"bad-ip", "--dns", "192.0.2.1"}, base...)...)
	order([]string{"wildcard"}, append([]string{"bad-wild", "--dns", "a.*.example.test"}, base...)...)
	order([]string{"mail"}, append([]string{"bad-mail", "--email", "no mail"}, base...)...)
	order([]string{"fraction"}, append([]string{"bad-fraction", "--dns", "a.example.test", "--renew-fraction", "1.5"}, base...)...)
	order([]string{"bad/name"}, append([]string{"bad/name", "--dns", "a.example.test"}, base...)...)
	order([]string{"no-ca"}, "bad-issuer", "--dns", "a.example.test", "--issuer", "no-ca", "--target", "tool")
	order([]string{"no-profile"}, append([]string{"bad-profile", "--dns", "a.example.test", "--profile", "no-profile"}, base...)...)
	order([]string{"no-target"}, "bad-target", "--dns", "a.example.test", "--issuer", "ca", "--target", "no-target")
	found, err := b.Certificates(b.Ctx, "--name-prefix", "bad")
	b.OK(err)
	if len(found) > 0 {
		b.T.Errorf("refused orders left %+v", found)
	}
	b.Refused(2, []string{"--no-such-flag"}, "certs", "list", "--no-such-flag")
	b.Refused(2, []string{"format"}, "certs", "list", "--format", "xml")
	b.Refused(2, []string{"no-such"}, "no-such")

	// A server that is not there, one that is another's, a key that is wrong or malformed.
	nowhere, err := estate.FreeAddrs(1)
	b.OK(err)
	run := func(env ...string) error {
		_, err := b.Run(b.Ctx, "certmesh", append(b.CLIEnv(), env...), "status", "--timeout", "5s")
		return err
	}
	b.IsRefusal(run("CERTMESH_SERVER_URL="+nowhere[0]), 1, nowhere[0])
	site, err := b.StartBuiltin("host", "other", "other.example.test")
	b.OK(err)
	defer site.Stop()
	b.IsRefusal(run("CERTMESH_SERVER_URL="+site.Addr), 1, "CA")
	b.IsRefusal(run("CERTMESH_API_KEY=wrong"), 1, "key")
	_, err = b.Run(b.Ctx, "certmesh", []string{"CERTMESH_CONFIG=" + b.Path("no-such.yaml"), "HOME=" + b.Path()}, "status")
	b.IsRefusal(err, 1, "login")
}

// target makes a target of kind file without waiting for anything.
func (b *bench) target(name string, settings map[string]any, args ...string) error {
	b.T.Helper()
	text, err := json.Marshal(settings)
	b.OK(err)
	_, err = b.CLI(b.Ctx, append([]string{"targets", "create", name, "--agent", "host", "--kind", "file", "--settings", string(text)}, args...)...)
	return err
}

// stumbles orders a certificate for a target that cannot take it at the moment, and waits until its job says why in all
// of words. Tries go on, so that it is to be mended soon.
func (b *bench) stumbles(target string, words ...string) {
	b.T.Helper()
	b.Do("certs", "create", "for-"+target, "--dns", target+".example.test", "--issuer", "ca", "--target", target)
	b.Until("the job for "+target+" to say "+strings.Join(words, ", "), func() error {
		jobs, err := b.Jobs(b.Ctx, "--certificate", "for-"+target)
		if err != nil {
			return err
		}
		for _, j := range jobs {
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(j.Error, w) }) {
				return nil
			}
		}
		return fmt.Errorf("%+v", jobs)
	})
}

// fails orders a certificate for a target that cannot take it, and waits until its placement says why in all of words.
// The certificate is issued: that it is not served is the other fact.
func (b *bench) fails(target string, words ...string) estate.Certificate {
	b.T.Helper()
	b.Do("certs", "create", "for-"+target, "--dns", target+".example.test", "--issuer", "ca", "--target", target)
	var c estate.Certificate
	b.Until("the placement at "+target+" to say "+strings.Join(words, ", "), func() error {
		c = b.Certificate("for-" + target)
		p := c.Placements[0]
		text := strings.ToLower(p.LastError)
		for _, w := range words {
			if !strings.Contains(text, strings.ToLower(w)) {
				return fmt.Errorf("%s, placement %+v", c.Status, p)
			}
		}
		return nil
	})
	if p := c.Placements[0]; p.Current || c.PlacementsCurrent != 0 || p.InstalledGeneration != 0 {
		b.T.Errorf("a deployment that failed counts as done: %+v", p)
	}
	if c.Status != "Active" {
		b.T.Errorf("what is issued and not served is Active, not %s", c.Status)
	}
	return c
}

func (b *bench) absent(path string) {
	b.T.Helper()
	if _, err := os.Lstat(path); err == nil {
		b.T.Errorf("%s exists", path)
	}
}

func (b *bench) paths() {
	root := b.SiteDir("host")
	for name, path := range map[string]string{
		"p-dots": root + "/../escaped.pem", "p-dots-end": root + "/x/..", "p-relative": "escaped.pem", "p-null": root + "/a\x00b.pem", "p-root": "/",
	} {
		b.IsRefusal(b.target(name, map[string]any{"pem_path": path}), 1, "pem_path")
	}
	outside := b.Path("escaped.pem")
	b.OK(b.target("p-outside", map[string]any{"pem_path": outside}))
	b.fails("p-outside", "CERTMESH_TARGET_ROOTS")
	b.absent(outside)
	b.OK(os.MkdirAll(b.Path("elsewhere"), 0o700))
	b.OK(os.Symlink(b.Path("elsewhere"), filepath.Join(root, "link")))
	b.OK(b.target("p-link", map[string]any{"pem_path": filepath.Join(root, "link", "x.pem")}))
	b.fails("p-link", "link")
	b.absent(b.Path("elsewhere", "x.pem"))
	// A path that a link replaces after it was accepted is no way out either.
	b.OK(os.MkdirAll(filepath.Join(root, "later"), 0o700))
	b.OK(b.target("p-later", map[string]any{"pem_path": filepath.Join(root, "later", "y.pem")}))
	b.OK(os.Remove(filepath.Join(root, "later")))
	b.OK(os.Symlink(b.Path("elsewhere"), filepath.Join(root, "later")))
	b.fails("p-later")
	b.absent(b.Path("elsewhere", "y.pem"))
	var a estate.Agent
	b.Get(&a, "agents", "get", "host")
	if all := strings.Join(a.RejectedStates, "\n"); !strings.Contains(all, "CERTMESH_TARGET_ROOTS") {
		b.T.Errorf("the agent's refusals are not shown: %q", all)
	}
}

func (b *bench) commands() {
	marker := filepath.Join(b.SiteDir("host"), "pwned")
	path := func(n int) string { return filepath.Join(b.SiteDir("host"), fmt.Sprintf("cmd-%d.pem", n)) }
	for i, command := range [][]string{
		{"/usr/bin/touch", b.ran + "; touch " + marker}, {"/usr/bin/touch", "$(touch " + marker + ")"}, {"/usr/bin/touch", "`touch " + marker + "`"},
		{"/usr/bin/touch", b.ran, "&&", "touch", marker}, {"/usr/bin/touch", b.ran, "|", "tee", marker}, {"/usr/bin/touch", "a\ntouch " + marker},
		{"sh", "-c", "touch " + marker}, {"/bin/bash", "-c", "touch " + marker}, {"touch " + marker}, {"../../usr/bin/touch", marker}, {""},
	} {
		err := b.target(fmt.Sprintf("c-%d", i), map[string]any{"pem_path": path(i), "reload_command": command})
		b.IsRefusal(err, 1, "reload_command")
	}
	b.OK(b.target("c-strange", map[string]any{"pem_path": path(100), "reload_command": []string{"/usr/bin/touch", marker}}))
	b.fails("c-strange", "CERTMESH_ALLOW_COMMANDS")
	b.absent(path(100))
	b.OK(b.target("c-allowed", map[string]any{"pem_path": path(101), "reload_command": b.allowed}))
	b.Do("certs", "create", "for-c-allowed", "--dns", "c.example.test", "--issuer", "ca", "--target", "c-allowed", "--wait", "--wait-timeout", estatetest.Long)
	if _, err := os.Stat(b.ran); err != nil {
		b.T.Errorf("the allowed command was not run: %v", err)
	}
	b.absent(marker)
}

func (b *bench) nginx() {
	// The second server block accepts keys of 192 bits of strength only: its certificate is the culprit.
	sites, err := b.StartNginxSites(b.Ctx, "host", "shared", estate.VirtualHost{Name: "good.example.test"},
		estate.VirtualHost{Name: "picky.example.test", Extra: `ssl_ciphers "DEFAULT:@SECLEVEL=4";`, Curve: strong()})
	b.OK(err)
	good, picky := sites[0], sites[1]
	before, err := estate.Served(b.Ctx, picky.Addr, picky.Host)
	b.OK(err)
	b.Do(good.TargetArgs("n-good", "host")...)
	b.Do(picky.TargetArgs("n-picky", "host")...)
	b.Do("certs", "create", "for-n-good", "--dns", good.Host, "--issuer", "ca", "--target", "n-good")
	b.fails("n-picky", "nginx", "ee key too small")
	c := b.Current("for-n-good")
	b.Serves(good, c.Leaves[0].Serial, estate.SelfSigned(b.ca.ChainPEM))
	after, err := estate.Served(b.Ctx, picky.Addr, picky.Host)
	b.OK(err)
	if estate.Fingerprint(before) != estate.Fingerprint(after) {
		b.T.Error("the site that refused its certificate serves another one than before")
	}
	pair, err := tls.LoadX509KeyPair(picky.CertPath, picky.KeyPath)
	b.OK(err)
	if estate.Fingerprint(pair.Leaf) != estate.Fingerprint(before) {
		b.T.Error("the files of the site that refused its certificate were not put back")
	}
	b.Tool(good.Nginx, "-t", "-c", good.Config)
}

func (b *bench) verifyAddress() {
	nowhere, err := estate.FreeAddrs(1)
	b.OK(err)
	path := filepath.Join(b.SiteDir("host"), "v-closed.pem")
	b.OK(b.target("v-closed", map[string]any{"pem_path": path}, "--verify-address", nowhere[0]))
	b.fails("v-closed", nowhere[0])
	b.absent(path)
	site, err := b.StartBuiltin("host", "v-other-site", "v-other.example.test")
	b.OK(err)
	defer site.Stop()
	path = filepath.Join(b.SiteDir("host"), "v-other.pem")
	b.OK(b.target("v-other", map[string]any{"pem_path": path}, "--verify-address", site.Addr, "--server-name", site.Host))
	b.fails("v-other", site.Addr)
	b.absent(path)
	b.IsRefusal(b.target("v-bad", map[string]any{"pem_path": path}, "--verify-address", "no port"), 1, "verify_address")
}
