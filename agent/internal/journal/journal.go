// Package journal remembers on disk every assignment that the agent accepted and the server has not settled.
//
// One small file per open assignment, replaced by rename with fsync of file and directory. That is simpler than a log
// and safe: there is no torn tail and nothing to compact, an entry's removal needs no free space, and at most a few
// hundred entries are open (work.MaxOpen). A removal is not fsynced: an entry that comes back after a power cut is
// resolved by the next Welcome's verdict.
package journal

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/agent/internal/durable"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// Entry is one open assignment. Its phase follows from what it holds.
type Entry struct {
	Assignment *agentpb.Assignment
	// CSR was made (class key).
	CSR []byte
	// SPKI is the hash of the key that the CSR is for.
	SPKI []byte
	// Receipt is what a target needs to undo an installation that is not finished; nil: none is open.
	Receipt json.RawMessage
	// Result ends the assignment on this side.
	Result *agentpb.Result
}

// Phase says how far the assignment got.
func (e *Entry) Phase() agentpb.Phase {
	switch {
	case e.Result != nil:
		return agentpb.Phase_PHASE_RESULT
	case len(e.CSR) > 0:
		return agentpb.Phase_PHASE_CSR
	default:
		return agentpb.Phase_PHASE_ACCEPTED
	}
}

// Clone copies the entry; the messages in it are shared and must not be changed.
func (e *Entry) Clone() *Entry {
	c := *e
	return &c
}

// Journal keeps entries by assignment id. Calls are safe for concurrent use.
type Journal interface {
	// Put stores the entry and returns once it is durable.
	Put(e *Entry) error
	// Drop forgets an assignment; unknown is fine.
	Drop(id string) error
	// All returns every entry, ordered by assignment id.
	All() ([]*Entry, error)
	// Probe says whether a Put would succeed now.
	Probe() error
}

// record is the file's body: a line "certmesh-journal 1 <crc32c>" and then this as JSON.
type record struct {
	Assignment []byte          `json:"assignment"`
	CSR        []byte          `json:"csr,omitempty"`
	SPKI       []byte          `json:"spki,omitempty"`
	Receipt    json.RawMessage `json:"receipt,omitempty"`
	Result     []byte          `json:"result,omitempty"`
}

const header = "certmesh-journal 1 "

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func encode(e *Entry) ([]byte, error) {
	r := record{CSR: e.CSR, SPKI: e.SPKI, Receipt: e.Receipt}
	var err error
	if r.Assignment, err = proto.Marshal(e.Assignment); err != nil {
		return nil, fault.Wrap(fault.Internal, err, "an assignment cannot be encoded")
	}
	if e.Result != nil {
		if r.Result, err = proto.Marshal(e.Result); err != nil {
			return nil, fault.Wrap(fault.Internal, err, "a result cannot be encoded")
		}
	}
	body, err := json.Marshal(r)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "a journal entry cannot be encoded")
	}
	head := fmt.Sprintf("%s%08x\n", header, crc32.Checksum(body, castagnoli))
	return append([]byte(head), body...), nil
}

func decode(data []byte) (*Entry, error) {
	head, body, ok := strings.Cut(string(data), "\n")
	sum, found := strings.CutPrefix(head, header)
	if !ok || !found {
		return nil, fault.New(fault.Internal, "no journal entry")
	}
	want, err := strconv.ParseUint(sum, 16, 32)
	if err != nil || uint32(want) != crc32.Checksum([]byte(body), castagnoli) {
		return nil, fault.New(fault.Internal, "the checksum does not match")
	}
	var r record
	if err := json.Unmarshal([]byte(body), &r); err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the entry cannot be decoded")
	}
	e := &Entry{Assignment: &agentpb.Assignment{}, CSR: r.CSR, SPKI: r.SPKI, Receipt: r.Receipt}
	if err := proto.Unmarshal(r.Assignment, e.Assignment); err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the assignment cannot be decoded")
	}
	if len(r.Result) > 0 {
		e.Result = &agentpb.Result{}
		if err := proto.Unmarshal(r.Result, e.Result); err != nil {
			return nil, fault.Wrap(fault.Internal, err, "the result cannot be decoded")
		}
	}
	return e, nil
}

// Disk is the Journal of a real host.
type Disk struct {
	dir    string
	log    *slog.Logger
	frozen bool
	// locks order what happens to one entry, by a hash of its id; entries are apart on disk, and their fsyncs overlap.
	locks [64]sync.Mutex
}

