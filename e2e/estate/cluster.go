package estate

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// Cluster is a control plane of several nodes on one PostgreSQL. Its agents belong to the estate it was made in and know
// the mesh addresses of all.
type Cluster struct {
	estate *Estate
	Nodes  []*ClusterNode
	DSN    string

	env          []string
	stopPostgres func()
}

// ClusterNode is one node: an estate with ports and a data directory of its own, and the others' files.
type ClusterNode struct {
	*Estate
	ID      string
	Process *Process
	env     []string
}

// NewCluster prepares n nodes on a PostgreSQL of the estate's own; none of them runs yet. env is added to each node's.
func (e *Estate) NewCluster(ctx context.Context, n int, env ...string) (*Cluster, error) {
	dsn, stop, err := e.StartPostgres(ctx)
	if err != nil {
		return nil, err
	}
	c := &Cluster{estate: e, DSN: dsn, stopPostgres: stop}
	if err := c.prepare(n, env); err != nil {
		stop()
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
	m := &ClusterNode{Estate: e, ID: id, env: []string{"CERTMESH_NODE_ID=" + id, "CERTMESH_CLUSTER_TOKEN_FILE=" + e.Path(id, "token")}}
	c.Nodes = append(c.Nodes, m)
	return m, nil
}

// NodeEnv is the environment of a node, for certmeshd's commands beside it.
func (c *Cluster) NodeEnv(m *ClusterNode) []string {
	env := append(m.ServerEnv(), c.env...)
	return append(append(env, m.env...), "CERTMESH_CLUSTER_JOIN="+c.MeshAddresses())
}

// MeshAddresses are those of all nodes, as agents and nodes take them.
func (c *Cluster) MeshAddresses() string {
	all := make([]string, len(c.Nodes))
	for i, m := range c.Nodes {
		all[i] = m.Mesh
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
	var err error
	m.Process, err = m.launch(append(append(append([]string{}, c.env...), m.env...), "CERTMESH_CLUSTER_JOIN="+c.MeshAddresses()), "serve")
	return err
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
func (c *Cluster) PauseDatabase() error { return c.signalDatabase(syscall.SIGSTOP) }

// ResumeDatabase is its mirror image.
func (c *Cluster) ResumeDatabase() error { return c.signalDatabase(syscall.SIGCONT) }

// signalDatabase reaches the server and its backends, each of which is in a process group of its own.
func (c *Cluster) signalDatabase(s syscall.Signal) error {
	c.estate.mu.Lock()
	defer c.estate.mu.Unlock()
	for _, p := range c.estate.procs {
		if p.Name != "postgres" {
			continue
		}
		// The server first: it starts no more backends.
		if err := syscall.Kill(p.PID(), s); err != nil {
			return err
		}
		lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.PID()))
		if err != nil {
			return err
		}
		for _, list := range lists {
			children, err := os.ReadFile(list)
			if err != nil {
				return err
			}
			for child := range strings.FieldsSeq(string(children)) {
				pid, err := strconv.Atoi(child)
				if err != nil {
					return err
				}
				_ = syscall.Kill(pid, s) // it may have ended meanwhile
			}
		}
	}
	return nil
}

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
func (m *ClusterNode) Running() bool {
	if m.Process == nil {
		return false
	}
	select {
	case <-m.Process.Exited():
		return false
	default:
		return true
	}
}

// CloseCluster stops the nodes and the database.
func (c *Cluster) CloseCluster() {
	for _, m := range c.Nodes {
		m.Close()
	}
	c.stopPostgres()
}
