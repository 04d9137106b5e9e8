// Package keystore keeps the private keys of managed certificates on the host that made them.
//
// A key is made beside the one in use and named by the generation it is to serve and by its own public key:
//
//	<dir>/<certificate id>/<generation, 12 digits>-<SHA-256 of the SPKI, hex>.pem   PKCS#8, 0600
//	<dir>/<certificate id>/<generation>-<spki>.crt                                  the leaf, once deployed
//
// The file exists before the CSR leaves the host, so that a crash in between finds the same key again. Keys leave this
// package as crypto.Signer or as PEM for a target that writes it; nothing here logs.
package keystore

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"regexp"
	"slices"

	"github.com/certmesh/certmesh/protocol/fault"
)

// SPKI is the SHA-256 of a public key's SubjectPublicKeyInfo in DER.
type SPKI [sha256.Size]byte

func (s SPKI) String() string { return hex.EncodeToString(s[:]) }

// SPKIOf returns the SPKI hash of a certificate's key.
func SPKIOf(cert *x509.Certificate) SPKI { return sha256.Sum256(cert.RawSubjectPublicKeyInfo) }

// Algorithms lists the key algorithms that can be made, in the spelling of the wire.
func Algorithms() []string {
	return []string{"ECDSA-P256", "ECDSA-P384", "RSA-2048", "RSA-3072", "RSA-4096", "Ed25519"}
}

// maxGeneration is what twelve digits hold; a larger number would break the order of names.
const maxGeneration = 999_999_999_999

var certificateID = regexp.MustCompile(`^cert_[0-9a-f]{32}$`)

// CheckName returns an Invalid fault unless id and generation can name a key. It guards every path made from them.
func CheckName(id string, generation int64) error {
	if !certificateID.MatchString(id) {
		return fault.InvalidField("certificate_id", "is not a certificate id (cert_ and 32 hex digits)")
	}
	if generation < 0 || generation > maxGeneration {
		return fault.InvalidField("generation", "%d is outside 0 to %d", generation, int64(maxGeneration))
	}
	return nil
}

// Info describes a key without its secret.
type Info struct {
	CertificateID string
	Generation    int64
	SPKI          SPKI
	Algorithm     string
	// Leaf is the deployed certificate in DER; empty: none yet.
	Leaf []byte
}

// Key is one private key.
type Key struct {
	CertificateID string
	Generation    int64
	SPKI          SPKI
	Signer        crypto.Signer
}

// PEM returns the key as PKCS#8 PEM, for targets that write keys.
func (k Key) PEM() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k.Signer)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the key cannot be encoded")
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// Store keeps keys. Every method is safe for concurrent use and idempotent.
type Store interface {
	// Ensure returns the key of (certificate, generation) with the algorithm, making it durably if there is none.
	// Asked again, also after a crash, it returns the same key.
	Ensure(certificateID string, generation int64, algorithm string) (Key, error)
	// BySPKI finds a certificate's key by its public key; NotFound if this host holds none.
	BySPKI(certificateID string, spki SPKI) (Key, error)
	// Relabel gives a key another generation. A key that is not held is no error: it was retired.
	Relabel(certificateID string, spki SPKI, generation int64) error
	// Retire deletes the certificate's keys and leaves with a generation lower than below, and says how many keys.
	Retire(certificateID string, below int64) (int, error)
	// PutLeaf stores the deployed leaf beside its key.
	PutLeaf(certificateID string, spki SPKI, leaf []byte) error
	// List returns all keys held, ordered by certificate and generation.
	List() ([]Info, error)
}

// Make returns a new key of the named algorithm; Unsupported if the name is unknown.
func Make(algorithm string) (crypto.Signer, error) {
	var s crypto.Signer
	var err error
	switch algorithm {
	case "ECDSA-P256":
		s, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ECDSA-P384":
		s, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "RSA-2048":
		s, err = rsa.GenerateKey(rand.Reader, 2048)
	case "RSA-3072":
		s, err = rsa.GenerateKey(rand.Reader, 3072)
	case "RSA-4096":
		s, err = rsa.GenerateKey(rand.Reader, 4096)
	case "Ed25519":
		_, s, err = ed25519.GenerateKey(rand.Reader)
	default:
		return nil, fault.New(fault.Unsupported, "this agent cannot make a key of algorithm %q; it knows %v", algorithm, Algorithms())
	}
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the key could not be made")
	}
	return s, nil
}

// algorithmOf names a key's algorithm as Make does; empty if Make makes no such key.
func algorithmOf(s crypto.Signer) string {
	switch k := s.(type) {
	case *ecdsa.PrivateKey:
		switch k.Curve {
		case elliptic.P256():
			return "ECDSA-P256"
		case elliptic.P384():
			return "ECDSA-P384"
		}
	case *rsa.PrivateKey:
		switch k.N.BitLen() {
		case 2048:
			return "RSA-2048"
		case 3072:
			return "RSA-3072"
		case 4096:
			return "RSA-4096"
		}
	case ed25519.PrivateKey:
		return "Ed25519"
	}
	return ""
}

func spkiOf(s crypto.Signer) (SPKI, error) {
	der, err := x509.MarshalPKIXPublicKey(s.Public())
	if err != nil {
		return SPKI{}, fault.Wrap(fault.Internal, err, "the public key cannot be encoded")
	}
	return sha256.Sum256(der), nil
}

func decodeKey(data []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fault.New(fault.Internal, "a key file holds no PKCS#8 PEM")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "a key file cannot be decoded")
	}
	s, ok := k.(crypto.Signer)
	if !ok {
		return nil, fault.New(fault.Internal, "a key file holds a key that cannot sign")
	}
	return s, nil
}

func sortInfos(in []Info) {
	slices.SortFunc(in, func(a, b Info) int {
		return cmp.Or(cmp.Compare(a.CertificateID, b.CertificateID), cmp.Compare(a.Generation, b.Generation),
			slices.Compare(a.SPKI[:], b.SPKI[:]))
	})
}

func notHeld(certificateID string) error {
	return fault.New(fault.NotFound, "this agent holds no key of %s that fits the certificate; it must be issued again", certificateID)
}
