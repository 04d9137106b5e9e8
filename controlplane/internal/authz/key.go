// Package authz says who an operator is and what a role may do.
//
// An API key is cmk1.<id>.<secret>: the secret is 256 random bits in base64url without padding, and only the SHA-256 of
// its text is stored. Roles are fixed; one table (Methods) maps every gRPC method to the permission it needs, and a
// method without a row is refused, so that a new RPC is closed until somebody decides.
package authz

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"regexp"
	"strings"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/id"
	"github.com/certmesh/certmesh/protocol/fault"
)

const (
	keyPrefix = "cmk1"
	// secretBytes is the entropy of a secret; secretText its length in base64url.
	secretBytes = 32
	secretText  = 43
)

var keyName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$`)

// NewSecret returns 256 random bits in base64url without padding.
func NewSecret() string {
	b := make([]byte, secretBytes)
	// crypto/rand.Read never fails: it crashes the program instead.
	_, _ = rand.Read(b)
	return base64.RawURLEncoding.EncodeToString(b)
}

// HashSecret is what is stored of a secret: the SHA-256 of its text.
func HashSecret(secret string) []byte {
	h := sha256.Sum256([]byte(secret))
	return h[:]
}

// NewKey makes an API key. The first result is the key itself, to be shown once; the second what is stored. A zero
// expires means never. Errors: Invalid for a bad name or an unknown role.
func NewKey(name string, role Role, expires, now time.Time) (string, domain.APIKey, error) {
	if !keyName.MatchString(name) {
		return "", domain.APIKey{}, fault.InvalidField("name", "use 1 to 64 letters, digits, dot, dash, underscore or @, beginning with a letter or digit")
	}
	if !role.valid() {
		return "", domain.APIKey{}, fault.InvalidField("role", "%q is not a role; use admin, operator, approver or viewer", string(role))
	}
	secret := NewSecret()
	k := domain.APIKey{
		ID: id.New(id.APIKey), Name: name, Role: string(role), Hash: HashSecret(secret),
		ExpiresAt: domain.Micro(expires), CreatedAt: domain.Micro(now),
	}
	return keyPrefix + "." + k.ID + "." + secret, k, nil
}

// Principal is an authenticated operator.
type Principal struct {
	KeyID, Name string
	Role        Role
}

// Actor is the name in the audit trail.
func (p Principal) Actor() string { return "operator:" + p.Name }

// Anonymous is the actor of callers who have not shown who they are.
const Anonymous = "anonymous"

// Keys finds a stored API key by the hash of its secret. Errors: NotFound.
type Keys interface {
	APIKeyByHash(ctx context.Context, hash []byte) (domain.APIKey, error)
}

// Authenticate checks an API key. Every refusal is Unauthorized with one and the same sentence, so that a guesser
// learns nothing; only the holder of a right secret is told that it has expired or was revoked. Errors of the store
// pass through.
func Authenticate(ctx context.Context, keys Keys, key string, now time.Time) (Principal, error) {
	keyID, secret, ok := splitKey(key)
	if !ok {
		return Principal{}, unknownKey()
	}
	hash := HashSecret(secret)
	k, err := keys.APIKeyByHash(ctx, hash)
	if fault.Is(err, fault.NotFound) {
		return Principal{}, unknownKey()
	}
	if err != nil {
		return Principal{}, err
	}
	if subtle.ConstantTimeCompare(k.Hash, hash)&subtle.ConstantTimeCompare([]byte(k.ID), []byte(keyID)) != 1 {
		return Principal{}, unknownKey()
	}
	p := Principal{KeyID: k.ID, Name: k.Name, Role: Role(k.Role)}
	switch {
	case !k.RevokedAt.IsZero():
		return p, fault.New(fault.Unauthorized, "this API key was revoked; ask an administrator for another one")
	case !k.ExpiresAt.IsZero() && !now.Before(k.ExpiresAt):
		return p, fault.New(fault.Unauthorized, "this API key expired at %s; ask an administrator for another one", k.ExpiresAt.UTC().Format(time.RFC3339))
	}
	return p, nil
}

func unknownKey() error {
	return fault.New(fault.Unauthorized, "the API key is not known here; check CERTMESH_API_KEY and the server, or log in again with certmesh login")
}

func splitKey(key string) (keyID, secret string, ok bool) {
	parts := strings.Split(key, ".")
	if len(parts) != 3 || parts[0] != keyPrefix || len(parts[1]) == 0 || len(parts[1]) > 64 || len(parts[2]) != secretText {
		return "", "", false
	}
	return parts[1], parts[2], true
}
