// Package work does what the control plane assigns: it makes keys and CSRs, installs certificates at targets, verifies
// them, and keeps every assignment in the journal from acceptance to settlement.
//
// The order of things is the model's (a pure state machine); the Engine carries its effects out. An assignment is on
// disk before it is accepted, a receipt before anything is committed, a result before it is sent. A target is worked on
// by one assignment at a time; targets that share a reload domain are installed together and activated once.
//
// What must be on disk before what follows from it:
//
//	key                → the CSR of it is stored
//	assignment         → Accepted is sent, and the work begins
//	CSR, result        → it is sent; Hello tells less until then
//	staged files       → the receipt is stored
//	receipt            → anything is renamed into its place
//	installed files    → the service is told to load them, and the read-back
//	record of Watch    → the result is stored
//
// Nothing waits for the leaf beside its key, a retired key's removal and an entry's removal: what a power cut undoes of them is
// harmless, and done again. Stores and removals of entries are begun in the order of the model's steps and come onto the disk in
// that order, so that no step waits for the disk: what many assignments store meanwhile shares an fsync (durable.Log).
//
// It does not know streams: messages go to whatever Sink is attached, and nowhere when none is.
package work
