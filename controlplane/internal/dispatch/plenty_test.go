package dispatch

import (
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

// TestPlentyInHand: while much waits for credit, all of it is not read again for each job that is added; what is new is seen
// after a pause, or as soon as little waits.
func TestPlentyInHand(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	for range 2 * plenty {
		w.create(domain.JobDeployment)
	}
	w.connect(both(0))
	w.answerAll()
	w.now = w.now.Add(2 * loadPause)
	w.step(Woken{At: w.now})
	w.answerAll()
	known := func() int { waits, out := w.state.Counts(); return waits + out }
	before := w.state.loads
	for range 50 {
		w.create(domain.JobDeployment)
		w.step(Woken{At: w.now})
		w.answerAll()
	}
	if n := w.state.loads - before; n != 0 || known() != 2*plenty {
		t.Errorf("%d loads, %d jobs known", n, known())
	}
	if want := w.state.loadedAt.Add(loadPause); !w.state.wait.Equal(want) {
		t.Errorf("it waits until %v, not %v", w.state.wait, want)
	}
	w.now = w.now.Add(loadPause)
	w.step(Ticked{At: w.now})
	w.answerAll()
	if n := w.state.loads - before; n != 1 || known() != 2*plenty+50 {
		t.Errorf("after the pause: %d loads, %d jobs known", n, known())
	}
	// Little waits: seen at once.
	w.create(domain.JobDeployment)
	w.step(Woken{At: w.now})
	w.ready = both(2*plenty + 20)
	w.grant()
	w.answerAll()
	if n := w.state.loads - before; n != 2 {
		t.Errorf("with little in hand: %d loads", n)
	}
	w.settle()
}
