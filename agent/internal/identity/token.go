package identity

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"regexp"
	"strings"

	"github.com/certmesh/certmesh/protocol/fault"
)

// Token is a parsed join token, cmjt1.<id>.<secret base64url>.<SHA-256 of the mesh root, hex>.
type Token struct {
	// ID names the token; it is no secret.
	ID string
	// CA is the SHA-256 of the mesh root's DER, which the server's chain must lead to.
	CA [sha256.Size]byte

	raw string
}

// Raw returns the token as it goes into the Enroll message. It is a secret.
func (t Token) Raw() string { return t.raw }

// String hides the secret, so that no log can print it.
func (t Token) String() string { return "join token " + t.ID }

var tokenID = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// ParseToken reads a join token. Its errors never repeat the token.
func ParseToken(s string) (Token, error) {
	const next = "copy the whole line that `certmesh agents token create` printed"
	parts := strings.Split(strings.TrimSpace(s), ".")
	if len(parts) != 4 || parts[0] != "cmjt1" {
		return Token{}, fault.InvalidField("join_token", "is not a join token; %s", next)
	}
	if !tokenID.MatchString(parts[1]) {
		return Token{}, fault.InvalidField("join_token", "has a damaged id; %s", next)
	}
	if secret, err := base64.RawURLEncoding.DecodeString(parts[2]); err != nil || len(secret) < 16 || len(secret) > 64 {
		return Token{}, fault.InvalidField("join_token", "has a damaged secret; %s", next)
	}
	t := Token{ID: parts[1], raw: strings.Join(parts, ".")}
	if n, err := hex.Decode(t.CA[:], []byte(fit(parts[3]))); err != nil || n != len(t.CA) {
		return Token{}, fault.InvalidField("join_token", "has a damaged CA fingerprint; %s", next)
	}
	return t, nil
}

// fit keeps hex.Decode from writing past the array.
func fit(s string) string {
	if len(s) != 2*sha256.Size {
		return ""
	}
	return s
}
