package node

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"go.yaml.in/yaml/v3"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
	"github.com/certmesh/certmesh/protocol/fault"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

func TestMain(m *testing.M) { storetest.Main(m) }

// devConfiguration is dev's, on free ports and a directory of the test's own.
func devConfiguration(t testing.TB, dir string, set map[string]string) *Configuration {
	t.Helper()
	flags := map[string]string{"node.data_dir": dir, "node.id": "n1"}
	for _, l := range []string{"api", "grpc", "mesh", "pki"} {
		flags["listen."+l] = "127.0.0.1:0"
	}
	maps.Copy(flags, set)
	c, err := LoadConfiguration(Dev, "", func(string) (string, bool) { return "", false }, flags)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func startDev(t testing.TB, dir string, set map[string]string) *Node {
	t.Helper()
	n, err := Start(t.Context(), Options{Configuration: devConfiguration(t, dir, set), Mode: Dev, Version: "test", Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopNode(t, n) })
	return n
}

func stopNode(t testing.TB, n *Node) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := n.Stop(ctx); err != nil {
		t.Errorf("stop: %v", err)
	}
}

// operator dials the node as certmesh does: with nothing but the profile that dev wrote.
func operator(t testing.TB, n *Node) (context.Context, *grpc.ClientConn) {
	t.Helper()
	data, err := os.ReadFile(n.ClientProfile())
	if err != nil {
		t.Fatal(err)
	}
	var p clientProfile
	if err := yaml.Unmarshal(data, &p); err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(p.CACertificate)) {
		t.Fatal("the profile holds no CA")
	}
	conn, err := grpc.NewClient(p.ServerURL, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+p.APIKey), conn
}

func TestLesson17ARestartKeepsTrustAndTheOperatorsKey(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n := startDev(t, dir, nil)
	root, _ := os.ReadFile(n.ClientProfile())
	ctx, conn := operator(t, n)
	created, err := operatorpb.NewIssuersServiceClient(conn).CreateIssuer(ctx, &operatorpb.CreateIssuerRequest{Name: "internal", Kind: "local"})
	if err != nil {
		t.Fatal(err)
	}
	stopNode(t, n)

	n = startDev(t, dir, nil)
	again, _ := os.ReadFile(n.ClientProfile())
	keep := func(b []byte) string { return string(b[strings.Index(string(b), "api_key"):]) }
	if keep(root) != keep(again) {
		t.Error("key or CA of the profile changed")
	}
	ctx, conn = operator(t, n)
	got, err := operatorpb.NewIssuersServiceClient(conn).GetIssuer(ctx, &operatorpb.GetIssuerRequest{Id: "internal"})
	if err != nil || got.GetIssuer().GetChainPem() != created.GetIssuer().GetChainPem() {
		t.Fatalf("the CA did not survive the restart: %v", err)
	}
	st, err := operatorpb.NewSystemServiceClient(conn).GetStatus(ctx, &operatorpb.GetStatusRequest{})
	if err != nil || st.GetStore() != "sqlite" || st.GetTrustDomain() != "certmesh.local" || len(st.GetDuties()) != 8 {
		t.Fatalf("%v %v", st, err)
	}
	for name, private := range map[string]string{"kek": n.cfg.Secrets.KEKFile, "profile": n.ClientProfile()} {
		if s, err := os.Stat(private); err != nil || s.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", name, s.Mode(), err)
		}
	}
}