const suffix = ".entry"

// Open makes dir and removes what interrupted writes left.
func Open(dir string, log *slog.Logger) (*Disk, error) {
	if err := durable.PrivateDir(dir); err != nil {
		return nil, err
	}
	if err := durable.Sweep(dir); err != nil {
		return nil, err
	}
	return &Disk{dir: dir, log: log}, nil
}

// View returns a Disk for All only, beside an agent that may be running: it makes, moves and removes nothing.
func View(dir string) *Disk {
	return &Disk{dir: dir, log: slog.New(slog.DiscardHandler), frozen: true}
}

// lock takes the lock of an entry and returns its release.
func (d *Disk) lock(id string) func() {
	m := &d.locks[crc32.Checksum([]byte(id), castagnoli)%uint32(len(d.locks))]
	m.Lock()
	return m.Unlock
}

// path hashes the id: it comes from the server and must not be a path.
func (d *Disk) path(id string) string {
	h := sha256.Sum256([]byte(id))
	return filepath.Join(d.dir, hex.EncodeToString(h[:16])+suffix)
}

// Put implements Journal.
func (d *Disk) Put(e *Entry) error {
	data, err := encode(e)
	if err != nil {
		return err
	}
	defer d.lock(e.Assignment.GetId())()
	return durable.WriteFile(d.path(e.Assignment.GetId()), data, 0o600)
}

// Drop implements Journal.
func (d *Disk) Drop(id string) error {
	defer d.lock(id)()
	if err := os.Remove(d.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault.Wrap(fault.Retryable, err, "a journal entry cannot be removed (%s)", durable.Reason(err))
	}
	return nil
}

// Probe implements Journal.
func (d *Disk) Probe() error {
	defer d.lock("probe")()
	path := filepath.Join(d.dir, "probe")
	if err := durable.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return fault.Wrap(fault.Retryable, err, "%s cannot be removed (%s)", path, durable.Reason(err))
	}
	return nil
}

// All implements Journal. An entry that cannot be decoded is renamed aside and logged: one bad sector must not keep
// the agent from its other work, and the server assigns again what Hello does not list.
func (d *Disk) All() ([]*Entry, error) {
	es, err := os.ReadDir(d.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(fault.Retryable, err, "the journal %s cannot be read (%s)", d.dir, durable.Reason(err))
	}
	var out []*Entry
	for _, f := range es {
		if !f.Type().IsRegular() || !strings.HasSuffix(f.Name(), suffix) {
			continue
		}
		path := filepath.Join(d.dir, f.Name())
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fault.Wrap(fault.Retryable, err, "the journal entry %s cannot be read (%s)", path, durable.Reason(err))
		}
		e, err := decode(data)
		if err == nil && d.path(e.Assignment.GetId()) != path {
			err = fault.New(fault.Internal, "the entry is of another assignment")
		}
		if err != nil && d.frozen {
			continue
		}
		if err != nil {
			d.log.Error("journal entry is damaged and set aside", "path", path, "err", err)
			if err := os.Rename(path, path+".damaged"); err != nil {
				d.log.Error("damaged journal entry cannot be set aside", "path", path, "err", err)
			}
			continue
		}
		out = append(out, e)
	}
	sortEntries(out)
	return out, nil
}

func sortEntries(es []*Entry) {
	sort.Slice(es, func(i, j int) bool { return es[i].Assignment.GetId() < es[j].Assignment.GetId() })
}

// Memory is a Journal that lives with the process; for load tools that run many agents.
type Memory struct {
	mu      sync.Mutex
	entries map[string]*Entry
}

// NewMemory returns an empty Memory.
func NewMemory() *Memory { return &Memory{entries: map[string]*Entry{}} }

// Put implements Journal.
func (m *Memory) Put(e *Entry) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.entries[e.Assignment.GetId()] = e.Clone()
	return nil
}

// Drop implements Journal.
func (m *Memory) Drop(id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.entries, id)
	return nil
}

// Probe implements Journal.
func (m *Memory) Probe() error { return nil }

// All implements Journal.
func (m *Memory) All() ([]*Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*Entry, 0, len(m.entries))
	for _, e := range m.entries {
		out = append(out, e.Clone())
	}
	sortEntries(out)
	return out, nil
}
