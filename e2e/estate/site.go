package estate

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Site is a TLS server whose certificate an agent deploys.
type Site struct {
	Host, Addr        string
	CertPath, KeyPath string
	// Config is nginx's configuration file; empty for the built-in server.
	Config string
	// Nginx is the nginx binary; empty for the built-in server.
	Nginx string
	stop  func()
}

// Kind and Settings are what `targets create` wants to be told of the site.
func (s *Site) Kind() string {
	if s.Nginx == "" {
		return "file"
	}
	return "nginx"
}

// Settings is the connector's JSON.
func (s *Site) Settings() string {
	m := map[string]string{"cert_path": s.CertPath, "key_path": s.KeyPath}
	if s.Nginx != "" {
		m["nginx_path"], m["config_path"] = s.Nginx, s.Config
	}
	b, err := json.Marshal(m)
	if err != nil {
		panic(err) // a map of strings always encodes
	}
	return string(b)
}

// TargetArgs are the arguments of `certmesh` that make the site a target called name of an agent.
func (s *Site) TargetArgs(name, agent string) []string {
	return []string{"targets", "create", name, "--agent", agent, "--kind", s.Kind(), "--settings", s.Settings(),
		"--verify-address", s.Addr, "--server-name", s.Host}
}

// Stop ends the site.
func (s *Site) Stop() { s.stop() }

// NginxPath returns the nginx binary, or "" when there is none.
func NginxPath() string {
	for _, p := range []string{"nginx", "/usr/sbin/nginx", "/usr/local/sbin/nginx"} {
		if found, err := exec.LookPath(p); err == nil {
			return found
		}
	}
	return ""
}

// prepare writes a self-signed placeholder, so that the site can start before its first certificate is deployed.
func prepare(dir, host string, curve elliptic.Curve) (cert, key string, err error) {
	if curve == nil {
		curve = elliptic.P256()
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", "", err
	}
	k, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		return "", "", err
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "placeholder"},
		DNSNames: []string{host}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &k.PublicKey, k)
	if err != nil {
		return "", "", err
	}
	kb, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return "", "", err
	}
	cert, key = filepath.Join(dir, "site.crt"), filepath.Join(dir, "site.key")
	if err := os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		return "", "", err
	}
	return cert, key, os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kb}), 0o600)
}

// StartNginx runs a real nginx with a configuration of its own below <dir>/sites/<agent>/<name>.
func (e *Estate) StartNginx(ctx context.Context, agent, name, host string) (*Site, error) {
	sites, err := e.StartNginxSites(ctx, agent, name, VirtualHost{Name: host})
	if err != nil {
		return nil, err
	}
	return sites[0], nil
}

// NginxCommands are what the agent has to be allowed for the nginx called name, known before it runs.
func (e *Estate) NginxCommands(agent, name string) [][]string {
	bin, conf := NginxPath(), filepath.Join(e.SiteDir(agent), name, "nginx.conf")
	return [][]string{{bin, "-t", "-c", conf}, {bin, "-s", "reload", "-c", conf}}
}

// VirtualHost is one server block of an nginx.
type VirtualHost struct {
	Name string
	// Extra is added to the server block.
	Extra string
	// Curve is of the placeholder's key; nil: P-256.
	Curve elliptic.Curve
}

