// Package dispatch decides what happens to work.
//
// Work for an agent belongs to the node that holds the agent's stream. Step is that node's decision about one agent: a
// pure function from a state and an event to the next state and effects. It knows no clock, randomness, network or
// store: time comes in events, and whoever calls it carries the effects out and brings their answers back as events.
//
//	waiting ─Raise→ raising ─Raised→ given ─Accepted, CSR, result→ (Accept, Issue, Complete, Fail) ─→ Settle, gone
//	   ↑                                                                        │ Fail, tried again
//	   └────────────────────────────────────────────────────────────────────────┘
//
// What holds in every order of events, and is tested so:
//
//   - Assignments sent on a stream never exceed the credits granted on it; what the agent brought along in its Hello
//     is outside the count. A credit is taken before the attempt is raised and given back if that fails.
//   - An assignment is sent only after the store raised its attempt under the session's epoch.
//   - At most one report of a job is with the store or the issuer at any time; a repeated one is left out.
//   - Every open job of the agent is waiting, being raised, given, or is found by the next Load. What the store cannot
//     take now is kept and tried again.
//   - The store is the judge: a Conflict drops what was believed, and the truth is loaded anew.
//
// Work without an agent is run by Central, under the permits of its issuers.
package dispatch
