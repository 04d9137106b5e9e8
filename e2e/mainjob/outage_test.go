package mainjob

import (
	"crypto/tls"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/certmesh/certmesh/e2e/estate"
	"github.com/certmesh/certmesh/e2e/estate/estatetest"
)

// lone is an estate with the agent solo and the issuer ca.
type lone struct {
	*hosts
	agent *estate.Process
	self  estate.Agent
}

func newLone(t *testing.T, env ...string) *lone {
	t.Helper()
	l := &lone{hosts: &hosts{Lab: estatetest.Start(t, env...)}}
	l.agent, l.self = l.Join(estate.AgentOptions{Name: "solo"})
	l.issuer = l.Issuer("ca")
	l.roots = estate.SelfSigned(l.issuer.ChainPEM)
	return l
}

// back starts the agent again, without a token.
func (l *lone) back() {
	l.T.Helper()
	p, err := l.StartAgent(estate.AgentOptions{Name: "solo"})
	l.OK(err)
	l.agent = p
}

// stopAgent ends the agent as systemd would.
func (l *lone) stopAgent() {
	l.T.Helper()
	if err := l.agent.Stop(20 * time.Second); err != nil {
		l.T.Fatalf("the agent did not stop cleanly: %v\n%s", err, l.agent.Tail(20))
	}
}

// installed reads the serial in a PEM file of a target.
func installed(path string) (string, error) {
	p, err := tls.LoadX509KeyPair(path, path)
	if err != nil {
		return "", err
	}
	return estate.Serial(p.Leaf), nil
}

func TestAgentAway(t *testing.T) {
	t.Parallel()
	l := newLone(t, "CERTMESH_SCHEDULER_AGENT_HEALTH_CHECK_INTERVAL=2s")
	site, err := l.StartBuiltin("solo", "away", "away.example.test")
	l.OK(err)
	defer site.Stop()
	l.Do(site.TargetArgs("away", "solo")...)

	// 1. An order for a host that is off waits, and says for what.
	l.stopAgent()
	_, err = l.WaitAgent(l.Ctx, nil, "solo", "Offline")
	l.OK(err)
	var c estate.Certificate
	l.Get(&c, "certs", "create", "away", "--dns", "away.example.test", "--issuer", "ca", "--target", "away")
	if c.Status != "Pending" || c.PlacementsCurrent != 0 || c.PlacementsTotal != 1 {
		l.T.Errorf("an order nobody can do is %s with %d of %d placements", c.Status, c.PlacementsCurrent, c.PlacementsTotal)
	}
	jobs, err := l.Jobs(l.Ctx, "--open")
	l.OK(err)
	if len(jobs) != 1 || jobs[0].Tries != 0 || jobs[0].State != "AwaitingCSR" {
		l.T.Errorf("there should be one open job that used no try: %+v", jobs)
	}
	if why := l.Do("certs", "why", "away"); !strings.Contains(why, "offline") {
		l.T.Errorf("why does not say that the agent is offline:\n%s", why)
	}

	// 2. --wait gives up in its time and says so by status 3; the order stays.
	_, err = l.CLI(l.Ctx, "certs", "renew", "away", "--wait", "--wait-timeout", "1s")
	var ce *estate.CLIError
	if !errors.As(err, &ce) || ce.Code != 3 {
		l.T.Errorf("waiting in vain should end with status 3: %v", err)
	}

	// 3. It is served when the host comes.
	l.back()
	c = l.Current("away")
	first := c.Leaves[0].Serial
	l.Serves(site, first, l.roots)
	l.Keys("solo", c.ID, 1)

	// 4. A renewal waits likewise; what is issued and what is served are two facts.
	l.stopAgent()
	l.Do("certs", "renew", "away")
	c = l.Certificate("away")
	p := c.Placements[0]
	if c.Status != "RenewalInProgress" || c.Leaves[0].Serial != first || p.State != "Served" || p.ServedGeneration != c.Leaves[0].Generation {
		l.T.Errorf("while the host is off the former certificate is served: %s, %+v, %+v", c.Status, c.Leaves, p)
	}
	l.Serves(site, first, l.roots)
	l.back()
	l.Until("the renewal to be served", func() error {
		leaf, err := estate.Trusted(l.Ctx, site.Addr, site.Host, l.roots)
		if err == nil && estate.Serial(leaf) == first {
			err = fmt.Errorf("still %s", first)
		}
		return err
	})
	c = l.Current("away")
	l.Serves(site, c.Leaves[0].Serial, l.roots)
	l.Keys("solo", c.ID, 1)

	l.Quiet()
}

func TestRestart(t *testing.T) {
	t.Parallel()
	l := newLone(t)
	paths := map[string]string{}
	order := func(name string) {
		l.T.Helper()
		paths[name] = l.pemTarget(name, "solo")
		l.Do("certs", "create", name, "--dns", name+".example.test", "--issuer", "ca", "--target", name)
	}

	// 1. The server is stopped: it ends cleanly, comes back with the same trust, and its agent returns by itself.
	order("before")
	if err := l.Server.Stop(30 * time.Second); err != nil {
		t.Fatalf("certmeshd did not stop cleanly: %v\n%s", err, l.Server.Tail(20))
	}
	l.StartServer()
	_, err := l.WaitAgent(l.Ctx, l.agent, "solo", "Online")
	l.OK(err)
	l.Current("before")

	// 2. Server and agent are killed right after orders.
	order("server-killed")
	l.Server.Kill()
	l.StartServer()
	order("agent-killed")
	l.agent.Kill()
	l.back()
	order("both-killed")
	l.agent.Kill()
	l.Server.Kill()
	l.StartServer()
	l.back()

	// 3. Renewals while the agent is being killed.
	l.Do("certs", "renew", "before")
	l.agent.Kill()
	l.back()

	// 4. All is served once, nothing is open, no former key is left, the agent is the same.
	for name, path := range paths {
		c := l.Current(name)
		got, err := installed(path)
		l.OK(err)
		if got != c.Leaves[0].Serial {
			t.Errorf("%s: %s is installed, %s is wanted", name, got, c.Leaves[0].Serial)
		}
	}
	l.Quiet()
	for name := range paths {
		c := l.Current(name)
		l.Keys("solo", c.ID, 1)
		seen := map[int64]bool{}
		for _, v := range l.Versions(name) {
			if seen[v.Generation] {
				t.Errorf("%s has two versions of generation %d", name, v.Generation)
			}
			seen[v.Generation] = true
		}
	}
	a, err := l.WaitAgent(l.Ctx, l.agent, "solo", "Online")
	l.OK(err)
	if a.ID != l.self.ID {
		t.Errorf("the agent became %s; it was %s", a.ID, l.self.ID)
	}
	l.stopAgent()
}

