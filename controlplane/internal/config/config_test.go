package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/certmesh/certmesh/protocol/fault"
)

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "node.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func env(kv map[string]string) func(string) (string, bool) {
	return func(k string) (string, bool) { v, ok := kv[k]; return v, ok }
}

func TestPrecedenceAndOrigin(t *testing.T) {
	t.Parallel()
	l, err := Load(Sources{
		File: write(t, "listen:\n  api: 127.0.0.1:1\n  grpc: 127.0.0.1:2\n  mesh: 127.0.0.1:3\nstore:\n  migrate: false\n"),
		Getenv: env(map[string]string{"CERTMESH_LISTEN_GRPC": "127.0.0.1:22", "CERTMESH_LISTEN_MESH": "127.0.0.1:33",
			"CERTMESH_STORE_DSN": "postgres://u:hunter2@db/x"}),
		Flags: map[string]string{"listen.mesh": "127.0.0.1:333"},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]struct {
		text   string
		origin Origin
	}{
		"listen.api":  {"127.0.0.1:1", FromFile},
		"listen.grpc": {"127.0.0.1:22", FromEnv},
		"listen.mesh": {"127.0.0.1:333", FromFlag},
		"listen.pki":  {":8080", FromDefault},
		// A value that the file sets to its type's zero is not overwritten by the default.
		"store.migrate": {"false", FromFile},
		"store.dsn":     {"(set)", FromEnv},
	}
	for _, v := range l.Values() {
		if strings.Contains(v.Text, "hunter2") {
			t.Errorf("%s shows a secret", v.Key)
		}
		if w, ok := want[v.Key]; ok {
			if v.Text != w.text || v.Origin != w.origin {
				t.Errorf("%s = %q from %s, want %q from %s", v.Key, v.Text, v.Origin, w.text, w.origin)
			}
			delete(want, v.Key)
		}
	}
	if len(want) > 0 {
		t.Errorf("missing: %v", want)
	}
	if l.Config.Scheduler.RenewalCheckInterval != time.Hour {
		t.Errorf("renewal check interval %s", l.Config.Scheduler.RenewalCheckInterval)
	}
}

func TestEveryProblemIsNamed(t *testing.T) {
	t.Parallel()
	_, err := Load(Sources{
		File: write(t, "listen:\n  api: nowhere\nlog:\n  level: loud\npki:\n  public_url: ftp://x\n"),
		Getenv: env(map[string]string{"CERTMESH_IDENTITY_TTL": "1s", "CERTMESH_STORE_MAX_READERS": "many",
			"CERTMESH_SCHEDULER_RETRY_INTERVAL": "0s", "CERTMESH_API_CHANGES": "0", "CERTMESH_API_CHANGES_WAITING": "-1"}),
		Flags: map[string]string{"no.such": "1"},
	})
	if err == nil {
		t.Fatal("accepted")
	}
	for _, key := range []string{"listen.api", "log.level", "pki.public_url", "mesh.identity_ttl", "store.max_readers",
		"scheduler.retry_interval", "api.changes: 0", "api.changes_waiting: -1", "no.such"} {
		if !strings.Contains(err.Error(), key) {
			t.Errorf("%s is not named in: %v", key, err)
		}
	}
}

// TestBadFilesAreToldInOneLineEach: by key, file, line and what is allowed, in the words of the file and not of Go.
func TestBadFilesAreToldInOneLineEach(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ text, want string }{
		"unknown key":     {"listen:\n  apu: 127.0.0.1:1\n", "listen.apu: is no setting (node.yaml, line 2); listen has api, grpc, mesh, raft, pki"},
		"unknown section": {"lisen:\n  api: x\n", `"lisen": is no section (node.yaml, line 1); use one of node, listen, store`},
		"duration":        {"jobs:\n  keep: long\n", `jobs.keep: "long" is not a duration such as 30s or 1h (node.yaml, line 2)`},
		"number":          {"store:\n  max_readers: many\n", `store.max_readers: "many" is not a whole number (node.yaml, line 2)`},
		"truth":           {"store:\n  migrate: perhaps\n", `store.migrate: "perhaps" is not true or false (node.yaml, line 2)`},
		"list for one":    {"log:\n  level: [a]\n", "log.level: is not a single value (node.yaml, line 2)"},
		"map for a list":  {"node:\n  names:\n    a: b\n", "node.names: is not a list such as [a, b] (node.yaml, line 3)"},
		"text for all":    {"hello", "node.yaml holds no sections; write some of node, listen"},
		"text for a part": {"log: info\n", "log: is a section (node.yaml, line 1); write its settings below it: level, format"},
		"twice":           {"log:\n  level: info\n  level: warn\n", "log.level: is there twice (node.yaml, line 3); keep one"},
		"no YAML":         {"log:\n\tlevel: info\n", "node.yaml is not YAML: line 2: found character that cannot start any token; write"},
		"secret":          {"store:\n  dsn: [hunter2]\n", "store.dsn: is not a single value (node.yaml, line 2)"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := Load(Sources{File: write(t, c.text)})
			if err == nil || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "hunter2") {
				t.Fatalf("got  %v\nwant %s", err, c.want)
			}
			if !fault.Is(err, fault.Invalid) {
				t.Fatalf("class %s", fault.ClassOf(err))
			}
		})
	}
	l, err := Load(Sources{File: write(t, "node:\n  names: [a, b]\n  id:\njobs:\nlog: {level: warn}\n")})
	if err != nil || l.Config.Log.Level != "warn" || strings.Join(l.Config.Node.Names, " ") != "a b" || l.Config.Jobs.Keep != 720*time.Hour {
		t.Fatalf("%+v %v", l, err)
	}
	if l, err = Load(Sources{File: write(t, "# nothing\n")}); err != nil || l.Config.Log.Level != "info" {
		t.Fatal(err)
	}
}

func TestEverySettingIsDocumented(t *testing.T) {
	t.Parallel()
	envs := map[string]bool{}
	for _, v := range Reference() {
		if v.Doc == "" || !strings.HasPrefix(v.Env, "CERTMESH_") || envs[v.Env] {
			t.Errorf("%s needs a doc and a CERTMESH_ variable of its own (has %q)", v.Key, v.Env)
		}
		envs[v.Env] = true
	}
}

// TestNeverIsAnInterval: agents may be told not to look by themselves; no other interval may be nothing.
func TestNeverIsAnInterval(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ key, value, want string }{
		"never":            {"jobs.verify_interval", "0s", ""},
		"negative":         {"jobs.verify_interval", "-1s", "jobs.verify_interval"},
		"another interval": {"jobs.verify_timeout", "0s", "jobs.verify_timeout"},
	} {
		_, err := Load(Sources{Getenv: env(nil), Flags: map[string]string{c.key: c.value}})
		switch {
		case c.want == "" && err != nil, c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v", name, err)
		}
	}
}
