package mainjob

import (
	"crypto/rand"
	"encoding/base64"
	"strings"
	"testing"

	"github.com/certmesh/certmesh/e2e/estate"
	"github.com/certmesh/certmesh/e2e/estate/estatetest"
)

// TestLesson18ServeAsShipped goes the way of production, with nothing made up by `dev`.
func TestLesson18ServeAsShipped(t *testing.T) {
	t.Parallel()
	l := &hosts{Lab: estatetest.New(t)}
	dsn, stop, err := l.StartPostgres(l.Ctx)
	l.OK(err)
	t.Cleanup(stop)

	// 1. serve without a key-encryption key or a public URL says what is missing, and starts nothing.
	_, err = l.Run(l.Ctx, "certmeshd", l.ServerEnv(), "serve")
	l.IsRefusal(err, 2, "CERTMESH_SECRETS_KEK_FILE")

	// 2. The schema is brought up apart; config says where each value came from and hides the DSN.
	kek := make([]byte, 32)
	_, _ = rand.Read(kek) // never fails
	env := []string{
		"CERTMESH_SECRETS_KEK_FILE=" + l.File("kek", base64.StdEncoding.EncodeToString(kek)+"\n"),
		"CERTMESH_PKI_PUBLIC_URL=http://" + l.PKI,
		"CERTMESH_STORE_DSN=" + dsn,
		"CERTMESH_STORE_MIGRATE=false",
	}
	certmeshd := func(args ...string) string {
		t.Helper()
		out, err := l.Run(l.Ctx, "certmeshd", append(l.ServerEnv(), env...), args...)
		l.OK(err)
		return string(out)
	}
	if before := certmeshd("migrate", "status"); !strings.Contains(before, "no") {
		t.Errorf("a fresh database has steps to go:\n%s", before)
	}
	_, err = l.Run(l.Ctx, "certmeshd", append(l.ServerEnv(), env...), "serve")
	l.IsRefusal(err, 2, "migrate up")
	certmeshd("migrate", "up")
	for _, line := range strings.Split(strings.TrimSpace(certmeshd("migrate", "status")), "\n")[1:] {
		if strings.HasSuffix(strings.TrimSpace(line), " no") {
			t.Errorf("a step is not applied: %s", line)
		}
	}
	conf := certmeshd("config", "--set", "log.level=warn")
	for _, want := range []string{"environment", "default", "flag", "CERTMESH_LISTEN_MESH"} {
		if !strings.Contains(conf, want) {
			t.Errorf("certmeshd config does not mention %s:\n%s", want, conf)
		}
	}
	if strings.Contains(conf, "postgres://") {
		t.Errorf("certmeshd config shows the DSN:\n%s", conf)
	}

	// 3. It runs; the first key is made beside the store; login checks the server by its CA's fingerprint.
	key := strings.TrimSpace(certmeshd("apikey", "create", "--name", "first", "--role", "admin"))
	l.Server, err = l.Serve(l.Ctx, env...)
	l.OK(err)
	profile := l.Path("server", "client.yaml")
	cli := append(l.CLIEnv(), "CERTMESH_API_KEY="+key)
	root, err := estate.MeshFingerprint(l.Ctx, l.GRPC)
	l.OK(err)
	_, err = l.Run(l.Ctx, "certmesh", cli, "login", "--server", l.GRPC, "--ca-fingerprint", strings.Repeat("ab", 32))
	l.IsRefusal(err, 1, "fingerprint")
	_, err = l.Run(l.Ctx, "certmesh", cli, "login", "--server", l.GRPC, "--ca-fingerprint", root)
	l.OK(err)
	if text := l.read(profile); !strings.Contains(text, "BEGIN CERTIFICATE") {
		t.Errorf("the profile holds no root:\n%s", text)
	}
	if out := l.Do("status"); !strings.Contains(out, "postgres") {
		t.Errorf("status does not name the store:\n%s", out)
	}

	// 4. A viewer looks and changes nothing; a wrong key is refused; neither is shown a stack of causes.
	viewer := strings.TrimSpace(certmeshd("apikey", "create", "--name", "onlooker", "--role", "viewer"))
	as := func(key string, args ...string) error {
		_, err := l.Run(l.Ctx, "certmesh", append(l.CLIEnv(), "CERTMESH_API_KEY="+key), args...)
		return err
	}
	l.OK(as(viewer, "certs", "list"))
	l.IsRefusal(as(viewer, "issuers", "create", "mine"), 1, "role")
	l.IsRefusal(as("cmak1.nobody.nothing", "certs", "list"), 1, "key")

	// 5. The main job.
	_, l.east = l.Join(estate.AgentOptions{Name: "east"})
	l.issuer = l.Issuer("ca")
	path := l.pemTarget("first", "east")
	l.order("first", "--dns", "first.example.test", "--issuer", "ca", "--target", "first")
	l.renew("first")
	l.verify(l.issuer.ChainPEM, path)

	// 6. What monitors ask.
	for path, want := range map[string]string{"/health": `"ok"`, "/ready": `"ready"`, "/metrics": "certmesh_"} {
		status, body, err := l.Estate.Get(l.Ctx, "https://"+l.API+path)
		l.OK(err)
		if status != 200 || !strings.Contains(string(body), want) {
			t.Errorf("GET %s: %d without %s", path, status, want)
		}
	}
	// 7. Without its database the node lives, and is not ready.
	stop()
	l.Until("the node to say that it is not ready", func() error {
		if l.Ready(l.Ctx) != nil {
			return nil //nolint:nilerr // an error is what is waited for
		}
		return errStillReady
	})
	if status, _, err := l.Estate.Get(l.Ctx, "https://"+l.API+"/health"); err != nil || status != 200 {
		t.Errorf("GET /health without a database: %d %v", status, err)
	}
}

type constError string

func (c constError) Error() string { return string(c) }

const errStillReady = constError("it is ready")
