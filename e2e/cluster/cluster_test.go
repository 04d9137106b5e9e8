package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/certmesh/certmesh/e2e/estate"
	"github.com/certmesh/certmesh/e2e/estate/estatetest"
)

func TestMain(m *testing.M) {
	// Each test is three nodes, a database and agents.
	estatetest.AtOnce = 2
	estatetest.Main(m)
}

// cluster is three nodes in the hands of one test. Its command line asks the first of them unless told otherwise.
type cluster struct {
	*estatetest.Lab
	*estate.Cluster
}

// start runs n nodes with an issuer called ca.
func start(t *testing.T, n int, env ...string) *cluster {
	t.Helper()
	l := estatetest.New(t)
	// Safety nets and back-offs are not what is tried; waiting for them would only take time.
	c, err := l.NewCluster(l.Ctx, n, append([]string{"CERTMESH_SCHEDULER_RETRY_INTERVAL=1s"}, env...)...)
	l.OK(err)
	t.Cleanup(c.CloseCluster)
	l.OK(c.StartAll(l.Ctx))
	l.Issuer("ca")
	return &cluster{l, c}
}

// at runs the command line against a node.
func (c *cluster) at(m *estate.ClusterNode, args ...string) (string, error) {
	out, err := m.CLI(c.Ctx, args...)
	return string(out), err
}

func (c *cluster) do(m *estate.ClusterNode, args ...string) string {
	c.T.Helper()
	out, err := c.at(m, args...)
	c.OK(err)
	return out
}

// agent starts an agent that knows all nodes and has one target with one certificate, called as it is.
func (c *cluster) agent(name string) *estate.Process {
	c.T.Helper()
	p, _ := c.Join(estate.AgentOptions{Name: name, Env: []string{"CERTMESH_SERVER_URL=" + c.MeshAddresses()}})
	path := filepath.Join(c.SiteDir(name), name+".pem")
	c.Do("targets", "create", name, "--agent", name, "--kind", "file", "--settings", fmt.Sprintf("{%q: %q}", "pem_path", path))
	c.Do("certs", "create", name, "--dns", name+".example.test", "--issuer", "ca", "--target", name, "--wait", "--wait-timeout", estatetest.Long)
	return p
}

// status is what a node says of the cluster.
func (c *cluster) status(m *estate.ClusterNode) string {
	c.T.Helper()
	text, err := c.Certmeshd(c.Ctx, m, "cluster", "status")
	c.OK(err)
	return text
}

// others are the nodes but one.
func (c *cluster) others(m *estate.ClusterNode) []*estate.ClusterNode {
	var list []*estate.ClusterNode
	for _, o := range c.Nodes {
		if o != m {
			list = append(list, o)
		}
	}
	return list
}

// whole waits until every node is a voter, and linked to all others.
func (c *cluster) whole() {
	c.T.Helper()
	c.Until("the cluster to be whole", func() error {
		for _, m := range c.Nodes {
			text, err := c.Certmeshd(c.Ctx, m, "cluster", "status")
			if err != nil {
				return err
			}
			voters, linked := 0, 0
			for line := range strings.Lines(text) {
				f := strings.Fields(line)
				if len(f) == 7 && (f[1] == "voter" || f[1] == "leader") {
					voters++
				}
				if len(f) == 7 && f[3] == "yes" {
					linked++
				}
			}
			if voters != len(c.Nodes) || linked != len(c.Nodes)-1 {
				return fmt.Errorf("%s sees:\n%s", m.ID, text)
			}
		}
		return nil
	})
}

// once checks that each certificate has the wanted number of versions, all of different generations and serials.
func (c *cluster) once(m *estate.ClusterNode, names []string, want int) {
	c.T.Helper()
	serials := map[string]string{}
	for _, name := range names {
		versions, err := m.Versions(c.Ctx, name)
		c.OK(err)
		generations := map[int64]bool{}
		for _, v := range versions {
			if other, ok := serials[v.Serial]; ok {
				c.T.Errorf("serial %s is that of %s and of %s", v.Serial, other, name)
			}
			serials[v.Serial] = name
			if generations[v.Generation] {
				c.T.Errorf("%s has two versions of generation %d", name, v.Generation)
			}
			generations[v.Generation] = true
		}
		if len(versions) != want {
			c.T.Errorf("%s has %d versions, not %d: %+v", name, len(versions), want, versions)
		}
	}
}

