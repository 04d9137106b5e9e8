package domain

import "time"

// RolloverPhase is how far the change from one mesh CA to the next has come.
type RolloverPhase string

// The phases. One that has ended may be followed by another rollover.
const (
	RolloverNone      RolloverPhase = ""          // there never was one
	RolloverStarted   RolloverPhase = "Started"   // both roots are trusted, the former CA signs
	RolloverActivated RolloverPhase = "Activated" // both roots are trusted, the next CA signs
	RolloverFinished  RolloverPhase = "Finished"  // only the next root is trusted, the former keys are destroyed
	RolloverAborted   RolloverPhase = "Aborted"   // only the former root is trusted, the next one's keys are destroyed
)

// UnderWay says that two roots are trusted.
func (p RolloverPhase) UnderWay() bool { return p == RolloverStarted || p == RolloverActivated }

// Rollover is the latest change of the mesh CA.
type Rollover struct {
	Phase RolloverPhase
	// Revision rises with each step.
	Revision int64
	// Other is the CA that does not sign: the next one in phase Started, the former one in Activated. Empty when it has ended.
	Other CA
	// Bundle is the first version of the trust bundle that holds both roots.
	Bundle                          int64
	StartedAt, ActivatedAt, EndedAt time.Time
}

// Mesh is what nodes have to know of the mesh CA, all of one moment.
type Mesh struct {
	CA CA
	// Bundle is the version of the roots (DER); the first of them is of the CA that signs.
	Bundle int64
	Roots  [][]byte
	// Revision is Rollover.Revision, 0 when there never was one.
	Revision int64
}

// TrustAck says that an agent has a version of the trust bundle in force.
type TrustAck struct {
	AgentID string
	Version int64
	At      time.Time
}

// RolloverLag is an agent for which a rollover waits. Agents that could not come back by themselves anyway are none: the
// retired ones, and those without an identity that is unrevoked and ended less than IdentityGrace ago.
type RolloverLag struct {
	AgentID, Name string
	State         AgentState
	LastSeen      time.Time
	// Acknowledged: it has both roots in force. Refusal is why not, if it said so.
	Acknowledged bool
	Refusal      string
	// Moved: it has connected with an identity of the CA that signs.
	Moved bool
}

// RolloverProgress is how far a rollover has come, at most as many Lags and Tokens as were asked for.
type RolloverProgress struct {
	Rollover Rollover
	Mesh     Mesh
	// Agents are all that count, Lagging those of them that the next step waits for.
	Agents, Lagging int
	Lags            []RolloverLag
	// FormerIdentities are valid ones of earlier CAs, of agents that are not retired.
	FormerIdentities int
	// Tokens can still be used and name the former root, so that they are of no use after the last step.
	Tokens      []JoinToken
	TokensTotal int
}

// IdentityGrace is how long after its end an identity may still be renewed (Reidentify).
const IdentityGrace = 30 * 24 * time.Hour
