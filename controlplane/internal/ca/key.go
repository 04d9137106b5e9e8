package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/controlplane/internal/secret"
	"github.com/certmesh/certmesh/protocol/fault"
)

// keyType is what the package knows of one key algorithm.
type keyType struct {
	algorithm domain.KeyAlgorithm
	generate  func() (crypto.Signer, error)
	// keyEncipherment: the key can transport keys; RSA only (RFC 8813 section 3 for EC, RFC 8410 section 5 for Ed25519).
	keyEncipherment bool
	scheme          scheme
}

// scheme is how a CA key of one type signs.
type scheme struct {
	x509 x509.SignatureAlgorithm
	oid  asn1.ObjectIdentifier
	// null: the AlgorithmIdentifier carries NULL parameters (RFC 4055 section 5), otherwise none.
	null bool
	hash crypto.Hash // 0: the scheme signs the message itself
	// placeholder is a well-formed signature value of this scheme, for linting what is not signed yet.
	placeholder func(crypto.PublicKey) []byte
}

var (
	sha256ECDSA = scheme{x509.ECDSAWithSHA256, asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}, false, crypto.SHA256, ecdsaPlaceholder}
	sha384ECDSA = scheme{x509.ECDSAWithSHA384, asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 3}, false, crypto.SHA384, ecdsaPlaceholder}
	sha256RSA   = scheme{x509.SHA256WithRSA, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, true, crypto.SHA256, rsaPlaceholder}
	pureEd25519 = scheme{x509.PureEd25519, asn1.ObjectIdentifier{1, 3, 101, 112}, false, 0, ed25519Placeholder}
)

// keyTypes has a row for every algorithm of domain.KeyAlgorithms.
var keyTypes = []keyType{
	{domain.ECDSAP256, ecdsaKey(elliptic.P256()), false, sha256ECDSA},
	{domain.ECDSAP384, ecdsaKey(elliptic.P384()), false, sha384ECDSA},
	{domain.RSA2048, rsaKey(2048), true, sha256RSA},
	{domain.RSA3072, rsaKey(3072), true, sha256RSA},
	{domain.RSA4096, rsaKey(4096), true, sha256RSA},
	{domain.Ed25519, ed25519Key, false, pureEd25519},
}

func keyTypeOf(a domain.KeyAlgorithm) (keyType, error) {
	for _, t := range keyTypes {
		if t.algorithm == a {
			return t, nil
		}
	}
	return keyType{}, fault.InvalidField("key_algorithm", "%q is not a key algorithm; use one of %s", a, listed(domain.KeyAlgorithms))
}

func ecdsaKey(c elliptic.Curve) func() (crypto.Signer, error) {
	return func() (crypto.Signer, error) { return ecdsa.GenerateKey(c, rand.Reader) }
}

func rsaKey(bits int) func() (crypto.Signer, error) {
	return func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, bits) }
}

func ed25519Key() (crypto.Signer, error) {
	_, k, err := ed25519.GenerateKey(rand.Reader)
	return k, err
}

func ecdsaPlaceholder(pub crypto.PublicKey) []byte {
	size := 32
	if k, ok := pub.(*ecdsa.PublicKey); ok {
		size = (k.Curve.Params().BitSize + 7) / 8
	}
	one := append([]byte{0x7f}, make([]byte, size-1)...)
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		for range 2 {
			b.AddASN1(cbasn1.INTEGER, func(b *cryptobyte.Builder) { b.AddBytes(one) })
		}
	})
	return b.BytesOrPanic()
}

func rsaPlaceholder(pub crypto.PublicKey) []byte {
	size := 256
	if k, ok := pub.(*rsa.PublicKey); ok {
		size = k.Size()
	}
	return append([]byte{0x7f}, make([]byte, size-1)...)
}

func ed25519Placeholder(crypto.PublicKey) []byte {
	return append([]byte{0x7f}, make([]byte, ed25519.SignatureSize-1)...)
}

// identifier is the DER of the scheme's AlgorithmIdentifier.
func (s scheme) identifier() ([]byte, error) {
	ai := pkix.AlgorithmIdentifier{Algorithm: s.oid}
	if s.null {
		ai.Parameters = asn1.NullRawValue
	}
	return asn1.Marshal(ai)
}

// publicKey is a public key that has passed every check on keys.
type publicKey struct {
	key  crypto.PublicKey
	kind keyType
	spki []byte // SubjectPublicKeyInfo, DER
	// skid is the leftmost 160 bits of the SHA-256 of the subjectPublicKey bits (RFC 7093 section 2, method 1).
	skid []byte
}

// minExponent is F4: what every CA and FIPS 186-5 section 5.4 demand at least.
const minExponent = 65537

