package store

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"strings"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

const nodeColumns = "id, secret_hash, epoch, instance, enrolled_at, started_at, removed_at"

func scanNode(scan scanner) (domain.Node, error) {
	var n domain.Node
	var enrolledAt, startedAt, removedAt int64
	err := scan(&n.ID, &n.SecretHash, &n.Epoch, &n.Instance, &enrolledAt, &startedAt, &removedAt)
	n.EnrolledAt, n.StartedAt, n.RemovedAt = fromMicro(enrolledAt), fromMicro(startedAt), fromMicro(removedAt)
	return n, err
}

// StartNode makes a process the node it says it is: its epoch rises, and a process that was this node before is so no
// more. The first node of a store enrols by this alone; a later one, and one that was removed, needs a token that nobody
// has used; one that is enrolled shows its secret. Unauthorized: a token is missing or of no use. Conflict: the
// node is enrolled with another secret.
func (s *Store) StartNode(ctx context.Context, x domain.NodeStart) (domain.Node, error) {
	if err := checkTexts("id", x.ID, "secret_hash", x.SecretHash, "instance", x.Instance); err != nil {
		return domain.Node{}, err
	}
	var node domain.Node
	err := s.settled(ctx, "node.start", func(t *tx) error {
		all, err := collect(t, "SELECT "+nodeColumns+" FROM cluster_node ORDER BY id", nil, scanNode)
		if err != nil {
			return err
		}
		node = domain.Node{ID: x.ID, SecretHash: x.SecretHash, Epoch: 1, Instance: x.Instance, EnrolledAt: domain.Micro(x.At), StartedAt: domain.Micro(x.At)}
		var serving []string
		var known bool
		for _, n := range all {
			if n.RemovedAt.IsZero() {
				serving = append(serving, n.ID)
			}
			if n.ID != x.ID {
				continue
			}
			known = true
			if t.again && n.Instance == x.Instance {
				node = n
				return nil
			}
			node.Epoch = n.Epoch + 1
			if n.RemovedAt.IsZero() {
				if n.SecretHash != x.SecretHash {
					return fault.New(fault.Conflict, "node %q is enrolled already, from another data directory: give this one another node.id, or, if that one is gone for good, run `certmeshd cluster remove %s` and start with a new token", x.ID, x.ID)
				}
				node.EnrolledAt = n.EnrolledAt
			}
		}
		enrolled := node.EnrolledAt.Before(domain.Micro(x.At))
		if !enrolled && len(serving) > 0 {
			if err := t.useClusterToken(x, serving); err != nil {
				return err
			}
		}
		if known {
			n, err := t.exec(`UPDATE cluster_node SET secret_hash = $1, epoch = $2, instance = $3, enrolled_at = $4, started_at = $5, removed_at = 0
WHERE id = $6 AND epoch = $7`, node.SecretHash, int64(node.Epoch), node.Instance, micro(node.EnrolledAt), micro(node.StartedAt), node.ID, int64(node.Epoch-1))
			if err == nil && n != 1 {
				return errMoved
			}
			if err != nil {
				return err
			}
		} else if _, err := t.exec(`INSERT INTO cluster_node (id, secret_hash, epoch, instance, enrolled_at, started_at, removed_at)
VALUES ($1, $2, 1, $3, $4, $4, 0)`, node.ID, node.SecretHash, node.Instance, micro(node.EnrolledAt)); err != nil {
			if _, ok := isUnique(err); ok {
				return errMoved
			}
			return err
		}
		action := "node.started"
		if !enrolled {
			action = "node.enrolled"
		}
		return t.audit(domain.AuditEvent{At: x.At, Actor: "node:" + x.ID, Action: action, Resource: "node/" + x.ID,
			Detail: map[string]string{"instance": x.Instance, "token": x.TokenID}})
	})
	return node, err
}

var errClusterToken = fault.New(fault.Unauthorized, "the cluster token is not known here, used up or expired: make one with `certmeshd cluster token create` beside a node in service")

