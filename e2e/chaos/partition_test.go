package chaos

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/certmesh/certmesh/e2e/estate"
	"github.com/certmesh/certmesh/e2e/estate/estatetest"
)

// cutCluster is three nodes, an agent called east and its certificate, behind a network that can be cut.
func cutCluster(t *testing.T) *trial {
	t.Helper()
	network := estate.NewNetwork()
	t.Cleanup(network.Close)
	s := &trial{Lab: estatetest.New(t)}
	var err error
	s.Cluster, err = s.NewClusterOf(s.Ctx, estate.ClusterOptions{Nodes: nodes, Network: network, Env: []string{"CERTMESH_SCHEDULER_RETRY_INTERVAL=1s"}})
	s.OK(err)
	t.Cleanup(s.CloseCluster)
	s.OK(s.StartAll(s.Ctx))
	s.issuer = s.Issuer("ca").ID
	token, err := s.Token(s.Ctx)
	s.OK(err)
	a := &subject{name: "east"}
	s.agents = []*subject{a}
	s.OK(s.startAgent(a, token))
	_, err = s.WaitAgent(s.Ctx, a.process, a.name, "Online")
	s.OK(err)
	s.order("east")
	return s
}

// order orders a certificate at east and waits until it is there.
func (s *trial) order(name string) {
	s.T.Helper()
	s.Do("targets", "create", name, "--agent", "east", "--kind", "file", "--settings", fmt.Sprintf(`{"pem_path":%q}`, filepath.Join(s.SiteDir("east"), name+".pem")))
	s.Do("certs", "create", name, "--dns", name+".example.test", "--issuer", "ca", "--target", name, "--wait", "--wait-timeout", estatetest.Long)
}

// holder is the node that holds east's stream.
func (s *trial) holder() *estate.ClusterNode {
	s.T.Helper()
	var id string
	s.OK(s.row(s.Ctx, "SELECT holder FROM agent_session", &id))
	for _, m := range s.Nodes {
		if m.ID == id {
			return m
		}
	}
	s.T.Fatalf("the stream is held by %q", id)
	return nil
}

// TestRevokedBehindACut: the leader is cut off from the other nodes, and not from the database. What it is asked to revoke
// then, when others lead and it may not know, is on the CRL of all as soon as the nodes are joined again.
func TestRevokedBehindACut(t *testing.T) {
	t.Parallel()
	s := cutCluster(t)
	s.order("more")
	former, err := s.Leader(s.Ctx, nil)
	s.OK(err)
	for _, other := range s.ids(former) {
		s.Network.Cut(former.ID, other)
	}
	if _, err = s.Leader(s.Ctx, former); err != nil {
		t.Fatal(err)
	}
	_, err = former.CLI(s.Ctx, "certs", "revoke", "more", "--reason", "superseded")
	s.OK(err)
	for _, other := range s.ids(former) {
		s.Network.Heal(former.ID, other)
	}
	for _, m := range s.Nodes {
		s.Until("the CRL of "+m.ID+" to have it", func() error {
			l, err := crlOf(s.Ctx, m, s.issuer)
			if err == nil && len(l.RevokedCertificateEntries) != 1 {
				err = fmt.Errorf("CRL %s has %d", l.Number, len(l.RevokedCertificateEntries))
			}
			return err
		})
	}
}

// TestAgentIsCutOff: an agent that does not reach its node any more finds another, where its work goes on.
func TestAgentIsCutOff(t *testing.T) {
	t.Parallel()
	s := cutCluster(t)
	former := s.holder()
	s.Network.Cut("east", former.ID)
	s.Do("certs", "renew", "east", "--wait", "--wait-timeout", estatetest.Long)
	if now := s.holder(); now == former {
		t.Errorf("the stream is still held by %s", now.ID)
	}
}

// TestNodeLosesTheDatabase: a node that is cut off from the database says so. The agents that it holds are sent elsewhere when
// there is work for them, so that it is done meanwhile, and the node takes part again by itself.
func TestNodeLosesTheDatabase(t *testing.T) {
	t.Parallel()
	s := cutCluster(t)
	cut := s.holder()
	s.Network.Cut(cut.ID, "database")
	s.Until("the node not to be ready", func() error {
		if cut.Ready(s.Ctx) == nil {
			return fmt.Errorf("%s is ready", cut.ID)
		}
		return nil
	})
	other := s.Nodes[0]
	if other == cut {
		other = s.Nodes[1]
	}
	_, err := other.CLI(s.Ctx, "certs", "renew", "east", "--wait", "--wait-timeout", estatetest.Long)
	s.OK(err)
	s.Network.Heal(cut.ID, "database")
	s.Until("the node to be ready", func() error { return cut.Ready(s.Ctx) })
	_, err = cut.CLI(s.Ctx, "certs", "renew", "east", "--wait", "--wait-timeout", estatetest.Long)
	s.OK(err)
}
