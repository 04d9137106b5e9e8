package secret

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/crypto/scrypt"

	"github.com/certmesh/certmesh/protocol/fault"
)

// maxFile bounds a key file: some 80 keys and comments.
const maxFile = 8 << 10

// LoadFile reads key-encryption keys from a file of mode 0600 or stricter: one key a line, KeySize bytes in base64,
// the sealing key first; lines that begin with # are comments.
func LoadFile(path string) (*Keyring, error) {
	f, err := os.Open(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fault.Wrap(fault.NotFound, err, "no key-encryption key at %s: make one with `openssl rand -base64 32`, mode 0600, "+
			"the same on every node, and back it up apart from the database", path)
	case err != nil:
		return nil, fault.Wrap(fault.Invalid, err, "read the key-encryption key")
	}
	defer func() { _ = f.Close() }() // only read
	info, err := f.Stat()
	if err != nil {
		return nil, fault.Wrap(fault.Invalid, err, "read the key-encryption key")
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, fault.New(fault.Invalid, "%s is not a file; secrets.kek_file names the file with the key-encryption key", path)
	case info.Mode().Perm()&0o077 != 0:
		return nil, fault.New(fault.Invalid, "%s has mode %04o, so others on this host may read the key-encryption key: chmod 600 %s",
			path, info.Mode().Perm(), path)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fault.Wrap(fault.Invalid, err, "read the key-encryption key")
	}
	defer clear(text)
	if len(text) > maxFile {
		return nil, fault.New(fault.Invalid, "%s is greater than %d bytes; it holds %d random bytes in base64", path, maxFile, KeySize)
	}
	k, err := parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return k, nil
}

func parse(text []byte) (*Keyring, error) {
	var keys [][]byte
	defer func() {
		for _, k := range keys {
			clear(k)
		}
	}()
	for n, line := range bytes.Split(text, []byte("\n")) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		key := make([]byte, base64.StdEncoding.DecodedLen(len(line)))
		size, err := base64.StdEncoding.Strict().Decode(key, line)
		if err != nil || size != KeySize {
			// The cause would quote the line: it is a secret.
			clear(key)
			return nil, fault.New(fault.Invalid, "line %d is not %d bytes in base64: make a key with `openssl rand -base64 32`", n+1, KeySize)
		}
		keys = append(keys, key[:size])
	}
	if len(keys) == 0 {
		return nil, fault.New(fault.Invalid, "holds no key: make one with `openssl rand -base64 32`")
	}
	return NewKeyring(keys[0], keys[1:]...)
}

// LoadOrCreateFile is LoadFile for a single node: when there is no file it makes one of mode 0600 in an existing
// directory. Of processes that start together one makes the key and all use it.
func LoadOrCreateFile(path string) (*Keyring, error) {
	k, err := LoadFile(path)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return k, err
	}
	if err := create(path); err != nil {
		return nil, fault.Wrap(fault.Invalid, err, "make the key-encryption key %s", path)
	}
	return LoadFile(path)
}

// create writes a new key beside path and links it there: after a crash there is a whole file or none, and an existing
// one is never replaced.
func create(path string) error {
	key := make([]byte, KeySize)
	defer clear(key)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, ".kek-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp.Name()) }() // the key is at path, or nowhere
	_, err = tmp.WriteString(base64.StdEncoding.EncodeToString(key) + "\n")
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Link(tmp.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Passphrase are the parameters by which a key-encryption key is derived from a passphrase with scrypt (RFC 7914).
// They are no secret and are stored in clear; every node needs the same.
type Passphrase struct {
	Salt []byte `json:"salt"` // 16 bytes or more
	LogN int    `json:"log_n"`
	R    int    `json:"r"`
	P    int    `json:"p"`
}

// NewPassphrase returns parameters with a fresh salt that cost about 0.3 s and 128 MiB (2^17, 8, 1).
func NewPassphrase() (Passphrase, error) {
	p := Passphrase{Salt: make([]byte, 16), LogN: 17, R: 8, P: 1}
	if _, err := rand.Read(p.Salt); err != nil {
		return Passphrase{}, fault.Wrap(fault.Internal, err, "make a salt")
	}
	return p, nil
}

// minPassphrase is the shortest passphrase, in bytes: it guards every CA key against whoever gets a copy of the database.
const minPassphrase = 16

// Keyring derives the key-encryption key. Parameters that are too weak, or so strong that they would exhaust the node,
// are refused.
func (p Passphrase) Keyring(passphrase []byte) (*Keyring, error) {
	switch {
	case len(passphrase) < minPassphrase:
		return nil, fault.New(fault.Invalid, "a passphrase for key encryption has at least %d characters", minPassphrase)
	case len(p.Salt) < 16, p.LogN < 14, p.LogN > 20, p.R < 8, p.R > 16, p.P < 1, p.P > 4:
		return nil, fault.New(fault.Invalid, "the stored parameters of the passphrase are out of bounds "+
			"(salt of 16 bytes, log_n 14 to 20, r 8 to 16, p 1 to 4): restore them from a backup")
	}
	key, err := scrypt.Key(passphrase, p.Salt, 1<<p.LogN, p.R, p.P, KeySize)
	if err != nil {
		return nil, fault.Wrap(fault.Invalid, err, "derive the key-encryption key")
	}
	defer clear(key)
	return NewKeyring(key)
}