// StartNginxSites runs one nginx with a server block and a port for each host; stopping one site stops them all.
func (e *Estate) StartNginxSites(ctx context.Context, agent, name string, hosts ...VirtualHost) ([]*Site, error) {
	bin := NginxPath()
	if bin == "" {
		return nil, errors.New("nginx is not installed: apt-get install nginx")
	}
	addrs, err := FreeAddrs(len(hosts))
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(e.SiteDir(agent), name)
	conf := filepath.Join(dir, "nginx.conf")
	var sites []*Site
	var servers strings.Builder
	for i, h := range hosts {
		cert, key, err := prepare(filepath.Join(dir, h.Name), h.Name, h.Curve)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&servers, `  server {
    listen %s ssl;
    server_name %s;
    %s
    ssl_certificate %s;
    ssl_certificate_key %s;
    location / { return 200 "served by nginx\n"; }
  }
`, addrs[i], h.Name, h.Extra, cert, key)
		sites = append(sites, &Site{Host: h.Name, Addr: addrs[i], CertPath: cert, KeyPath: key, Config: conf, Nginx: bin})
	}
	text := fmt.Sprintf(`daemon off;
%s
worker_processes 1;
pid %[2]s/nginx.pid;
error_log %[2]s/error.log;
events { worker_connections 64; }
http {
  access_log off;
  client_body_temp_path %[2]s/body; proxy_temp_path %[2]s/proxy; fastcgi_temp_path %[2]s/fastcgi;
  uwsgi_temp_path %[2]s/uwsgi; scgi_temp_path %[2]s/scgi;
%[3]s}
`, nginxUser(), dir, servers.String())
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return nil, err
	}
	p, err := e.Start("nginx-"+name, bin, nil, "-c", conf)
	if err != nil {
		return nil, err
	}
	for _, s := range sites {
		s.stop = func() { _ = p.Stop(5 * time.Second) } // killed or stopped, it is gone
	}
	err = Wait(ctx, "nginx to answer", func(ctx context.Context) error {
		select {
		case <-p.Exited():
			return Stop(fmt.Errorf("nginx ended:\n%s", p.Tail(20)))
		default:
		}
		for _, s := range sites {
			if _, err := Served(ctx, s.Addr, s.Host); err != nil {
				return err
			}
		}
		return nil
	})
	return sites, err
}

// nginxUser keeps nginx's workers on our own user, so that they can read the estate's private directory.
func nginxUser() string {
	if os.Getuid() == 0 {
		return "user root;"
	}
	return ""
}

// StartBuiltin serves TLS from files and reads them again at every handshake.
func (e *Estate) StartBuiltin(agent, name, host string) (*Site, error) {
	cert, key, err := prepare(filepath.Join(e.SiteDir(agent), name), host, nil)
	if err != nil {
		return nil, err
	}
	addrs, err := FreeAddrs(1)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", addrs[0])
	if err != nil {
		return nil, err
	}
	load := func(ctx context.Context) (*tls.Certificate, error) {
		// Two files cannot be read in one step: a pair that does not match yet is read again.
		for try := 0; ; try++ {
			c, err := tls.LoadX509KeyPair(cert, key)
			if err == nil || try == 20 {
				return &c, err
			}
			select {
			case <-time.After(time.Millisecond):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	}
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write([]byte("served by the built-in site\n"))
		}),
		ReadHeaderTimeout: 5 * time.Second,
		ErrorLog:          slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo), // probes that hang up are no news
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12,
			GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) { return load(h.Context()) }},
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.ServeTLS(l, "", "") }) // ends by Close
	return &Site{Host: host, Addr: l.Addr().String(), CertPath: cert, KeyPath: key, stop: func() { _ = srv.Close(); wg.Wait() }}, nil
}

// Served returns the leaf that addr serves for host.
func Served(ctx context.Context, addr, host string) (*x509.Certificate, error) {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 2 * time.Second},
		// The question is what is served, not whether to trust it.
		Config: &tls.Config{InsecureSkipVerify: true, ServerName: host}}
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.(*tls.Conn).ConnectionState().PeerCertificates[0], nil
}

// Trusted returns the leaf that addr serves for host, if it chains to one of roots (PEM) and bears the name.
func Trusted(ctx context.Context, addr, host, roots string) (*x509.Certificate, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(roots)) {
		return nil, errors.New("the issuer's chain holds no certificate")
	}
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 2 * time.Second}, Config: &tls.Config{RootCAs: pool, ServerName: host, MinVersion: tls.VersionTLS12}}
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.(*tls.Conn).ConnectionState().PeerCertificates[0], nil
}

// SelfSigned returns those certificates of a PEM chain that are roots.
func SelfSigned(chain string) string {
	var out strings.Builder
	for rest := []byte(chain); ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			return out.String()
		}
		if c, err := x509.ParseCertificate(b.Bytes); err == nil && c.CheckSignatureFrom(c) == nil {
			out.Write(pem.EncodeToMemory(b))
		}
	}
}

// MeshFingerprint is that of the last certificate which a node's listener shows, as an operator would read it off the host.
func MeshFingerprint(ctx context.Context, addr string) (string, error) {
	d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}}
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	chain := conn.(*tls.Conn).ConnectionState().PeerCertificates
	return Fingerprint(chain[len(chain)-1]), nil
}

// Serial is a certificate's serial as the tool prints it.
func Serial(c *x509.Certificate) string { return c.SerialNumber.Text(16) }

// Fingerprint is the SHA-256 of a certificate in hex.
func Fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}
