package disk

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/certmesh/certmesh/protocol/fault"
)

// layout is one way to arrange files, with how a reader finds them.
type layout struct {
	name   string
	config func(root string) Config
	// paths of the files, by slot, as a service names them.
	paths func(root string) []string
	roles []Role
}

func layouts() []layout {
	return []layout{
		{"versions", func(root string) Config {
			return Config{Dir: root + "/site", DirField: "dir", Slots: []Slot{
				{Cert, "cert.pem", "cert_name", 0o644}, {Key, "key.pem", "key_name", 0o600}, {Chain, "chain.pem", "chain_name", 0o644}}}
		}, func(root string) []string {
			d := root + "/site/" + Link + "/"
			return []string{d + "cert.pem", d + "key.pem", d + "chain.pem"}
		}, []Role{Cert, Key, Chain}},
		{"combined", func(root string) Config {
			return Config{Slots: []Slot{{Pair, root + "/site.pem", "pem_path", 0o600}}}
		}, func(root string) []string { return []string{root + "/site.pem"} }, []Role{Pair}},
		{"separate", func(root string) Config {
			return Config{Slots: []Slot{{Key, root + "/private/key.pem", "key_path", 0o600},
				{Cert, root + "/cert.pem", "cert_path", 0o644}, {Chain, root + "/chain.pem", "chain_path", 0o644}}}
		}, func(root string) []string {
			return []string{root + "/private/key.pem", root + "/cert.pem", root + "/chain.pem"}
		}, []Role{Key, Cert, Chain}},
	}
}

func clock() func() time.Time {
	at := time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC)
	return func() time.Time { at = at.Add(time.Second); return at }
}

type bed struct {
	t    *testing.T
	l    layout
	root string
	s    *Store
}

func newBed(t *testing.T, l layout, retention int) *bed {
	t.Helper()
	root := t.TempDir()
	if err := os.Mkdir(root+"/private", 0o755); err != nil {
		t.Fatal(err)
	}
	cfg := l.config(root)
	cfg.Log, cfg.Now, cfg.Roots, cfg.UID, cfg.GID, cfg.Retention = slog.New(slog.DiscardHandler), clock(), []string{root}, -1, -1, retention
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return &bed{t, l, root, s}
}

func (b *bed) set(name string) [][]byte {
	var out [][]byte
	for _, r := range b.l.roles {
		out = append(out, []byte(strings.Repeat(name+" "+string(r)+"\n", 20)))
	}
	return out
}

// holds says which set is in place: its name, "" for none, or an error for anything else.
func (b *bed) holds(names ...string) (string, error) {
	var got [][]byte
	missing := 0
	for _, p := range b.l.paths(b.root) {
		data, err := os.ReadFile(p)
		if errors.Is(err, fs.ErrNotExist) {
			missing++
		} else if err != nil {
			return "", err
		}
		got = append(got, data)
	}
	if missing == len(got) {
		return "", nil
	}
	for _, n := range names {
		same := true
		for i, want := range b.set(n) {
			same = same && bytes.Equal(got[i], want)
		}
		if same {
			return n, nil
		}
	}
	return "", fmt.Errorf("a mixture: %.20q", got)
}

func (b *bed) want(name string) {
	b.t.Helper()
	if got, err := b.holds("A", "B", "C", "D"); err != nil || got != name {
		b.t.Fatalf("in place: %q, %v; want %q\n%s", got, err, name, tree(b.root))
	}
}

func (b *bed) install(name string) Receipt {
	b.t.Helper()
	r, err := b.s.Stage(b.t.Context(), b.set(name))
	if err != nil {
		b.t.Fatal(err)
	}
	if err := b.s.Commit(b.t.Context(), r); err != nil {
		b.t.Fatal(err)
	}
	return r
}

// tree lists everything below root, with sizes and link targets.
func tree(root string) string {
	var out strings.Builder
	_ = filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == root {
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
		fmt.Fprintf(&out, "%s %s %d %s\n", fi.Mode(), strings.TrimPrefix(p, root), size, to)
		return nil
	})
	return out.String()
}

