package fsm_test

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/certmesh/certmesh/cluster/internal/fsm"
	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
)

var update = flag.Bool("update", false, "write the snapshot of this version into testdata")

func encode(t testing.TB, c *clusterpb.Command) []byte {
	t.Helper()
	data, err := proto.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func register(id, address string) *clusterpb.Command {
	return &clusterpb.Command{Body: &clusterpb.Command_Register{Register: &clusterpb.RegisterMember{Member: &clusterpb.Member{
		Id: id, RaftAddress: address, MeshAddress: address, Version: 1, Healthy: true, Suffrage: clusterpb.Member_SUFFRAGE_VOTER,
	}}}}
}

func grant(id uint64, issuer, node string, permits int32) *clusterpb.Command {
	return &clusterpb.Command{Body: &clusterpb.Command_Grant{Grant: &clusterpb.GrantPermits{Lease: &clusterpb.PermitLease{
		Id: id, IssuerId: issuer, NodeId: node, Permits: permits, DurationMs: 5000,
	}}}}
}

func pause(issuer string, ms int64) *clusterpb.Command {
	return &clusterpb.Command{Body: &clusterpb.Command_Pause{Pause: &clusterpb.PauseIssuer{IssuerId: issuer, PauseMs: ms}}}
}

func end(ids ...uint64) *clusterpb.Command {
	return &clusterpb.Command{Body: &clusterpb.Command_End{End: &clusterpb.EndLeases{LeaseIds: ids}}}
}

// future returns a command of a version that this one does not know.
func future(ignorable bool) []byte {
	data := protowire.AppendTag(nil, 900, protowire.BytesType)
	data = protowire.AppendBytes(data, []byte("later"))
	if ignorable {
		data = protowire.AppendTag(data, 1, protowire.VarintType)
		data = protowire.AppendVarint(data, 1)
	}
	return data
}

func apply(t *testing.T, s *clusterpb.Snapshot, commands ...*clusterpb.Command) *clusterpb.Snapshot {
	t.Helper()
	for _, c := range commands {
		var err error
		if s, err = fsm.Apply(s, encode(t, c)); err != nil {
			t.Fatalf("apply %v: %v", c, err)
		}
	}
	return s
}

func TestRegistry(t *testing.T) {
	t.Parallel()
	s := apply(t, &clusterpb.Snapshot{}, register("n2", "b:1"), register("n1", "a:1"), register("n2", "c:1"))
	if len(s.GetMembers()) != 2 || s.GetMembers()[0].GetId() != "n1" || fsm.Member(s, "n2").GetRaftAddress() != "c:1" {
		t.Errorf("registry: %v", s.GetMembers())
	}
	if m := fsm.Member(s, "n1"); m.GetHealthy() || m.GetSuffrage() != 0 {
		t.Errorf("the registry says what only the leader and Raft know: %v", m)
	}
	s = apply(t, s, &clusterpb.Command{Body: &clusterpb.Command_Forget{Forget: &clusterpb.ForgetMember{NodeId: "n1"}}})
	if len(s.GetMembers()) != 1 || fsm.Member(s, "n1") != nil {
		t.Errorf("after forgetting n1: %v", s.GetMembers())
	}
}

func TestLeases(t *testing.T) {
	t.Parallel()
	s := apply(t, &clusterpb.Snapshot{}, grant(1, "i", "n1", 5), grant(2, "i", "n2", 5), grant(3, "i", "n1", 7))
	if len(s.GetLeases()) != 2 || s.GetLeases()[0].GetPermits() != 7 || s.GetLastLeaseId() != 3 {
		t.Errorf("leases: %v", s)
	}
	if _, err := fsm.Apply(s, encode(t, grant(3, "i", "n3", 1))); !errors.Is(err, fsm.ErrStale) {
		t.Errorf("a grant whose id is not the highest: %v, want ErrStale", err)
	}
	s = apply(t, s, end(1, 3, 99))
	if len(s.GetLeases()) != 1 || s.GetLeases()[0].GetId() != 2 || s.GetLastLeaseId() != 3 {
		t.Errorf("after the end of 3: %v", s)
	}
	s = apply(t, s, pause("i", 1000), pause("j", 5), pause("i", 10))
	if len(s.GetPauses()) != 2 || s.GetPauses()[0].GetPauseMs() != 10 {
		t.Errorf("pauses: %v", s.GetPauses())
	}
	if s = apply(t, s, pause("i", 0)); len(s.GetPauses()) != 1 {
		t.Errorf("a pause of nothing stays: %v", s.GetPauses())
	}
}

func TestUnknownAndMalformed(t *testing.T) {
	t.Parallel()
	s := apply(t, &clusterpb.Snapshot{}, register("n1", "a:1"))
	for _, c := range []struct {
		name  string
		entry []byte
		want  error
	}{
		{"may be ignored", future(true), nil},
		{"may not be ignored", future(false), fsm.ErrUnknown},
		{"nothing", nil, fsm.ErrMalformed},
		{"garbage", []byte("\xff\xfe garbage"), fsm.ErrMalformed},
		{"no member", encode(t, &clusterpb.Command{Body: &clusterpb.Command_Register{}}), fsm.ErrMalformed},
		{"no lease", encode(t, &clusterpb.Command{Body: &clusterpb.Command_Grant{}}), fsm.ErrMalformed},
		{"a lease of nothing", encode(t, grant(9, "i", "n", 0)), fsm.ErrMalformed},
		{"a pause before now", encode(t, pause("i", -1)), fsm.ErrMalformed},
	} {
		next, err := fsm.Apply(s, c.entry)
		if !errors.Is(err, c.want) || next != s {
			t.Errorf("%s: error %v, want %v; state kept: %v", c.name, err, c.want, next == s)
		}
	}
}

// TestLaterFieldsSurvive: what a newer version keeps in a snapshot outlives a node that does not know it.
func TestLaterFieldsSurvive(t *testing.T) {
	t.Parallel()
	s, err := fsm.Decode(future(false))
	if err != nil {
		t.Fatal(err)
	}
	data, err := fsm.Encode(apply(t, s, register("n1", "a:1")))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(data, []byte("later")) {
		t.Error("a field of a newer version is lost")
	}
}

// entries draws logs that hold all there is, and what there should not be.
func entries() *rapid.Generator[[]byte] {
	id := rapid.SampledFrom([]string{"", "n1", "n2", "n3", "n4"})
	issuer := rapid.SampledFrom([]string{"", "acme", "corp"})
	return rapid.Custom(func(t *rapid.T) []byte {
		var c *clusterpb.Command
		switch rapid.IntRange(0, 9).Draw(t, "kind") {
		case 0, 1:
			c = register(id.Draw(t, "id"), rapid.SampledFrom([]string{"a:1", "b:2"}).Draw(t, "address"))
		case 2:
			c = &clusterpb.Command{Body: &clusterpb.Command_Forget{Forget: &clusterpb.ForgetMember{NodeId: id.Draw(t, "id")}}}
		case 3:
			c = &clusterpb.Command{Body: &clusterpb.Command_Plan{Plan: &clusterpb.PlanShards{NodeIds: rapid.SliceOfN(id, 0, 4).Draw(t, "plan")}}}
		case 4:
			c = &clusterpb.Command{Body: &clusterpb.Command_Configuration{Configuration: &clusterpb.ConfigurationChanged{}}}
		case 5, 6:
			c = grant(rapid.Uint64Range(0, 40).Draw(t, "lease"), issuer.Draw(t, "issuer"), id.Draw(t, "node"), rapid.Int32Range(-1, 3).Draw(t, "permits"))
		case 7:
			c = end(rapid.SliceOfN(rapid.Uint64Range(0, 40), 0, 5).Draw(t, "leases")...)
		case 8:
			c = pause(issuer.Draw(t, "issuer"), rapid.Int64Range(-1, 3).Draw(t, "ms"))
		default:
			if rapid.Bool().Draw(t, "ignorable") {
				return future(true)
			}
			return rapid.SliceOfN(rapid.Byte(), 0, 30).Draw(t, "garbage")
		}
		data, err := proto.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		return data
	})
}

// TestReplicasAgree: two replicas of one log, one of which goes through a snapshot in the middle, end with the same bytes,
// and no state changes after it was handed out.
func TestReplicasAgree(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		log := rapid.SliceOfN(entries(), 0, 60).Draw(t, "log")
		cut := rapid.IntRange(0, len(log)).Draw(t, "cut")
		bytesOf := func(s *clusterpb.Snapshot) []byte {
			data, err := fsm.Encode(s)
			if err != nil {
				t.Fatal(err)
			}
			return data
		}
		a, b := &clusterpb.Snapshot{}, &clusterpb.Snapshot{}
		for i, entry := range log {
			before := bytesOf(a)
			nextA, errA := fsm.Apply(a, entry)
			if !bytes.Equal(before, bytesOf(a)) {
				t.Fatalf("entry %d changed a state that was handed out", i)
			}
			if i == cut {
				restored, err := fsm.Decode(bytesOf(b))
				if err != nil {
					t.Fatal(err)
				}
				b = restored
			}
			nextB, errB := fsm.Apply(b, entry)
			if !errors.Is(errA, errB) {
				t.Fatalf("entry %d: %v and %v", i, errA, errB)
			}
			a, b = nextA, nextB
		}
		if !bytes.Equal(bytesOf(a), bytesOf(b)) {
			t.Fatalf("the replicas differ:\n%v\n%v", a, b)
		}
	})
}

