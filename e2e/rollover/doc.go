// Package rollover proves from outside, with the binaries, that the mesh CA can be changed while everything runs.
//
// TestRollover, one control plane and the agents near and far, which is off from before the start until after the
// activation: start, refusals, a forced activation, a killed control plane, the return of far with an expired identity,
// refusals, the end. In every phase a certificate is renewed and served; the agents' processes and ids stay the same.
//
// TestRolloverLeavesBehindWhoNeverHeard: an agent that was off for the whole of a forced rollover is refused afterwards,
// and joins again with a new token. An aborted rollover leaves no trace at an agent.
//
// TestRolloverOfACluster, three nodes on PostgreSQL and two agents: a node that was dead for two steps comes back, the
// leader dies before the last one; nodes and agents know one another in every phase.
package rollover