// TestLeaderDies: SIGKILL of the leader in the middle of renewals that are ordered at all nodes. Another leads, every
// acknowledged renewal is done, once, and the dead node comes back with the command line it had.
func TestLeaderDies(t *testing.T) {
	t.Parallel()
	c := start(t, 3)
	c.whole()
	names := []string{"east", "west", "north"}
	for _, n := range names {
		c.agent(n)
	}
	leader, err := c.Leader(c.Ctx, nil)
	c.OK(err)
	rest := c.others(leader)
	var ordering sync.WaitGroup
	errs := make([]error, len(names))
	for i, name := range names {
		ordering.Go(func() { _, errs[i] = c.at(rest[i%2], "certs", "renew", name) })
	}
	leader.Process.Kill()
	began := time.Now()
	ordering.Wait()
	c.OK(errors.Join(errs...))
	next, err := c.Leader(c.Ctx, leader)
	c.OK(err)
	t.Logf("%s led within %s of the death of %s", next.ID, time.Since(began).Round(time.Millisecond), leader.ID)
	for _, name := range names {
		c.Until(name+" to be renewed and served", func() error {
			var got estate.Certificate
			if err := next.JSON(c.Ctx, &got, "certs", "get", name); err != nil {
				return err
			}
			if got.Leaves[0].Generation != 2 || got.PlacementsCurrent != 1 {
				return fmt.Errorf("it is at generation %d, %d placements are current", got.Leaves[0].Generation, got.PlacementsCurrent)
			}
			return nil
		})
	}
	c.once(next, names, 2)

	c.OK(c.StartNode(c.Ctx, leader))
	c.whole()
	c.do(leader, "certs", "renew", "east", "--wait", "--wait-timeout", estatetest.Long)
	c.once(leader, []string{"east"}, 3)
}

// TestQuorumLost: of three nodes two die. The third goes on with what needs no leader.
func TestQuorumLost(t *testing.T) {
	t.Parallel()
	c := start(t, 3)
	c.whole()
	c.agent("east")
	last := c.Nodes[2]
	for _, m := range c.others(last) {
		m.Process.Kill()
	}
	c.Until("the third node to see that nobody leads", func() error {
		if text := c.status(last); estate.LeaderOf(text) != "nobody" || !strings.Contains(text, "nobody leads:") {
			return errors.New(text)
		}
		return nil
	})
	// The agent finds it, renewals and new orders are done, certificates are revoked.
	_, err := last.WaitAgent(c.Ctx, nil, "east", "Online")
	c.OK(err)
	c.do(last, "certs", "renew", "east", "--wait", "--wait-timeout", estatetest.Long)
	path := filepath.Join(c.SiteDir("east"), "more.pem")
	c.do(last, "targets", "create", "more", "--agent", "east", "--kind", "file", "--settings", fmt.Sprintf("{%q: %q}", "pem_path", path))
	c.do(last, "certs", "create", "more", "--dns", "more.example.test", "--issuer", "ca", "--target", "more", "--wait", "--wait-timeout", estatetest.Long)
	c.do(last, "certs", "revoke", "more", "--reason", "superseded")
	var issuer estate.Issuer
	c.OK(last.JSON(c.Ctx, &issuer, "issuers", "get", "ca"))
	if status, body, err := last.Get(c.Ctx, "http://"+last.PKI+"/.well-known/pki/crl/"+issuer.ID); err != nil || status != 200 || len(body) == 0 {
		t.Errorf("the CRL without a leader: %d, %d bytes, %v", status, len(body), err)
	}
	c.once(last, []string{"east"}, 2)
	// One more, and somebody leads again.
	c.OK(c.StartNode(c.Ctx, c.Nodes[0]))
	_, err = c.Leader(c.Ctx, nil)
	c.OK(err)
}

