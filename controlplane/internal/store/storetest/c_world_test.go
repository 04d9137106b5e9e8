package storetest_test

import (
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/controlplane/internal/store/storetest"
)

// eachWorld is each with a World: it runs fn on every engine, calm and stumbling, and checks the invariants at the end.
func eachWorld(t *testing.T, fn func(t *testing.T, w *world)) {
	for name, faults := range map[string]func() store.Faults{
		"calm":            func() store.Faults { return nil },
		"40001":           func() store.Faults { return &stumble{} },
		"kept and untold": func() store.Faults { return &stumble{commit: store.ErrCommitKept} },
		"lost and untold": func() store.Faults { return &stumble{commit: store.ErrCommitLost} },
	} {
		t.Run(name, func(t *testing.T) {
			storetest.Each(t, func(t *testing.T, e storetest.Engine) {
				w := &world{World: storetest.NewWorld(t, e, func(c *store.Config) { c.Faults = faults() }), t: t}
				fn(t, w)
				w.Check(t)
			})
		})
	}
}

// world is a World with what the tests below say often.
type world struct {
	*storetest.World
	t *testing.T
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// by is an operation of an operator.
func (w *world) by(name string) domain.Op {
	op := w.Op()
	op.Actor = "operator:" + name
	return op
}

// actions are the actions of a resource's trail, oldest first.
func (w *world) actions(resource string) []string {
	w.t.Helper()
	events, _, err := w.S.AuditEvents(w.t.Context(), resource, domain.PageRequest{Size: 1000})
	w.must(err)
	var out []string
	for i := range events {
		out = append(out, events[len(events)-1-i].Action)
	}
	return out
}

// work is the open work of an agent, by job.
func (w *world) work(agentID string) map[string]domain.Work {
	w.t.Helper()
	list, err := w.S.OpenWork(w.t.Context(), []domain.WorkQuery{{AgentID: agentID}})
	w.must(err)
	out := map[string]domain.Work{}
	for _, x := range list[0].Work {
		out[x.Job.ID] = x
	}
	return out
}
