// Package ca is our own certification authorities: it checks requests, builds certificates, lints them, signs them, and
// signs CRLs (RFC 5280).
//
// Issuance is two steps, so that a certificate that was not linted, or not recorded, cannot be signed by mistake:
//
//	Prepare(request)  builds the to-be-signed bytes once, without touching the CA key, and lints them
//	Sign(tbs)         signs exactly those bytes; bytes that this process has not linted are linted first
//
// Between the two the caller records an intent with the bytes, so that a retry after a crash signs the same certificate
// again and never a second one. Sign verifies its own signature once before anything leaves the package.
//
// Keys are crypto.Signers named by URIs ("sealed:<key id>"). What a key or signature algorithm needs stands in two
// tables in key.go; a new algorithm is a new row.
package ca