func FuzzApply(f *testing.F) {
	f.Add(future(false))
	f.Add(encode(f, grant(1, "i", "n", 1)))
	f.Fuzz(func(t *testing.T, entry []byte) {
		s := &clusterpb.Snapshot{LastLeaseId: 3, Leases: []*clusterpb.PermitLease{{Id: 3, IssuerId: "i", NodeId: "n"}}}
		if next, err := fsm.Apply(s, entry); err != nil && next != s {
			t.Error("an error and another state")
		}
	})
}

// TestSnapshotsOfOldVersions: what an earlier version wrote is read, and this version's is kept for later ones.
func TestSnapshotsOfOldVersions(t *testing.T) {
	t.Parallel()
	s := apply(t, &clusterpb.Snapshot{}, register("n1", "a:1"), register("n2", "b:1"), grant(7, "acme", "n2", 4), pause("corp", 30000),
		&clusterpb.Command{Body: &clusterpb.Command_Plan{Plan: &clusterpb.PlanShards{NodeIds: []string{"n1", "n2"}}}},
		&clusterpb.Command{Body: &clusterpb.Command_Configuration{Configuration: &clusterpb.ConfigurationChanged{}}})
	path := filepath.Join("testdata", "snapshot-v1.bin")
	if *update {
		data, err := fsm.Encode(s)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	old, err := fsm.Decode(data)
	if err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(old, s) {
		t.Errorf("read %v, want %v", old, s)
	}
	if _, err := fsm.Decode([]byte("\x0a\xff\xff garbage")); err == nil {
		t.Error("garbage is read as a snapshot")
	}
}
