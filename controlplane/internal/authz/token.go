package authz

import (
	"encoding/hex"
	"strings"

	"github.com/certmesh/certmesh/protocol/fault"
)

const tokenPrefix = "cmjt1"

// JoinTokenString is what an operator hands to a host: cmjt1.<id>.<secret>.<SHA-256 of the mesh root in hex>. The
// fingerprint lets a host that knows nothing else recognise the server.
func JoinTokenString(tokenID, secret, rootFingerprint string) string {
	return strings.Join([]string{tokenPrefix, tokenID, secret, rootFingerprint}, ".")
}

// ParseJoinToken takes a join token apart; what is stored of it is HashSecret(secret). Errors: Unauthorized, with the
// same sentence whatever is wrong.
func ParseJoinToken(token string) (tokenID, secret, rootFingerprint string, err error) {
	bad := fault.New(fault.Unauthorized, "the join token is malformed; copy it whole from certmesh agents token create")
	parts := strings.Split(token, ".")
	if len(parts) != 4 || parts[0] != tokenPrefix || len(parts[1]) == 0 || len(parts[1]) > 64 || len(parts[2]) != secretText {
		return "", "", "", bad
	}
	if b, err := hex.DecodeString(parts[3]); err != nil || len(b) != 32 {
		return "", "", "", bad
	}
	return parts[1], parts[2], parts[3], nil
}
