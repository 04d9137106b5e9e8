// Package cluster tries a control plane of three nodes on one database, from the built binaries: what goes on when nodes
// die, are drained, or lose their Raft directories.
package cluster
