// Package renewals measures how long it takes from an operator's `renew` until the new certificate is deployed, verified
// by a handshake and recorded as served, with the binaries that are shipped: one after another at a file target and at a
// real nginx, and a thousand at once at each. It also measures what agent and server weigh while they have nothing to do.
//
//	go test -run '^$' -bench . -benchtime 1x ./e2e/bench/renewals
//
// Beside each figure stands what the machine itself needs in the same run: an fsync, a handshake, `nginx -t` and a reload.
// RENEWALS_BIN is a folder with binaries that are built already, RENEWALS_PROFILES one for CPU profiles of the server,
// RENEWALS_LATENCY, RENEWALS_NGINX and RENEWALS_BURST other numbers than 200, 60 and 1000. Files lie below TMPDIR; on
// a file system in memory fsync costs nothing. The test of this package does the same with a handful of renewals;
// nothing is timed there.
package renewals
