// Package state keeps the versioned resources that the control plane sends: trust bundle, settings, targets. The latest
// version wins; what cannot be applied is rejected with a reason while the last good version stays in force. Versions
// in force survive a restart.
package state

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"slices"
	"sort"
	"strings"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/agent/internal/durable"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

// The kinds of state.
const (
	KindTrustBundle = "trust_bundle"
	KindSettings    = "settings"
	KindTarget      = "target"
)

const (
	// maxTargets bounds what one agent keeps; a host has a handful, one with a web server for many customers hundreds. With
	// their answers it stays below what an outbox holds (stream.maxBox).
	maxTargets = 1000
	// Hello lists the names.
	maxName = 64
	prefix  = "state-"
)

// Config of a Keeper.
type Config struct {
	Files durable.Store
	Log   *slog.Logger
	// TrustBundle takes a bundle into force, or says why not.
	TrustBundle func(*agentpb.TrustBundle) error
	// Target checks a target against what this agent links and allows, and against the others in force.
	Target func(t *agentpb.TargetSpec, others []*agentpb.TargetSpec) error
	// Settings is told the settings in force after a change; nil values are defaults.
	Settings func(*agentpb.Settings)
}

// Keeper holds the states in force. It is safe for concurrent use.
type Keeper struct {
	cfg  Config
	mu   sync.Mutex
	held map[key]*agentpb.State
	// list are the targets of held, by id; a new slice after every change.
	list []*agentpb.TargetSpec
}

type key struct{ kind, name string }

// Open reads the states that were in force. A damaged one is dropped with a log line: the server sends it again when
// Hello does not list it.
func Open(cfg Config) (*Keeper, error) {
	k := &Keeper{cfg: cfg, held: map[key]*agentpb.State{}}
	names, err := cfg.Files.List(prefix)
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		data, err := cfg.Files.Read(n)
		if err != nil {
			return nil, fault.Wrap(fault.Retryable, err, "the state %s cannot be read", n)
		}
		st := &agentpb.State{}
		if err := proto.Unmarshal(data, st); err != nil || fileOf(keyOf(st)) != n {
			cfg.Log.Warn("damaged state dropped", "file", n)
			continue
		}
		k.held[keyOf(st)] = st
		if t := st.GetTarget(); t != nil {
			k.list = append(k.list, t)
		}
	}
	slices.SortFunc(k.list, func(a, b *agentpb.TargetSpec) int { return strings.Compare(a.GetId(), b.GetId()) })
	return k, nil
}

func keyOf(st *agentpb.State) key {
	return key{st.GetVersion().GetKind(), st.GetVersion().GetName()}
}

// fileOf hashes the name: it comes from the server and must not be a path.
func fileOf(k key) string {
	h := sha256.Sum256([]byte(k.kind + "\x00" + k.name))
	return prefix + hex.EncodeToString(h[:16]) + ".pb"
}

// Settings returns the settings in force; never nil.
func (k *Keeper) Settings() *agentpb.Settings {
	k.mu.Lock()
	defer k.mu.Unlock()
	if s := k.held[key{KindSettings, ""}].GetSettings(); s != nil {
		return s
	}
	return &agentpb.Settings{}
}

// Versions lists what is held, for Hello.
func (k *Keeper) Versions() []*agentpb.StateVersion {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := make([]*agentpb.StateVersion, 0, len(k.held))
	for _, st := range k.held {
		out = append(out, st.GetVersion())
	}
	sort.Slice(out, func(i, j int) bool {
		return slices.Compare([]string{out[i].GetKind(), out[i].GetName()}, []string{out[j].GetKind(), out[j].GetName()}) < 0
	})
	return out
}

// Apply takes st into force and returns nil, or says why not; then the former version stays. A version that is not
// newer than the one held changes nothing and is no error.
func (k *Keeper) Apply(st *agentpb.State) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	id := keyOf(st)
	if len(id.name) > maxName {
		return fault.InvalidField("version.name", "has %d bytes; at most %d are expected", len(id.name), maxName)
	}
	if have := k.held[id].GetVersion(); have != nil && !newer(st.GetVersion(), have) {
		return nil
	}
	if err := k.take(id, st); err != nil {
		return err
	}
	if id.kind == KindSettings && k.cfg.Settings != nil {
		s := st.GetSettings()
		if s == nil {
			s = &agentpb.Settings{}
		}
		k.cfg.Settings(s)
	}
	return nil
}

// newer says whether v replaces have. A server that was restored from a backup may give a number again to another body.
func newer(v, have *agentpb.StateVersion) bool {
	if v.GetVersion() == have.GetVersion() {
		return len(v.GetHash()) > 0 && !bytes.Equal(v.GetHash(), have.GetHash())
	}
	return v.GetVersion() > have.GetVersion()
}

func (k *Keeper) take(id key, st *agentpb.State) error {
	if _, removed := st.GetBody().(*agentpb.State_Removed); removed && id.kind != KindTrustBundle {
		if err := k.cfg.Files.Remove(fileOf(id)); err != nil {
			return err
		}
		delete(k.held, id)
		if id.kind == KindTarget {
			k.list = k.targets(id.name)
		}
		return nil
	}
	misfit := fault.New(fault.Invalid, "the state's body does not fit its kind %q", strings.ToValidUTF8(id.kind[:min(len(id.kind), 64)], ""))
	switch id.kind {
	case KindTrustBundle:
		if st.GetTrustBundle() == nil || id.name != "" {
			return misfit
		}
		if err := k.cfg.TrustBundle(st.GetTrustBundle()); err != nil {
			return err
		}
	case KindSettings:
		s := st.GetSettings()
		if s == nil || id.name != "" {
			return misfit
		}
		if s.GetBeatIntervalMs() < 0 || s.GetVerifyTimeoutMs() < 0 || s.GetVerifyIntervalMs() < 0 {
			return fault.InvalidField("settings", "an interval is negative")
		}
	case KindTarget:
		t := st.GetTarget()
		if t == nil || t.GetId() != id.name {
			return misfit
		}
		others := k.targets(id.name)
		if k.held[id] == nil && len(others) >= maxTargets {
			return fault.New(fault.Exhausted, "this agent keeps at most %d targets", maxTargets)
		}
		if err := k.cfg.Target(t, others); err != nil {
			return err
		}
	default:
		return fault.New(fault.Unsupported, "this agent does not know that kind of state; a newer version may")
	}
	data, err := proto.Marshal(st)
	if err != nil {
		return fault.Wrap(fault.Internal, err, "a state cannot be encoded")
	}
	if err := k.cfg.Files.Write(fileOf(id), data); err != nil {
		return err
	}
	k.held[id] = st
	if t := st.GetTarget(); t != nil {
		others := k.targets(id.name)
		i, _ := slices.BinarySearchFunc(others, id.name, func(t *agentpb.TargetSpec, id string) int { return strings.Compare(t.GetId(), id) })
		k.list = slices.Insert(others, i, t)
	}
	return nil
}

// targets are those in force but except, by id, in a slice of its own.
func (k *Keeper) targets(except string) []*agentpb.TargetSpec {
	out := make([]*agentpb.TargetSpec, 0, len(k.list)+1)
	for _, t := range k.list {
		if t.GetId() != except {
			out = append(out, t)
		}
	}
	return out
}

// Targets are the targets in force, by id; the slice is shared and must not be changed.
func (k *Keeper) Targets() []*agentpb.TargetSpec {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.list
}
