package cluster

import (
	"slices"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/certmesh/certmesh/cluster/internal/fsm"
	clusterlog "github.com/certmesh/certmesh/cluster/internal/log"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
)

// book knows where nodes are. The registry alone does not suffice: after a start it is empty until a leader is there, for
// whose election the addresses are needed, and if every node has moved meanwhile what it says is wrong.
type book struct {
	registry func() *clusterpb.Snapshot
	// found is the registry as it follows from what lay on the disk at the start, committed or not.
	found *clusterpb.Snapshot

	mu sync.Mutex
	// learned is what nodes have said of themselves since.
	learned map[string]*clusterpb.Member
}

func newBook(registry func() *clusterpb.Snapshot, f *clusterlog.Files) *book {
	found := &clusterpb.Snapshot{}
	if f.Newest != nil {
		if s, err := fsm.Decode(f.Newest); err == nil {
			found = s
		}
	}
	for _, l := range f.Logs {
		if l.Type == raft.LogCommand {
			found, _ = fsm.Apply(found, l.Data) // What cannot be applied names no address.
		}
	}
	return &book{registry: registry, found: found, learned: map[string]*clusterpb.Member{}}
}

// learn takes in what a node says of itself.
func (b *book) learn(m *clusterpb.Member) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.learned) < maxMembers || b.learned[m.GetId()] != nil {
		b.learned[m.GetId()] = m
	}
}

// known returns what is known of a node, best first.
func (b *book) known(id string) []*clusterpb.Member {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := []*clusterpb.Member{b.learned[id], fsm.Member(b.registry(), id), fsm.Member(b.found, id)}
	return slices.DeleteFunc(all, func(m *clusterpb.Member) bool { return m == nil })
}

// where returns the Raft addresses of a node, best first.
func (b *book) where(id string) []string {
	var all []string
	for _, m := range b.known(id) {
		if !slices.Contains(all, m.GetRaftAddress()) {
			all = append(all, m.GetRaftAddress())
		}
	}
	return all
}

// meshOf returns the mesh address of a node, or nothing.
func (b *book) meshOf(id string) string {
	// Who moved has told the registry before anyone else.
	if m := fsm.Member(b.registry(), id); m != nil {
		return m.GetMeshAddress()
	}
	for _, m := range b.known(id) {
		return m.GetMeshAddress()
	}
	return ""
}

// mesh returns every mesh address that is known.
func (b *book) mesh() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var all []string
	for _, m := range b.learned {
		all = append(all, m.GetMeshAddress())
	}
	for _, m := range slices.Concat(b.registry().GetMembers(), b.found.GetMembers()) {
		all = append(all, m.GetMeshAddress())
	}
	slices.Sort(all)
	return slices.Compact(all)
}
