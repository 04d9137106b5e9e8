package secret

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

var epoch = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func key(b byte) []byte { return bytes.Repeat([]byte{b}, KeySize) }

func ring(t testing.TB, keys ...byte) *Keyring {
	t.Helper()
	var older [][]byte
	for _, b := range keys[1:] {
		older = append(older, key(b))
	}
	k, err := NewKeyring(key(keys[0]), older...)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func seal1(t testing.TB, k *Keyring, text string) domain.SealedKey {
	t.Helper()
	s, err := k.Seal("sk_1", "ca/iss_1/sign", []byte(text), epoch)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	k := ring(t, 1)
	for _, text := range []string{"x", "a private key", strings.Repeat("long", maxPlaintext/4)} {
		s := seal1(t, k, text)
		got, err := k.Open(s)
		if err != nil || string(got) != text {
			t.Fatalf("%d bytes: %v", len(text), err)
		}
		if len(text) > 1 && (bytes.Contains(s.Ciphertext, []byte(text)) || bytes.Contains(s.WrappedDEK, []byte(text))) {
			t.Fatal("the plaintext is in the row")
		}
		if s.ID != "sk_1" || s.Purpose != "ca/iss_1/sign" || s.KEKID != k.ID() || !s.CreatedAt.Equal(epoch) {
			t.Fatalf("%+v", s)
		}
	}
	if a, b := seal1(t, k, "same"), seal1(t, k, "same"); bytes.Equal(a.Ciphertext, b.Ciphertext) || bytes.Equal(a.WrappedDEK, b.WrappedDEK) {
		t.Error("two seals of one secret are alike")
	}
}

func TestSealRefusesWhatItCannotBind(t *testing.T) {
	t.Parallel()
	k := ring(t, 1)
	for name, try := range map[string]func() (domain.SealedKey, error){
		"no id":      func() (domain.SealedKey, error) { return k.Seal("", "p", []byte("x"), epoch) },
		"no purpose": func() (domain.SealedKey, error) { return k.Seal("i", "", []byte("x"), epoch) },
		"nothing":    func() (domain.SealedKey, error) { return k.Seal("i", "p", nil, epoch) },
		"too much":   func() (domain.SealedKey, error) { return k.Seal("i", "p", make([]byte, maxPlaintext+1), epoch) },
	} {
		if _, err := try(); err == nil {
			t.Errorf("%s: sealed", name)
		}
	}
}

func TestChangedRowsDoNotOpen(t *testing.T) {
	t.Parallel()
	k := ring(t, 1, 2)
	good := seal1(t, k, "a private key")
	other, err := k.Seal("sk_2", "ca/iss_1/sign", []byte("another key"), epoch)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*domain.SealedKey){
		"swapped row":          func(s *domain.SealedKey) { s.WrappedDEK, s.Ciphertext = other.WrappedDEK, other.Ciphertext },
		"swapped ciphertext":   func(s *domain.SealedKey) { s.Ciphertext = other.Ciphertext },
		"swapped data key":     func(s *domain.SealedKey) { s.WrappedDEK = other.WrappedDEK },
		"renamed":              func(s *domain.SealedKey) { s.ID = "sk_2" },
		"another purpose":      func(s *domain.SealedKey) { s.Purpose = "ca/iss_1/root" },
		"parts moved":          func(s *domain.SealedKey) { s.ID, s.Purpose = "sk_", "1ca/iss_1/sign" },
		"another KEK of ours":  func(s *domain.SealedKey) { s.KEKID = keyID(key(2)) },
		"fields exchanged":     func(s *domain.SealedKey) { s.WrappedDEK, s.Ciphertext = s.Ciphertext, s.WrappedDEK },
		"a flipped bit":        func(s *domain.SealedKey) { s.Ciphertext[len(s.Ciphertext)-1] ^= 1 },
		"a flipped nonce":      func(s *domain.SealedKey) { s.Ciphertext[1] ^= 1 },
		"a flipped data key":   func(s *domain.SealedKey) { s.WrappedDEK[5] ^= 1 },
		"cut short":            func(s *domain.SealedKey) { s.Ciphertext = s.Ciphertext[:10] },
		"empty":                func(s *domain.SealedKey) { s.Ciphertext = nil },
		"another format":       func(s *domain.SealedKey) { s.Ciphertext[0] = 9 },
		"data key of no bytes": func(s *domain.SealedKey) { s.WrappedDEK = nil },
	} {
		s := good
		s.WrappedDEK, s.Ciphertext = bytes.Clone(good.WrappedDEK), bytes.Clone(good.Ciphertext)
		change(&s)
		text, err := k.Open(s)
		if text != nil || !fault.Is(err, fault.Rejected) {
			t.Errorf("%s: %q, %v", name, text, err)
		}
	}
}

func TestAWrongKEKIsNamed(t *testing.T) {
	t.Parallel()
	s := seal1(t, ring(t, 1), "a private key")
	_, err := ring(t, 2, 3).Open(s)
	if !fault.Is(err, fault.Unauthorized) || !strings.Contains(err.Error(), keyID(key(1))) || !strings.Contains(err.Error(), keyID(key(2))) {
		t.Fatal(err)
	}
	// After a change of keys the older one still opens.
	if text, err := ring(t, 2, 1).Open(s); err != nil || string(text) != "a private key" {
		t.Fatal(err)
	}
	if _, err := NewKeyring(make([]byte, 16)); !fault.Is(err, fault.Invalid) {
		t.Errorf("a key of 16 bytes: %v", err)
	}
	if strings.Contains(keyID(key(1)), "0101") {
		t.Error("the id shows the key")
	}
}

