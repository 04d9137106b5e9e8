// Package badinput proves from outside that wrong and hostile input gets a precise refusal, leaves a row in the trail
// where it matters, and loses nothing.
//
// TestBadInput runs on one control plane with the agent host, in numbered steps:
//  1. join tokens: malformed, unknown, used up, expired, of another mesh: exit status and one line each; nobody joins.
//  2. identities: a client certificate of another CA ends at the handshake, a stream without one is refused.
//  3. garbage on every port: the listeners, the agent and the tool go on as if nothing had happened.
//  4. the tool: unknown names, bad names in orders, unreachable servers, wrong keys: status 1 or 2 and one line.
//  5. paths: outside the roots, with "..", through a symbolic link: refused, nothing is written.
//  6. commands: shell metacharacters, shells, what the host does not allow: refused, nothing is run.
//  7. disks: full, read-only, at a target and below the agent itself: the reason is shown; with room again all is served.
//  8. nginx that refuses one certificate: that one alone is undone, its neighbour is served.
//  9. a wrong verify address: issued and not served, rolled back, with the reason.
//
// TestRogueAgent speaks the protocol itself, as an agent that was taken over would:
//  10. CSRs that are malformed, weakly keyed or wrongly signed do not enrol.
//  11. streams that begin wrongly, lie about who they are, speak unknown versions or send too much are ended.
//  12. another agent's assignment is not touched by results, CSRs or acceptances sent for it.
//  13. names that were not ordered are not signed, nor weak keys.
//  14. results and CSRs that are sent again change nothing.
package badinput
