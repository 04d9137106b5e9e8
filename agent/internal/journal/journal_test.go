package journal

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func open(t *testing.T, dir string) *Disk {
	t.Helper()
	d, err := Open(dir, quiet())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func entry(id string, attempt int64) *Entry {
	return &Entry{Assignment: &agentpb.Assignment{Id: id, Attempt: attempt, Class: agentpb.WorkClass_WORK_CLASS_KEY}}
}

func same(a, b *Entry) bool {
	return proto.Equal(a.Assignment, b.Assignment) && proto.Equal(a.Result, b.Result) && bytes.Equal(a.CSR, b.CSR) &&
		bytes.Equal(a.SPKI, b.SPKI) && bytes.Equal(a.Receipt, b.Receipt)
}

// TestJournalIsItsModel: any order of puts, drops and restarts leaves what a map would hold, on disk and in memory.
func TestJournalIsItsModel(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		dir := t.TempDir()
		journals := map[string]Journal{"memory": NewMemory()}
		// Every write of the disk's is synced: a fifth of the runs says enough.
		if rapid.IntRange(0, 4).Draw(rt, "disk") == 0 {
			journals["disk"], journals["view"] = open(t, dir), view{dir: dir}
		}
		model := map[string]*Entry{}
		ids := []string{"job_1", "../../etc/passwd", "", strings.Repeat("x", 64), "job_2\x00"}
		rt.Repeat(map[string]func(*rapid.T){
			"put": func(rt *rapid.T) {
				e := entry(rapid.SampledFrom(ids).Draw(rt, "id"), rapid.Int64Min(1).Draw(rt, "attempt"))
				if rapid.Bool().Draw(rt, "csr") {
					e.CSR, e.SPKI = rapid.SliceOfN(rapid.Byte(), 1, 50).Draw(rt, "bytes"), []byte{1}
				}
				if rapid.Bool().Draw(rt, "receipt") {
					e.Receipt = []byte(`{"a":[1,2]}`)
				}
				if rapid.Bool().Draw(rt, "result") {
					e.Result = &agentpb.Result{Id: e.Assignment.GetId(), Attempt: e.Assignment.GetAttempt()}
				}
				for name, j := range journals {
					if name != "view" && Store(j, e) != nil {
						rt.Fatal("not put")
					}
				}
				model[e.Assignment.GetId()] = e
			},
			"drop": func(rt *rapid.T) {
				id := rapid.SampledFrom(ids).Draw(rt, "id")
				for name, j := range journals {
					if name != "view" {
						j.Drop(id)
					}
				}
				settle(rt, journals["disk"])
				delete(model, id)
			},
			"restart": func(*rapid.T) {
				if d, ok := journals["disk"].(*Disk); ok {
					if err := d.Close(); err != nil {
						rt.Fatal(err)
					}
					journals["disk"] = open(t, dir)
				}
			},
			"": func(rt *rapid.T) {
				for name, j := range journals {
					all, err := j.All()
					if err != nil || len(all) != len(model) {
						rt.Fatalf("%s holds %d of %d, %v", name, len(all), len(model), err)
					}
					for i, e := range all {
						if !same(e, model[e.Assignment.GetId()]) {
							rt.Fatalf("%s: %+v", name, e)
						}
						if i > 0 && all[i-1].Assignment.GetId() >= e.Assignment.GetId() {
							rt.Fatalf("%s: not in order", name)
						}
					}
				}
			},
		})
	})
}

// view is a Journal that is only looked at.
type view struct {
	Journal
	dir string
}

func (v view) All() ([]*Entry, error) { return View(v.dir) }

// settle waits until what was begun is done.
func settle(t interface{ Fatal(...any) }, j Journal) {
	if d, ok := j.(*Disk); ok {
		if err := d.files.Remove("none"); err != nil {
			t.Fatal(err)
		}
	}
}

// TestForeign: what is stored under another's name, or is no entry, is left out and costs nothing else.
func TestForeign(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	d := open(t, dir)
	for i := range 3 {
		if err := Store(d, entry(fmt.Sprint("job_", i), 1)); err != nil {
			t.Fatal(err)
		}
	}
	good, err := d.files.Read("job_1")
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range [][]byte{nil, []byte("{}"), []byte("[]"), good[:len(good)/2]} {
		if err := d.files.Write("job_1", b); err != nil {
			t.Fatal(err)
		}
		if err := d.files.Write("job_0", good); err != nil {
			t.Fatal(err)
		}
		if all, err := d.All(); err != nil || len(all) != 1 {
			t.Fatalf("%q: %d entries, %v", b, len(all), err)
		}
		if all, err := View(dir); err != nil || len(all) != 1 {
			t.Fatalf("%q: a look sees %d entries, %v", b, len(all), err)
		}
	}
	if err := Store(d, entry("job_1", 2)); err != nil {
		t.Error("after damage the id cannot be used again")
	}
}

// TestUnwritable: a file in place of the directory stands for a disk that takes nothing.
func TestUnwritable(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "journal")
	d := open(t, dir)
	if err := d.Probe(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{"put": Store(d, entry("job_1", 1)), "probe": d.Probe()} {
		if !fault.Is(err, fault.Retryable) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := View(dir); err == nil {
		t.Error("an unreadable journal looks empty; the agent would forget what it accepted")
	}
	if _, err := Open(dir, quiet()); !fault.Is(err, fault.Retryable) {
		t.Error(err)
	}
}

func TestJournalRace(t *testing.T) {
	t.Parallel()
	d := open(t, t.TempDir())
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 10 {
				e := entry(fmt.Sprint("job_", g), int64(i+1))
				if err := Store(d, e); err != nil {
					t.Error(err)
				}
				if _, err := d.All(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	all, _ := d.All()
	var got []int64
	for _, e := range all {
		got = append(got, e.Assignment.GetAttempt())
	}
	if !reflect.DeepEqual(got, []int64{10, 10, 10, 10}) {
		t.Errorf("attempts %v", got)
	}
}