// TestDrain: SIGTERM and cluster drain move the agents to the other nodes and give leadership away.
func TestDrain(t *testing.T) {
	t.Parallel()
	c := start(t, 3)
	c.whole()
	for _, n := range []string{"east", "west"} {
		c.agent(n)
	}
	leader, err := c.Leader(c.Ctx, nil)
	c.OK(err)
	out, err := c.Certmeshd(c.Ctx, leader, "cluster", "drain")
	c.OK(err)
	if !strings.Contains(out, "ended") {
		t.Errorf("cluster drain said %q", out)
	}
	c.Until("the process to end", func() error {
		if leader.Running() {
			return errors.New("it runs")
		}
		return nil
	})
	if code := leader.Process.ExitCode(); code != 0 {
		t.Errorf("a drained node ended with status %d:\n%s", code, leader.Process.Tail(20))
	}
	next, err := c.Leader(c.Ctx, leader)
	c.OK(err)
	for _, n := range []string{"east", "west"} {
		_, err := next.WaitAgent(c.Ctx, nil, n, "Online")
		c.OK(err)
		c.do(next, "certs", "renew", n, "--wait", "--wait-timeout", estatetest.Long)
	}
	// A node that was drained is still a member, and SIGTERM does the same.
	c.OK(c.StartNode(c.Ctx, leader))
	c.whole()
	if err := next.Process.Stop(40 * time.Second); err != nil {
		t.Errorf("SIGTERM: %v\n%s", err, next.Process.Tail(20))
	}
	_, err = c.Leader(c.Ctx, next)
	c.OK(err)
}

// TestRaftIsWiped: Raft's directories are gone from all nodes. They begin anew with the same command line, and nothing is
// lost, because Raft kept nothing that matters.
func TestRaftIsWiped(t *testing.T) {
	t.Parallel()
	c := start(t, 3)
	c.whole()
	c.agent("east")
	for _, m := range c.Nodes {
		c.OK(m.Process.Stop(40 * time.Second))
	}
	for _, m := range c.Nodes {
		out, err := c.Certmeshd(c.Ctx, m, "cluster", "recover", "--yes")
		c.OK(err)
		if !strings.Contains(out, "raft.aside-1") {
			t.Errorf("cluster recover said %q", out)
		}
	}
	for _, m := range c.Nodes {
		c.OK(c.StartNode(c.Ctx, m))
	}
	c.whole()
	c.do(c.Nodes[1], "certs", "renew", "east", "--wait", "--wait-timeout", estatetest.Long)
	c.once(c.Nodes[1], []string{"east"}, 2)
}

// TestGrowth: one node becomes three. Two voters there never are; who does not belong there is told why.
func TestGrowth(t *testing.T) {
	t.Parallel()
	c := start(t, 1)
	c.agent("east")
	second, err := c.AddNode("n2")
	c.OK(err)

	// Without a token, and with one that was used.
	_, err = c.Run(c.Ctx, "certmeshd", c.NodeEnv(second), "serve")
	c.IsRefusal(err, 1, "n2", "is not enrolled", "cluster token create")
	c.OK(c.Enrol(c.Ctx, second))
	c.OK(c.StartNode(c.Ctx, second))
	c.Until("the second node to be a member without a vote", func() error {
		if text := c.status(second); !strings.Contains(text, "non-voter") || !strings.Contains(text, "Add a third") || estate.LeaderOf(text) != "n1" {
			return errors.New(text)
		}
		return nil
	})
	third, err := c.AddNode("n3")
	c.OK(err)
	token, err := os.ReadFile(second.Path("n2", "token"))
	c.OK(err)
	c.OK(os.WriteFile(third.Path("n3", "token"), token, 0o600))
	_, err = c.Run(c.Ctx, "certmeshd", c.NodeEnv(third), "serve")
	c.IsRefusal(err, 1, "used up")
	c.OK(c.Enrol(c.Ctx, third))
	c.OK(c.StartNode(c.Ctx, third))
	c.whole()

	// A data directory is one node's; a node id one data directory's.
	_, err = c.Run(c.Ctx, "certmeshd", append(c.NodeEnv(third), "CERTMESH_NODE_ID=n4"), "serve")
	c.IsRefusal(err, 1, "another certmeshd uses the data directory")
	stranger, err := c.AddNode("stranger")
	c.OK(err)
	_, err = c.Run(c.Ctx, "certmeshd", append(c.NodeEnv(stranger), "CERTMESH_NODE_ID=n3"), "serve")
	c.IsRefusal(err, 1, "n3", "another data directory")
	_, err = c.Run(c.Ctx, "certmeshd", append(c.NodeEnv(stranger), "CERTMESH_TRUST_DOMAIN=elsewhere.test"), "serve")
	c.IsRefusal(err, 2, "CERTMESH_TRUST_DOMAIN=certmesh.local")
	_, err = c.Run(c.Ctx, "certmeshd", append(c.NodeEnv(stranger), "CERTMESH_CLUSTER_BOOTSTRAP_EXPECT=2"), "serve")
	c.IsRefusal(err, 2, "cluster.bootstrap_expect", "two")

	// Removed is removed: the process ends by itself and does not come back.
	_, err = c.Certmeshd(c.Ctx, third, "cluster", "remove", "n3")
	c.IsRefusal(err, 1, "this is node", "drain it")
	out, err := c.Certmeshd(c.Ctx, second, "cluster", "remove", "n3")
	c.OK(err)
	if !strings.Contains(out, "n3 is removed") {
		t.Errorf("cluster remove said %q", out)
	}
	c.Until("the removed node to end", func() error {
		if third.Running() {
			return errors.New("it runs")
		}
		return nil
	})
	if !strings.Contains(third.Process.Tail(5), "was removed from the cluster") || third.Process.ExitCode() != 1 {
		t.Errorf("the removed node ended with status %d:\n%s", third.Process.ExitCode(), third.Process.Tail(5))
	}
	_, err = c.Run(c.Ctx, "certmeshd", c.NodeEnv(third), "serve")
	c.IsRefusal(err, 1, "used up")
	c.do(c.Nodes[0], "certs", "renew", "east", "--wait", "--wait-timeout", estatetest.Long)
}

