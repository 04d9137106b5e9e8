// Package streams measures what many agents cost one control-plane node, with the binaries that are shipped and with
// agentswarm: memory for each idle stream beside that of a bare grpc-go server in the same run, CPU and database writes
// while nothing happens, how soon all agents are back after a restart, how soon all have acknowledged a command, and what
// agents that misbehave do to the others.
//
//	go test -run '^$' -bench Streams ./e2e/bench/streams
//
// STREAMS_AGENTS is the number of agents (10,000), STREAMS_PROFILES a folder for heap and CPU profiles of the server,
// STREAMS_BIN one with binaries that are built already. The test of this package does the same with twenty agents, so
// that the measurement itself keeps working; nothing is timed there.
package streams
