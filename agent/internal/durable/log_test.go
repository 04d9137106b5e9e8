package durable

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/certmesh/certmesh/protocol/fault"
)

func openLog(t interface{ Fatal(...any) }, dir string) *Log {
	l, err := OpenLog(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	l.least = 4 << 10
	return l
}

// TestLogIsItsModel: any order of writes, removals and restarts leaves what a map would hold, also when everything is
// moved to a new file in between.
func TestLogIsItsModel(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		dir := t.TempDir()
		l := openLog(rt, dir)
		steps := 0
		model := map[string]string{}
		name := rapid.SampledFrom([]string{"a", "", "../x", "\x00", strings.Repeat("n", 300)})
		rt.Repeat(map[string]func(*rapid.T){
			"write": func(rt *rapid.T) {
				n, b := name.Draw(rt, "name"), rapid.SampledFrom([]string{"", "x", "\x00\x00", magic, magic + strings.Repeat("\x00", 20), "end\x00"}).Draw(rt, "blob")
				if err := l.Write(n, []byte(b)); err != nil {
					rt.Fatal(err)
				}
				model[n] = b
			},
			"remove": func(rt *rapid.T) {
				n := name.Draw(rt, "name")
				if err := l.Remove(n); err != nil {
					rt.Fatal(err)
				}
				delete(model, n)
			},
			"renew": func(rt *rapid.T) {
				if rapid.IntRange(0, 5).Draw(rt, "sometimes") > 0 {
					return
				}
				if err := l.Probe(); err != nil {
					rt.Fatal(err)
				}
			},
			"restart": func(rt *rapid.T) {
				if err := l.Close(); err != nil {
					rt.Fatal(err)
				}
				l = openLog(rt, dir)
			},
			"": func(rt *rapid.T) {
				if steps++; steps%4 > 0 {
					return
				}
				seen, err := ReadLog(dir)
				if err != nil {
					rt.Fatal(err)
				}
				names, err := l.List("")
				if err != nil || len(names) != len(model) || len(seen) != len(model) {
					rt.Fatalf("%d names, %d seen, of %d, %v", len(names), len(seen), len(model), err)
				}
				for n, want := range model {
					if got, err := l.Read(n); err != nil || string(got) != want || string(seen[n]) != want {
						rt.Fatalf("%q: %q, seen %q, %v", n, got, seen[n], err)
					}
				}
			},
		})
		if err := l.Close(); err != nil {
			rt.Fatal(err)
		}
	})
}

// three writes three blobs and a fourth that a power cut may tear; it returns the file, and where the fourth begins and ends.
func three(t *testing.T, dir string) (data []byte, from, to int) {
	t.Helper()
	l := openLog(t, dir)
	for i := range 3 {
		if err := l.Write(fmt.Sprint("blob-", i), bytes.Repeat([]byte{byte('0' + i)}, 40)); err != nil {
			t.Fatal(err)
		}
	}
	from = int(l.end)
	if err := l.Write("blob-3", []byte("the last")); err != nil {
		t.Fatal(err)
	}
	to = int(l.end)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, logName))
	if err != nil {
		t.Fatal(err)
	}
	return data[: to+64 : to+64], from, to
}

// TestLogTorn: a write that was cut at any byte, whatever of it came to the disk, leaves what was stored before, and the
// log can be written to.
func TestLogTorn(t *testing.T) {
	t.Parallel()
	data, from, to := three(t, t.TempDir())
	for cut := from; cut < to; cut++ {
		for _, rest := range []byte{0, 0xff} {
			b := bytes.Clone(data)
			for i := cut; i < to; i++ {
				b[i] = rest
			}
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, logName), b, 0o600); err != nil {
				t.Fatal(err)
			}
			l := openLog(t, dir)
			names, _ := l.List("")
			if len(names) != 3 {
				t.Fatalf("cut at %d of %d: %v", cut-from, to-from, names)
			}
			if cut > from && cut < to-1 {
				continue // the rest costs an fsync each
			}
			if err := l.Write("after", []byte("x")); err != nil {
				t.Fatal(err)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			if seen, err := ReadLog(dir); err != nil || len(seen) != 4 {
				t.Fatalf("cut at %d: %d blobs, %v", cut-from, len(seen), err)
			}
		}
	}
}

