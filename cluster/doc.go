// Package cluster makes one control plane of several nodes. hashicorp/raft is behind its door, and nothing else knows it.
//
// Raft answers what a database answers badly: who is alive, who leads, within a second and without writing rows. It holds
// leadership, the registry of nodes, the plan of shards, the leases of permits and the configuration's revision. All of it
// may be lost: wiping Raft on every node and starting again costs nothing but the seconds that takes. The truth is in the
// database, whose fences also decide between two nodes that both believe to lead, which is normal for a moment.
//
// # A node's way in
//
// The command line is the same for a first start, a restart and growth. A node whose Raft has a configuration goes on with
// it. One without asks the nodes it was told of (Config.Join): if any belongs to a cluster, it asks the leader to let it
// join. Only if none does, and Config.BootstrapExpect of them (itself included) were found that all see the same nodes and
// expect the same number, the one with the lowest id begins the cluster with that many voters; the others are found by it.
//
// Raft's own configuration names nodes by their ids. Where a node is, is in the registry, and the node itself puts it there:
// whenever what the registry says of it is not what it is (a new address, another version, draining), it tells the leader.
// A node that finds no leader asks those it knows where they are now, so even a cluster whose nodes all moved comes together.
//
// Who joins follows without a vote until it has proven stable and the number of voters stays odd. Stopping is not leaving.
// A node that was silent for very long (Timing.ReapAfter) is taken out; when it comes back, it joins again.
//
// # Leadership
//
// Config.Leading is called when this node leads and has seen everything before (Barrier); its context ends when leadership
// is lost or the disk fails. Two gains in a row without a loss between them are a loss and a gain. A node that cannot
// establish gives leadership away.
package cluster