// TestIdentity takes a little over a minute, the shortest life that an identity may have.
func TestIdentity(t *testing.T) {
	t.Parallel()
	l := newLone(t, "CERTMESH_IDENTITY_TTL=1m")
	off, away := l.Join(estate.AgentOptions{Name: "off"})
	joined := time.Now()
	if err := off.Stop(20 * time.Second); err != nil {
		t.Fatalf("the agent did not stop cleanly: %v", err)
	}
	// 1. The connected agent renews its identity over the stream.
	issued := func(agent string) int {
		t.Helper()
		events, err := l.Audit(l.Ctx, "--resource", "agent/"+agent)
		l.OK(err)
		n := 0
		for _, e := range events {
			if e.Action == "identity.issued" && e.Outcome == "ok" {
				n++
			}
		}
		return n
	}
	at := issued(l.self.ID)
	l.Until("the connected agent to renew its identity", func() error {
		if n := issued(l.self.ID); n <= at {
			return fmt.Errorf("it has %d", n)
		}
		return nil
	})
	// 2. The one that is off comes back after its identity has expired, without a token.
	l.Until("the identity of the stopped agent to expire", func() error {
		if left := time.Until(joined.Add(time.Minute + time.Second)); left > 0 {
			return fmt.Errorf("%s are left", left)
		}
		return nil
	})
	p, err := l.StartAgent(estate.AgentOptions{Name: "off"})
	l.OK(err)
	a, err := l.WaitAgent(l.Ctx, p, "off", "Online")
	l.OK(err)
	if a.ID != away.ID {
		t.Errorf("it came back as %s; it was %s", a.ID, away.ID)
	}
	l.Audited("agent.reidentified=ok")
	// 3. Both still work.
	for _, name := range []string{"solo", "off"} {
		l.pemTarget("at-"+name, name)
		l.Do("certs", "create", "at-"+name, "--dns", "identity.example.test", "--issuer", "ca", "--target", "at-"+name, "--wait", "--wait-timeout", estatetest.Long)
	}
}

func TestRetire(t *testing.T) {
	t.Parallel()
	l := newLone(t)
	path := l.pemTarget("kept", "solo")
	l.order("kept", "--dns", "kept.example.test", "--issuer", "ca", "--target", "kept")
	serial, err := installed(path)
	l.OK(err)

	// 1. The stream ends at once, and the agent with it.
	began := time.Now()
	l.Do("agents", "retire", "solo", "--reason", "taken out of service")
	select {
	case <-l.agent.Exited():
	case <-l.Ctx.Done():
		t.Fatalf("the retired agent still runs after %s:\n%s", time.Since(began), l.agent.Tail(20))
	}
	if code := l.agent.ExitCode(); code == 0 {
		t.Error("a retired agent ends with a failure, so that whoever watches it sees it")
	}
	if text := l.agent.Tail(5); !strings.Contains(text, "retired") || !strings.Contains(text, l.self.ID) {
		t.Errorf("the agent does not say that it was retired:\n%s", text)
	}
	// 2. It stays out.
	l.back()
	select {
	case <-l.agent.Exited():
	case <-l.Ctx.Done():
		t.Fatalf("the retired agent tries for ever:\n%s", l.agent.Tail(20))
	}
	var a estate.Agent
	l.Get(&a, "agents", "get", "solo")
	if a.State != "Retired" || a.Reason != "taken out of service" {
		t.Errorf("it is %s because %q", a.State, a.Reason)
	}
	// 3. What it served is left alone, and nothing new is placed on it.
	if now, err := installed(path); err != nil || now != serial {
		t.Errorf("the installed certificate changed: %s, %v", now, err)
	}
	l.Refused(1, []string{"retired"}, "targets", "create", "late", "--agent", l.self.ID, "--kind", "file",
		"--settings", fmt.Sprintf(`{"pem_path":%q}`, filepath.Join(l.SiteDir("solo"), "late.pem")))
	l.Quiet()
	l.Audited("agent.retired=ok")
}

// TestSignals: both daemons end on SIGINT as on SIGTERM, with status 0.
func TestSignals(t *testing.T) {
	t.Parallel()
	l := newLone(t)
	for _, p := range []*estate.Process{l.agent, l.Server} {
		l.OK(p.Signal(syscall.SIGINT))
		select {
		case <-p.Exited():
		case <-l.Ctx.Done():
			t.Fatalf("%s does not end:\n%s", p.Name, p.Tail(20))
		}
		if code := p.ExitCode(); code != 0 {
			t.Errorf("%s ended with status %d:\n%s", p.Name, code, p.Tail(20))
		}
	}
}
