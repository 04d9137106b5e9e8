package storetest

import (
	"testing"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
)

func TestStandingsAndTargetsOfManyAgents(t *testing.T) {
	t.Parallel()
	Each(t, func(t *testing.T, e Engine) {
		w := NewWorld(t, e)
		ctx := t.Context()
		here, moved, retired := w.Agent(t, "here"), w.Agent(t, "moved"), w.Agent(t, "retired")
		var held []domain.HeldStream
		for _, a := range []domain.Agent{here, moved, retired} {
			w.Open(t, a.ID, "n1")
			held = append(held, domain.HeldStream{AgentID: a.ID, IdentitySerial: w.Hello(a.ID, "n1").IdentitySerial})
		}
		held = append(held, domain.HeldStream{AgentID: "agt_unknown", IdentitySerial: "00"})
		one, two := w.Target(t, here.ID, "one"), w.Target(t, here.ID, "two")
		w.Open(t, moved.ID, "n2")
		_, err := w.S.RetireAgent(ctx, retired.ID, "sold", w.Op())
		must(t, err)
		got, err := w.S.Standings(ctx, held)
		must(t, err)
		if len(got) != 4 || got[3] != (domain.Standing{}) {
			t.Fatalf("%+v", got)
		}
		if x := got[0]; x.Session.Epoch != 1 || x.Session.Holder != "n1" || x.State != domain.AgentOnline || x.Revoked {
			t.Errorf("here: %+v", x)
		}
		if x := got[1]; x.Session.Epoch != 2 || x.Session.Holder != "n2" || x.Revoked {
			t.Errorf("moved: %+v", x)
		}
		if x := got[2]; x.State != domain.AgentRetired || x.Reason != "sold" || !x.Revoked {
			t.Errorf("retired: %+v", x)
		}
		targets, err := w.S.TargetsOfAgents(ctx, []string{here.ID, moved.ID})
		must(t, err)
		if l := targets[here.ID]; len(targets) != 1 || len(l) != 2 || l[0].ID == l[1].ID || (l[0].ID != one.ID && l[1].ID != one.ID) || (l[0].ID != two.ID && l[1].ID != two.ID) {
			t.Errorf("%+v", targets)
		}
	})
}
