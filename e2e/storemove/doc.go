// Package storemove proves, from outside with the binaries, what is done to a store as a whole.
//
// TestMove, from SQLite to PostgreSQL:
//  1. a backup and a copy beside a running node: the one is made, the other is refused.
//  2. the node stops; the copy is killed at random moments and run again, nodes refuse what is there, and it comes to its end.
//  3. `serve` on PostgreSQL goes on with the same CA, key, API key and data directory; the agent, which was never restarted,
//     connects again; what was issued is known; a renewal is served, and no serial was issued twice.
//
// TestRestore, from an older backup:
//  1. after the backup certificates are renewed, ordered and revoked; then the node is killed and the backup put in place.
//  2. `recover --after-restore`, refused while a node runs, tells what to look through.
//  3. agents report what they hold: every leaf that is served is known again, as a version or as a found leaf.
//  4. renewals go on above all generations of the lost time, no serial is issued in both histories, CRLs have higher numbers.
//  5. revocations of the lost time come back with a CRL that was published then; the others are lost, as the operator was
//     told, and can be made again, found leaves included.
package storemove
