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
// CERTMESH_CHAOS_ROUNDS is the number of rounds (10), CERTMESH_CHAOS_SEED the seed that a failure prints.
package chaos