// journalled sends a receipt through JSON, as the agent's journal does.
func journalled(t *testing.T, r Receipt) Receipt {
	t.Helper()
	raw, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	out, err := ParseReceipt(raw)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// cutter fails the k-th change; a crash fails everything after it too.
type cutter struct {
	at, n int
	err   error
	crash bool
	ops   []string
}

func (c *cutter) step(op, path string) error {
	c.n++
	c.ops = append(c.ops, op+" "+path)
	if c.n == c.at || c.crash && c.n > c.at {
		return c.err
	}
	return nil
}

// TestCrashAnywhere cuts stage, commit and undo at every change of the file system; each time a fresh process finds the
// old or the new set after Repair, whole, and can undo and install again.
func TestCrashAnywhere(t *testing.T) {
	t.Parallel()
	for _, l := range layouts() {
		for _, former := range []string{"", "A"} {
			for _, retention := range []int{3, -1} {
				for _, acts := range []string{"commit", "undo"} {
					t.Run(fmt.Sprintf("%s/from=%s/retention=%d/%s", l.name, former, retention, acts), func(t *testing.T) {
						t.Parallel()
						for k := 1; ; k++ {
							if !crashAt(t, l, former, retention, acts == "undo", k) {
								if k < 5 {
									t.Fatalf("only %d changes were cut", k-1)
								}
								return
							}
						}
					})
				}
			}
		}
	}
}

// crashAt returns false once k lies behind the last change.
func crashAt(t *testing.T, l layout, former string, retention int, undo bool, k int) bool {
	t.Helper()
	b := newBed(t, l, retention)
	ctx := t.Context()
	if former != "" {
		b.install(former)
	}
	cut := &cutter{at: k, err: errTorn, crash: true}
	b.s.step = cut.step
	var receipt *Receipt // what the journal holds
	committed := false
	func() {
		r, err := b.s.Stage(ctx, b.set("B"))
		if err != nil {
			return
		}
		receipt = &r
		if b.s.Commit(ctx, r) != nil {
			return
		}
		committed = true
		if undo {
			_ = b.s.Undo(ctx, r)
		}
	}()
	done := cut.n < k
	last := cut.ops[min(k, cut.n)-1]
	// A new process.
	b.s.step = nil
	fail := func(format string, args ...any) {
		t.Helper()
		t.Fatalf("cut at %d (%s): %s\n%s", k, last, fmt.Sprintf(format, args...), tree(b.root))
	}
	if receipt != nil {
		r := journalled(t, *receipt)
		for range 2 {
			if err := b.s.Repair(ctx, r); err != nil {
				fail("repair: %v", err)
			}
		}
		now, err := b.holds(former, "B")
		if err != nil {
			fail("after repair %v", err)
		}
		if now != former && now != "B" {
			fail("after repair %q is in place", now)
		}
		if committed && !undo && now != "B" {
			fail("a finished commit was lost")
		}
		for range 2 {
			err := b.s.Undo(ctx, r)
			if kept := !committed || retention > 0 || former == ""; err != nil && kept {
				fail("undo: %v", err)
			}
			if err == nil {
				now = former
			} else if !fault.Is(err, fault.Unsupported) {
				fail("undo without a backup: %v", err)
			}
			if got, err := b.holds(former, "B"); err != nil || got != now {
				fail("after undo: %q, %v; want %q", got, err, now)
			}
		}
	} else if got, err := b.holds(former); err != nil || got != former {
		fail("after a cut stage: %q, %v", got, err)
	}
	// Life goes on, and nothing that was interrupted stays for ever.
	r := b.install("C")
	if got, err := b.holds("C"); err != nil || got != "C" {
		fail("installing again: %q, %v", got, err)
	}
	if left := tree(b.root); strings.Contains(left, "staged") || strings.Contains(left, ".gone-") || strings.Contains(left, linkPrefix) {
		fail("left behind")
	}
	if retention > 0 {
		if err := b.s.Undo(ctx, r); err != nil {
			fail("undo of the second: %v", err)
		}
	}
	return !done
}

// TestCrashThenUndoWithoutRepair leaves Repair out: Undo alone must cope with every half-finished commit.
func TestCrashThenUndoWithoutRepair(t *testing.T) {
	t.Parallel()
	for _, l := range layouts() {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			for k := 1; ; k++ {
				b := newBed(t, l, 3)
				b.install("A")
				r, err := b.s.Stage(t.Context(), b.set("B"))
				if err != nil {
					t.Fatal(err)
				}
				cut := &cutter{at: k, err: errTorn, crash: true}
				b.s.step = cut.step
				_ = b.s.Commit(t.Context(), r)
				b.s.step = nil
				// The undo is cut as well, once at each of its own changes.
				for j := 1; ; j++ {
					again := &cutter{at: j, err: errTorn, crash: true}
					b.s.step = again.step
					_ = b.s.Undo(t.Context(), journalled(t, r))
					b.s.step = nil
					if again.n < j {
						break
					}
				}
				b.want("A")
				if cut.n < k {
					return
				}
			}
		})
	}
}

