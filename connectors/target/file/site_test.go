package file_test

import (
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/connectors/target"
)

func env(roots ...string) target.Env {
	return target.Env{Log: slog.New(slog.DiscardHandler), Roots: roots, BackupRetention: 3,
		Now: func() time.Time { return time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC) }}
}

// site is a TLS server that loads a PEM file when it is told, by a file that appears.
type site struct {
	address, pem string
	l            net.Listener

	mu   sync.Mutex
	cert *tls.Certificate
}

func newSite(t *testing.T, pem string) *site {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return &site{address: l.Addr().String(), pem: pem, l: l}
}

// start serves until the test ends. The file flag asks for a reload and is removed.
func (s *site) start(t *testing.T, flag string) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := s.l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(5 * time.Second))
				tc := tls.Server(c, &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
					s.mu.Lock()
					defer s.mu.Unlock()
					if os.Remove(flag) == nil || s.cert == nil {
						cert, err := tls.LoadX509KeyPair(s.pem, s.pem)
						if err != nil {
							return nil, errors.Join(errors.New("no certificate"), err)
						}
						s.cert = &cert
					}
					return s.cert, nil
				}})
				if tc.Handshake() == nil {
					_, _ = tc.Read(make([]byte, 1))
				}
			})
		}
	})
	t.Cleanup(func() { _ = s.l.Close(); wg.Wait() })
}