// TestDatabaseAway: while the database is away nothing new is taken and nobody ends; afterwards all goes on.
func TestDatabaseAway(t *testing.T) {
	t.Parallel()
	c := start(t, 3)
	c.whole()
	c.agent("east")
	c.OK(c.PauseDatabase())
	c.Until("the nodes to be not ready", func() error {
		for _, m := range c.Nodes {
			if m.Ready(c.Ctx) == nil {
				return fmt.Errorf("%s is ready", m.ID)
			}
		}
		return nil
	})
	for _, m := range c.Nodes {
		if status, _, err := m.Get(c.Ctx, "https://"+m.API+"/health"); err != nil || status != 200 {
			t.Errorf("%s: /health without a database: %d %v", m.ID, status, err)
		}
		if text := c.status(m); !strings.Contains(text, "does not answer") {
			t.Errorf("%s does not tell that the store is away:\n%s", m.ID, text)
		}
	}
	_, err := c.at(c.Nodes[1], "certs", "renew", "east", "--timeout", "20s")
	if err == nil {
		t.Error("a renewal was acknowledged without a database")
	}
	// A node that is started meanwhile waits.
	c.Nodes[0].Process.Kill()
	c.OK(c.LaunchNode(c.Nodes[0]))
	c.Until("the node to say what it waits for", func() error {
		if !strings.Contains(c.Nodes[0].Process.Tail(3), "the database does not answer; this node waits for it") {
			return errors.New(c.Nodes[0].Process.Tail(3))
		}
		return nil
	})
	c.OK(c.ResumeDatabase())
	for _, m := range c.Nodes {
		c.Until(m.ID+" to be ready", func() error { return m.Ready(c.Ctx) })
		if !m.Running() {
			t.Errorf("%s ended while the database was away", m.ID)
		}
	}
	c.do(c.Nodes[2], "certs", "renew", "east", "--wait", "--wait-timeout", estatetest.Long)
}

// TestLeaderIsStopped: the leader is stopped for longer than an election takes and goes on. Another has led meanwhile, and
// nothing that was done twice is there twice.
func TestLeaderIsStopped(t *testing.T) {
	t.Parallel()
	c := start(t, 3)
	c.whole()
	c.agent("east")
	leader, err := c.Leader(c.Ctx, nil)
	c.OK(err)
	c.OK(leader.Process.Signal(syscall.SIGSTOP))
	next, err := c.Leader(c.Ctx, leader)
	c.OK(err)
	c.do(next, "certs", "renew", "east", "--wait", "--wait-timeout", estatetest.Long)
	c.OK(leader.Process.Signal(syscall.SIGCONT))
	c.whole()
	c.Until("all to agree on who leads", func() error {
		want := estate.LeaderOf(c.status(next))
		for _, m := range c.Nodes {
			if got := estate.LeaderOf(c.status(m)); got != want || got == "nobody" {
				return fmt.Errorf("%s says %s, %s says %s", next.ID, want, m.ID, got)
			}
		}
		return nil
	})
	c.do(leader, "certs", "renew", "east", "--wait", "--wait-timeout", estatetest.Long)
	c.once(leader, []string{"east"}, 3)
}
