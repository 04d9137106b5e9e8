// Package fsm is the state that the cluster's Raft log leads to, as functions over values.
//
// Every node applies the same entries and must arrive at the same bytes: no clock, no randomness, no map, no goroutine,
// no I/O, no log. A test of this package and e2e/deptest hold that. A state is never changed once it was returned, so a
// snapshot is a pointer.
package fsm

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
)

var (
	// ErrUnknown: the entry holds a command that this version does not know and may not ignore. The node is too old: what
	// it makes of later entries would not be what the others make of them.
	ErrUnknown = errors.New("the log holds a command of a newer version")
	// ErrMalformed: the entry is none, or holds values that no node proposes. Every node skips it.
	ErrMalformed = errors.New("not a command of the cluster")
	// ErrStale: the command came too late, its ground is gone. Every node skips it.
	ErrStale = errors.New("overtaken by a later command")
)

// Apply returns the state after an entry. With an error it is the state before; the error is the same on every node, but
// for ErrUnknown. An unknown command that may be ignored is no error.
func Apply(s *clusterpb.Snapshot, entry []byte) (*clusterpb.Snapshot, error) {
	c := &clusterpb.Command{}
	if err := proto.Unmarshal(entry, c); err != nil {
		return s, ErrMalformed
	}
	next := shallow(s)
	switch b := c.GetBody().(type) {
	case *clusterpb.Command_Register:
		m := b.Register.GetMember()
		if m.GetId() == "" {
			return s, ErrMalformed
		}
		// Raft's configuration says who votes, and the leader who is well.
		m.Suffrage, m.Healthy = clusterpb.Member_SUFFRAGE_UNSPECIFIED, false
		next.Members = put(s.GetMembers(), m, func(a, b *clusterpb.Member) int { return cmp.Compare(a.GetId(), b.GetId()) })
	case *clusterpb.Command_Forget:
		next.Members = drop(s.GetMembers(), func(m *clusterpb.Member) bool { return m.GetId() == b.Forget.GetNodeId() })
	case *clusterpb.Command_Plan:
		next.ShardNodeIds = b.Plan.GetNodeIds()
	case *clusterpb.Command_Configuration:
		next.ConfigurationRevision++
	case *clusterpb.Command_Grant:
		l := b.Grant.GetLease()
		switch {
		case l.GetIssuerId() == "" || l.GetNodeId() == "" || l.GetPermits() < 1 || l.GetDurationMs() < 1:
			return s, ErrMalformed
		case l.GetId() <= s.GetLastLeaseId():
			return s, ErrStale
		}
		next.LastLeaseId = l.GetId()
		next.Leases = put(s.GetLeases(), l, compareLeases)
	case *clusterpb.Command_End:
		ended := b.End.GetLeaseIds()
		next.Leases = drop(s.GetLeases(), func(l *clusterpb.PermitLease) bool { return slices.Contains(ended, l.GetId()) })
	case *clusterpb.Command_Pause:
		p := b.Pause
		if p.GetIssuerId() == "" || p.GetPauseMs() < 0 {
			return s, ErrMalformed
		}
		next.Pauses = drop(s.GetPauses(), func(old *clusterpb.PauseIssuer) bool { return old.GetIssuerId() == p.GetIssuerId() })
		if p.GetPauseMs() > 0 {
			next.Pauses = put(next.Pauses, p, func(a, b *clusterpb.PauseIssuer) int { return cmp.Compare(a.GetIssuerId(), b.GetIssuerId()) })
		}
	case nil:
		switch {
		case len(c.ProtoReflect().GetUnknown()) == 0:
			return s, ErrMalformed
		case c.GetIgnorable():
			return s, nil
		default:
			return s, ErrUnknown
		}
	default:
		return s, ErrUnknown
	}
	return next, nil
}

// Encode returns the bytes of a snapshot: the same for the same state.
func Encode(s *clusterpb.Snapshot) ([]byte, error) {
	return proto.MarshalOptions{Deterministic: true}.Marshal(s)
}

// Decode reads a snapshot.
func Decode(data []byte) (*clusterpb.Snapshot, error) {
	s := &clusterpb.Snapshot{}
	if err := proto.Unmarshal(data, s); err != nil {
		return nil, fmt.Errorf("the snapshot cannot be read: %w", err)
	}
	return s, nil
}

// Member returns a node's entry in the registry, nil if it has none.
func Member(s *clusterpb.Snapshot, id string) *clusterpb.Member {
	for _, m := range s.GetMembers() {
		if m.GetId() == id {
			return m
		}
	}
	return nil
}

// shallow returns a copy that shares every element; what a newer version stored besides stays with it.
func shallow(s *clusterpb.Snapshot) *clusterpb.Snapshot {
	next := &clusterpb.Snapshot{
		Members: s.GetMembers(), ShardNodeIds: s.GetShardNodeIds(), ConfigurationRevision: s.GetConfigurationRevision(),
		Leases: s.GetLeases(), LastLeaseId: s.GetLastLeaseId(), Pauses: s.GetPauses(),
	}
	if unknown := s.ProtoReflect().GetUnknown(); len(unknown) > 0 {
		next.ProtoReflect().SetUnknown(unknown)
	}
	return next
}

func compareLeases(a, b *clusterpb.PermitLease) int {
	return cmp.Or(cmp.Compare(a.GetIssuerId(), b.GetIssuerId()), cmp.Compare(a.GetNodeId(), b.GetNodeId()))
}

// put returns a sorted list with v in it, in the place of what compares equal; list stays as it is.
func put[T any](list []T, v T, compare func(a, b T) int) []T {
	at, found := slices.BinarySearchFunc(list, v, compare)
	if !found {
		return slices.Insert(slices.Clone(list), at, v)
	}
	next := slices.Clone(list)
	next[at] = v
	return next
}

// drop returns a list without what gone names; list stays as it is.
func drop[T any](list []T, gone func(T) bool) []T {
	if !slices.ContainsFunc(list, gone) {
		return list
	}
	return slices.DeleteFunc(slices.Clone(list), gone)
}
