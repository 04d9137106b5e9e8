package agentd_test

import (
	"crypto/sha256"
	"os"
	"path/filepath"
	"testing"

	"github.com/certmesh/certmesh/agent/internal/durable"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
	"github.com/certmesh/certmesh/protocol/fault"
)

func observedOf(m *agentpb.ConnectRequest) (*agentpb.Observed, bool) {
	return m.GetObserved(), m.GetObserved() != nil
}

// TestDrift: what somebody changes at a target is found by the agent alone, and told again after a restart, which remembers
// what was deployed.
func TestDrift(t *testing.T) {
	t.Parallel()
	f := newFake(t, newAuthority(), nil)
	root := t.TempDir()
	cfg := config(t, f)
	cfg.TargetRoots = []string{root}
	r := start(t, cfg)
	s := f.next()
	s.welcome()
	spec := fileTarget(root)
	s.state(&agentpb.State{Version: &agentpb.StateVersion{Kind: "target", Name: targetID, Version: 1}, Body: &agentpb.State_Target{Target: spec}})
	expect(s, appliedOf)
	s.assign(keyJob("job_k", 1, 1))
	leaf := newAuthority().leaf(expect(s, csrOf).GetCsr())
	s.assign(deployJob("job_d", 1, 1, [][]byte{leaf}, spec))
	res := expect(s, resultOf)
	want := sha256.Sum256(leaf)
	if res.GetDeployed() == nil || installed(t, root) != want {
		t.Fatalf("%v", res)
	}
	s.settle(&agentpb.Settled{Id: res.GetId(), Attempt: 1, Outcome: agentpb.Settled_OUTCOME_OK, CertificateId: certID})
	if kept := must(durable.ReadLog(filepath.Join(cfg.DataDir, "placed"))); len(kept) != 1 {
		t.Fatalf("recorded: %d", len(kept))
	}
	s.state(&agentpb.State{Version: &agentpb.StateVersion{Kind: "settings", Version: 1},
		Body: &agentpb.State_Settings{Settings: &agentpb.Settings{VerifyTimeoutMs: 10, VerifyIntervalMs: 1000}}})
	expect(s, appliedOf)

	if err := os.Remove(filepath.Join(root, "site", "current")); err != nil {
		t.Fatal(err)
	}
	o := expect(s, observedOf)
	if o.GetTargetId() != targetID || o.GetCertificateId() != certID || o.GetGeneration() != 1 || o.GetProblem().GetClass() != string(fault.Conflict) ||
		len(o.GetInstalledFingerprint()) != 0 {
		t.Errorf("observed %v", o)
	}
	r.end()

	r = start(t, cfg)
	s = f.next()
	s.welcome()
	if o := expect(s, observedOf); o.GetProblem() == nil {
		t.Errorf("observed %v", o)
	}
	s.assign(deployJob("job_d2", 1, 1, [][]byte{leaf}, spec))
	if res = expect(s, resultOf); res.GetDeployed() == nil || installed(t, root) != want {
		t.Fatalf("%v", res)
	}
	s.settle(&agentpb.Settled{Id: res.GetId(), Attempt: 1, Outcome: agentpb.Settled_OUTCOME_OK, CertificateId: certID})
	r.end()

	start(t, cfg)
	s = f.next()
	s.welcome()
	if o := expect(s, observedOf); o.GetProblem() != nil || string(o.GetInstalledFingerprint()) != string(want[:]) {
		t.Errorf("observed %v", o)
	}
}

// TestOnePathOneTarget: a second target that writes what another writes is refused, also when its path says it differently, and
// a deployment to it does nothing.
func TestOnePathOneTarget(t *testing.T) {
	t.Parallel()
	f := newFake(t, newAuthority(), nil)
	root := must(filepath.EvalSymlinks(t.TempDir()))
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(root, link); err != nil {
		t.Fatal(err)
	}
	cfg := config(t, f)
	cfg.TargetRoots = []string{root, link}
	start(t, cfg)
	s := f.next()
	s.welcome()
	first := fileTarget(root)
	first.Name = "web"
	s.state(&agentpb.State{Version: &agentpb.StateVersion{Kind: "target", Name: targetID, Version: 1}, Body: &agentpb.State_Target{Target: first}})
	expect(s, appliedOf)
	for i, dir := range []string{root, link} {
		other := fileTarget(dir)
		other.Id = targetID + "2"
		s.state(&agentpb.State{Version: &agentpb.StateVersion{Kind: "target", Name: other.Id, Version: int64(i + 1)}, Body: &agentpb.State_Target{Target: other}})
		rej := expect(s, rejectedOf)
		if rej.GetFailure().GetClass() != string(fault.Rejected) && i == 0 {
			t.Errorf("rejected as %v", rej)
		}
		if i == 0 {
			contains(t, rej.GetFailure().GetMessage(), `target "web"`)
		}
		s.assign(keyJob("job_k"+string(rune('a'+i)), 1, int64(i+1)))
		leaf := newAuthority().leaf(expect(s, csrOf).GetCsr())
		s.assign(deployJob("job_d"+string(rune('a'+i)), 1, int64(i+1), [][]byte{leaf}, other))
		if res := expect(s, resultOf); res.GetFailure() == nil {
			t.Errorf("%v", res)
		}
	}
	if _, err := os.Lstat(filepath.Join(root, "site", "current")); err == nil {
		t.Error("something was installed")
	}
}