// TestFailureAnywhere fails one change, as a full disk or a missing permission does, and lets the rest succeed: nothing
// is half done and the sentence says what to do.
func TestFailureAnywhere(t *testing.T) {
	t.Parallel()
	for _, l := range layouts() {
		for _, cause := range []struct {
			err  error
			says string
		}{{syscall.ENOSPC, "free space"}, {syscall.EACCES, "correct the owner and mode"}, {syscall.EROFS, "read-only"}, {syscall.EIO, "input/output error"}} {
			t.Run(l.name+"/"+cause.err.Error(), func(t *testing.T) {
				t.Parallel()
				for k := 1; ; k++ {
					b := newBed(t, l, 3)
					b.install("A")
					before := tree(b.root)
					cut := &cutter{at: k, err: &fs.PathError{Op: "x", Path: "y", Err: cause.err}}
					b.s.step = cut.step
					r, err := b.s.Stage(t.Context(), b.set("B"))
					stage := err
					if err == nil {
						err = b.s.Commit(t.Context(), r)
					}
					b.s.step = nil
					if cut.n < k {
						b.want("B")
						return
					}
					switch {
					case stage != nil && tree(b.root) != before:
						t.Fatalf("a failed stage at %d (%s) left something:\n%s", k, cut.ops[k-1], tree(b.root))
					case err == nil:
						// Tidying failed; the new set is in place.
						b.want("B")
						continue
					}
					b.want("A")
					if !fault.Is(err, fault.Retryable) || !strings.Contains(err.Error(), cause.says) {
						t.Fatalf("cut at %d (%s): %v", k, cut.ops[k-1], err)
					}
					if stage == nil {
						if err := b.s.Undo(t.Context(), r); err != nil {
							t.Fatal(err)
						}
						if tree(b.root) != before {
							t.Fatalf("undo left something:\n%s", tree(b.root))
						}
					}
					b.install("B")
					b.want("B")
				}
			})
		}
	}
}

// TestSyncBeforeShown: what appears under a name that is read was synced before, and the name is synced before Commit
// returns.
func TestSyncBeforeShown(t *testing.T) {
	t.Parallel()
	for _, l := range layouts() {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t, l, 3)
			b.install("A")
			rec := &cutter{}
			b.s.step = rec.step
			b.install("B")
			written := map[string]bool{} // not synced yet
			dirty := map[string]bool{}   // directories with names that are not synced
			renames := 0
			for _, o := range rec.ops {
				op, path, _ := strings.Cut(o, " ")
				switch op {
				case "write":
					written[path] = true
				case "fsync":
					delete(written, path)
				case "create", "mkdir", "symlink", "remove":
					dirty[filepath.Dir(path)] = true
				case "rename":
					renames++
					if len(written) > 0 {
						t.Errorf("%s with %v not synced", o, written)
					}
					dirty[filepath.Dir(path)] = true
				case "syncdir":
					delete(dirty, filepath.Clean(path))
				}
			}
			if renames == 0 || len(dirty) > 0 {
				t.Errorf("%d renames, directories not synced: %v", renames, dirty)
			}
		})
	}
}

func TestRetention(t *testing.T) {
	t.Parallel()
	for _, l := range layouts() {
		for _, keep := range []int{-1, 1, 3} {
			t.Run(fmt.Sprintf("%s/%d", l.name, keep), func(t *testing.T) {
				t.Parallel()
				b := newBed(t, l, keep)
				var r Receipt
				for _, n := range []string{"A", "B", "C", "D", "A", "B", "C", "D"} {
					r = b.install(n)
				}
				if got := b.former(); got != max(keep, 0) {
					t.Errorf("%d former versions, want %d\n%s", got, max(keep, 0), tree(b.root))
				}
				err := b.s.Undo(t.Context(), r)
				if keep < 1 {
					if !fault.Is(err, fault.Unsupported) || !strings.Contains(err.Error(), "backup_retention") {
						t.Errorf("undo without a backup: %v", err)
					}
					b.want("D")
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				b.want("C")
			})
		}
	}
}

func (b *bed) former() int {
	if b.l.name == "versions" {
		es, err := os.ReadDir(b.root + "/site/" + versionsDir)
		if err != nil {
			b.t.Fatal(err)
		}
		return len(es) - 1
	}
	found, err := filepath.Glob(filepath.Join(filepath.Dir(b.l.paths(b.root)[0]), ".*.certmesh-backup-*"))
	if err != nil {
		b.t.Fatal(err)
	}
	n := 0
	for _, f := range found {
		if strings.HasPrefix(filepath.Base(f), "."+filepath.Base(b.l.paths(b.root)[0])) {
			n++
		}
	}
	return n
}

// TestSuperseded: a receipt that lost its turn changes nothing of what was installed later.
func TestSuperseded(t *testing.T) {
	t.Parallel()
	for _, l := range layouts() {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t, l, 3)
			b.install("A")
			rb := b.install("B")
			rc := b.install("C")
			for range 2 {
				if err := b.s.Undo(t.Context(), rb); err != nil {
					t.Fatal(err)
				}
				if err := b.s.Repair(t.Context(), rb); err != nil {
					t.Fatal(err)
				}
				b.want("C")
			}
			if err := b.s.Undo(t.Context(), rc); err != nil {
				t.Fatal(err)
			}
			b.want("B")
			if err := b.s.Undo(t.Context(), rb); err != nil {
				t.Fatal(err)
			}
			b.want("A")
		})
	}
}

