package domain

// State and fences: who may write what, and how a stale writer is stopped.
//
//	row            key                                     written by                              guarded by
//	agent_session  agent                                   Hello: epoch+1, holder=node, commit;    compare-and-set on epoch; an older stream is
//	                                                       then load open jobs                     closed (Goodbye superseded)
//	duty_fence     duty or shard                           taking it: epoch+1, holder=node         later writes lock the row in the same
//	                                                                                               transaction and compare (UPDATE … WHERE epoch)
//	job            id; one open per (certificate, agent)   creator, then the holder of the         results: WHERE id AND attempt AND state;
//	               for issuance and renewal, per           agent's session                         raising attempt (dispatch) locks the session
//	               (certificate, target) for deployment                                            row and compares its epoch
//	intent         (certificate, agent, generation)        issue, before signing                   unique key; a retry signs that TBS again
//	version        (issuer, serial);                       issue, after signing                    insert consumes the intent; the certificate
//	               (certificate, agent, generation)                                                leaves the process only after this commit
//	leaf           (certificate, agent)                    issue and the renewal duty              changed with the job or version it follows
//	placement      (certificate, target)                   deploy results; observations            attempt of its job; the generation that was
//	                                                                                               deployed, and no deployment open
//	audit          id                                      everyone, insert only                   –
//
// attempt is the fencing token and rises at every dispatch; tries is what is counted against the maximum and rises when
// the agent has accepted, so a host that is off uses none up. An epoch only says who may dispatch; a result is judged by
// (job, attempt, state) alone, so that a resumed assignment survives a reconnect.

// Epoch is minted by the database: it rises each time a session or a duty changes hands.
type Epoch int64

// Session is the row agent_session.
type Session struct {
	AgentID string
	Epoch   Epoch
	// Holder is the node that holds the stream, empty when none does.
	Holder string
	BootID string
}

// Fence is a held duty: the right to write while the row duty_fence still carries Epoch.
type Fence struct {
	Duty   string
	Holder string
	Epoch  Epoch
}
