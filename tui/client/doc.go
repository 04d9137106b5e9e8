// Package client connects to a control plane as an operator does: the profile with address, API key and CA, the TLS
// that trusts that CA alone, calls with a deadline each, retries of reads while the server is away, and errors that are
// one line with the next step in it. It knows the public protocol and nothing of the server's insides.
package client
