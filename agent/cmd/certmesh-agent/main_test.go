package main

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/certmesh/certmesh/agent/agentd"
)

const token = "cmjt1.tok." + "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA" + ".0000000000000000000000000000000000000000000000000000000000000000"

type outcome struct {
	code        int
	out, stderr string
}

func invoke(t *testing.T, env map[string]string, args ...string) outcome {
	t.Helper()
	var out, errs bytes.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // nothing here needs a server; what tries to reach one ends
	code := run(ctx, args, &out, &errs, lookup(env))
	return outcome{code, out.String(), errs.String()}
}

func lookup(env map[string]string) func(string) (string, bool) {
	return func(k string) (string, bool) { v, ok := env[k]; return v, ok }
}

// TestBadUsage: exit status 2 and one line that says what is wrong, without secrets.
func TestBadUsage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, c := range map[string]struct {
		env  map[string]string
		args []string
		want string
	}{
		"unknown flag":    {nil, []string{"run", "--nope"}, "see certmesh-agent run --help"},
		"bad token flag":  {nil, []string{"run", "--join-token", "cmjt1.s3cret"}, "is not a join token"},
		"both flags":      {nil, []string{"run", "--join-token", token, "--join-token-file", "/x"}, "given twice"},
		"argument":        {nil, []string{"run", "now"}, "takes no arguments"},
		"no token":        {nil, []string{"run"}, "CERTMESH_JOIN_TOKEN"},
		"bad token":       {map[string]string{"CERTMESH_JOIN_TOKEN": "cmjt1.s3cret"}, []string{"enroll"}, "is not a join token"},
		"token twice":     {map[string]string{"CERTMESH_JOIN_TOKEN": token, "CERTMESH_JOIN_TOKEN_FILE": "/x"}, []string{"run"}, "given twice"},
		"no token file":   {nil, []string{"run", "--join-token-file", dir + "/none"}, "none cannot be read"},
		"http":            {map[string]string{"CERTMESH_SERVER_URL": "http://x:8444"}, []string{"run"}, "speaks TLS"},
		"bad port":        {map[string]string{"CERTMESH_SERVER_URL": "x:99999"}, []string{"run"}, "between 1 and 65535"},
		"relative root":   {map[string]string{"CERTMESH_TARGET_ROOTS": "etc"}, []string{"run"}, "not an absolute path"},
		"shell command":   {map[string]string{"CERTMESH_ALLOW_COMMANDS": `[["sh","-c","reboot"]]`}, []string{"run"}, "runs other commands"},
		"not JSON":        {map[string]string{"CERTMESH_ALLOW_COMMANDS": "systemctl reload nginx"}, []string{"run"}, `[["systemctl","reload","nginx"]]`},
		"metacharacters":  {nil, []string{"run", "--allow-command", `["nginx","-s","reload; reboot"]`}, "means something to a shell"},
		"label":           {map[string]string{"CERTMESH_LABELS": "zone"}, []string{"run"}, "k=v"},
		"log level":       {map[string]string{"CERTMESH_LOG_LEVEL": "loud"}, []string{"run"}, "debug, info, warn or error"},
		"log format":      {nil, []string{"run", "--log-format", "xml"}, "json or text"},
		"retention":       {map[string]string{"CERTMESH_BACKUP_RETENTION": "0"}, []string{"run"}, "-1 for none"},
		"status format":   {nil, []string{"status", "--format", "xml"}, "table or json"},
		"unknown command": {nil, []string{"frobnicate"}, "unknown command"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			env := map[string]string{"CERTMESH_DATA_DIR": t.TempDir(), "CERTMESH_LOG_LEVEL": "error"}
			maps.Copy(env, c.env)
			got := invoke(t, env, c.args...)
			if got.code != 2 || strings.Count(got.stderr, "\n") != 1 || !strings.Contains(got.stderr, c.want) {
				t.Errorf("%+v", got)
			}
			if strings.Contains(got.stderr, "s3cret") || strings.Contains(got.stderr, "AAAAAAAA") {
				t.Error("the error repeats a secret")
			}
		})
	}
}

