package estate

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
)

// Cluster is a control plane of several nodes on one PostgreSQL. Its agents belong to the estate it was made in and know
// the mesh addresses of all.
type Cluster struct {
	estate *Estate
	Nodes  []*ClusterNode
	DSN    string
	// Database is what DSN names.
	Database *Postgres
	// Network carries what nodes, agents and the database say to one another; nil: they talk directly. In it the nodes are
	// called by their ids and the database "database".
	Network *Network

	env []string
}

// ClusterNode is one node: an estate with ports and a data directory of its own, and the others' files.
type ClusterNode struct {
	*Estate
	ID      string
	Process *Process
	env     []string
	// mesh is where others reach the mesh listener.
	mesh string
}

// ClusterOptions say what a cluster is like.
type ClusterOptions struct {
	Nodes int
	// Durable makes a database that may be crashed.
	Durable bool
	// Network, if there is one, carries all connections but those of operators.
	Network *Network
	// Env is added to each node's environment.
	Env []string
}

// NewCluster prepares n nodes on a PostgreSQL of the estate's own; none of them runs yet. env is added to each node's.
func (e *Estate) NewCluster(ctx context.Context, n int, env ...string) (*Cluster, error) {
	return e.NewClusterOf(ctx, ClusterOptions{Nodes: n, Env: env})
}

// NewClusterOf prepares a cluster; none of its nodes runs yet.
func (e *Estate) NewClusterOf(ctx context.Context, o ClusterOptions) (*Cluster, error) {
	db, err := e.NewPostgres(ctx, o.Durable)
	if err != nil {
		return nil, err
	}
	c := &Cluster{estate: e, Database: db, DSN: db.DSN, Network: o.Network}
	if c.Network != nil {
		var at string
		if at, err = c.Network.Expose("database", "unix", db.Socket); err == nil {
			c.DSN = "postgres://postgres@" + at + "/postgres?sslmode=disable"
		}
	}
	if err == nil {
		err = c.prepare(o.Nodes, o.Env)
	}
	if err != nil {
		db.Close()
		return nil, err
	}
	return c, nil
}

func (c *Cluster) prepare(n int, env []string) error {
	kek := make([]byte, 32)
	_, _ = rand.Read(kek) // never fails
	path := c.estate.Path("kek")
	if err := os.WriteFile(path, []byte(base64.StdEncoding.EncodeToString(kek)+"\n"), 0o600); err != nil {
		return err
	}
	c.env = append([]string{
		"CERTMESH_SECRETS_KEK_FILE=" + path,
		"CERTMESH_STORE_DSN=" + c.DSN,
		fmt.Sprintf("CERTMESH_CLUSTER_BOOTSTRAP_EXPECT=%d", n),
	}, env...)
	for i := range n {
		if _, err := c.AddNode(fmt.Sprintf("n%d", i+1)); err != nil {
			return err
		}
	}
	c.env = append(c.env, "CERTMESH_PKI_PUBLIC_URL=http://"+c.Nodes[0].PKI)
	return nil
}

// AddNode prepares one more node. Nodes that run already need not hear of it.
func (c *Cluster) AddNode(id string) (*ClusterNode, error) {
	e, err := newNode(c.estate.cfg, id)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(e.Path(id), 0o700); err != nil {
		return nil, err
	}
	m := &ClusterNode{Estate: e, ID: id, mesh: e.Mesh, env: []string{"CERTMESH_NODE_ID=" + id, "CERTMESH_CLUSTER_TOKEN_FILE=" + e.Path(id, "token")}}
	if c.Network != nil {
		raft, err := c.Network.Expose(id, "tcp", e.Raft)
		if err != nil {
			return nil, err
		}
		if m.mesh, err = c.Network.Expose(id, "tcp", e.Mesh); err != nil {
			return nil, err
		}
		m.env = append(m.env, "CERTMESH_CLUSTER_RAFT_ADDRESS="+raft, "CERTMESH_CLUSTER_MESH_ADDRESS="+m.mesh)
	}
	c.Nodes = append(c.Nodes, m)
	return m, nil
}

// AddEnv adds to the environment of the node's later starts.
func (m *ClusterNode) AddEnv(env ...string) { m.env = append(m.env, env...) }

// NodeEnv is the environment of a node, for certmeshd's commands beside it.
func (c *Cluster) NodeEnv(m *ClusterNode) []string {
	env := append(m.ServerEnv(), c.env...)
	return append(append(env, m.env...), "CERTMESH_CLUSTER_JOIN="+c.MeshAddresses())
}