// inspectKey refuses keys that are weak or of no known type. It costs no public-key operation, so it goes before any
// signature is verified with the key.
func inspectKey(pub crypto.PublicKey) (publicKey, error) {
	kind, err := kindOf(pub)
	if err != nil {
		return publicKey{}, err
	}
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return publicKey{}, fault.Wrap(fault.Invalid, err, "the public key cannot be encoded")
	}
	input := cryptobyte.String(spki)
	var inner cryptobyte.String
	var bits asn1.BitString
	if !input.ReadASN1(&inner, cbasn1.SEQUENCE) || !inner.SkipASN1(cbasn1.SEQUENCE) || !inner.ReadASN1BitString(&bits) {
		return publicKey{}, fault.New(fault.Internal, "a SubjectPublicKeyInfo of ours does not parse")
	}
	sum := sha256.Sum256(bits.RightAlign())
	return publicKey{key: pub, kind: kind, spki: spki, skid: sum[:20]}, nil
}

func kindOf(pub crypto.PublicKey) (keyType, error) {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return keyTypeOf(domain.ECDSAP256)
		case elliptic.P384():
			return keyTypeOf(domain.ECDSAP384)
		}
		name := "unknown"
		if k.Curve != nil {
			name = k.Curve.Params().Name
		}
		return keyType{}, fault.New(fault.Rejected, "keys on the curve %s are not accepted; use P-256 or P-384", name)
	case *rsa.PublicKey:
		bits := k.N.BitLen()
		switch {
		case bits < 2048:
			return keyType{}, fault.New(fault.Rejected, "the RSA key has %d bits, too few to be safe; use 2048, 3072 or 4096", bits)
		case k.N.Bit(0) == 0:
			return keyType{}, fault.New(fault.Rejected, "the RSA modulus is even: the key is broken; make a new one")
		case k.E < minExponent || k.E%2 == 0:
			return keyType{}, fault.New(fault.Rejected, "the RSA public exponent %d is not accepted; use %d", k.E, minExponent)
		}
		switch bits {
		case 2048:
			return keyTypeOf(domain.RSA2048)
		case 3072:
			return keyTypeOf(domain.RSA3072)
		case 4096:
			return keyTypeOf(domain.RSA4096)
		}
		return keyType{}, fault.New(fault.Rejected, "the RSA key has %d bits; use 2048, 3072 or 4096", bits)
	case ed25519.PublicKey:
		if len(k) == ed25519.PublicKeySize {
			return keyTypeOf(domain.Ed25519)
		}
	}
	return keyType{}, fault.New(fault.Rejected, "keys of this type are not accepted; use one of %s", listed(domain.KeyAlgorithms))
}

// allowed refuses an algorithm that is not on a profile's list.
func allowed(a domain.KeyAlgorithm, p domain.Profile) error {
	if slices.Contains(p.Allowed, a) || a == p.KeyAlgorithm {
		return nil
	}
	return fault.New(fault.Rejected, "profile %q does not allow %s keys; it allows %s", p.Name, a, listed(p.Allowed))
}

func listed[S ~string](all []S) string {
	s := make([]string, len(all))
	for i, v := range all {
		s[i] = string(v)
	}
	return strings.Join(s, ", ")
}

// sealedScheme is the URI scheme of keys that lie sealed in the database.
const sealedScheme = "sealed"

// keySource opens the private key behind the rest of a key URI.
type keySource func(rest string) (crypto.Signer, error)

// openKey finds the signer behind a key URI.
func openKey(uri string, sources map[string]keySource) (crypto.Signer, error) {
	kind, rest, ok := strings.Cut(uri, ":")
	source := sources[kind]
	if !ok || source == nil || rest == "" {
		return nil, fault.New(fault.Unsupported, "this node has no access to keys named %q; it knows %s:<key id>", uri, sealedScheme)
	}
	return source(rest)
}

// sealedKeys opens keys of one purpose from the database.
func sealedKeys(purpose string, keys func(id string) (domain.SealedKey, error), ring *secret.Keyring) keySource {
	return func(id string) (crypto.Signer, error) {
		sealed, err := keys(id)
		if err != nil {
			return nil, fmt.Errorf("read key %s: %w", id, err)
		}
		if sealed.ID != id || sealed.Purpose != purpose {
			return nil, fault.New(fault.Rejected, "sealed key %s is not the key for %s: restore the table of sealed keys from a backup", id, purpose)
		}
		der, err := ring.Open(sealed)
		if err != nil {
			return nil, err
		}
		defer clear(der)
		key, err := x509.ParsePKCS8PrivateKey(der)
		if err != nil {
			// The cause may quote the key's bytes.
			return nil, fault.New(fault.Internal, "sealed key %s is no PKCS#8 private key", id)
		}
		signer, ok := key.(crypto.Signer)
		if !ok {
			return nil, fault.New(fault.Unsupported, "sealed key %s cannot sign", id)
		}
		return signer, nil
	}
}

// sealKey seals a private key; the plaintext is gone when it returns.
func sealKey(key crypto.Signer, id, purpose string, ring *secret.Keyring, now time.Time) (domain.SealedKey, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return domain.SealedKey{}, fault.New(fault.Internal, "a private key of type %T cannot be encoded", key)
	}
	defer clear(der)
	return ring.Seal(id, purpose, der, now)
}

// Purposes of sealed keys.
func signingPurpose(caID string) string { return "ca/" + caID + "/sign" }
func rootPurpose(caID string) string    { return "ca/" + caID + "/root" }
