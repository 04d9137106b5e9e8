package file_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/connectors/target/file"
	"github.com/certmesh/certmesh/connectors/target/targettest"
	"github.com/certmesh/certmesh/protocol/fault"
)

// wild is a place full of traps: base/root is allowed, everything else in base is not.
func wild(t *testing.T) (base string) {
	t.Helper()
	base = t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"root/ok", "root/deep/er", "outside/sub/versions", "root-evil", "rootevil", "root/isdir.pem", "root/planted/versions", "root/file/versions",
		"root/foreign/versions", "root/badversions", "root/hollow/versions"} {
		must(os.MkdirAll(base+"/"+d, 0o755))
	}
	for _, f := range []string{"outside/secret.pem", "outside/sub/x.pem", "root/plain", "root/file/current", "root-evil/x.pem"} {
		must(os.WriteFile(base+"/"+f, []byte("precious"), 0o644))
	}
	for name, to := range map[string]string{
		"root/out": "../outside", "root/outabs": base + "/outside", "root/in": "ok", "root/deep/up": "../../outside/sub", "root/deep/er/upup": "../..", "root/etc": "/etc",
		"root/dangling": "nowhere", "root/loop": "loop", "root/a": "b", "root/b": "a", "root/dot": ".", "root/dotdot": "..", "root/proc": "/proc/self/root",
		"root/final.pem": "../outside/secret.pem", "root/finalabs.pem": base + "/outside/secret.pem", "root/finalin.pem": "ok/x.pem", "root/finalnew.pem": "../outside/new.pem",
		"root/planted/current": "../../outside/sub", "root/foreign/current": "/etc", "root/badversions/versions": "../../outside/sub/versions", "root/hollow/current": "versions/../../../outside",
		"rootlink": "root",
	} {
		must(os.Symlink(to, base+"/"+name))
	}
	must(syscall.Mkfifo(base+"/root/fifo.pem", 0o600))
	must(os.WriteFile(base+"/root/big.pem", nil, 0o600))
	must(os.Truncate(base+"/root/big.pem", 1<<31))
	return base
}

