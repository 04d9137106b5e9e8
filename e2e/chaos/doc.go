// Package chaos kills the built control plane and agents at random moments, while orders and renewals run, and counts
// from outside what became of them.
//
// TestChaos, on SQLite and on PostgreSQL, for half of the rounds each:
//  1. A control plane, two agents, a site at each, a certificate placed on both.
//  2. Each round orders a certificate or renews one, and after a random time kills the server, an agent, or all of
//     them with SIGKILL; what was killed is started again at once. Calls that got no answer are made again.
//  3. Every few rounds, and at the end, all comes to rest, and then: every order that was acknowledged is there; one
//     leaf per (certificate, agent, generation); no serial twice; what is served, by handshake and on disk, is what is
//     wanted; one key per (certificate, agent) is left; no job is open.
//
// TestCluster, on three nodes, three agents and one PostgreSQL that waits for the disk, in Jepsen's manner:
//  1. Clients order, renew, revoke and read certificates and fetch CRLs at random nodes; a client whose node fails goes on
//     with another. What they ask and hear is recorded (package history).
//  2. Meanwhile the nemesis kills, stops (SIGSTOP, longer than an election takes), cuts off and restarts nodes, agents and
//     the database by a plan made from the seed. Connections run through listeners of the test's, which hold back what is
//     sent between two parties that are cut off from one another: node from nodes, node from database, agent from node.
//  3. When it has gone all must come to rest by itself, and history.Check compares the history with the database, what the
//     nodes answer, the CRL and the files at the targets. A failed run keeps history, state and logs, and says where.
//
// CERTMESH_CHAOS_MINUTES is how long it rages (25 seconds). CERTMESH_CHAOS_ROUNDS is the number of TestChaos's rounds (10), CERTMESH_CHAOS_SEED the seed that a failure prints.
package chaos