// MeshAddresses are those of all nodes, as agents and nodes take them.
func (c *Cluster) MeshAddresses() string {
	all := make([]string, len(c.Nodes))
	for i, m := range c.Nodes {
		all[i] = m.mesh
	}
	return strings.Join(all, ",")
}

// Certmeshd runs one of certmeshd's commands beside a node.
func (c *Cluster) Certmeshd(ctx context.Context, m *ClusterNode, args ...string) (string, error) {
	out, err := c.estate.Run(ctx, "certmeshd", c.NodeEnv(m), args...)
	return strings.TrimSpace(string(out)), err
}

// Enrol makes a token for a node that needs one.
func (c *Cluster) Enrol(ctx context.Context, m *ClusterNode) error {
	token, err := c.Certmeshd(ctx, m, "cluster", "token", "create")
	if err != nil {
		return err
	}
	return os.WriteFile(m.Path(m.ID, "token"), []byte(token+"\n"), 0o600)
}

// LaunchNode starts a node, or starts it again.
func (c *Cluster) LaunchNode(m *ClusterNode) error {
	p, err := m.launch(append(append(append([]string{}, c.env...), m.env...), "CERTMESH_CLUSTER_JOIN="+c.MeshAddresses()), "serve")
	if err != nil {
		return err
	}
	m.Process = p
	if c.Network != nil {
		c.Network.Party(m.ID, p.PID)
	}
	return nil
}

// StartNode is LaunchNode, and waits until the node is ready.
func (c *Cluster) StartNode(ctx context.Context, m *ClusterNode) error {
	if err := c.LaunchNode(m); err != nil {
		return err
	}
	return m.awaitServer(ctx, m.Process)
}

// StartAll starts all nodes of an empty store, waits until one leads, and gives every node's estate an admin's profile, so
// that the command line works at each.
func (c *Cluster) StartAll(ctx context.Context) error {
	for i, m := range c.Nodes {
		if i > 0 {
			if err := c.Enrol(ctx, m); err != nil {
				return err
			}
		}
		if err := c.StartNode(ctx, m); err != nil {
			return err
		}
	}
	if _, err := c.Leader(ctx, nil); err != nil {
		return err
	}
	key, err := c.Certmeshd(ctx, c.Nodes[0], "apikey", "create", "--name", "tests", "--role", "admin")
	if err != nil {
		return err
	}
	for _, m := range c.Nodes {
		if err := c.Login(ctx, m, key); err != nil {
			return err
		}
	}
	// The cluster's own command line asks the first node.
	c.estate.node = c.Nodes[0].ID
	return nil
}

// Login writes a profile with the key for a node.
func (c *Cluster) Login(ctx context.Context, m *ClusterNode, key string) error {
	root, err := MeshFingerprint(ctx, m.GRPC)
	if err != nil {
		return err
	}
	_, err = c.estate.Run(ctx, "certmesh", append(m.CLIEnv(), "CERTMESH_API_KEY="+key), "login", "--server", m.GRPC, "--ca-fingerprint", root)
	return err
}

// Leader waits until one of the nodes that run says that it leads, other than not, and returns it.
func (c *Cluster) Leader(ctx context.Context, not *ClusterNode) (*ClusterNode, error) {
	var found *ClusterNode
	err := Wait(ctx, "a leader", func(ctx context.Context) error {
		for _, m := range c.Nodes {
			if m == not || !m.Running() {
				continue
			}
			text, err := c.Certmeshd(ctx, m, "cluster", "status")
			if err == nil && LeaderOf(text) == m.ID {
				found = m
				return nil
			}
		}
		return errors.New("no node says that it leads")
	})
	return found, err
}

// PauseDatabase stops the database's processes, so that it answers nobody and breaks no connection.
func (c *Cluster) PauseDatabase() error { return c.Database.Signal(syscall.SIGSTOP) }

// ResumeDatabase is its mirror image.
func (c *Cluster) ResumeDatabase() error { return c.Database.Signal(syscall.SIGCONT) }

// LeaderOf reads the leader's id off what `certmeshd cluster status` prints.
func LeaderOf(status string) string {
	for line := range strings.Lines(status) {
		if rest, ok := strings.CutPrefix(line, "leader "); ok {
			return strings.TrimSpace(rest)
		}
	}
	return ""
}

// Running reports whether the node's process lives.
func (m *ClusterNode) Running() bool { return m.Process != nil && m.Process.Running() }

// CloseCluster stops the nodes and the database.
func (c *Cluster) CloseCluster() {
	for _, m := range c.Nodes {
		m.Close()
	}
	c.Database.Close()
}
