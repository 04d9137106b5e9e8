package rollover

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/certmesh/certmesh/e2e/estate"
	"github.com/certmesh/certmesh/e2e/estate/estatetest"
	agentpb "github.com/certmesh/certmesh/protocol/agent/v1"
)

func TestMain(m *testing.M) { estatetest.Main(m) }

// lab is an estate with an issuer and a rollover's console.
type lab struct {
	*estatetest.Lab
	env   []string // of the console
	near  *estate.Process
	site  *estate.Site
	roots string
}

// short is the shortest life of an identity, so that what happens within days happens within a minute.
const short = "CERTMESH_IDENTITY_TTL=1m"

func newLab(t *testing.T) *lab {
	t.Helper()
	l := &lab{Lab: estatetest.Start(t, short)}
	l.env = l.ServerEnv()
	l.near, _ = l.Join(estate.AgentOptions{Name: "near"})
	l.roots = estate.SelfSigned(l.Issuer("ca").ChainPEM)
	var err error
	l.site, err = l.StartBuiltin("near", "site", "site.example.test")
	l.OK(err)
	t.Cleanup(l.site.Stop)
	l.Do(l.site.TargetArgs("site", "near")...)
	l.Do("certs", "create", "site", "--dns", "site.example.test", "--issuer", "ca", "--target", "site", "--wait", "--wait-timeout", estatetest.Long)
	return l
}

// console runs a step next to the store.
func (l *lab) console(args ...string) (string, error) {
	out, err := l.Run(l.Ctx, "certmeshd", l.env, append([]string{"mesh", "rollover"}, args...)...)
	return string(out), err
}

func (l *lab) step(args ...string) string {
	l.T.Helper()
	out, err := l.console(args...)
	l.OK(err)
	return out
}

func (l *lab) refused(words []string, args ...string) {
	l.T.Helper()
	_, err := l.console(args...)
	l.IsRefusal(err, 1, words...)
}

// says waits until status says all of lines.
func (l *lab) says(lines ...string) {
	l.T.Helper()
	l.Until("the rollover to say "+strings.Join(lines, ", "), func() error {
		out, err := l.console("status")
		if err != nil {
			return err
		}
		flat := strings.Join(strings.Fields(out), " ")
		for _, line := range lines {
			if !strings.Contains(flat, line) {
				return fmt.Errorf("it says %s", out)
			}
		}
		return nil
	})
}

// works renews the certificate and waits until the renewed one is served.
func (l *lab) works(phase string) {
	l.T.Helper()
	before := l.Certificate("site").Leaves[0].Serial
	l.Do("certs", "renew", "site", "--wait", "--wait-timeout", estatetest.Long)
	c := l.Current("site")
	if c.Leaves[0].Serial == before {
		l.T.Errorf("%s: the certificate was not renewed", phase)
	}
	l.Serves(l.site, c.Leaves[0].Serial, l.roots)
	select {
	case <-l.near.Exited():
		l.T.Fatalf("%s: the agent ended:\n%s", phase, l.near.Tail(20))
	default:
	}
}

// fingerprints are those of the roots that status lists, the one that signs first.
func (l *lab) fingerprints() []string {
	l.T.Helper()
	var out []string
	for line := range strings.Lines(l.step("status")) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "root" {
			out = append(out, strings.TrimSuffix(f[1], ","))
		}
	}
	return out
}

// login logs in with a fingerprint and returns the environment of that profile.
func (l *lab) login(name, fingerprint string) ([]string, error) {
	l.T.Helper()
	key, err := l.Run(l.Ctx, "certmeshd", l.env, "apikey", "create", "--name", name, "--role", "viewer")
	l.OK(err)
	env := []string{"CERTMESH_CONFIG=" + l.Path(name+".yaml")}
	_, err = l.Run(l.Ctx, "certmesh", append(env, "CERTMESH_API_KEY="+strings.TrimSpace(string(key))), "login", "--server", l.GRPC, "--ca-fingerprint", fingerprint)
	return env, err
}

