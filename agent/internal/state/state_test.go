package state

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/agent/internal/durable"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func open(t *testing.T, files durable.Store) *Keeper {
	t.Helper()
	k, err := Open(Config{Files: files, Log: slog.New(slog.DiscardHandler),
		TrustBundle: func(b *agentpb.TrustBundle) error {
			if len(b.GetRoots()) == 0 {
				return fault.New(fault.Invalid, "no roots")
			}
			return nil
		},
		Target: func(s *agentpb.TargetSpec, _ []*agentpb.TargetSpec) error {
			if s.GetKind() != "file" {
				return fault.New(fault.Unsupported, "no such kind")
			}
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func target(version int64, name, kind string) *agentpb.State {
	return &agentpb.State{Version: &agentpb.StateVersion{Kind: KindTarget, Name: name, Version: version, Hash: []byte(kind)},
		Body: &agentpb.State_Target{Target: &agentpb.TargetSpec{Id: name, Kind: kind}}}
}

func settings(version, verify int64) *agentpb.State {
	return &agentpb.State{Version: &agentpb.StateVersion{Kind: KindSettings, Version: version},
		Body: &agentpb.State_Settings{Settings: &agentpb.Settings{VerifyTimeoutMs: verify}}}
}

func held(k *Keeper) string {
	var b strings.Builder
	for _, v := range k.Versions() {
		fmt.Fprintf(&b, "%s:%s@%d ", v.GetKind(), v.GetName(), v.GetVersion())
	}
	return strings.TrimSpace(b.String())
}

// TestLastGoodVersionStays: a rejected version changes nothing, now or after a restart.
func TestLastGoodVersionStays(t *testing.T) {
	t.Parallel()
	files := durable.NewMemory()
	k := open(t, files)
	for _, st := range []*agentpb.State{target(1, "t1", "file"), target(1, "t2", "file"), settings(4, 100)} {
		if err := k.Apply(st); err != nil {
			t.Fatal(err)
		}
	}
	for want, st := range map[fault.Class]*agentpb.State{
		fault.Unsupported: target(2, "t1", "f5"),
		fault.Invalid:     settings(5, -1),
	} {
		if err := k.Apply(st); !fault.Is(err, want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	for _, k := range []*Keeper{k, open(t, files)} {
		if got := held(k); got != "settings:@4 target:t1@1 target:t2@1" || k.Settings().GetVerifyTimeoutMs() != 100 {
			t.Errorf("held: %s, settings %v", got, k.Settings())
		}
	}
}

func TestLatestWins(t *testing.T) {
	t.Parallel()
	files := durable.NewMemory()
	k := open(t, files)
	for _, v := range []int64{3, 2, 3, 5, 4} {
		if err := k.Apply(settings(v, v)); err != nil {
			t.Fatal(err)
		}
	}
	if k.Settings().GetVerifyTimeoutMs() != 5 {
		t.Errorf("in force: %v", k.Settings())
	}
	gone := &agentpb.State{Version: &agentpb.StateVersion{Kind: KindTarget, Name: "t1", Version: 9}, Body: &agentpb.State_Removed{Removed: &agentpb.Removed{}}}
	if err := k.Apply(target(8, "t1", "file")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := k.Apply(gone); err != nil {
			t.Fatal(err)
		}
	}
	if got := held(open(t, files)); got != "settings:@5" {
		t.Error(got)
	}
	// After the server was restored from a backup it may give a number again to another body.
	same := settings(5, 77)
	same.Version.Hash = []byte("other")
	if err := k.Apply(same); err != nil || k.Settings().GetVerifyTimeoutMs() != 77 {
		t.Errorf("another body under the same number: %v, %v", k.Settings(), err)
	}
}

func TestHostileStates(t *testing.T) {
	t.Parallel()
	k := open(t, durable.NewMemory())
	misfit := settings(1, 1)
	misfit.Version.Kind = KindTarget
	named := settings(1, 1)
	named.Version.Name = "x"
	other := target(1, "t1", "file")
	other.GetTarget().Id = "t2"
	bundle := &agentpb.State{Version: &agentpb.StateVersion{Kind: KindTrustBundle, Version: 1}, Body: &agentpb.State_Removed{Removed: &agentpb.Removed{}}}
	for name, st := range map[string]*agentpb.State{
		"empty": {}, "misfit": misfit, "named singleton": named, "other target": other, "no trust bundle": bundle,
		"long name": target(1, strings.Repeat("x", 65), "file"),
		"unknown":   {Version: &agentpb.StateVersion{Kind: "\xff\x1b"}, Body: &agentpb.State_Settings{Settings: &agentpb.Settings{}}},
		"no roots":  {Version: &agentpb.StateVersion{Kind: KindTrustBundle, Version: 1}, Body: &agentpb.State_TrustBundle{TrustBundle: &agentpb.TrustBundle{}}},
	} {
		if err := k.Apply(st); fault.ClassOf(err) != fault.Invalid && fault.ClassOf(err) != fault.Unsupported {
			t.Errorf("%s: %v", name, err)
		}
	}
	for i := range maxTargets {
		if err := k.Apply(target(1, fmt.Sprint(i), "file")); err != nil {
			t.Fatal(err)
		}
	}
	if err := k.Apply(target(1, "one more", "file")); !fault.Is(err, fault.Exhausted) {
		t.Errorf("unbounded: %v", err)
	}
	if err := k.Apply(target(2, "7", "file")); err != nil {
		t.Errorf("at the bound a known target cannot change: %v", err)
	}
}

// TestDamagedState is dropped, so that the server sends it again.
func TestDamagedState(t *testing.T) {
	t.Parallel()
	files := durable.NewMemory()
	k := open(t, files)
	for _, st := range []*agentpb.State{target(1, "t1", "file"), target(1, "t2", "file")} {
		if err := k.Apply(st); err != nil {
			t.Fatal(err)
		}
	}
	if err := files.Write(fileOf(key{KindTarget, "t1"}), []byte("\xff\xff")); err != nil {
		t.Fatal(err)
	}
	swapped, _ := proto.Marshal(target(1, "t3", "file"))
	if err := files.Write(fileOf(key{KindTarget, "t4"}), swapped); err != nil {
		t.Fatal(err)
	}
	if got := held(open(t, files)); got != "target:t2@1" {
		t.Error(got)
	}
}

// TestUnwritable: what cannot be kept is not in force.
func TestUnwritable(t *testing.T) {
	t.Parallel()
	k := open(t, full{durable.NewMemory()})
	if err := k.Apply(settings(1, 9)); !fault.Is(err, fault.Retryable) || k.Settings().GetVerifyTimeoutMs() != 0 || held(k) != "" {
		t.Errorf("%v, %v", err, k.Settings())
	}
}

type full struct{ durable.Store }

func (full) Write(string, []byte) error { return fault.New(fault.Retryable, "no space left on device") }
