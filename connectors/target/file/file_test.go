package file_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/connectors/target/file"
	"github.com/certmesh/certmesh/connectors/target/targettest"
)

func raw(t testing.TB, settings map[string]any) json.RawMessage {
	t.Helper()
	b, err := json.Marshal(settings)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// read returns the files at cert and key, nil if neither exists.
func read(cert, key string) ([]byte, []byte, error) {
	c, err := os.ReadFile(cert)
	if err != nil && !os.IsNotExist(err) {
		return nil, nil, err
	}
	k, err := os.ReadFile(key)
	if err != nil && !os.IsNotExist(err) {
		return nil, nil, err
	}
	return c, k, nil
}

// readVersion reads as a careful reader does: it resolves the link once, and begins anew when that version was taken
// back meanwhile.
func readVersion(dir string) ([]byte, []byte, error) {
	for {
		v, err := filepath.EvalSymlinks(dir + "/current")
		if os.IsNotExist(err) {
			if _, err := os.Lstat(dir + "/current"); err == nil {
				continue
			}
			return nil, nil, nil
		}
		if err != nil {
			return nil, nil, err
		}
		c, k, err := read(v+"/fullchain.pem", v+"/key.pem")
		if err != nil || c != nil && k != nil {
			return c, k, err
		}
	}
}

func count(t *testing.T, pattern string) int {
	t.Helper()
	found, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return len(found)
}

func TestConformance(t *testing.T) {
	bad := map[string]json.RawMessage{
		"dir none":                json.RawMessage(`{}`),
		"dir two layouts":         json.RawMessage(`{"dir":"/a/b","pem_path":"/a/c.pem"}`),
		"key_path alone":          json.RawMessage(`{"cert_path":"/a/b"}`),
		"key_path same":           json.RawMessage(`{"cert_path":"/a/b","key_path":"/a/b"}`),
		"key_mode world":          json.RawMessage(`{"dir":"/a/b","key_mode":"0644"}`),
		"key_mode words":          json.RawMessage(`{"dir":"/a/b","key_mode":"rw"}`),
		"cert_mode writable":      json.RawMessage(`{"dir":"/a/b","cert_mode":"0666"}`),
		"backup_retention low":    json.RawMessage(`{"dir":"/a/b","backup_retention":-2}`),
		"owner odd":               json.RawMessage(`{"dir":"/a/b","owner":"a:b"}`),
		"verify_address no port":  json.RawMessage(`{"dir":"/a/b","verify_address":"localhost"}`),
		"server_name alone":       json.RawMessage(`{"dir":"/a/b","server_name":"x"}`),
		"reload_command line":     json.RawMessage(`{"dir":"/a/b","reload_command":"systemctl reload x"}`),
		"reload_command shell":    json.RawMessage(`{"dir":"/a/b","reload_command":["sh","-c","x"]}`),
		"validate_command alone":  json.RawMessage(`{"dir":"/a/b","validate_command":["true"]}`),
		"fullchain_name repeated": json.RawMessage(`{"dir":"/a/b","fullchain_name":"cert.pem"}`),
		"dir twice":               json.RawMessage(`{"dir":"/a/b","dir":"/a/b"}`),
		"DIR case":                json.RawMessage(`{"DIR":"/a/b"}`),
	}
	for _, l := range []struct {
		name        string
		place       func(t *testing.T) targettest.Place
		unsupported []string
	}{
		{"versions", func(t *testing.T) targettest.Place {
			root := t.TempDir()
			dir := root + "/site"
			return targettest.Place{
				Env:      target.Env{Roots: []string{root}, BackupRetention: 3},
				Settings: raw(t, map[string]any{"dir": dir}),
				Read: func() ([]byte, []byte, error) {
					return readVersion(dir)
				},
				Former:    func(t *testing.T) int { return count(t, dir+"/versions/*") - 1 },
				Retention: 3,
			}
		}, nil},
		{"combined", func(t *testing.T) targettest.Place {
			root := t.TempDir()
			path := root + "/site.pem"
			return targettest.Place{
				Env:       target.Env{Roots: []string{root}, BackupRetention: 3},
				Settings:  raw(t, map[string]any{"pem_path": path, "backup_retention": 2}),
				Read:      func() ([]byte, []byte, error) { b, _, err := read(path, path); return b, b, err },
				Former:    func(t *testing.T) int { return count(t, root+"/.site.pem.certmesh-backup-*") },
				Retention: 2,
			}
		}, nil},
		{"separate", func(t *testing.T) targettest.Place {
			root := t.TempDir()
			return targettest.Place{
				Env:       target.Env{Roots: []string{root}, BackupRetention: 3},
				Settings:  raw(t, map[string]any{"cert_path": root + "/c.pem", "key_path": root + "/k.pem", "chain_path": root + "/ca.pem"}),
				Read:      func() ([]byte, []byte, error) { return read(root+"/c.pem", root+"/k.pem") },
				Former:    func(t *testing.T) int { return count(t, root+"/.k.pem.certmesh-backup-*") },
				Retention: 3,
			}
		}, []string{targettest.Atomic}},
		{"no backups", func(t *testing.T) targettest.Place {
			root := t.TempDir()
			return targettest.Place{
				Env:       target.Env{Roots: []string{root}, BackupRetention: 3},
				Settings:  raw(t, map[string]any{"cert_path": root + "/c.pem", "key_path": root + "/k.pem", "backup_retention": -1}),
				Read:      func() ([]byte, []byte, error) { return read(root+"/c.pem", root+"/k.pem") },
				Former:    func(t *testing.T) int { return count(t, root+"/.*certmesh-backup-*") },
				Retention: 0,
			}
		}, []string{targettest.Atomic, targettest.UndoCommitted}},
		{"reloaded and verified", func(t *testing.T) targettest.Place {
			root := t.TempDir()
			site := newSite(t, root+"/site.pem")
			reload := target.Command{"touch", root + "/reloaded"}
			return targettest.Place{
				Env: target.Env{Roots: []string{root}, BackupRetention: 3, Commands: []target.Command{reload, {"test", "-s", root + "/site.pem"}}},
				Settings: raw(t, map[string]any{"pem_path": root + "/site.pem", "reload_command": reload,
					"validate_command": []string{"test", "-s", root + "/site.pem"}, "verify_address": site.address, "server_name": "site.example.test"}),
				Read: func() ([]byte, []byte, error) {
					b, _, err := read(root+"/site.pem", root+"/site.pem")
					return b, b, err
				},
				Start:   func(t *testing.T) { site.start(t, root+"/reloaded") },
				Address: site.address,
			}
		}, nil},
	} {
		t.Run(l.name, func(t *testing.T) {
			targettest.Run(t, targettest.Suite{Kind: file.Kind(), New: l.place, Bad: bad, Unsupported: l.unsupported})
		})
	}
}

// TestContents: what is in which file, and with which rights.
func TestContents(t *testing.T) {
	t.Parallel()
	ca := targettest.NewCA(t)
	m := ca.Material(t)
	one := func(b []byte) int { return bytes.Count(b, []byte("BEGIN CERTIFICATE")) }
	for _, c := range []struct {
		name     string
		settings map[string]any
		// certificates by file, and its mode
		want map[string]int
		mode map[string]os.FileMode
	}{
		{"versions", map[string]any{"dir": "site"}, map[string]int{"site/current/cert.pem": 1, "site/current/chain.pem": 1, "site/current/fullchain.pem": 2, "site/current/key.pem": 0},
			map[string]os.FileMode{"site/current/cert.pem": 0o644, "site/current/key.pem": 0o600}},
		{"versions named", map[string]any{"dir": "site", "cert_name": "a", "key_name": "b", "chain_name": "c", "fullchain_name": "d", "key_mode": "0640"},
			map[string]int{"site/current/a": 1, "site/current/b": 0, "site/current/c": 1, "site/current/d": 2}, map[string]os.FileMode{"site/current/b": 0o640}},
		{"combined", map[string]any{"pem_path": "p.pem"}, map[string]int{"p.pem": 2}, map[string]os.FileMode{"p.pem": 0o600}},
		{"two", map[string]any{"cert_path": "c.pem", "key_path": "k.pem", "cert_mode": "0444"}, map[string]int{"c.pem": 2, "k.pem": 0}, map[string]os.FileMode{"c.pem": 0o444, "k.pem": 0o600}},
		{"three", map[string]any{"cert_path": "c.pem", "key_path": "k.pem", "chain_path": "i.pem"}, map[string]int{"c.pem": 1, "k.pem": 0, "i.pem": 1}, map[string]os.FileMode{"i.pem": 0o644}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			root := t.TempDir()
			settings := map[string]any{}
			for k, v := range c.settings {
				if s, ok := v.(string); ok && (k == "dir" || strings.HasSuffix(k, "_path")) {
					v = root + "/" + s
				}
				settings[k] = v
			}
			tg := open(t, root, settings)
			install(t, tg, m)
			keys := 0
			for name, n := range c.want {
				b, err := os.ReadFile(root + "/" + name)
				if err != nil {
					t.Fatal(err)
				}
				if one(b) != n {
					t.Errorf("%s has %d certificates, want %d", name, one(b), n)
				}
				keys += bytes.Count(b, []byte("BEGIN PRIVATE KEY"))
			}
			if keys != 1 {
				t.Errorf("%d keys", keys)
			}
			for name, want := range c.mode {
				fi, err := os.Stat(root + "/" + name)
				if err != nil || fi.Mode().Perm() != want {
					t.Errorf("%s has mode %v, want %v: %v", name, fi.Mode(), want, err)
				}
			}
		})
	}
}

func open(t *testing.T, root string, settings map[string]any) target.Target {
	t.Helper()
	tg, err := file.Kind().Open(t.Context(), env(root), raw(t, settings))
	if err != nil {
		t.Fatal(err)
	}
	return tg
}

func install(t *testing.T, tg target.Target, m target.Material) {
	t.Helper()
	st, err := tg.Stage(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if cur, err := tg.Current(t.Context()); err != nil || cur.Leaf != m.Leaf() {
		t.Fatalf("%v, %v", cur, err)
	}
}
