package permit

import (
	"cmp"
	"maps"
	"slices"

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
)

// Ledger is what the Raft log says about permits: the last lease of each node toward each issuer, and who asked for
// restraint. It is a pure value of the commands applied: no clock, randomness or order of maps. What lapses stays until
// the leader ends it. The zero value is empty and ready; it is not safe for concurrent use.
type Ledger struct {
	// leases by whom they were granted to: a grant replaces the one before it.
	leases map[holding]*clusterpb.PermitLease
	pauses map[string]int64
	lastID uint64
}

type holding struct{ issuer, node string }

// Apply carries out a GrantPermits, EndLeases or PauseIssuer, and nothing for any other command. The messages become the
// ledger's: the caller does not change them any more.
func (l *Ledger) Apply(c *clusterpb.Command) {
	switch b := c.GetBody().(type) {
	case *clusterpb.Command_Grant:
		l.grant(b.Grant.GetLease())
	case *clusterpb.Command_End:
		l.end(b.End.GetLeaseIds())
	case *clusterpb.Command_Pause:
		l.pause(b.Pause.GetIssuerId(), b.Pause.GetPauseMs())
	}
}

func (l *Ledger) grant(lease *clusterpb.PermitLease) {
	if lease == nil {
		return
	}
	if l.leases == nil {
		l.leases = map[holding]*clusterpb.PermitLease{}
	}
	l.leases[holding{lease.GetIssuerId(), lease.GetNodeId()}] = lease
	l.lastID = max(l.lastID, lease.GetId())
}

func (l *Ledger) end(ids []uint64) {
	maps.DeleteFunc(l.leases, func(_ holding, lease *clusterpb.PermitLease) bool { return slices.Contains(ids, lease.GetId()) })
}

// pause of 0 or less says that it is over.
func (l *Ledger) pause(issuer string, ms int64) {
	if ms <= 0 {
		delete(l.pauses, issuer)
		return
	}
	if l.pauses == nil {
		l.pauses = map[string]int64{}
	}
	l.pauses[issuer] = ms
}

// Leases returns the leases in the ledger, in the order of their ids. The messages are shared: they are read only.
func (l *Ledger) Leases() []*clusterpb.PermitLease {
	return slices.SortedFunc(maps.Values(l.leases), func(a, b *clusterpb.PermitLease) int {
		return cmp.Or(cmp.Compare(a.GetId(), b.GetId()), cmp.Compare(a.GetIssuerId(), b.GetIssuerId()), cmp.Compare(a.GetNodeId(), b.GetNodeId()))
	})
}

// Pauses returns who asked for restraint, by issuer: how long, not since when.
func (l *Ledger) Pauses() []*clusterpb.PauseIssuer {
	out := make([]*clusterpb.PauseIssuer, 0, len(l.pauses))
	for _, issuer := range slices.Sorted(maps.Keys(l.pauses)) {
		out = append(out, &clusterpb.PauseIssuer{IssuerId: issuer, PauseMs: l.pauses[issuer]})
	}
	return out
}

// LastLeaseID is the highest id granted so far; 0: none ever.
func (l *Ledger) LastLeaseID() uint64 { return l.lastID }

// Snapshot writes the ledger into s. What it writes shares nothing with the ledger that a later Apply changes.
func (l *Ledger) Snapshot(s *clusterpb.Snapshot) {
	s.Leases, s.Pauses, s.LastLeaseId = l.Leases(), l.Pauses(), l.lastID
}

// Restore makes the ledger what Snapshot wrote, whatever it was before.
func (l *Ledger) Restore(s *clusterpb.Snapshot) {
	*l = Ledger{lastID: s.GetLastLeaseId()}
	for _, lease := range s.GetLeases() {
		l.grant(lease)
	}
	for _, p := range s.GetPauses() {
		l.pause(p.GetIssuerId(), p.GetPauseMs())
	}
}
