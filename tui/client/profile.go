package client

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"go.yaml.in/yaml/v3"
)

// maxProfile bounds what is read of a profile: a key, an address and a few CA certificates.
const maxProfile = 256 << 10

// Key is an API key. It prints as a placeholder, so that no message can show it.
type Key string

func (Key) String() string   { return "[API key]" }
func (Key) GoString() string { return "[API key]" }

// Check reports what is wrong with the form of a key, without repeating it.
func (k Key) Check() error {
	switch {
	case k == "":
		return errors.New("no API key is set; log in with certmesh login or set CERTMESH_API_KEY")
	case len(k) > 1024:
		return errors.New("the API key is too long to be one; copy it again, alone")
	case strings.ContainsFunc(string(k), func(r rune) bool { return r <= ' ' || r > '~' }):
		return errors.New("the API key contains blanks or other characters that no key has; copy it again, alone")
	}
	return nil
}

// Profile is the file by which the tool finds a control plane. It holds a secret and belongs to its owner alone.
type Profile struct {
	// ServerURL is host:port of the operators' gRPC listener.
	ServerURL string `yaml:"server_url"`
	APIKey    Key    `yaml:"api_key"`
	// CACertificate is the PEM of the mesh root that the server's chain must end in.
	CACertificate string `yaml:"ca_certificate"`
}

// DefaultProfile is where the profile lies unless a path is given.
func DefaultProfile() (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", errors.New("the user's configuration directory is not known here; name the profile by --config or CERTMESH_CONFIG")
	}
	return filepath.Join(dir, "certmesh", "client.yaml"), nil
}

// LoadProfile reads a profile. A profile that others may read, and one with keys that it does not know, is refused. A
// missing file is reported by an error that matches fs.ErrNotExist.
func LoadProfile(path string) (Profile, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Profile{}, missing{path}
	}
	if err != nil {
		return Profile{}, fmt.Errorf("the profile cannot be read: %w; name another by --config", err)
	}
	defer func() { _ = f.Close() }() // only read
	info, err := f.Stat()
	if err != nil {
		return Profile{}, fmt.Errorf("the profile cannot be read: %w; name another by --config", err)
	}
	if !info.Mode().IsRegular() {
		return Profile{}, fmt.Errorf("the profile %s is not a file; name another by --config", path)
	}
	// Windows has no such bits; the directory's access list protects it there.
	if mode := info.Mode().Perm(); mode&^0o600 != 0 && runtime.GOOS != "windows" {
		return Profile{}, fmt.Errorf("the profile %s has mode %04o and holds an API key; run: chmod 600 %s", path, mode, quote(path))
	}
	data, err := io.ReadAll(io.LimitReader(f, maxProfile+1))
	if err != nil {
		return Profile{}, fmt.Errorf("the profile cannot be read: %w; name another by --config", err)
	}
	if len(data) > maxProfile {
		return Profile{}, fmt.Errorf("the profile %s is larger than %d KiB; write it anew with certmesh login", path, maxProfile>>10)
	}
	var p Profile
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	// The decoder's text may quote the file, and with it the key.
	if err := d.Decode(&p); err != nil {
		return Profile{}, fmt.Errorf("the profile %s is not a mapping of server_url, api_key and ca_certificate; write it anew with certmesh login", path)
	}
	return p, nil
}

// missing is a profile that is not there.
type missing struct{ path string }

func (m missing) Error() string {
	return "there is no profile at " + m.path + "; run certmesh login, or name one by --config"
}
func (missing) Is(err error) bool { return err == fs.ErrNotExist }

// quote makes path safe to paste into a shell.
func quote(path string) string {
	if !strings.ContainsFunc(path, func(r rune) bool {
		return !strings.ContainsRune("/._-+,:@%", r) && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}) {
		return path
	}
	return "'" + strings.ReplaceAll(path, "'", `'\''`) + "'"
}

// Save writes the profile with mode 0600, whole or not at all; a directory that is missing is made with mode 0700.
func (p Profile) Save(path string) (err error) {
	data, err := yaml.Marshal(p) //nolint:gosec // the key belongs into the profile, which is the owner's alone
	if err != nil {
		return fmt.Errorf("the profile cannot be encoded: %w", err)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("the profile's directory cannot be made: %w; name another by --config", err)
	}
	f, err := os.CreateTemp(dir, ".client-*") // mode 0600
	if err != nil {
		return fmt.Errorf("the profile cannot be written: %w; name another by --config", err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name()) // the error says what matters
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("the profile cannot be written: %w; name another by --config", err)
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("the profile cannot be written: %w; name another by --config", err)
	}
	return nil
}
