// Package domain holds certmesh's types, state tables and rules. It does no I/O and knows no clock, context or SQL:
// time is always an argument. Who may write which row, and how a stale writer is stopped, is written down in fence.go.
package domain
