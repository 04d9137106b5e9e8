package estate

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"
)

// Site is a TLS server whose certificate an agent deploys.
type Site struct {
	Addr              string
	CertPath, KeyPath string
	// Config is nginx's configuration file; empty for the built-in server.
	Config string
	// Validate and Reload are the commands the agent is to be allowed; empty for the built-in server.
	Validate, Reload []string
	// Nginx is the nginx binary; empty for the built-in server.
	Nginx string
	stop  func()
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
func prepare(dir, host string) (cert, key string, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", "", err
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
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
	bin := NginxPath()
	if bin == "" {
		return nil, errors.New("nginx is not installed: apt-get install nginx")
	}
	dir := e.Path("sites", agent, name)
	cert, key, err := prepare(dir, host)
	if err != nil {
		return nil, err
	}
	addrs, err := FreeAddrs(1)
	if err != nil {
		return nil, err
	}
	conf := filepath.Join(dir, "nginx.conf")
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
  server {
    listen %[3]s ssl;
    server_name %[4]s;
    ssl_certificate %[5]s;
    ssl_certificate_key %[6]s;
    location / { return 200 "served by nginx\n"; }
  }
}
`, nginxUser(), dir, addrs[0], host, cert, key)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return nil, err
	}
	p, err := e.Start("nginx-"+name, bin, nil, "-c", conf)
	if err != nil {
		return nil, err
	}
	s := &Site{Addr: addrs[0], CertPath: cert, KeyPath: key, Config: conf, Nginx: bin,
		Validate: []string{bin, "-t", "-c", conf}, Reload: []string{bin, "-s", "reload", "-c", conf}, stop: func() { _ = p.Stop(5 * time.Second) }}
	err = Wait(ctx, "nginx to answer", func(ctx context.Context) error {
		select {
		case <-p.Exited():
			return Stop(fmt.Errorf("nginx ended:\n%s", p.Tail(20)))
		default:
		}
		_, err := Served(ctx, s.Addr, host)
		return err
	})
	return s, err
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
	dir := e.Path("sites", agent, name)
	cert, key, err := prepare(dir, host)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	load := func() (*tls.Certificate, error) {
		// Two files cannot be read in one step: a pair that does not match yet is read again.
		for try := 0; ; try++ {
			c, err := tls.LoadX509KeyPair(cert, key)
			if err == nil || try == 20 {
				return &c, err
			}
			time.Sleep(time.Millisecond)
		}
	}
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write([]byte("served by the built-in site\n"))
		}),
		ReadHeaderTimeout: 5 * time.Second,
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return load() }},
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.ServeTLS(l, "", "") }) // ends by Close
	return &Site{Addr: l.Addr().String(), CertPath: cert, KeyPath: key, stop: func() { _ = srv.Close(); wg.Wait() }}, nil
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
