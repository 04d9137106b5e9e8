// Package secret seals private keys for the database, so that every node can sign, any node may die, and the database
// alone gives nothing away.
//
// Envelope encryption: each secret has a fresh 256-bit data key (AES-256-GCM); the data key is wrapped by the
// key-encryption key (AES-256-GCM), which lives outside the database, in a file or in a person's head. Both layers bind
// the secret's id, its purpose and the id of the key-encryption key as additional data: a row that is swapped, renamed
// or given another purpose does not open.
package secret

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"time"

	"github.com/certmesh/certmesh/controlplane/internal/domain"
	"github.com/certmesh/certmesh/protocol/fault"
)

// KeySize is the length of a key-encryption key and of a data key in bytes.
const KeySize = 32

// maxPlaintext bounds what is sealed; an RSA-4096 key in PKCS#8 is under 2.5 KiB.
const maxPlaintext = 1 << 20

// sealVersion is the first byte of both sealed fields; another value means another format.
const sealVersion = 1

// Keyring holds the key-encryption keys of this node: the first seals, all open. It is safe for concurrent use.
type Keyring struct {
	keys []kek
}

type kek struct {
	id   string
	aead cipher.AEAD
}

// NewKeyring returns a keyring whose first key seals; older ones only open what was sealed before they were replaced.
// Every key has KeySize bytes.
func NewKeyring(key []byte, older ...[]byte) (*Keyring, error) {
	k := &Keyring{}
	for _, b := range append([][]byte{key}, older...) {
		if len(b) != KeySize {
			return nil, fault.New(fault.Invalid, "a key-encryption key has %d bytes, this one has %d", KeySize, len(b))
		}
		aead, err := newAEAD(b)
		if err != nil {
			return nil, err
		}
		k.keys = append(k.keys, kek{id: keyID(b), aead: aead})
	}
	return k, nil
}

// ID names the key that seals: 16 hex digits of a hash, which tell nothing about the key.
func (k *Keyring) ID() string { return k.keys[0].id }

// Seal encrypts plaintext under a fresh data key. id and purpose are bound to it: Open succeeds with exactly these.
func (k *Keyring) Seal(id, purpose string, plaintext []byte, now time.Time) (domain.SealedKey, error) {
	switch {
	case id == "" || purpose == "":
		return domain.SealedKey{}, fault.New(fault.Internal, "a sealed key needs an id and a purpose")
	case len(plaintext) == 0 || len(plaintext) > maxPlaintext:
		return domain.SealedKey{}, fault.New(fault.Internal, "a sealed key has 1 to %d bytes, this one has %d", maxPlaintext, len(plaintext))
	}
	dek := make([]byte, KeySize)
	defer clear(dek)
	if _, err := rand.Read(dek); err != nil {
		return domain.SealedKey{}, fault.Wrap(fault.Internal, err, "make a data key")
	}
	data, err := newAEAD(dek)
	if err != nil {
		return domain.SealedKey{}, err
	}
	with := k.keys[0]
	return domain.SealedKey{
		ID: id, Purpose: purpose, KEKID: with.id, CreatedAt: domain.Micro(now),
		WrappedDEK: seal(with.aead, dek, additional("data key", id, purpose, with.id)),
		Ciphertext: seal(data, plaintext, additional("secret", id, purpose, with.id)),
	}, nil
}

// Open decrypts s. The caller clears the result once it is done with it.
func (k *Keyring) Open(s domain.SealedKey) ([]byte, error) {
	var with *kek
	for i := range k.keys {
		if k.keys[i].id == s.KEKID {
			with = &k.keys[i]
		}
	}
	if with == nil {
		return nil, fault.New(fault.Unauthorized, "key %s is sealed under key-encryption key %s, this node has %s: "+
			"point secrets.kek_file at the file that holds %s", s.ID, s.KEKID, k.ID(), s.KEKID)
	}
	dek, err := open(with.aead, s.WrappedDEK, additional("data key", s.ID, s.Purpose, s.KEKID))
	if err != nil {
		return nil, damaged(s.ID, err)
	}
	defer clear(dek)
	data, err := newAEAD(dek)
	if err != nil {
		return nil, damaged(s.ID, err)
	}
	plaintext, err := open(data, s.Ciphertext, additional("secret", s.ID, s.Purpose, s.KEKID))
	if err != nil {
		return nil, damaged(s.ID, err)
	}
	return plaintext, nil
}

func damaged(id string, err error) error {
	return fault.Wrap(fault.Rejected, err, "the row of sealed key %s was changed after it was written: restore it from a backup", id)
}

// keyID is a short fingerprint: the label keeps it apart from any other use of the hash.
func keyID(key []byte) string {
	h := sha256.New()
	h.Write([]byte("certmesh key-encryption key id\x00"))
	h.Write(key)
	return hex.EncodeToString(h.Sum(nil)[:8])
}

func newAEAD(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "set up AES-256")
	}
	// The nonce is random and leads the ciphertext. A data key encrypts once; a key-encryption key wraps far fewer than
	// the 2^32 keys that NIST SP 800-38D section 8.3 allows.
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "set up GCM")
	}
	return aead, nil
}

func seal(aead cipher.AEAD, plaintext, ad []byte) []byte {
	return aead.Seal([]byte{sealVersion}, nil, plaintext, ad) //nolint:gosec // the nonce is random, made by the AEAD itself
}

func open(aead cipher.AEAD, sealed, ad []byte) ([]byte, error) {
	if len(sealed) == 0 || sealed[0] != sealVersion {
		return nil, fault.New(fault.Unsupported, "unknown sealing format")
	}
	return aead.Open(nil, nil, sealed[1:], ad)
}

// additional is the additional authenticated data: every part with its length before it, so that no two lists of parts
// are written alike.
func additional(parts ...string) []byte {
	ad := []byte("certmesh sealed key 1")
	for _, p := range parts {
		ad = binary.BigEndian.AppendUint32(ad, uint32(len(p))) //nolint:gosec // ids and purposes are short
		ad = append(ad, p...)
	}
	return ad
}
