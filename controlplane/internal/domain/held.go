package domain

// HeldStream is an open stream that a node asks about: whose it is and which identity it was opened with.
type HeldStream struct{ AgentID, IdentitySerial string }

// Standing says whether a stream may stay open. It is zero where the agent is not known.
type Standing struct {
	// Session is the agent's as recorded: a stream of a lower epoch has been superseded.
	Session Session
	State   AgentState
	// Reason of a retirement or quarantine.
	Reason string
	// Revoked: the identity that was asked about is.
	Revoked bool
}
