package keystore

import (
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	idA = "cert_00000000000000000000000000000001"
	idB = "cert_00000000000000000000000000000002"
)

func stores(t *testing.T) map[string]Store {
	d, err := Open(filepath.Join(t.TempDir(), "keys"))
	if err != nil {
		t.Fatal(err)
	}
	return map[string]Store{"disk": d, "memory": NewMemory()}
}

func ensure(t *testing.T, s Store, id string, generation int64, algorithm string) Key {
	t.Helper()
	k, err := s.Ensure(id, generation, algorithm)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func leaf(t *testing.T, k Key) []byte {
	t.Helper()
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Signer.Public(), k.Signer)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func list(t *testing.T, s Store) string {
	t.Helper()
	is, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, i := range is {
		fmt.Fprintf(&b, "%s/%d/%s/%v ", i.CertificateID[36:], i.Generation, i.Algorithm, len(i.Leaf) > 0)
	}
	return strings.TrimSpace(b.String())
}

func TestStore(t *testing.T) {
	t.Parallel()
	for name, s := range stores(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k1 := ensure(t, s, idA, 1, "ECDSA-P256")
			if again := ensure(t, s, idA, 1, "ECDSA-P256"); again.SPKI != k1.SPKI {
				t.Error("asked again, it made another key")
			}
			ensure(t, s, idA, 2, "Ed25519")
			ensure(t, s, idA, 2, "ECDSA-P384")
			ensure(t, s, idB, 1, "RSA-2048")
			if got := list(t, s); got != "1/1/ECDSA-P256/false 1/2/ECDSA-P384/false 1/2/Ed25519/false 2/1/RSA-2048/false" &&
				got != "1/1/ECDSA-P256/false 1/2/Ed25519/false 1/2/ECDSA-P384/false 2/1/RSA-2048/false" {
				t.Error(got)
			}
			if _, err := s.BySPKI(idB, k1.SPKI); !fault.Is(err, fault.NotFound) {
				t.Errorf("another certificate's key: %v", err)
			}
			if err := s.PutLeaf(idA, k1.SPKI, leaf(t, k1)); err != nil {
				t.Fatal(err)
			}
			if err := s.Relabel(idA, k1.SPKI, 5); err != nil {
				t.Fatal(err)
			}
			if err := s.Relabel(idA, SPKI{9}, 5); err != nil {
				t.Errorf("a retired key: %v", err)
			}
			if n, err := s.Retire(idA, 5); n != 2 || err != nil {
				t.Errorf("retired %d, %v", n, err)
			}
			if got := list(t, s); got != "1/5/ECDSA-P256/true 2/1/RSA-2048/false" {
				t.Error(got)
			}
			if k, err := s.BySPKI(idA, k1.SPKI); err != nil || k.Generation != 5 {
				t.Errorf("%+v, %v", k, err)
			}
			if err := s.PutLeaf(idA, SPKI{9}, nil); !fault.Is(err, fault.NotFound) {
				t.Errorf("a leaf without a key: %v", err)
			}
			if n, err := s.Retire(idA, 1<<40); n != 1 || err != nil {
				t.Errorf("retired %d, %v", n, err)
			}
		})
	}
}

// TestHostileNames: nothing from the wire becomes a path.
func TestHostileNames(t *testing.T) {
	t.Parallel()
	for name, s := range stores(t) {
		for _, id := range []string{"", "..", "../x", "cert_" + strings.Repeat("A", 32), idA + "/..", idA + "\x00", idA + "\n"} {
			_, e1 := s.Ensure(id, 1, "ECDSA-P256")
			_, e2 := s.BySPKI(id, SPKI{})
			_, e3 := s.Retire(id, 1)
			for i, err := range []error{e1, e2, e3, s.Relabel(id, SPKI{}, 1), s.PutLeaf(id, SPKI{}, nil)} {
				if !fault.Is(err, fault.Invalid) {
					t.Errorf("%s: %q: call %d: %v", name, id, i, err)
				}
			}
		}
		for _, g := range []int64{-1, maxGeneration + 1} {
			if _, err := s.Ensure(idA, g, "ECDSA-P256"); !fault.Is(err, fault.Invalid) {
				t.Errorf("generation %d: %v", g, err)
			}
		}
		if _, err := s.Ensure(idA, 1, "RSA-512"); !fault.Is(err, fault.Unsupported) {
			t.Error(err)
		}
	}
}

func TestConcurrentEnsure(t *testing.T) {
	t.Parallel()
	for name, s := range stores(t) {
		var mu sync.Mutex
		seen := map[SPKI]bool{}
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				k, err := s.Ensure(idA, 1, "ECDSA-P256")
				mu.Lock()
				defer mu.Unlock()
				if seen[k.SPKI] = true; err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if len(seen) != 1 {
			t.Errorf("%s: %d keys of one generation", name, len(seen))
		}
	}
}

func TestModes(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "keys")
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	k := ensure(t, s, idA, 1, "ECDSA-P256")
	if err := s.PutLeaf(idA, k.SPKI, leaf(t, k)); err != nil {
		t.Fatal(err)
	}
	files := 0
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		want := fs.FileMode(0o600)
		if d.IsDir() {
			want = 0o700
		} else {
			files++
		}
		if st.Mode().Perm() != want {
			t.Errorf("%s has mode %v", path, st.Mode())
		}
		return err
	})
	if err != nil || files != 2 {
		t.Errorf("%d files, %v", files, err)
	}
}

// TestRelabelCutBetweenRenames: the leaf is renamed first and found by its public key whichever name it carries.
func TestRelabelCutBetweenRenames(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	k := ensure(t, s, idA, 1, "ECDSA-P256")
	if err := s.PutLeaf(idA, k.SPKI, leaf(t, k)); err != nil {
		t.Fatal(err)
	}
	from, to := filepath.Join(dir, idA, baseName(1, k.SPKI)), filepath.Join(dir, idA, baseName(7, k.SPKI))
	if err := os.Rename(from+".crt", to+".crt"); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(dir); err != nil {
		t.Fatal(err)
	}
	if got := list(t, s); got != "1/1/ECDSA-P256/true" {
		t.Error(got)
	}
	// Said again, as the server does.
	if err := s.Relabel(idA, k.SPKI, 7); err != nil {
		t.Fatal(err)
	}
	if got := list(t, s); got != "1/7/ECDSA-P256/true" {
		t.Error(got)
	}
	if n, err := s.Retire(idA, 8); n != 1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if es, _ := os.ReadDir(filepath.Join(dir, idA)); len(es) != 0 {
		t.Errorf("left: %v", es)
	}
}

// TestDamagedKey is an error that names the file and not its content; another certificate's keys still work.
func TestDamagedKey(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	k := ensure(t, s, idA, 1, "ECDSA-P256")
	other := ensure(t, s, idB, 1, "ECDSA-P256")
	data, err := other.PEM()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, idA, baseName(1, k.SPKI)+".pem")
	for _, b := range [][]byte{nil, []byte("garbage"), data} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.BySPKI(idA, k.SPKI); !fault.Is(err, fault.Internal) {
			t.Errorf("%v", err)
		}
		if _, err := s.BySPKI(idB, other.SPKI); err != nil {
			t.Error(err)
		}
	}
}

func TestUnwritable(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, idA), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Ensure(idA, 1, "ECDSA-P256"); !fault.Is(err, fault.Retryable) {
		t.Error(err)
	}
	if _, err := Open(filepath.Join(dir, idA)); !fault.Is(err, fault.Retryable) {
		t.Error(err)
	}
}
