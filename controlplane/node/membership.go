package node

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/jonboulle/clockwork"

	"github.com/certmesh/certmesh/controlplane/internal/authz"
	"github.com/certmesh/certmesh/controlplane/internal/config"
	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/controlplane/internal/store"
	"github.com/certmesh/certmesh/protocol/fault"
)

// metaCluster is the key under which a store keeps its cluster's id.
const metaCluster = "cluster_id"

// checkEvery is how often a node asks whether it still is one.
const checkEvery = 3 * time.Second

// membership is this process's right to be a node: a row in the store, and the secret in the data directory by which the
// row knows it again.
type membership struct {
	store     *store.Store
	clk       clockwork.Clock
	log       *slog.Logger
	clusterID string
	node      domain.Node
}

// papers are what a data directory remembers of the node it belongs to: the file node.json, mode 0600.
type papers struct {
	ClusterID string `json:"cluster_id"`
	NodeID    string `json:"node_id"`
	Secret    string `json:"secret"`
}

// enter makes this process a node of the store's cluster. Errors, each with what to do: the data directory is another
// node's or another cluster's; the node is not enrolled and has no good token; the clock is wrong.
func enter(ctx context.Context, s *store.Store, c *config.Config, clk clockwork.Clock, log *slog.Logger) (*membership, error) {
	clusterID, err := s.SetMetaIfAbsent(ctx, metaCluster, id.New(id.Cluster))
	if err != nil {
		return nil, fmt.Errorf("read the cluster's id: %w", err)
	}
	path := filepath.Join(c.Node.DataDir, "node.json")
	p, err := readPapers(path)
	enrolled := p.Secret != ""
	switch {
	case err != nil:
		return nil, err
	case p.Secret == "":
		secret := make([]byte, 32)
		_, _ = rand.Read(secret) // it crashes the program instead of failing
		p = papers{ClusterID: clusterID, NodeID: c.Node.ID, Secret: base64.RawURLEncoding.EncodeToString(secret)}
	case p.ClusterID != clusterID:
		return nil, fault.InvalidField("store.dsn", "is the store of cluster %s, but the data directory %s is of a node of cluster %s: set the right store.dsn, or give this node an empty node.data_dir",
			clusterID, c.Node.DataDir, p.ClusterID)
	case p.NodeID != c.Node.ID:
		return nil, fault.InvalidField("node.id", "is %q, but the data directory %s is of node %q: set node.id to that, or give this node an empty node.data_dir", c.Node.ID, c.Node.DataDir, p.NodeID)
	}
	if err := checkClock(ctx, s, clk, c.Cluster.MaxClockSkew); err != nil {
		if !fault.Is(err, fault.Rejected) || !enrolled {
			return nil, err
		}
		log.Error("the clock is wrong", "error", err) // it has a vote and agents: without it less would work
	}
	tokenID, tokenHash, err := clusterToken(c)
	if err != nil {
		return nil, err
	}
	m := &membership{store: s, clk: clk, log: log, clusterID: clusterID}
	// The secret is on disk before the row knows it: a node that is cut down between starts again as if it were new.
	if err := writePapers(path, p); err != nil {
		return nil, err
	}
	m.node, err = s.StartNode(ctx, domain.NodeStart{ID: c.Node.ID, SecretHash: domain.HashHex([]byte(p.Secret)), Instance: id.New(id.Instance),
		TokenID: tokenID, TokenHash: tokenHash, At: clk.Now()})
	switch class := fault.ClassOf(err); {
	case err == nil:
		return m, nil
	case !enrolled && (class == fault.Unauthorized || class == fault.Conflict || class == fault.Invalid):
		// The directory is nobody's still.
		return nil, errors.Join(err, os.Remove(path))
	default:
		return nil, err
	}
}

// serverClock is the clock that nodes have in common.
type serverClock interface {
	ServerTime(ctx context.Context) (time.Time, error)
}

// checkClock compares this node's clock with the database server's, by which the other nodes were judged as well.
func checkClock(ctx context.Context, s serverClock, clk clockwork.Clock, most time.Duration) error {
	before := clk.Now()
	theirs, err := s.ServerTime(ctx)
	if err != nil {
		return fmt.Errorf("ask the database for its time: %w", err)
	}
	if theirs.IsZero() {
		return nil // an embedded store has no other clock than ours
	}
	after := clk.Now()
	// Whatever time it was when the database looked: it was between our two looks.
	off := max(theirs.Sub(after), before.Sub(theirs), 0)
	if off > most {
		return fault.New(fault.Rejected, "this host's clock says %s and the database's %s, which is more than cluster.max_clock_skew (%s) apart: set both clocks by NTP, then start again",
			after.UTC().Format(time.RFC3339), theirs.UTC().Format(time.RFC3339), most)
	}
	return nil
}

func readPapers(path string) (papers, error) {
	var p papers
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	if err != nil {
		return p, fault.Wrap(fault.Invalid, err, "the node's file in node.data_dir cannot be read")
	}
	if err := json.Unmarshal(data, &p); err != nil || p.Secret == "" || p.ClusterID == "" || p.NodeID == "" {
		return p, fault.New(fault.Invalid, "%s is damaged: restore it, or delete it, run `certmeshd cluster remove` for this node, and start again with a new token", path)
	}
	return p, nil
}

func writePapers(path string, p papers) error {
	data, err := json.Marshal(p) //nolint:gosec // the file is where the secret is kept, mode 0600
	if err != nil {
		return fault.Wrap(fault.Internal, err, "the node's file cannot be encoded")
	}
	return writePrivate(path, append(data, '\n'))
}

const clusterTokenPrefix = "cmct1"

// clusterToken reads the token of the configuration; all is empty when there is none.
func clusterToken(c *config.Config) (tokenID string, hash []byte, err error) {
	text := c.Cluster.Token
	if c.Cluster.TokenFile != "" {
		data, err := os.ReadFile(c.Cluster.TokenFile)
		// The file may be gone once the node has enrolled.
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", nil, fault.Wrap(fault.Invalid, err, "cluster.token_file cannot be read")
		}
		text = strings.TrimSpace(string(data))
	}
	if text == "" {
		return "", nil, nil
	}
	parts := strings.Split(text, ".")
	if len(parts) != 3 || parts[0] != clusterTokenPrefix || parts[1] == "" || parts[2] == "" {
		return "", nil, fault.New(fault.Invalid, "the cluster token is malformed; copy it whole from `certmeshd cluster token create`")
	}
	return parts[1], authz.HashSecret(parts[2]), nil
}

// newClusterToken makes a token: the text to be shown once, and what is stored.
func newClusterToken(ttl time.Duration, now time.Time) (string, domain.ClusterToken) {
	secret := authz.NewSecret()
	k := domain.ClusterToken{ID: id.New(id.ClusterToken), Hash: authz.HashSecret(secret), ExpiresAt: domain.Micro(now.Add(ttl)), CreatedBy: "console"}
	return clusterTokenPrefix + "." + k.ID + "." + secret, k
}

// keep asks again and again whether this process still is the node it began as, until ctx ends. It returns why not. That the
// store does not answer says nothing about it.
func (m *membership) keep(ctx context.Context) error {
	t := m.clk.NewTicker(checkEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.Chan():
		}
		err := m.store.CheckNode(ctx, m.node.ID, m.node.Epoch)
		switch {
		case err == nil || ctx.Err() != nil:
		case fault.Is(err, fault.Conflict), fault.Is(err, fault.Forbidden), fault.Is(err, fault.NotFound):
			return err
		default:
			m.log.Warn("the store did not say whether this node still belongs to the cluster", "error", err)
		}
	}
}
