// Package store keeps the truth of a cluster in SQL: CockroachDB, PostgreSQL or an embedded SQLite file, with one text
// per statement for all three.
//
// A method is a use case and one transaction, SERIALIZABLE unless its comment says why less is enough. It takes plain
// values and returns plain values: there is no transaction handle outside this package. Inside a transaction there is SQL
// and pure code of package domain, nothing else: no network, no clock, no random choice. Times are arguments, kept as
// microseconds in UTC.
//
// Methods that take a slice share commits: what queued while the former commit ran goes into the next transaction
// (batch.go). They answer one outcome per item; a stale item never spoils the others.
//
// A commit whose outcome is unknown (the connection broke in COMMIT) is never repeated blindly: the method runs once more
// and recognises by the natural key of what it wrote whether the first one held (tx.again).
//
// The store sends no notifications. After a method has returned its commit is done; waking a node is the caller's next
// line, and a sweep finds what a caller that died left behind.
package store