func (l *lab) back(name string) *estate.Process {
	l.T.Helper()
	p, err := l.StartAgent(estate.AgentOptions{Name: name})
	l.OK(err)
	return p
}

func (l *lab) off(p *estate.Process) time.Time {
	l.T.Helper()
	if err := p.Stop(20 * time.Second); err != nil {
		l.T.Fatalf("the agent did not stop cleanly: %v\n%s", err, p.Tail(20))
	}
	return time.Now()
}

func (l *lab) lapsed(since time.Time) {
	l.T.Helper()
	l.Until("the identity of the stopped agent to expire", func() error {
		if left := time.Until(since.Add(time.Minute + time.Second)); left > 0 {
			return fmt.Errorf("%s are left", left)
		}
		return nil
	})
}

func TestRollover(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	far, self := l.Join(estate.AgentOptions{Name: "far"})
	gone := l.off(far)
	_, err := l.WaitAgent(l.Ctx, nil, "far", "Offline")
	l.OK(err)
	early, err := l.Token(l.Ctx)
	l.OK(err)
	former := l.fingerprints()
	if len(former) != 1 || !strings.HasSuffix(early, former[0]) {
		t.Fatalf("roots %v, and a token for another", former)
	}

	// 1. Both roots are trusted; the former one signs.
	l.refused([]string{"no rollover"}, "activate")
	l.step("start")
	both := l.fingerprints()
	if len(both) != 2 || both[0] != former[0] {
		t.Fatalf("roots after the start: %v", both)
	}
	if again := l.step("start"); !strings.Contains(again, both[1]) {
		t.Errorf("the start was taken again:\n%s", again)
	}
	l.says("Started at", "agents 1 of 2 are ready for the next step", "far Offline", "the new root")
	l.works("started")
	l.refused([]string{"1 of 2", "far", "--force 1"}, "activate")
	l.refused([]string{"activate comes first"}, "finish")

	// 2. The next CA signs. An agent that is connected takes an identity of it soon.
	l.step("activate", "--force", "1")
	if now := l.fingerprints(); len(now) != 2 || now[0] != both[1] || now[1] != both[0] {
		t.Fatalf("roots after the activation: %v, before: %v", now, both)
	}
	l.refused([]string{"finish it"}, "start")
	l.refused([]string{"cannot be taken back"}, "abort")
	l.says("agents 1 of 2 are ready for the next step", "far Offline")
	l.works("activated")
	l.Server.Kill()
	l.StartServer(short)
	_, err = l.WaitAgent(l.Ctx, l.near, "near", "Online")
	l.OK(err)
	l.works("activated, after a restart")
	l.refused([]string{"1 of 2", "far", "1 join tokens", "--force 2"}, "finish")

	// 3. Operators get in by either root, and tokens of either work.
	old, err := l.login("old", both[0])
	l.OK(err)
	fresh, err := l.login("fresh", both[1])
	l.OK(err)
	late, err := l.StartAgent(estate.AgentOptions{Name: "late", Token: early})
	l.OK(err)
	_, err = l.WaitAgent(l.Ctx, late, "late", "Online")
	l.OK(err)
	token, err := l.Token(l.Ctx)
	l.OK(err)
	if !strings.HasSuffix(token, both[1]) {
		t.Error("a new token does not name the root that signs")
	}

	// 4. The one that slept through it all comes back, although its identity has expired and it knows the former root only.
	l.lapsed(gone)
	far = l.back("far")
	a, err := l.WaitAgent(l.Ctx, far, "far", "Online")
	l.OK(err)
	if a.ID != self.ID {
		t.Errorf("it came back as %s; it was %s", a.ID, self.ID)
	}
	l.Audited("agent.reidentified=ok")
	l.says("agents 3 of 3 are ready for the next step", "join tokens 0 that can be used name the former root")

	// 5. The former root is dropped, and its key destroyed.
	done := l.step("finish")
	if after := l.fingerprints(); len(after) != 1 || after[0] != both[1] || !strings.Contains(done, "Finished at") {
		t.Fatalf("roots after the end: %v\n%s", after, done)
	}
	l.works("finished")
	for name, p := range map[string]*estate.Process{"near": l.near, "far": far, "late": late} {
		l.off(p)
		p = l.back(name)
		_, err := l.WaitAgent(l.Ctx, p, name, "Online")
		l.OK(err)
		if name == "near" {
			l.near = p
		}
	}
	l.works("finished, after restarts")
	next, err := l.StartAgent(estate.AgentOptions{Name: "new", Token: token})
	l.OK(err)
	_, err = l.WaitAgent(l.Ctx, next, "new", "Online")
	l.OK(err)

	// 6. Who logged in while both were trusted is still in; the former fingerprint is not enough any more.
	for name, env := range map[string][]string{"old": old, "fresh": fresh} {
		if _, err := l.Run(l.Ctx, "certmesh", env, "status"); err != nil {
			t.Errorf("the profile %s: %v", name, err)
		}
	}
	_, err = l.login("denied", both[0])
	l.IsRefusal(err, 1, both[1], "check the address")
	l.Audited("mesh.rollover_started=ok", "mesh.rollover_activated=ok", "mesh.rollover_finished=ok")
	l.step("finish")
}