func write(t testing.TB, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kek")
	if err := errors.Join(os.WriteFile(path, []byte(text), 0o600), os.Chmod(path, mode)); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestKeyFiles(t *testing.T) {
	t.Parallel()
	one, two := base64.StdEncoding.EncodeToString(key(1)), base64.StdEncoding.EncodeToString(key(2))
	k, err := LoadFile(write(t, "# rotated on Monday\n\n"+two+"\r\n"+one+"\n", 0o600))
	if err != nil || k.ID() != keyID(key(2)) {
		t.Fatalf("%v", err)
	}
	if _, err := k.Open(seal1(t, ring(t, 1), "x")); err != nil {
		t.Error("the older key of the file does not open")
	}
	if _, err := LoadFile(write(t, one, 0o400)); err != nil {
		t.Errorf("mode 0400: %v", err)
	}
	secretish := one[:30]
	for name, c := range map[string]struct {
		path, says string
		class      fault.Class
	}{
		"group may read":  {write(t, one, 0o640), "chmod 600", fault.Invalid},
		"others may read": {write(t, one, 0o604), "chmod 600", fault.Invalid},
		"world may write": {write(t, one, 0o602), "chmod 600", fault.Invalid},
		"empty":           {write(t, "", 0o600), "holds no key", fault.Invalid},
		"comments only":   {write(t, "# nothing\n", 0o600), "holds no key", fault.Invalid},
		"short":           {write(t, one[:30]+"\n", 0o600), "line 1", fault.Invalid},
		"second is junk":  {write(t, one+"\n"+secretish+"??\n", 0o600), "line 2", fault.Invalid},
		"too long a file": {write(t, strings.Repeat("#\n", maxFile), 0o600), "greater than", fault.Invalid},
		"a directory":     {t.TempDir(), "not a file", fault.Invalid},
		"missing":         {filepath.Join(t.TempDir(), "none"), "openssl rand", fault.NotFound},
	} {
		_, err := LoadFile(c.path)
		if !fault.Is(err, c.class) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && strings.Contains(err.Error(), secretish) {
			t.Errorf("%s: the error quotes the key", name)
		}
	}
}

func TestProcessesThatStartTogetherShareOneKey(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "kek")
	ids := make([]string, 16)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			k, err := LoadOrCreateFile(path)
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = k.ID()
		})
	}
	wg.Wait()
	for _, id := range ids {
		if id == "" || id != ids[0] {
			t.Fatalf("keys %v", ids)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if again, err := LoadOrCreateFile(path); err != nil || again.ID() != ids[0] {
		t.Errorf("a later start: %v", err)
	}
	// An existing file that is wrong is never replaced.
	bad := write(t, "junk", 0o600)
	if _, err := LoadOrCreateFile(bad); err == nil {
		t.Error("junk was accepted")
	}
	if text, err := os.ReadFile(bad); err != nil || string(text) != "junk" {
		t.Errorf("junk was replaced by %d bytes", len(text))
	}
	if _, err := LoadOrCreateFile(filepath.Join(dir, "no", "such", "kek")); !fault.Is(err, fault.Invalid) {
		t.Errorf("a missing directory: %v", err)
	}
}

func TestPassphraseBounds(t *testing.T) {
	t.Parallel()
	ok := Passphrase{Salt: make([]byte, 16), LogN: 14, R: 8, P: 1}
	phrase := []byte("correct horse battery")
	a, err := ok.Keyring(phrase)
	if err != nil {
		t.Fatal(err)
	}
	b, err := ok.Keyring(phrase)
	if err != nil || a.ID() != b.ID() {
		t.Fatalf("one passphrase, two keys: %v", err)
	}
	salted := ok
	salted.Salt = []byte("another salt 123")
	if c, err := salted.Keyring(phrase); err != nil || c.ID() == a.ID() {
		t.Errorf("the salt counts for nothing: %v", err)
	}
	if _, err := ok.Keyring([]byte("too short a word")[:minPassphrase-1]); !fault.Is(err, fault.Invalid) {
		t.Errorf("a short passphrase: %v", err)
	}
	for name, change := range map[string]func(*Passphrase){
		"short salt": func(p *Passphrase) { p.Salt = p.Salt[:15] }, "cheap": func(p *Passphrase) { p.LogN = 13 }, "ruinous": func(p *Passphrase) { p.LogN = 21 },
		"r low": func(p *Passphrase) { p.R = 7 }, "r high": func(p *Passphrase) { p.R = 17 }, "p low": func(p *Passphrase) { p.P = 0 }, "p high": func(p *Passphrase) { p.P = 5 },
	} {
		p := ok
		change(&p)
		if _, err := p.Keyring(phrase); !fault.Is(err, fault.Invalid) || strings.Contains(err.Error(), string(phrase)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	fresh, err := NewPassphrase()
	if err != nil || len(fresh.Salt) != 16 || fresh.LogN < 17 {
		t.Errorf("%+v, %v", fresh, err)
	}
}

func FuzzOpen(f *testing.F) {
	k, err := NewKeyring(key(1))
	if err != nil {
		f.Fatal(err)
	}
	s, err := k.Seal("sk_1", "p", []byte("x"), epoch)
	if err != nil {
		f.Fatal(err)
	}
	noise := make([]byte, 60)
	if _, err := rand.Read(noise); err != nil {
		f.Fatal(err)
	}
	f.Add(s.WrappedDEK, noise)
	f.Add(noise, s.Ciphertext)
	f.Fuzz(func(t *testing.T, wrapped, text []byte) {
		c := s
		c.WrappedDEK, c.Ciphertext = wrapped, text
		if _, err := k.Open(c); err == nil && (!bytes.Equal(wrapped, s.WrappedDEK) || !bytes.Equal(text, s.Ciphertext)) {
			t.Fatal("a forged row opened")
		}
	})
}
