package target

import (
	"context"

	"github.com/certmesh/certmesh/protocol/fault"
)

// Group is what was committed together in one reload domain.
type Group struct {
	// Activate validates and loads everything that is installed now (Activator.Activate of any member).
	Activate func(ctx context.Context) error
	// Undo takes member i back; Redo installs it again (Stage, journal, Commit): all of it or nothing.
	Undo func(ctx context.Context, i int) error
	Redo func(ctx context.Context, i int) error
}

// Settle activates n committed members once. If that is refused (Rejected or Invalid) it finds the culprits by
// bisection; afterwards they are undone, and everything else is installed and active. It returns a verdict for each
// member: nil if it is active, otherwise why it is not, with the culprit's own error for culprits.
//
// When the former material is refused too, no member is at fault: all are undone and get that error. When an activation
// fails for another reason (the service is down), nothing can be learned: the members in question are undone and get it.
//
// One activation when all is well; k culprits among n members cost at most 2 + 2k·⌈log2 n⌉ more. Undo is called even
// after ctx has ended.
func (g Group) Settle(ctx context.Context, n int) []error {
	s := settling{g: g, verdict: make([]error, n)}
	if n == 0 {
		return s.verdict
	}
	members := make([]int, n)
	for i := range members {
		members[i] = i
	}
	err := g.Activate(ctx)
	if err == nil {
		return s.verdict
	}
	members = s.undo(ctx, members, err)
	if !refusal(err) {
		s.blame(members, err)
		s.reload(ctx)
		return s.verdict
	}
	// Is it us? This also makes the service load the former material, should the first activation have got that far.
	if base := g.Activate(ctx); base != nil {
		s.blame(members, fault.Wrap(fault.ClassOf(base), base, "the configuration is refused even with the former certificates, so it must be mended first: %s", Sentence(base)))
		return s.verdict
	}
	if len(members) == 1 && n == 1 {
		s.blame(members, err)
		return s.verdict
	}
	s.search(ctx, members)
	if s.refused {
		s.reload(ctx)
	}
	return s.verdict
}

type settling struct {
	g       Group
	verdict []error
	// refused: the last activation failed.
	refused bool
}

// reload makes the service load what is installed now, in case a failed activation got further than validation. Its
// error says nothing new: the service has accepted the same configuration before, or was failing all along.
func (s *settling) reload(ctx context.Context) { _ = s.g.Activate(context.WithoutCancel(ctx)) }

func refusal(err error) bool { return fault.Is(err, fault.Rejected) || fault.Is(err, fault.Invalid) }

// search settles members, which are undone, beside everything that is active already. It halves without trying the
// whole: members are known to hold a culprit.
func (s *settling) search(ctx context.Context, members []int) {
	if len(members) <= 1 {
		s.try(ctx, members)
		return
	}
	half := len(members) / 2
	s.try(ctx, members[:half])
	s.try(ctx, members[half:])
}

// try installs members, which are undone, and activates them.
func (s *settling) try(ctx context.Context, members []int) {
	var in []int
	for _, i := range members {
		if err := ctx.Err(); err != nil {
			s.verdict[i] = fault.Wrap(fault.Retryable, context.Cause(ctx), "it was stopped")
		} else if err := s.g.Redo(ctx, i); err != nil {
			s.verdict[i] = err
		} else {
			in = append(in, i)
		}
	}
	if len(in) == 0 {
		return
	}
	err := s.g.Activate(ctx)
	if s.refused = err != nil; !s.refused {
		return
	}
	out := s.undo(ctx, in, err)
	if len(in) == 1 || !refusal(err) {
		s.blame(out, err)
		return
	}
	s.search(ctx, out)
}

// undo takes members back and returns those that are; the others get their verdict.
func (s *settling) undo(ctx context.Context, members []int, why error) []int {
	var out []int
	for _, i := range members {
		if err := s.g.Undo(context.WithoutCancel(ctx), i); err != nil {
			s.verdict[i] = fault.Wrap(fault.ClassOf(why), why, "%s; and the former state could not be restored: %s", Sentence(why), Sentence(err))
			continue
		}
		out = append(out, i)
	}
	return out
}

func (s *settling) blame(members []int, err error) {
	for _, i := range members {
		s.verdict[i] = err
	}
}
