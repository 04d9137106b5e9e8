package renewals

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/certmesh/certmesh/e2e/estate"
)

// placeholder is a self-signed pair that sites begin with.
func placeholder() (cert, key []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &k.PublicKey, k)
	if err != nil {
		return nil, nil, err
	}
	kb, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kb}), nil
}

// prepare makes n sites below dir, each with files of its own, all at addr.
func prepare(dir, prefix, addr string, n int) ([]*estate.Site, error) {
	cert, key, err := placeholder()
	if err != nil {
		return nil, err
	}
	var sites []*estate.Site
	for i := range n {
		host := fmt.Sprintf("%s-%04d.test", prefix, i)
		at := filepath.Join(dir, host)
		s := &estate.Site{Host: host, Addr: addr, CertPath: filepath.Join(at, "site.crt"), KeyPath: filepath.Join(at, "site.key")}
		if err := os.MkdirAll(at, 0o700); err != nil {
			return nil, err
		}
		if err := os.WriteFile(s.CertPath, cert, 0o600); err != nil {
			return nil, err
		}
		if err := os.WriteFile(s.KeyPath, key, 0o600); err != nil {
			return nil, err
		}
		sites = append(sites, s)
	}
	return sites, nil
}

// serveFiles runs one TLS server for n sites; it reads a site's files again at every handshake.
func serveFiles(e *estate.Estate, agent, prefix string, n int) (sites []*estate.Site, stop func(), err error) {
	addrs, err := estate.FreeAddrs(1)
	if err != nil {
		return nil, nil, err
	}
	if sites, err = prepare(e.SiteDir(agent), prefix, addrs[0], n); err != nil {
		return nil, nil, err
	}
	by := map[string]*estate.Site{}
	for _, s := range sites {
		by[s.Host] = s
	}
	l, err := net.Listen("tcp", addrs[0])
	if err != nil {
		return nil, nil, err
	}
	srv := &http.Server{Handler: http.NotFoundHandler(), ReadHeaderTimeout: 5 * time.Second,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo), // probes that hang up are no news
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			s := by[h.ServerName]
			if s == nil {
				return nil, fmt.Errorf("no site %q", h.ServerName)
			}
			// Two files cannot be read in one step: a pair that does not match yet is read again.
			for try := 0; ; try++ {
				c, err := tls.LoadX509KeyPair(s.CertPath, s.KeyPath)
				if err == nil || try == 20 {
					return &c, err
				}
				select {
				case <-h.Context().Done():
					return nil, h.Context().Err()
				case <-time.After(time.Millisecond):
				}
			}
		}}}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.ServeTLS(l, "", "") }) // ends by Close
	return sites, func() { _ = srv.Close(); wg.Wait() }, nil
}

// farm is one nginx with many sites on one port.
type farm struct {
	bin, conf, log string
	sites          []*estate.Site
}

const farmName = "farm"

// serveNginx runs one nginx for n sites. Its error log counts the reloads.
func serveNginx(ctx context.Context, e *estate.Estate, agent, prefix string, n int) (*farm, error) {
	dir := filepath.Join(e.SiteDir(agent), farmName)
	f := &farm{bin: estate.NginxPath(), conf: filepath.Join(dir, "nginx.conf"), log: filepath.Join(dir, "error.log")}
	addrs, err := estate.FreeAddrs(1)
	if err != nil {
		return nil, err
	}
	if f.sites, err = prepare(dir, prefix, addrs[0], n); err != nil {
		return nil, err
	}
	user := ""
	if os.Getuid() == 0 {
		user = "user root;" // the workers have to read the estate's private directory
	}
	var b strings.Builder
	fmt.Fprintf(&b, `daemon off;
%s
worker_processes 1;
pid %[2]s/nginx.pid;
error_log %[2]s/error.log notice;
events { worker_connections 4096; }
http {
  access_log off;
  server_names_hash_max_size 8192; server_names_hash_bucket_size 128;
  client_body_temp_path %[2]s/body; proxy_temp_path %[2]s/proxy; fastcgi_temp_path %[2]s/fastcgi;
  uwsgi_temp_path %[2]s/uwsgi; scgi_temp_path %[2]s/scgi;
`, user, dir)
	for _, s := range f.sites {
		s.Nginx, s.Config = f.bin, f.conf
		fmt.Fprintf(&b, "  server { listen %s ssl; server_name %s; ssl_certificate %s; ssl_certificate_key %s; return 200; }\n", s.Addr, s.Host, s.CertPath, s.KeyPath)
	}
	b.WriteString("}\n")
	if err := os.WriteFile(f.conf, []byte(b.String()), 0o600); err != nil {
		return nil, err
	}
	p, err := e.Start("nginx-"+prefix, f.bin, nil, "-c", f.conf)
	if err != nil {
		return nil, err
	}
	return f, estate.Wait(ctx, "nginx to answer", func(ctx context.Context) error {
		select {
		case <-p.Exited():
			return estate.Stop(fmt.Errorf("nginx ended:\n%s", p.Tail(20)))
		default:
		}
		_, err := estate.Served(ctx, f.sites[0].Addr, f.sites[0].Host)
		return err
	})
}

// reloads counts how often nginx has loaded its configuration again.
func (f *farm) reloads() (int, error) {
	b, err := os.ReadFile(f.log)
	return strings.Count(string(b), "reconfiguring"), err
}
