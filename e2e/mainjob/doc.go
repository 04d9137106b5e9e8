// Package mainjob proves the main job from outside, with the binaries, the command line, TLS handshakes and openssl.
//
// What each test proves, in numbered steps:
//
// TestMainJob, one control plane (SQLite), the agents east and west:
//  1. nginx: an order is issued through the agent, served by a real nginx under the CA's root, renewed on request; the
//     former key is there until the new certificate is served and gone afterwards; the trail tells each step.
//  2. files: one leaf in the three layouts, a version directory behind a symbolic link, one PEM, fixed separate paths;
//     a renewal reaches all three.
//  3. two agents: two keys, two leaves, neither key on the other host.
//  4. names of every form reach the certificate; the repeated order with its request id is the same certificate.
//  5. S/MIME: a message signed with the deployed key verifies under the CA for that purpose.
//  6. CAs with other keys than the default: openssl verifies what they issue.
//  7. a sub-CA from files: openssl verifies the chain up to the foreign root.
//  8. a short-lived certificate renews by itself; keys of every algorithm are made where the profile says so.
//  9. revocation: the CRL over HTTP is the CA's and lists the serial; openssl refuses the certificate by it.
//  10. lists, filters and cursors count what there is.
//
// TestAgentAway: an order for a host that is off waits and is served when it comes; a renewal waits likewise while
// the old certificate stays served: issued and served are two facts.
//
// TestRestart: server and agent are stopped, and killed, in the middle of orders; everything is served afterwards.
//
// TestIdentity: a connected agent renews its identity by itself; one that was off until its identity expired comes
// back without a new token.
//
// TestRetire: the stream ends at once, the agent stops and says why, and stays out.
//
// TestLesson18ServeAsShipped: production mode on PostgreSQL: migrate, config, API key, login, health, readiness, metrics.
//
// TestSignals: both daemons end cleanly on SIGINT.
//
// TestDemo: the demonstration tells its story, stays up when asked, says what failed, and leaves nothing behind.
package mainjob
