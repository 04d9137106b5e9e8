// Package work does what the control plane assigns: it makes keys and CSRs, installs certificates at targets, verifies
// them, and keeps every assignment in the journal from acceptance to settlement.
//
// The order of things is the model's (a pure state machine); the Engine carries its effects out. An assignment is on
// disk before it is accepted, a receipt before anything is committed, a result before it is sent. A target is worked on
// by one assignment at a time; targets that share a reload domain are installed together and activated once.
//
// It does not know streams: messages go to whatever Sink is attached, and nowhere when none is.
package work
