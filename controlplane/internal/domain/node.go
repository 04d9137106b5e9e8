package domain

import "time"

// Node is a process that may act for the control plane. Its row is the permission; who leads and who follows is Raft's.
type Node struct {
	// ID is chosen by whoever installs it (node.id) and never changes.
	ID string
	// SecretHash is the SHA-256, in hex, of the secret in its data directory, by which it is known when it starts again.
	SecretHash string
	// Epoch rises with each start: a process that knows an older one is not this node any more.
	Epoch Epoch
	// Instance is random per start.
	Instance   string
	EnrolledAt time.Time
	StartedAt  time.Time
	// RemovedAt is zero for a node in service.
	RemovedAt time.Time
}

// NodeStart is a process that wants to be a node.
type NodeStart struct {
	ID, SecretHash, Instance string
	// TokenID and TokenHash are of the cluster token it was given; empty: none.
	TokenID   string
	TokenHash []byte
	At        time.Time
}

// ClusterToken lets one node enrol, once. Only the SHA-256 of its secret is stored.
type ClusterToken struct {
	ID   string
	Hash []byte
	// NodeID is who used it; empty: nobody yet.
	NodeID    string
	ExpiresAt time.Time
	CreatedBy string
	CreatedAt time.Time
}