func TestFailure(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	got := invoke(t, map[string]string{"CERTMESH_DATA_DIR": file, "CERTMESH_JOIN_TOKEN": token, "CERTMESH_LOG_LEVEL": "error"}, "run")
	if got.code != 1 || strings.Count(got.stderr, "\n") != 1 || !strings.Contains(got.stderr, file) {
		t.Errorf("%+v", got)
	}
}

// TestConfiguration: flags before the environment, the environment before defaults.
func TestConfiguration(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	tokenFile := filepath.Join(dir, "token")
	if err := os.WriteFile(tokenFile, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	read := func(env map[string]string, args ...string) agentd.Config {
		t.Helper()
		c := &command{stderr: &bytes.Buffer{}, getenv: lookup(env)}
		cmd := &cobra.Command{Use: "run"}
		c.flags.add(cmd)
		if err := cmd.ParseFlags(args); err != nil {
			t.Fatal(err)
		}
		cfg, err := c.config(cmd)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Log = nil
		return cfg
	}
	if got := read(nil); got.DataDir != "/var/lib/certmesh-agent" || !reflect.DeepEqual(got.Servers, []string{"localhost:8444"}) || got.BackupRetention != 3 || got.TargetRoots != nil || got.AllowCommands != nil {
		t.Errorf("defaults are %+v", got)
	}
	env := map[string]string{"CERTMESH_SERVER_URL": "a:1, b:2", "CERTMESH_DATA_DIR": dir, "CERTMESH_KEY_DIR": "/k", "CERTMESH_AGENT_NAME": "n",
		"CERTMESH_LABELS": "a=1, b = x=y", "CERTMESH_TARGET_ROOTS": "/a:/b,/c/", "CERTMESH_ALLOW_COMMANDS": `[["nginx","-s","reload"]]`,
		"CERTMESH_JOIN_TOKEN_FILE": tokenFile, "CERTMESH_BACKUP_RETENTION": "-1"}
	want := agentd.Config{Servers: []string{"a:1", "b:2"}, DataDir: dir, KeyDir: "/k", Name: "n", Labels: map[string]string{"a": "1", "b": "x=y"},
		TargetRoots: []string{"/a", "/b", "/c"}, AllowCommands: [][]string{{"nginx", "-s", "reload"}}, JoinToken: token, BackupRetention: -1, Version: "dev"}
	if got := read(env); !reflect.DeepEqual(got, want) {
		t.Errorf("environment: got %+v, want %+v", got, want)
	}
	want.Servers, want.Name, want.TargetRoots, want.Labels = []string{"c:3"}, "m", []string{"/d"}, map[string]string{"z": "9"}
	want.AllowCommands = [][]string{{"systemctl", "reload", "x"}}
	if got := read(env, "--server-url", "c:3", "--name", "m", "--target-root", "/d", "--label", "z=9", "--allow-command", `["systemctl","reload","x"]`); !reflect.DeepEqual(got, want) {
		t.Errorf("flags: got %+v, want %+v", got, want)
	}
}

func TestStatusAndVersion(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "none")
	env := map[string]string{"CERTMESH_DATA_DIR": dir}
	if got := invoke(t, env, "status"); got.code != 0 || !strings.Contains(got.out, "has not joined") {
		t.Errorf("%+v", got)
	}
	got := invoke(t, env, "status", "--format", "json")
	var r agentd.Report
	if err := json.Unmarshal([]byte(got.out), &r); err != nil || r.Identity != nil || r.Running {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Error("a look made the data directory")
	}
	if got := invoke(t, nil, "version"); got.code != 0 || got.out != "dev\n" {
		t.Errorf("%+v", got)
	}
}