// TestLogDamaged: every flipped bit in the middle costs one blob, and the file is set aside.
func TestLogDamaged(t *testing.T) {
	t.Parallel()
	data, from, _ := three(t, t.TempDir())
	record := from / 3
	for i := record; i < 2*record; i++ {
		b := bytes.Clone(data)
		b[i] ^= 0x10
		dir := t.TempDir()
		path := filepath.Join(dir, logName)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if seen, err := ReadLog(dir); err != nil || len(seen) != 3 || seen["blob-1"] != nil {
			t.Fatalf("byte %d: a look sees %d blobs, %v", i-record, len(seen), err)
		}
		if _, err := os.Stat(path + ".damaged"); !errors.Is(err, fs.ErrNotExist) {
			t.Fatal("a look moved it")
		}
		l := openLog(t, dir)
		if names, _ := l.List(""); len(names) != 3 {
			t.Fatalf("byte %d: %v", i-record, names)
		}
		if _, err := os.Stat(path + ".damaged"); err != nil {
			t.Fatalf("byte %d: not set aside: %v", i-record, err)
		}
	}
}

// TestLogGrows: more than was laid out goes into a new file, and nothing is lost.
func TestLogGrows(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l := openLog(t, dir)
	l.least = logLeast
	big := bytes.Repeat([]byte("x"), logLeast/3)
	for i := range 8 {
		if err := l.Write(fmt.Sprint("blob-", i%5), big); err != nil {
			t.Fatal(err)
		}
	}
	if seen, err := ReadLog(dir); err != nil || len(seen) != 5 {
		t.Errorf("%d blobs, %v", len(seen), err)
	}
	if err := l.Write("huge", make([]byte, maxBlob+1)); !fault.Is(err, fault.Internal) {
		t.Error(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// TestLogTogether: what is begun while the disk is busy shares an fsync, and everything is told in order.
func TestLogTogether(t *testing.T) {
	t.Parallel()
	l := openLog(t, t.TempDir())
	var mu sync.Mutex
	var order []int
	var wg sync.WaitGroup
	for i := range 600 {
		wg.Add(1)
		done := func(err error) {
			defer wg.Done()
			mu.Lock()
			defer mu.Unlock()
			if order = append(order, i); err != nil {
				t.Error(err)
			}
		}
		if i%3 == 2 {
			l.Forget(fmt.Sprint("blob-", i-1), done)
		} else {
			l.Begin(fmt.Sprint("blob-", i), []byte("x"), done)
		}
	}
	wg.Wait()
	for i, n := range order {
		if i != n {
			t.Fatalf("told in the order %v", order)
		}
	}
	if names, _ := l.List(""); len(names) != 200 {
		t.Errorf("%d blobs", len(names))
	}
	for i := range 20 {
		l.Forget(fmt.Sprint("blob-", 3*i), nil)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if seen, err := ReadLog(l.dir); err != nil || len(seen) != 180 {
		t.Errorf("closed before it was done: %d blobs, %v", len(seen), err)
	}
}

// TestLogRefused: a disk that takes nothing keeps what was there, and is used again when it can be.
func TestLogRefused(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "log")
	l := openLog(t, dir)
	if err := l.Write("kept", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{"write": l.Write("new", nil), "probe": l.Probe(), "remove": l.Remove("kept")} {
		if !fault.Is(err, fault.Retryable) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := l.Write("new", nil); err != nil {
		t.Fatal(err)
	}
	if seen, err := ReadLog(dir); err != nil || len(seen) != 2 {
		t.Errorf("%v, %v", seen, err)
	}
}

// FuzzLog: no file makes reading fail or an unwritten blob appear twice.
func FuzzLog(f *testing.F) {
	f.Add([]byte(magic))
	f.Add(appendRecord(appendRecord(nil, "a", []byte("b"), false), "a", nil, true))
	f.Fuzz(func(t *testing.T, data []byte) {
		c := parseLog(data)
		if c.end > c.size || c.clean && c.damaged > 0 {
			t.Errorf("%+v", c)
		}
		var again []byte
		for name, blob := range c.live {
			again = appendRecord(again, name, blob, false)
		}
		if got := parseLog(again); len(got.live) != len(c.live) || got.damaged != 0 || int(got.end) != len(again) {
			t.Errorf("%d of %d blobs", len(got.live), len(c.live))
		}
	})
}
