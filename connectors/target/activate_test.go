package target_test

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/certmesh/certmesh/connectors/target"
	"github.com/certmesh/certmesh/protocol/fault"
)

// service refuses its configuration while a culprit is installed.
type service struct {
	installed, bad []bool
	active         []bool // what was installed at the last successful activation
	activations    int
	broken         error // the former material is refused too
	down           int   // the activation that fails for another reason
	noUndo, noRedo int   // the member that cannot be undone or installed again; -1 for none
	cancelAfter    int
	cancel         context.CancelFunc
}

func newService(n int, culprits ...int) *service {
	s := &service{installed: make([]bool, n), bad: make([]bool, n), active: make([]bool, n), noUndo: -1, noRedo: -1}
	for i := range n {
		s.installed[i] = true
	}
	for _, c := range culprits {
		s.bad[c] = true
	}
	return s
}

func (s *service) group() target.Group {
	return target.Group{
		Activate: func(ctx context.Context) error {
			s.activations++
			if s.activations == s.cancelAfter {
				s.cancel()
			}
			if s.activations == s.down {
				return fault.New(fault.Retryable, "the service is down")
			}
			if s.broken != nil {
				return s.broken
			}
			for i, in := range s.installed {
				if in && s.bad[i] {
					return fault.New(fault.Rejected, "member %d is refused", i)
				}
			}
			copy(s.active, s.installed)
			return nil
		},
		Undo: func(ctx context.Context, i int) error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if i == s.noUndo {
				return fault.New(fault.Unsupported, "no backup")
			}
			s.installed[i] = false
			return nil
		},
		Redo: func(_ context.Context, i int) error {
			if i == s.noRedo {
				return fault.New(fault.Retryable, "the disk is full")
			}
			s.installed[i] = true
			return nil
		},
	}
}

// settled checks what Settle promises, whatever happened.
func (s *service) settled(t interface{ Errorf(string, ...any) }, verdicts []error) {
	for i, err := range verdicts {
		if (err == nil) != s.installed[i] || (err == nil) != s.active[i] {
			t.Errorf("member %d: %v, installed %v, active %v", i, err, s.installed[i], s.active[i])
		}
	}
}

func TestSettle(t *testing.T) {
	t.Parallel()
	all := func(n int) []int {
		var out []int
		for i := range n {
			out = append(out, i)
		}
		return out
	}
	for _, c := range []struct {
		n        int
		culprits []int
	}{{0, nil}, {1, nil}, {1, []int{0}}, {2, nil}, {2, []int{1}}, {7, nil}, {8, []int{0}}, {8, []int{7}}, {8, []int{3}}, {8, []int{2, 3}}, {8, []int{0, 7}},
		{100, []int{41}}, {100, []int{0, 99}}, {5, all(5)}, {64, all(64)}, {1000, []int{500}}} {
		t.Run(fmt.Sprintf("%d/%d", c.n, len(c.culprits)), func(t *testing.T) {
			t.Parallel()
			s := newService(c.n, c.culprits...)
			verdicts := s.group().Settle(t.Context(), c.n)
			s.settled(t, verdicts)
			for i, err := range verdicts {
				if s.bad[i] && (!fault.Is(err, fault.Rejected) || !strings.Contains(err.Error(), fmt.Sprintf("member %d is", i))) {
					t.Errorf("culprit %d: %v", i, err)
				}
				if !s.bad[i] && err != nil {
					t.Errorf("%d is no culprit: %v", i, err)
				}
			}
			most := min(c.n, 1)
			if k := len(c.culprits); k > 0 {
				most += 2 + 2*k*bits.Len(uint(c.n-1))
			}
			if s.activations > most {
				t.Errorf("%d activations, at most %d are promised", s.activations, most)
			}
		})
	}
}

func TestSettleProperty(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(1, 40).Draw(rt, "n")
		s := newService(n, rapid.SliceOfDistinct(rapid.IntRange(0, n-1), rapid.ID[int]).Draw(rt, "culprits")...)
		s.down = rapid.IntRange(0, 12).Draw(rt, "down")
		s.noRedo = rapid.IntRange(-1, n-1).Draw(rt, "no redo")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		s.cancel, s.cancelAfter = cancel, rapid.IntRange(0, 12).Draw(rt, "cancel after")
		verdicts := s.group().Settle(ctx, n)
		s.settled(rt, verdicts)
		for i, err := range verdicts {
			if s.bad[i] && err == nil {
				rt.Errorf("culprit %d is active", i)
			}
		}
	})
}

// TestSettleBroken: a configuration that was broken before costs two activations and blames nobody.
func TestSettleBroken(t *testing.T) {
	t.Parallel()
	s := newService(50)
	s.broken = fault.New(fault.Rejected, "line 3 is wrong")
	verdicts := s.group().Settle(t.Context(), 50)
	s.settled(t, verdicts)
	if s.activations != 2 {
		t.Errorf("%d activations", s.activations)
	}
	for _, err := range verdicts {
		if !fault.Is(err, fault.Rejected) || !strings.Contains(err.Error(), "even with the former certificates") || !strings.Contains(err.Error(), "line 3") {
			t.Fatal(err)
		}
	}
}

// TestSettleDown: when the service is down nothing is learned, so nothing is bisected.
func TestSettleDown(t *testing.T) {
	t.Parallel()
	s := newService(50, 3)
	s.broken = fault.New(fault.Retryable, "the service is down")
	for _, err := range s.group().Settle(t.Context(), 50) {
		if !fault.Is(err, fault.Retryable) {
			t.Fatal(err)
		}
	}
	if s.activations > 2 {
		t.Errorf("%d activations", s.activations)
	}
	for i, in := range s.installed {
		if in {
			t.Errorf("%d is still installed", i)
		}
	}
}

// TestSettleNoUndo: a culprit that cannot be taken back says both, and costs the others their turn but not their lives.
func TestSettleNoUndo(t *testing.T) {
	t.Parallel()
	s := newService(8, 2)
	s.noUndo = 2
	verdicts := s.group().Settle(t.Context(), 8)
	if err := verdicts[2]; !fault.Is(err, fault.Rejected) || !strings.Contains(err.Error(), "could not be restored: no backup") {
		t.Error(err)
	}
	for i, err := range verdicts {
		if err == nil {
			t.Errorf("%d is said to be active beside a culprit that cannot be removed", i)
		}
		if i != 2 && s.installed[i] {
			t.Errorf("%d is installed", i)
		}
	}
}

// TestSettleInvalid: Invalid is a refusal as well.
func TestSettleInvalid(t *testing.T) {
	t.Parallel()
	s := newService(4, 1)
	g := s.group()
	inner := g.Activate
	g.Activate = func(ctx context.Context) error {
		if err := inner(ctx); err != nil {
			return errors.Join(fault.New(fault.Invalid, "refused"), err)
		}
		return nil
	}
	verdicts := g.Settle(t.Context(), 4)
	s.settled(t, verdicts)
	if verdicts[1] == nil || verdicts[0] != nil {
		t.Error(verdicts)
	}
}
