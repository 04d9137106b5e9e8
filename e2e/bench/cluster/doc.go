// Package cluster measures what several nodes on one PostgreSQL do, with the binaries that are shipped: how soon another
// node leads and has taken the duties after the leader's SIGKILL, how soon the streams of a dead node are with others, how
// much of one node's issuance rate three nodes on the same processors keep, what a wake-up through another node costs, and
// what each agent, beat, renewal and watch costs nodes and database.
//
//	go test -run '^$' -bench . -benchtime 1x ./e2e/bench/cluster
//
// CLUSTER_KILLS is how often the leader is killed (10), CLUSTER_STREAMS how many streams the dead node holds (3,000),
// CLUSTER_AGENTS how many agents carry the load (600), CLUSTER_BIN a folder with binaries that are built already,
// CLUSTER_PROFILES one for CPU profiles of the nodes. The test of this package does the same with a few, so that the measurement itself keeps working; nothing is timed there.
package cluster