func TestStartRefusesWhatWouldLoseSomething(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n := startDev(t, dir, nil)
	taken := n.Addresses().GRPC
	start := func(dir string, set map[string]string) error {
		n, err := Start(t.Context(), Options{Configuration: devConfiguration(t, dir, set), Mode: Dev, Log: quiet()})
		if err == nil {
			stopNode(t, n)
		}
		return err
	}
	expect := func(name string, err error, class fault.Class, text string) {
		t.Helper()
		if !fault.Is(err, class) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	expect("directory in use", start(dir, nil), fault.Conflict, "another certmeshd uses")
	expect("port in use", start(t.TempDir(), map[string]string{"listen.grpc": taken}), fault.Invalid, "listen.grpc")
	expect("unwritable directory", start(filepath.Join(n.ClientProfile(), "below-a-file"), nil), fault.Invalid, "node.data_dir")
	stopNode(t, n)
	expect("trust domain changed", start(dir, map[string]string{"mesh.trust_domain": "other.example"}), fault.Invalid, "CERTMESH_TRUST_DOMAIN=certmesh.local")
	if err := os.Rename(n.cfg.Secrets.KEKFile, n.cfg.Secrets.KEKFile+".lost"); err != nil {
		t.Fatal(err)
	}
	if err := start(dir, nil); err == nil || !strings.Contains(err.Error(), "key-encryption key") {
		t.Errorf("another key-encryption key: %v", err)
	}
	if err := os.Rename(n.cfg.Secrets.KEKFile+".lost", n.cfg.Secrets.KEKFile); err != nil {
		t.Fatal(err)
	}
	if err := start(dir, nil); err != nil {
		t.Errorf("with everything as it was: %v", err)
	}
}

// An operator's key may be the first thing that is done with a store, and ends when it is revoked.
func TestAPIKeysBesideTheStore(t *testing.T) {
	t.Parallel()
	c := devConfiguration(t, t.TempDir(), nil)
	key, err := CreateAPIKey(t.Context(), c, "me", "admin", 0)
	if err != nil || key == "" {
		t.Fatal(err)
	}
	if _, err := CreateAPIKey(t.Context(), c, "me", "admin", 0); !fault.Is(err, fault.Conflict) {
		t.Errorf("the name a second time: %v", err)
	}
	if _, err := CreateAPIKey(t.Context(), c, "you", "king", -time.Hour); !fault.Is(err, fault.Invalid) {
		t.Errorf("a role that there is not: %v", err)
	}
	if _, err := RevokeAPIKey(t.Context(), c, "nobody"); !fault.Is(err, fault.NotFound) {
		t.Errorf("a key that there is not: %v", err)
	}
	if _, err := RevokeAPIKey(t.Context(), c, "me"); err != nil {
		t.Error(err)
	}
	all, err := APIKeys(t.Context(), c)
	if err != nil || len(all) != 1 || all[0].RevokedAt.IsZero() || all[0].Hash != nil {
		t.Errorf("%+v %v", all, err)
	}
	s, err := openStore(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if _, err := authz.Authenticate(t.Context(), s, key, time.Now()); !fault.Is(err, fault.Unauthorized) {
		t.Errorf("a revoked key got in: %v", err)
	}
}

// What was derived where nothing was said is in force, and shown.
func TestLesson20EffectiveValuesAreShown(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	shown := map[string]string{}
	for _, v := range devConfiguration(t, dir, map[string]string{"node.id": ""}).Values() {
		shown[v.Key] = v.Text
	}
	if shown["secrets.kek_file"] != filepath.Join(dir, "kek") || shown["node.id"] == "" || shown["node.names"] == "" || shown["store.dsn"] != "(set)" {
		t.Errorf("%v", shown)
	}
}

func TestServeDemandsWhatItCannotMakeUp(t *testing.T) {
	t.Parallel()
	none := func(string) (string, bool) { return "", false }
	for field, flags := range map[string]map[string]string{
		"secrets.kek_file": {},
		"pki.public_url":   {"secrets.kek_file": "/etc/certmesh/kek"},
		"listen.grpc":      {"secrets.kek_file": "/k", "pki.public_url": "http://pki.test", "listen.grpc": "8442"},
		"no.such":          {"no.such": "1", "secrets.kek_file": "/k", "pki.public_url": "http://pki.test"},
	} {
		_, err := LoadConfiguration(Serve, "", none, flags)
		if !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: got %v", field, err)
		}
	}
}

func TestHealthReadinessAndMetrics(t *testing.T) {
	t.Parallel()
	n := startDev(t, t.TempDir(), nil)
	roots := n.trust.pool()
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13}}, Timeout: 10 * time.Second}
	defer c.CloseIdleConnections()
	get := func(path string) (int, string) {
		t.Helper()
		r, err := c.Get("https://" + n.Addresses().API + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r.StatusCode, string(b)
	}
	for path, want := range map[string]string{"/health": "ok", "/ready": "ready"} {
		code, body := get(path)
		var got struct{ Status string }
		if err := json.Unmarshal([]byte(body), &got); err != nil || code != 200 || got.Status != want {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	_, text := get("/metrics")
	// The first duty runs within a tenth of its interval, two seconds at most.
	for end := time.Now().Add(20 * time.Second); !strings.Contains(text, "certmesh_duty_runs_total") && time.Now().Before(end); {
		_, text = get("/metrics")
	}
	for _, series := range []string{`certmesh_certificates{status="Expired"} 0`, `certmesh_agents{state="Offline"} 0`,
		"certmesh_placements_lagging 0", "certmesh_duty_runs_total", "certmesh_store_seconds", "go_goroutines"} {
		if !strings.Contains(text, series) {
			t.Errorf("/metrics lacks %s", series)
		}
	}
	n.draining.Store(true)
	if code, _ := get("/ready"); code != http.StatusServiceUnavailable {
		t.Errorf("a draining node says it is ready: %d", code)
	}
	if code, _ := get("/health"); code != 200 {
		t.Errorf("a draining node lives: %d", code)
	}
	n.draining.Store(false)
}

// The chain that every TLS listener sends ends in the mesh root, by whose fingerprint join tokens and logins know it.
func TestTheChainEndsInTheRoot(t *testing.T) {
	t.Parallel()
	n := startDev(t, t.TempDir(), nil)
	for _, addr := range []string{n.Addresses().Mesh, n.Addresses().GRPC, n.Addresses().API} {
		conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		chain := conn.ConnectionState().PeerCertificates
		_ = conn.Close()
		if sha256.Sum256(chain[len(chain)-1].Raw) != sha256.Sum256(n.trust.mesh().Root().Raw) || len(chain[0].URIs) != 1 ||
			chain[0].URIs[0].String() != "spiffe://certmesh.local/node/n1" {
			t.Errorf("%s: %v", addr, chain[0].URIs)
		}
	}
	if _, err := tls.Dial("tcp", n.Addresses().Mesh, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); err == nil {
		t.Error("TLS 1.2 was accepted")
	}
}

// Garbage on every port is answered or dropped, and the node serves on.
func TestGarbageOnEveryPort(t *testing.T) {
	t.Parallel()
	n := startDev(t, t.TempDir(), nil)
	a := n.Addresses()
	for _, addr := range []string{a.API, a.GRPC, a.Mesh, a.PKI} {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte(strings.Repeat("\x00\xff garbage \r\n", 2000))) // the other end may hang up at once
		_ = c.Close()
	}
	ctx, conn := operator(t, n)
	if _, err := operatorpb.NewSystemServiceClient(conn).GetStatus(ctx, &operatorpb.GetStatusRequest{}); err != nil {
		t.Fatal(err)
	}
	r, err := http.Get("http://" + a.PKI + "/.well-known/pki/crl/..%2f..%2fetc/0")
	if err != nil {
		t.Fatal(err)
	}
	_ = r.Body.Close()
	if r.StatusCode != http.StatusNotFound {
		t.Errorf("a path trick got %d", r.StatusCode)
	}
}

// The reference page is made from the settings; docs/ holds what it says today.
func TestReferencePageIsFresh(t *testing.T) {
	t.Parallel()
	path := filepath.Join("..", "..", "docs", "configuration.md")
	have, err := os.ReadFile(path)
	if err != nil || string(have) != ConfigurationReference() {
		t.Errorf("docs/configuration.md is stale (%v): go run ./controlplane/cmd/certmeshd config --format markdown > docs/configuration.md", err)
	}
}