// useClusterToken spends a token on a node. Who does not know the secret learns nothing about the token.
func (t *tx) useClusterToken(x domain.NodeStart, serving []string) error {
	if x.TokenID == "" {
		return fault.New(fault.Unauthorized, "this store is that of a cluster (%s), and node %q is not enrolled there: make a token with `certmeshd cluster token create` beside a node in service, and set cluster.token_file to a file that holds it",
			strings.Join(serving, ", "), x.ID)
	}
	if !storable(x.TokenID) {
		return errClusterToken
	}
	k, err := one(t, errClusterToken, "SELECT id, hash, node_id, expires_at FROM cluster_token WHERE id = $1", []any{x.TokenID}, func(scan scanner) (domain.ClusterToken, error) {
		var k domain.ClusterToken
		var expiresAt int64
		err := scan(&k.ID, &k.Hash, &k.NodeID, &expiresAt)
		k.ExpiresAt = fromMicro(expiresAt)
		return k, err
	})
	missing := fault.Is(err, fault.Unauthorized)
	if err != nil && !missing {
		return err
	}
	if missing {
		k.Hash = make([]byte, sha256.Size)
	}
	if subtle.ConstantTimeCompare(k.Hash, x.TokenHash) != 1 || missing || k.NodeID != "" || !x.At.Before(k.ExpiresAt) {
		return errClusterToken
	}
	n, err := t.exec("UPDATE cluster_token SET node_id = $1 WHERE id = $2 AND node_id = ''", x.ID, k.ID)
	if err == nil && n != 1 {
		return errMoved
	}
	return err
}

// CheckNode reports whether a process is still the node that StartNode made it. Forbidden: the node was removed. Conflict:
// another process is this node by now. NotFound: the store does not know it; it may be another one than before.
func (s *Store) CheckNode(ctx context.Context, nodeID string, epoch domain.Epoch) error {
	return s.read(ctx, "node.check", func(t *tx) error {
		n, err := one(t, fault.New(fault.NotFound, "the store does not know node %q any more", nodeID),
			"SELECT "+nodeColumns+" FROM cluster_node WHERE id = $1", []any{nodeID}, scanNode)
		switch {
		case err != nil:
			return err
		case !n.RemovedAt.IsZero():
			return fault.New(fault.Forbidden, "node %q was removed from the cluster at %s", nodeID, n.RemovedAt.UTC().Format("2006-01-02 15:04:05Z"))
		case n.Epoch != epoch:
			return fault.New(fault.Conflict, "another process runs as node %q since %s: one data directory, one node.id, one process", nodeID, n.StartedAt.UTC().Format("2006-01-02 15:04:05Z"))
		}
		return nil
	})
}

// Nodes lists all nodes by id, removed ones as well.
func (s *Store) Nodes(ctx context.Context) ([]domain.Node, error) {
	var all []domain.Node
	err := s.read(ctx, "node.list", func(t *tx) error {
		var err error
		all, err = collect(t, "SELECT "+nodeColumns+" FROM cluster_node ORDER BY id", nil, scanNode)
		return err
	})
	return all, err
}

// RemoveNode ends a node's permission. It notices within seconds. Again it changes nothing. NotFound: there is none.
func (s *Store) RemoveNode(ctx context.Context, nodeID string, op domain.Op) error {
	missing := fault.New(fault.NotFound, "there is no node %q; certmeshd cluster status lists them", nodeID)
	if !storable(nodeID) {
		return missing
	}
	return s.settled(ctx, "node.remove", func(t *tx) error {
		n, err := one(t, missing, "SELECT "+nodeColumns+" FROM cluster_node WHERE id = $1", []any{nodeID}, scanNode)
		if err != nil || !n.RemovedAt.IsZero() {
			return err
		}
		if _, err := t.exec("UPDATE cluster_node SET removed_at = $1 WHERE id = $2 AND removed_at = 0", micro(op.At), nodeID); err != nil {
			return err
		}
		return t.auditOp(op, "node.removed", "node/"+nodeID, nil)
	})
}

// CreateClusterToken records a token by the SHA-256 of its secret.
func (s *Store) CreateClusterToken(ctx context.Context, k domain.ClusterToken, op domain.Op) error {
	switch {
	case !strings.HasPrefix(k.ID, id.ClusterToken+"_") || !storable(k.ID):
		return fault.InvalidField("id", "must begin with %s_", id.ClusterToken)
	case len(k.Hash) != sha256.Size:
		return fault.InvalidField("hash", "must be the SHA-256 of the secret")
	case !k.ExpiresAt.After(op.At):
		return fault.InvalidField("ttl", "must be above zero")
	}
	return s.settled(ctx, "node.token", func(t *tx) error {
		if t.again {
			if kept, err := t.exists("cluster_token", k.ID); kept || err != nil {
				return err
			}
		}
		if _, err := t.exec(`INSERT INTO cluster_token (id, hash, node_id, expires_at, created_by, created_at) VALUES ($1, $2, '', $3, $4, $5)`,
			k.ID, k.Hash, micro(k.ExpiresAt), k.CreatedBy, micro(op.At)); err != nil {
			return err
		}
		return t.auditOp(op, "node.token_created", "cluster_token/"+k.ID, nil)
	})
}
