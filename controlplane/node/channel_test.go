package node

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
	operatorpb "github.com/certmesh/certmesh/protocol/operator/v1"
)

// recorder keeps every byte of the channel in plain text, both ways.
type recorder struct {
	mu   sync.Mutex
	sent bytes.Buffer
	got  bytes.Buffer
}

func (r *recorder) wrap(c net.Conn) net.Conn { return &recorded{c, r} }

type recorded struct {
	net.Conn
	r *recorder
}

func (c *recorded) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	c.r.got.Write(b[:n])
	return n, err
}

func (c *recorded) Write(b []byte) (int, error) {
	c.r.mu.Lock()
	c.r.sent.Write(b)
	c.r.mu.Unlock()
	return c.Conn.Write(b)
}

// encodings are the forms in which a private key could cross: its DER, its numbers, and what text makes of each.
func encodings(t *testing.T, file string) (secret map[string][]byte, spki []byte) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(data)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	raw := map[string][]byte{"PKCS#8": block.Bytes}
	var pub any
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		pub = k.Public()
		if raw["scalar"], err = k.Bytes(); err != nil {
			t.Fatal(err)
		}
		if raw["SEC 1"], err = x509.MarshalECPrivateKey(k); err != nil {
			t.Fatal(err)
		}
	case *rsa.PrivateKey:
		pub = k.Public()
		raw["d"], raw["p"], raw["q"] = k.D.Bytes(), k.Primes[0].Bytes(), k.Primes[1].Bytes()
		raw["PKCS#1"] = x509.MarshalPKCS1PrivateKey(k)
	case ed25519.PrivateKey:
		pub, raw["seed"] = k.Public(), k.Seed()
	default:
		t.Fatalf("%T", key)
	}
	secret = map[string][]byte{}
	for name, b := range raw {
		secret[name] = b
		secret[name+" in hex"] = []byte(hex.EncodeToString(b))
		secret[name+" in HEX"] = bytes.ToUpper([]byte(hex.EncodeToString(b)))
		// Base64 depends on the offset: the middle of each of the three alignments is enough to find it.
		for skip := range 3 {
			s := base64.StdEncoding.EncodeToString(b[skip:])
			secret[name+" in base64 from "+string(rune('0'+skip))] = []byte(s[:len(s)-8])
		}
	}
	if spki, err = x509.MarshalPKIXPublicKey(pub); err != nil {
		t.Fatal(err)
	}
	return secret, spki
}

// Every byte of the channel is recorded while certificates of every key algorithm are ordered, deployed and renewed; no
// private key is in it in any form. Their public keys are, which shows that the recorder hears.
func TestPrivateKeysNeverCrossTheChannel(t *testing.T) {
	t.Parallel()
	e := storetest.Engines(t)[0]
	rec := &recorder{}
	w := newWorldWith(t, e, rec.wrap)
	var profiles []domain.Profile
	for i, a := range domain.KeyAlgorithms {
		profiles = append(profiles, domain.Profile{ID: "prof_0000000000000000000000000000010" + string(rune('0'+i)), Name: "alg-" + strings.ToLower(string(a)),
			KeyAlgorithm: a, Allowed: []domain.KeyAlgorithm{a}, EKUs: []domain.EKU{domain.EKUServerAuth}, TTL: day, MaxTTL: day, CreatedAt: domain.Micro(time.Now())})
	}
	if err := w.node.store.SeedProfiles(t.Context(), profiles); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	// A key is caught while it is there: the first generation's before the renewal retires it.
	keys := map[string]bool{}
	copies := t.TempDir()
	collect := func() {
		_ = filepath.WalkDir(w.host, func(path string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte("PRIVATE KEY")) {
					copied := filepath.Join(copies, filepath.Base(path))
					if !keys[path] && os.WriteFile(copied, b, 0o600) == nil {
						keys[path] = true
						keys[copied] = true
					}
				}
			}
			return nil
		})
	}
	for _, p := range profiles {
		sites := w.place(p.Name)
		call(w, ctx, "order", func(ctx context.Context, c clients) (*operatorpb.CreateCertificateResponse, error) {
			return c.certs.CreateCertificate(ctx, &operatorpb.CreateCertificateRequest{Name: p.Name, Issuer: "internal", Profile: p.Name,
				Names: &operatorpb.Names{Dns: []string{p.Name + ".test"}}, Targets: sites})
		})
		w.served(ctx, p.Name, 1)
		collect()
	}
	for _, p := range profiles {
		call(w, ctx, "renew", func(ctx context.Context, c clients) (*operatorpb.RenewCertificateResponse, error) {
			return c.certs.RenewCertificate(ctx, &operatorpb.RenewCertificateRequest{Id: p.Name})
		})
		w.served(ctx, p.Name, 2)
		collect()
	}
	rec.mu.Lock()
	defer rec.mu.Unlock()
	channel := append(bytes.Clone(rec.sent.Bytes()), rec.got.Bytes()...)
	found, searched := 0, 0
	for path := range keys {
		if filepath.Dir(path) != copies {
			continue // the copy stands for it
		}
		secrets, spki := encodings(t, path)
		searched++
		for form, b := range secrets {
			if bytes.Contains(channel, b) {
				t.Errorf("%s: %s of a private key crossed the channel", filepath.Base(path), form)
			}
		}
		if bytes.Contains(channel, spki) {
			found++
		}
	}
	// Two generations of six algorithms, and the agent's identity.
	if searched < 13 || found < 12 {
		t.Errorf("searched for %d keys, heard %d public ones in %d bytes", searched, found, len(channel))
	}
}
