package rollover

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/certmesh/certmesh/e2e/estate"
	"github.com/certmesh/certmesh/e2e/estate/estatetest"
)

// whole waits until every node that runs has links to all others.
func whole(l *lab, c *estate.Cluster) {
	l.T.Helper()
	l.Until("the nodes to be linked", func() error {
		for _, m := range c.Nodes {
			text, err := c.Certmeshd(l.Ctx, m, "cluster", "status")
			if err != nil {
				return err
			}
			linked := 0
			for line := range strings.Lines(text) {
				if f := strings.Fields(line); len(f) == 7 && f[3] == "yes" {
					linked++
				}
			}
			if linked != len(c.Nodes)-1 {
				return fmt.Errorf("%s sees:\n%s", m.ID, text)
			}
		}
		return nil
	})
}

func TestRolloverOfACluster(t *testing.T) {
	t.Parallel()
	e := estatetest.New(t)
	c, err := e.NewCluster(e.Ctx, 3, short, "CERTMESH_SCHEDULER_RETRY_INTERVAL=1s")
	e.OK(err)
	t.Cleanup(c.CloseCluster)
	e.OK(c.StartAll(e.Ctx))
	l := &lab{Lab: e, env: c.NodeEnv(c.Nodes[0])}
	whole(l, c)
	l.Issuer("ca")
	names := []string{"east", "west"}
	for _, name := range names {
		l.Join(estate.AgentOptions{Name: name, Env: []string{"CERTMESH_SERVER_URL=" + c.MeshAddresses()}})
		path := filepath.Join(l.SiteDir(name), name+".pem")
		l.Do("targets", "create", name, "--agent", name, "--kind", "file", "--settings", fmt.Sprintf("{%q: %q}", "pem_path", path))
		l.Do("certs", "create", name, "--dns", name+".example.test", "--issuer", "ca", "--target", name, "--wait", "--wait-timeout", estatetest.Long)
	}
	renewed := func(phase string) {
		t.Helper()
		for _, name := range names {
			before := l.Certificate(name).Leaves[0].Serial
			l.Do("certs", "renew", name, "--wait", "--wait-timeout", estatetest.Long)
			if after := l.Current(name).Leaves[0].Serial; after == before {
				t.Errorf("%s: %s was not renewed", phase, name)
			}
		}
	}

	// 1. One node is dead from before the start until after the activation.
	dead := c.Nodes[2]
	dead.Process.Kill()
	l.step("start")
	l.says("agents 2 of 2 are ready for the next step")
	renewed("started")
	l.step("activate")
	renewed("activated")
	// 2. It comes back, and the nodes know one another, each by an identity of the new CA.
	l.OK(c.StartNode(l.Ctx, dead))
	whole(l, c)
	l.says("agents 2 of 2 are ready for the next step")
	// 3. The leader dies; what takes its place has shaken hands under the new CA.
	leader, err := c.Leader(l.Ctx, nil)
	l.OK(err)
	leader.Process.Kill()
	_, err = c.Leader(l.Ctx, leader)
	l.OK(err)
	l.step("finish")
	l.OK(c.StartNode(l.Ctx, leader))
	whole(l, c)
	// 4. Operators log in by the new root, at every node.
	key, err := c.Certmeshd(l.Ctx, c.Nodes[0], "apikey", "create", "--name", "afterwards", "--role", "admin")
	l.OK(err)
	root := l.fingerprints()
	for _, m := range c.Nodes {
		shown, err := estate.MeshFingerprint(l.Ctx, m.GRPC)
		l.OK(err)
		if len(root) != 1 || shown != root[0] {
			t.Errorf("%s shows the root %s; the bundle has %v", m.ID, shown, root)
		}
		l.OK(c.Login(l.Ctx, m, key))
	}
	renewed("finished")
}
