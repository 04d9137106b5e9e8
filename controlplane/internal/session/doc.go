// Package session is the server's side of the agent stream: who an agent is, the conversation with it, and the I/O around
// the two pure decisions, Step here (the protocol: Hello, states, identities, endings) and dispatch.Step (work).
//
// A stream costs two goroutines: gRPC's handler, which waits for the end, and a reader. A sender runs only while something
// is to be sent, so that there is never more than one; and because the handler never sends, an agent that reads nothing
// can be cut off: returning from the handler is what ends a blocked Send. An admission runs beside the reader, so that
// the stacks of both stay small. What takes time (store, issuer) runs in pools of bounded size and comes back as events.
// One ticker serves all streams.
//
// A Hello registers its stream before the session is committed, and loads the work after it: so whoever creates a job,
// commits and then wakes, either finds the stream or its job is loaded.
package session
