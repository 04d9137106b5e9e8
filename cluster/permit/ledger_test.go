package permit

import (
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
)

func commandGen() *rapid.Generator[*clusterpb.Command] {
	return rapid.Custom(func(t *rapid.T) *clusterpb.Command {
		issuer := rapid.SampledFrom([]string{"", "iss_1", "iss_2"}).Draw(t, "issuer")
		switch rapid.IntRange(0, 4).Draw(t, "command") {
		case 0, 1:
			return &clusterpb.Command{Body: &clusterpb.Command_Grant{Grant: &clusterpb.GrantPermits{Lease: &clusterpb.PermitLease{
				Id: rapid.Uint64Range(0, 20).Draw(t, "id"), IssuerId: issuer, NodeId: rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "node"),
				Permits: rapid.Int32Range(-1, 9).Draw(t, "permits"), DurationMs: 10_000}}}}
		case 2:
			return &clusterpb.Command{Body: &clusterpb.Command_End{End: &clusterpb.EndLeases{LeaseIds: rapid.SliceOfN(rapid.Uint64Range(0, 20), 0, 4).Draw(t, "ids")}}}
		case 3:
			return &clusterpb.Command{Body: &clusterpb.Command_Pause{Pause: &clusterpb.PauseIssuer{IssuerId: issuer, PauseMs: rapid.Int64Range(-1, 3).Draw(t, "ms")}}}
		default:
			return rapid.SampledFrom([]*clusterpb.Command{nil, {}, {Body: &clusterpb.Command_Grant{}}, {Body: &clusterpb.Command_Configuration{}}}).Draw(t, "other")
		}
	})
}

// TestLedgerIsAFunctionOfTheLog: two replicas of which one went through a snapshot at a random place hold the same.
func TestLedgerIsAFunctionOfTheLog(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		log := rapid.SliceOfN(commandGen(), 0, 40).Draw(t, "log")
		cut := rapid.IntRange(0, len(log)).Draw(t, "cut")
		var a, b Ledger
		for _, c := range log {
			a.Apply(c)
		}
		for _, c := range log[:cut] {
			b.Apply(c)
		}
		var s clusterpb.Snapshot
		b.Snapshot(&s)
		bytes, err := proto.MarshalOptions{Deterministic: true}.Marshal(&s)
		if err != nil {
			t.Fatal(err)
		}
		// What was written does not change with what is applied after it.
		for _, c := range log[cut:] {
			b.Apply(c)
		}
		if again, _ := (proto.MarshalOptions{Deterministic: true}).Marshal(&s); string(again) != string(bytes) {
			t.Fatal("a snapshot changed after it was taken")
		}
		var read clusterpb.Snapshot
		if err := proto.Unmarshal(bytes, &read); err != nil {
			t.Fatal(err)
		}
		var c Ledger
		c.Apply(log0())
		c.Restore(&read)
		for _, command := range log[cut:] {
			c.Apply(command)
		}
		var sa, sc clusterpb.Snapshot
		a.Snapshot(&sa)
		c.Snapshot(&sc)
		if !proto.Equal(&sa, &sc) {
			t.Fatalf("one replica holds %v, the other %v", &sa, &sc)
		}
	})
}

// log0 is a command that leaves something behind.
func log0() *clusterpb.Command {
	return &clusterpb.Command{Body: &clusterpb.Command_Grant{Grant: &clusterpb.GrantPermits{Lease: &clusterpb.PermitLease{Id: 99, IssuerId: "x", NodeId: "x", Permits: 1}}}}
}

func TestLedgerReplacesAndEnds(t *testing.T) {
	t.Parallel()
	grant := func(id uint64, node string) *clusterpb.Command {
		return &clusterpb.Command{Body: &clusterpb.Command_Grant{Grant: &clusterpb.GrantPermits{Lease: &clusterpb.PermitLease{Id: id, IssuerId: "iss_1", NodeId: node, Permits: 2}}}}
	}
	var l Ledger
	l.Apply(grant(1, "a"))
	l.Apply(grant(2, "b"))
	l.Apply(grant(3, "a"))
	// 1 is not in force any more, 7 never was.
	l.Apply(&clusterpb.Command{Body: &clusterpb.Command_End{End: &clusterpb.EndLeases{LeaseIds: []uint64{1, 2, 7}}}})
	if got := l.Leases(); len(got) != 1 || got[0].GetId() != 3 || l.LastLeaseID() != 3 {
		t.Fatalf("leases %v, last %d", got, l.LastLeaseID())
	}
}