// TestStageTwice: the later staging wins, the earlier cannot be committed any more.
func TestStageTwice(t *testing.T) {
	t.Parallel()
	for _, l := range layouts() {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t, l, 3)
			b.install("A")
			rb, err := b.s.Stage(t.Context(), b.set("B"))
			if err != nil {
				t.Fatal(err)
			}
			rc, err := b.s.Stage(t.Context(), b.set("C"))
			if err != nil {
				t.Fatal(err)
			}
			if err := b.s.Commit(t.Context(), rb); !fault.Is(err, fault.Conflict) {
				t.Fatalf("commit of a replaced staging: %v", err)
			}
			b.want("A")
			if err := b.s.Commit(t.Context(), rc); err != nil {
				t.Fatal(err)
			}
			if err := b.s.Undo(t.Context(), rb); err != nil {
				t.Fatal(err)
			}
			b.want("C")
		})
	}
}

// TestTampered: what someone else changed meanwhile is neither overwritten nor mixed.
func TestTampered(t *testing.T) {
	t.Parallel()
	l := layouts()[2]
	b := newBed(t, l, 3)
	b.install("A")
	r, err := b.s.Stage(t.Context(), b.set("B"))
	if err != nil {
		t.Fatal(err)
	}
	cert := l.paths(b.root)[1]
	if err := os.WriteFile(cert, []byte("by hand"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := tree(b.root)
	if err := b.s.Commit(t.Context(), r); !fault.Is(err, fault.Conflict) || tree(b.root) != before {
		t.Errorf("commit over a change by hand: %v", err)
	}
	// Nothing of B was installed, so taking it back removes what was staged and leaves the change alone.
	if err := b.s.Undo(t.Context(), r); err != nil {
		t.Error(err)
	}
	if got, _ := os.ReadFile(cert); string(got) != "by hand" {
		t.Errorf("the change by hand is gone: %q", got)
	}
	if strings.Contains(tree(b.root), "staged") {
		t.Errorf("left behind:\n%s", tree(b.root))
	}
	// A change after the commit makes a mixture that only a new deployment can end: B's key is not taken back alone.
	r = b.install("B")
	if err := os.WriteFile(cert, []byte("by hand again"), 0o600); err != nil {
		t.Fatal(err)
	}
	before = tree(b.root)
	if err := b.s.Undo(t.Context(), r); !fault.Is(err, fault.Conflict) || tree(b.root) != before {
		t.Errorf("undo over a change by hand: %v", err)
	}
	b.install("C")
	b.want("C")
}

func TestReceiptGarbage(t *testing.T) {
	t.Parallel()
	for _, raw := range []string{``, `{}`, `null`, `[]`, `{"v":2}`, `{"v":1}`, `{"v":1,"dir":"/a","new":"../x"}`, `{"v":1,"dir":"a","new":"20261124T100001.000000Z-00000000"}`,
		`{"v":1,"dir":"/a/../b","new":"20261124T100001.000000Z-00000000"}`,
		`{"v":1,"files":[{"role":"cert","path":"/a/b","tag":"../../x","new":"00"}]}`, `{"v":1,"files":[{"path":"rel","tag":"20261124T100001.000000Z-00000000","new":"00"}]}`,
		`{"v":1,"files":[{"path":"/a","tag":"20261124T100001.000000Z-0000000g","new":"00"}]}`} {
		if _, err := ParseReceipt([]byte(raw)); !fault.Is(err, fault.Invalid) && !fault.Is(err, fault.Unsupported) {
			t.Errorf("%s: %v", raw, err)
		}
	}
}