func snapshot(t *testing.T, base string) string {
	t.Helper()
	var out strings.Builder
	err := filepath.WalkDir(base, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		to, _ := os.Readlink(p)
		size := fi.Size()
		if e.IsDir() {
			size = 0
		}
		fmt.Fprintln(&out, strings.TrimPrefix(p, base), fi.Mode(), size, to)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// TestHostilePaths: whatever is asked for, nothing outside the roots is read or written, no link is followed, nothing is
// left behind, and the refusal says why.
func TestHostilePaths(t *testing.T) {
	t.Parallel()
	base := wild(t)
	before := snapshot(t, base)
	m := targettest.NewCA(t).Material(t)
	long := strings.Repeat("x", 300)
	type trap struct{ kind, path, says string }
	var traps []trap
	// As a directory, as one file, and as one of several.
	for _, p := range []trap{
		{"", "relative/x.pem", "absolute"}, {"", "x.pem", "absolute"}, {"", "./x.pem", "absolute"}, {"", "~/x.pem", "absolute"}, {"", " /x.pem", "absolute"},
		{"", "/", "root directory"}, {"", "//", ""}, {"", "/..", ".."}, {"", "/../..", ".."},
		{"", "ROOT/../outside/x.pem", ".."}, {"", "ROOT/ok/../../outside/x.pem", ".."}, {"", "ROOT/ok/../x.pem", ".."}, {"", "ROOT/..", ".."}, {"", "ROOT/ok/..", ".."},
		{"", "ROOT/./x.pem", "contains ."}, {"", "ROOT//x.pem", "empty part"}, {"", "ROOT/ok/", "empty part"}, {"", "ROOT/ok//x.pem", "empty part"},
		{"", "ROOT/x\x00.pem", "control"}, {"", "ROOT/x\n.pem", "control"}, {"", "ROOT/x\x1b[2J", "control"}, {"", "ROOT/x\u202epem", "control"}, {"", "ROOT/\xff", "not UTF-8"},
		{"", `ROOT\..\outside`, "backslash"}, {"", `ROOT/ok\..\x`, "backslash"}, {"", "ROOT/ok /x.pem", "space"}, {"", "ROOT/ x.pem", "space"},
		{"", "ROOT/" + long, "longer than 255"}, {"", "ROOT/" + strings.Repeat("x/", 2000) + "y", "at most"}, {"", "ROOT/" + strings.Repeat("x", 200), "180"},
		{"", "ROOT/.hidden", "dot"}, {"", "ROOT/.x.pem.certmesh-staged-1", "dot"},
		{"", "BASE/root-evil/x.pem", "outside the roots"}, {"", "BASE/rootevil/x.pem", "outside the roots"}, {"", "BASE/roo/x.pem", "outside the roots"}, {"", "BASE/outside/x.pem", "outside the roots"},
		{"", "BASE/x.pem", "outside the roots"}, {"", "/etc/passwd", "outside the roots"}, {"", "/etc/ssl-evil/x.pem", "outside the roots"}, {"", "/proc/self/mem", "outside the roots"},
		{"", "/dev/null", "outside the roots"}, {"", "BASE/rootlink/x.pem", "outside the roots"}, {"", "BASE/ROOT/x.pem", ""}, {"", "BASE/Root/x.pem", "outside the roots"},
		{"", "ROOT/out/x.pem", "symbolic link"}, {"", "ROOT/outabs/x.pem", "symbolic link"}, {"", "ROOT/out/sub/x.pem", "symbolic link"}, {"", "ROOT/in/x.pem", "symbolic link"},
		{"", "ROOT/deep/up/x.pem", "symbolic link"}, {"", "ROOT/deep/er/upup/x.pem", "symbolic link"}, {"", "ROOT/etc/passwd", "symbolic link"}, {"", "ROOT/dangling/x.pem", "symbolic link"},
		{"", "ROOT/loop/x.pem", "symbolic link"}, {"", "ROOT/a/x.pem", "symbolic link"}, {"", "ROOT/dot/x.pem", "symbolic link"}, {"", "ROOT/dotdot/outside/x.pem", "symbolic link"},
		{"", "ROOT/proc/etc/x.pem", "symbolic link"}, {"", "ROOT/plain/x.pem", "not a directory"}, {"", "ROOT/fifo.pem/x.pem", "not a directory"},
		{"", "ROOT/no/such/x.pem", "does not exist"}, {"", "ROOT/fifo.pem", "regular file|not a directory"},
	} {
		for _, kind := range []string{"dir", "pem", "cert"} {
			traps = append(traps, trap{kind, p.path, p.says})
		}
	}
	traps = append(traps, []trap{
		{"pem", "ROOT/final.pem", "symbolic link"}, {"pem", "ROOT/finalabs.pem", "symbolic link"}, {"pem", "ROOT/finalin.pem", "symbolic link"}, {"pem", "ROOT/finalnew.pem", "symbolic link"},
		{"cert", "ROOT/final.pem", "symbolic link"}, {"cert", "ROOT/finalnew.pem", "symbolic link"}, {"cert", "ROOT/dangling", "symbolic link"},
		{"pem", "ROOT/isdir.pem", "not a regular file"}, {"pem", "ROOT/big.pem", "check the path"}, {"cert", "ROOT/big.pem", "check the path"}, {"pem", "ROOT", "root"}, {"cert", "ROOT", "root"},
		{"dir", "ROOT/out", "symbolic link"}, {"dir", "ROOT/in", "symbolic link"}, {"dir", "ROOT/dangling", "symbolic link"}, {"dir", "ROOT/loop", "symbolic link"}, {"dir", "ROOT/plain", "not a directory"},
		{"dir", "ROOT/planted", "not made by certmesh"}, {"dir", "ROOT/foreign", "not made by certmesh"}, {"dir", "ROOT/hollow", "not made by certmesh"}, {"dir", "ROOT/file", "not made by certmesh"},
		{"dir", "ROOT/badversions", "symbolic link"},
		{"name", "../x.pem", "slash"}, {"name", "..", "not a file name"}, {"name", ".", "not a file name"}, {"name", "a/b", "slash"}, {"name", "/etc/passwd", "slash"}, {"name", `a\b`, "slash"},
		{"name", "x\x00", "control"}, {"name", ".x", "dot"}, {"name", " x", "space"}, {"name", long, "180"}, {"name", "key.pem", "same file"},
	}...)
	if len(traps) < 200 {
		t.Fatalf("only %d traps", len(traps))
	}
	expand := strings.NewReplacer("BASE/ROOT", base+"/ROOT", "ROOT", base+"/root", "BASE", base)
	for _, tr := range traps {
		p := expand.Replace(tr.path)
		settings := map[string]any{}
		switch tr.kind {
		case "dir":
			settings["dir"] = p
		case "pem":
			settings["pem_path"] = p
		case "cert":
			settings["key_path"], settings["cert_path"] = base+"/root/ok/key.pem", p
		case "name":
			settings["dir"], settings["cert_name"] = base+"/root/ok", p
		}
		if strings.Contains(p, "\xff") {
			// JSON cannot carry it: ask the rule itself.
			if target.PathProblem(p) == "" {
				t.Errorf("%q has no problem", p)
			}
			continue
		}
		tg, err := file.Kind().Open(t.Context(), env(base+"/root"), raw(t, settings))
		if err == nil {
			var st target.Staged
			st, err = tg.Stage(t.Context(), m)
			if err == nil {
				_ = tg.Undo(t.Context(), st.Receipt())
			}
		}
		class := fault.ClassOf(err)
		if class != fault.Invalid && class != fault.Forbidden && class != fault.Conflict {
			t.Errorf("%s %q: %v (%s)", tr.kind, tr.path, err, class)
			continue
		}
		says := false
		for w := range strings.SplitSeq(tr.says, "|") {
			says = says || strings.Contains(err.Error(), w)
		}
		if !says {
			t.Errorf("%s %q: the refusal does not speak of %q: %v", tr.kind, tr.path, tr.says, err)
		}
		if got := snapshot(t, base); got != before {
			t.Fatalf("%s %q changed something:\n%s\nbefore\n%s", tr.kind, tr.path, got, before)
		}
	}
}

// TestHostileReceipts: a receipt cannot lead where settings cannot.
func TestHostileReceipts(t *testing.T) {
	t.Parallel()
	base := wild(t)
	before := snapshot(t, base)
	tg, err := file.Kind().Open(t.Context(), env(base+"/root"), raw(t, map[string]any{"dir": base + "/root/site"}))
	if err != nil {
		t.Fatal(err)
	}
	const tag = "20261124T120000.000000Z-0123abcd"
	for _, r := range []string{
		`{"v":1,"dir":"BASE/outside/sub","new":"TAG"}`, `{"v":1,"dir":"BASE/root/out","new":"TAG","made":true}`, `{"v":1,"dir":"/etc","new":"TAG","made":true}`,
		`{"v":1,"dir":"BASE/root/../outside","new":"TAG"}`, `{"v":1,"dir":"BASE/root/ok","new":"../../outside"}`, `{"v":1,"dir":"BASE/root/ok","new":"TAG","old":"../x"}`,
		`{"v":1,"files":[{"role":"pem","path":"BASE/outside/secret.pem","tag":"TAG","new":"00"}]}`, `{"v":1,"files":[{"role":"pem","path":"BASE/root/out/secret.pem","tag":"TAG","new":"00"}]}`,
		`{"v":1,"files":[{"role":"pem","path":"BASE/root/final.pem","tag":"TAG","new":"00"}]}`, `{"v":1,"files":[{"role":"pem","path":"BASE/root/ok/x","tag":"../../../outside/secret.pem","new":"00"}]}`,
		`{"v":1,"files":[{"role":"pem","path":"BASE/root-evil/x.pem","tag":"TAG","new":"00"}]}`,
	} {
		doc := target.Receipt(strings.NewReplacer("BASE", base, "TAG", tag).Replace(r))
		for what, do := range map[string]func() error{
			"undo":   func() error { return tg.Undo(t.Context(), doc) },
			"repair": func() error { return tg.(target.Repairer).Repair(t.Context(), doc) },
		} {
			if err := do(); !fault.Is(err, fault.Invalid) && !fault.Is(err, fault.Forbidden) {
				t.Errorf("%s %s: %v", what, r, err)
			}
			if got := snapshot(t, base); got != before {
				t.Fatalf("%s %s changed something:\n%s", what, r, got)
			}
		}
	}
}

// TestRoots: none allows nothing, a root may be a link that the host's operator chose, and the root itself may be the
// directory.
func TestRoots(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	if err := os.Mkdir(base+"/real", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("real", base+"/link"); err != nil {
		t.Fatal(err)
	}
	m := targettest.NewCA(t).Material(t)
	for _, roots := range [][]string{nil, {""}, {"real"}, {"."}, {base + "/real/sub"}, {base + "/rea"}} {
		_, err := file.Kind().Open(t.Context(), env(roots...), raw(t, map[string]any{"dir": base + "/real/site"}))
		if !fault.Is(err, fault.Forbidden) || !strings.Contains(err.Error(), "outside the roots") {
			t.Errorf("%q: %v", roots, err)
		}
	}
	for _, c := range []struct {
		roots    []string
		settings map[string]any
	}{
		{[]string{base + "/real"}, map[string]any{"dir": base + "/real"}},
		{[]string{base + "/link"}, map[string]any{"dir": base + "/link/site"}},
		{[]string{base + "/real/"}, map[string]any{"pem_path": base + "/real/p.pem"}},
		{[]string{"/"}, map[string]any{"pem_path": base + "/real/q.pem"}},
		{[]string{base, base + "/real"}, map[string]any{"pem_path": base + "/real/r.pem"}},
		{[]string{base + "/link", base + "/real"}, map[string]any{"cert_path": base + "/link/c.pem", "key_path": base + "/real/k.pem"}},
	} {
		tg, err := file.Kind().Open(t.Context(), env(c.roots...), raw(t, c.settings))
		if err != nil {
			t.Errorf("%q %v: %v", c.roots, c.settings, err)
			continue
		}
		install(t, tg, m)
	}
	gone := env(base + "/gone")
	tg, err := file.Kind().Open(t.Context(), gone, raw(t, map[string]any{"pem_path": base + "/gone/p.pem"}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tg.Stage(t.Context(), m); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "does not exist") {
		t.Errorf("a root that is not there: %v", err)
	}
}

// TestUnwritable: a real file system that takes nothing.
func TestUnwritable(t *testing.T) {
	t.Parallel()
	m := targettest.NewCA(t).Material(t)
	tg, err := file.Kind().Open(t.Context(), env("/proc"), raw(t, map[string]any{"pem_path": "/proc/site.pem"}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tg.Stage(t.Context(), m); err == nil || fault.ClassOf(err) == fault.Internal || !strings.Contains(err.Error(), "cannot be written") {
		t.Errorf("%v", err)
	}
}

// TestOwner: owner and group are set before anything is in place; unknown ones are refused when the target is opened.
func TestOwner(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	m := targettest.NewCA(t).Material(t)
	for _, s := range []map[string]any{{"owner": "no-such-user"}, {"group": "no-such-group"}, {"owner": "4294967296"}} {
		s["pem_path"] = root + "/p.pem"
		if _, err := file.Kind().Open(t.Context(), env(root), raw(t, s)); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "owner") && !strings.Contains(err.Error(), "group") {
			t.Errorf("%v: %v", s, err)
		}
	}
	uid, gid := os.Getuid(), os.Getgid()
	if uid == 0 {
		uid, gid = 1, 1
	}
	for i, s := range []map[string]any{{"pem_path": root + "/own.pem"}, {"cert_path": root + "/own.pem", "key_path": root + "/k.pem"}} {
		s["owner"], s["group"], s["key_mode"] = fmt.Sprint(uid), fmt.Sprint(gid), "0640"
		tg := open(t, root, s)
		install(t, tg, m)
		fi, err := os.Stat(root + "/own.pem")
		if err != nil {
			t.Fatal(err)
		}
		if st, ok := fi.Sys().(*syscall.Stat_t); !ok || int(st.Uid) != uid || int(st.Gid) != gid {
			t.Errorf("%d: %+v", i, fi.Sys())
		}
	}
}
