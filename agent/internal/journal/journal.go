// Package journal remembers on disk every assignment that the agent accepted and the server has not settled.
//
// The entries of a Disk are in one durable.Log: what many assignments store at the same time becomes durable with one
// fsync. A removal is not fsynced: an entry that comes back after a power cut is resolved by the next Welcome's verdict.
package journal

import (
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"sort"
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

// Journal keeps entries by assignment id. Calls are safe for concurrent use; what Put and Drop do comes about in the order
// of the calls.
type Journal interface {
	// Put stores the entry, which must not be changed afterwards, and returns at once. stored is called, not from within Put,
	// once it is durable, or with the reason why it cannot be.
	Put(e *Entry, stored func(error))
	// Drop forgets an assignment; unknown is fine. It returns at once.
	Drop(id string)
	// All returns every stored entry, ordered by assignment id.
	All() ([]*Entry, error)
	// Probe says whether a Put would succeed now.
	Probe() error
}

// Store is Put for who wants to wait.
func Store(j Journal, e *Entry) error {
	c := make(chan error, 1)
	j.Put(e, func(err error) { c <- err })
	return <-c
}

// record is an entry's encoding, as JSON.
type record struct {
	Assignment []byte          `json:"assignment"`
	CSR        []byte          `json:"csr,omitempty"`
	SPKI       []byte          `json:"spki,omitempty"`
	Receipt    json.RawMessage `json:"receipt,omitempty"`
	Result     []byte          `json:"result,omitempty"`
}

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
	return body, nil
}

func decode(id string, data []byte) (*Entry, error) {
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the entry cannot be decoded")
	}
	e := &Entry{Assignment: &agentpb.Assignment{}, CSR: r.CSR, SPKI: r.SPKI, Receipt: r.Receipt}
	if err := proto.Unmarshal(r.Assignment, e.Assignment); err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the assignment cannot be decoded")
	}
	if e.Assignment.GetId() != id {
		return nil, fault.New(fault.Internal, "the entry is of another assignment")
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
	files *durable.Log
	log   *slog.Logger
}

// Open makes dir if needed and reads what is in it.
func Open(dir string, log *slog.Logger) (*Disk, error) {
	l, err := durable.OpenLog(dir, log)
	if err != nil {
		return nil, err
	}
	return &Disk{files: l, log: log}, nil
}

// View returns the entries in dir for looking only, beside an agent that may be running. What is damaged is left out.
func View(dir string) ([]*Entry, error) {
	blobs, err := durable.ReadLog(dir)
	if err != nil {
		return nil, err
	}
	var out []*Entry
	for id, data := range blobs {
		if e, err := decode(id, data); err == nil {
			out = append(out, e)
		}
	}
	sortEntries(out)
	return out, nil
}

// Put implements Journal.
func (d *Disk) Put(e *Entry, stored func(error)) {
	data, err := encode(e)
	if err != nil {
		go stored(err)
		return
	}
	d.files.Begin(e.Assignment.GetId(), data, stored)
}

// Drop implements Journal.
func (d *Disk) Drop(id string) {
	d.files.Forget(id, func(err error) {
		if err != nil {
			d.log.Warn("journal entry not removed; the next Welcome settles it again", "job_id", id, "err", err)
		}
	})
}

// Probe implements Journal.
func (d *Disk) Probe() error { return d.files.Probe() }

// All implements Journal. An entry that cannot be decoded is left out and logged: it must not keep the agent from its other
// work, and the server assigns again what Hello does not list.
func (d *Disk) All() ([]*Entry, error) {
	ids, err := d.files.List("")
	if err != nil {
		return nil, err
	}
	var out []*Entry
	for _, id := range ids {
		data, err := d.files.Read(id)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		e, err := decode(id, data)
		if err != nil {
			d.log.Error("journal entry left out", "job_id", id, "err", err)
			continue
		}
		out = append(out, e)
	}
	sortEntries(out)
	return out, nil
}

// Close gives the file back after everything that was begun.
func (d *Disk) Close() error { return d.files.Close() }

func sortEntries(es []*Entry) {
	sort.Slice(es, func(i, j int) bool { return es[i].Assignment.GetId() < es[j].Assignment.GetId() })
}

// Memory is a Journal that lives with the process; for load tools that run many agents.
type Memory struct {
	mu      sync.Mutex
	entries map[string]*Entry
	told    []func(error)
	telling bool
}

// NewMemory returns an empty Memory.
func NewMemory() *Memory { return &Memory{entries: map[string]*Entry{}} }

// Put implements Journal.
func (m *Memory) Put(e *Entry, stored func(error)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.entries[e.Assignment.GetId()] = e.Clone()
	m.told = append(m.told, stored)
	if !m.telling {
		m.telling = true
		go m.tell()
	}
}

// tell says in order what was stored.
func (m *Memory) tell() {
	for {
		m.mu.Lock()
		told := m.told
		m.told = nil
		m.telling = len(told) > 0
		m.mu.Unlock()
		if len(told) == 0 {
			return
		}
		for _, f := range told {
			f(nil)
		}
	}
}

// Drop implements Journal.
func (m *Memory) Drop(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.entries, id)
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
