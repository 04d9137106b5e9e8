// Package history keeps what clients of a cluster saw while parts of it were killed, stopped and cut off, and judges it.
//
// A Recorder writes down every operation twice: when it is invoked and when its outcome is known (ok, fail) or given up
// as unknown (info). Check compares the operations, and what the database, the nodes and the agents' files hold once all
// is at rest, with the rules in Rules. It is a pure function: a history that was kept from a failed run is judged again
// with the same result.
package history
