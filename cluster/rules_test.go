package cluster

import (
	"errors"
	"slices"
	"testing"
	"time"

	clusterpb "github.com/certmesh/certmesh/protocol/cluster/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func TestPromotions(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ voters, stable, want int }{
		{1, 0, 0}, {1, 1, 0}, {1, 2, 2}, {1, 3, 2}, {1, 4, 4},
		{2, 0, 0}, {2, 1, 1}, {2, 2, 1}, {2, 3, 3},
		{3, 0, 0}, {3, 1, 0}, {3, 2, 2}, {3, 7, 2},
		{4, 0, 0}, {4, 1, 1}, {4, 5, 1},
		{5, 3, 0}, {7, 2, 0},
	} {
		if got := promotions(c.voters, c.stable); got != c.want {
			t.Errorf("%d voters and %d stable others: %d get a vote, want %d", c.voters, c.stable, got, c.want)
		}
	}
}

func TestReapable(t *testing.T) {
	t.Parallel()
	const contact, after = 2 * time.Second, 24 * time.Hour
	day := 25 * time.Hour
	voter := func(id string, silent time.Duration) standing { return standing{id, true, silent} }
	other := func(id string, silent time.Duration) standing { return standing{id, false, silent} }
	for _, c := range []struct {
		name string
		all  []standing
		want []string
	}{
		{"all well", []standing{voter("a", 0), voter("b", 1), voter("c", 1), voter("d", 1), voter("e", 1)}, nil},
		{"one of five is dead", []standing{voter("a", 0), voter("b", 1), voter("c", 1), voter("d", 1), voter("e", day)}, []string{"e"}},
		{"not yet", []standing{voter("a", 0), voter("b", 1), voter("c", 1), voter("d", 1), voter("e", 23*time.Hour)}, nil},
		{"two of five are dead: one at a time", []standing{voter("a", 0), voter("b", 1), voter("c", 1), voter("d", day), voter("e", day)}, []string{"d"}},
		{"then the other", []standing{voter("a", 0), voter("b", 1), voter("c", 1), voter("e", day)}, []string{"e"}},
		{"never below three", []standing{voter("a", 0), voter("b", 1), voter("c", day)}, nil},
		{"one that does not vote", []standing{voter("a", 0), voter("b", 1), voter("c", 1), other("d", day)}, []string{"d"}},
		{"beside a single voter", []standing{voter("a", 0), other("b", day), other("c", 1)}, []string{"b"}},
		{"a leader that slept for a day", []standing{voter("a", 0), voter("b", day), voter("c", day), voter("d", day), voter("e", day), other("f", day)}, nil},
		{"no majority is well", []standing{voter("a", 0), voter("b", 1), voter("c", day), voter("d", day), voter("e", 3*time.Second)}, nil},
	} {
		if got := reapable(c.all, contact, after); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestCommandsWaitForEveryMember(t *testing.T) {
	t.Parallel()
	members := []*clusterpb.Member{{Id: "n1", Version: Version}, {Id: "n2", Version: Version - 1}}
	if err := knownTo(members, Version); !fault.Is(err, fault.Unsupported) {
		t.Errorf("a command that n2 does not know: %v, want unsupported", err)
	}
	if err := knownTo(members, Version-1); err != nil {
		t.Errorf("a command that all know: %v", err)
	}
	if err := knownTo(nil, since(&clusterpb.Command{})); !fault.Is(err, fault.Unsupported) {
		t.Errorf("a command that this program does not know: %v, want unsupported", err)
	}
}

func TestExpect(t *testing.T) {
	t.Parallel()
	for n, ok := range map[int]bool{-1: false, 0: true, 1: true, 2: false, 3: true, 4: false, 5: true, 6: false, 7: true, 8: false, 9: false} {
		if err := CheckExpect(n); (err == nil) != ok {
			t.Errorf("%d: %v", n, err)
		}
	}
}

func TestAddress(t *testing.T) {
	t.Parallel()
	for address, ok := range map[string]bool{
		"n1.example.com:8445": true, "[2001:db8::1]:8445": true, "10.0.0.1:8445": true,
		"": false, "n1": false, ":8445": false, "0.0.0.0:8445": false, "[::]:8445": false, "n1:0": false, "n1:": false,
	} {
		if err := CheckAddress(address); (err == nil) != ok {
			t.Errorf("%q: %v", address, err)
		}
	}
}

func TestErrorsNameTheLeader(t *testing.T) {
	t.Parallel()
	err := fault.Wrap(fault.Rejected, ErrNotLeader, "node n2 leads")
	if !errors.Is(err, ErrNotLeader) || !fault.Is(err, fault.Rejected) {
		t.Errorf("%v", err)
	}
}