func TestRolloverLeavesBehindWhoNeverHeard(t *testing.T) {
	t.Parallel()
	l := newLab(t)

	// 1. Started and taken back, it leaves no trace.
	before := l.fingerprints()
	l.step("start")
	l.says("agents 1 of 1 are ready for the next step")
	l.step("abort")
	if after := l.fingerprints(); len(after) != 1 || after[0] != before[0] {
		t.Fatalf("roots after an abort: %v, before: %v", after, before)
	}
	l.refused([]string{"no rollover"}, "activate")
	l.Until("the agent to hold the one root again", func() error {
		return l.holds("near", before[0])
	})
	l.works("aborted")

	// 2. Another one, to its end, without the agent that is off.
	far, _ := l.Join(estate.AgentOptions{Name: "far"})
	gone := l.off(far)
	l.step("start")
	l.says("agents 1 of 2 are ready for the next step")
	l.step("activate", "--force", "1")
	l.says("agents 1 of 2 are ready for the next step")
	l.refused([]string{"far"}, "finish")
	l.step("finish", "--force", "1")
	after := l.fingerprints()
	l.Until("the agent to hold the new root alone", func() error {
		return l.holds("near", after[0])
	})
	l.works("finished")

	// 3. It is refused; a new token lets the host in.
	l.lapsed(gone)
	far = l.back("far")
	l.Until("the agent to say why it does not come in", func() error {
		if text := far.Log(); !strings.Contains(text, "not of the mesh CA") {
			return errors.New(far.Tail(5))
		}
		return nil
	})
	l.off(far)
	l.Do("agents", "retire", "far", "--reason", "left behind")
	l.OK(os.RemoveAll(filepath.Join(l.AgentDir("far"), "identity")))
	token, err := l.Token(l.Ctx)
	l.OK(err)
	far, err = l.StartAgent(estate.AgentOptions{Name: "far", Token: token})
	l.OK(err)
	l.Until("the host to be in again", func() error {
		select {
		case <-far.Exited():
			return estate.Stop(fmt.Errorf("the agent ended:\n%s", far.Tail(20)))
		default:
		}
		if !strings.Contains(far.Log(), `"connected"`) {
			return errors.New(far.Tail(3))
		}
		return nil
	})
}

// holds reads what an agent trusts: no root but those with the fingerprints.
func (l *lab) holds(agent string, fingerprints ...string) error {
	data, err := os.ReadFile(filepath.Join(l.AgentDir(agent), "identity", "trust-bundle.pb"))
	if err != nil {
		return err
	}
	bundle := &agentpb.TrustBundle{}
	if err := proto.Unmarshal(data, bundle); err != nil {
		return err
	}
	var roots []string
	for _, r := range bundle.GetRoots() {
		sum := sha256.Sum256(r)
		roots = append(roots, hex.EncodeToString(sum[:]))
	}
	if strings.Join(roots, " ") != strings.Join(fingerprints, " ") {
		return fmt.Errorf("it holds %v", roots)
	}
	return nil
}
