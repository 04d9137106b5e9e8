package ca

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"math/big"
	"testing"

	"github.com/certmesh/certmesh/protocol/fault"
)

func TestSerialsArePositiveLongAndUnique(t *testing.T) {
	t.Parallel()
	seen, long := map[string]bool{}, 0
	for range 5000 {
		n, err := NewSerial(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		text := SerialText(n)
		// RFC 5280 section 4.1.2.2: positive, at most 20 octets with the sign bit.
		if n.Sign() <= 0 || n.BitLen() > 159 || len(text) > 40 {
			t.Fatalf("serial %s", text)
		}
		if seen[text] {
			t.Fatalf("serial %s twice", text)
		}
		seen[text] = true
		if n.BitLen() > 64 {
			long++
		}
		back, err := ParseSerial(text)
		if err != nil || back.Cmp(n) != 0 {
			t.Fatalf("%s reads back as %v, %v", text, back, err)
		}
	}
	if long != 5000 {
		t.Fatalf("%d of 5000 serials have no more than 64 bits", 5000-long)
	}
}

func TestSerialsOfABrokenSource(t *testing.T) {
	t.Parallel()
	if n, err := NewSerial(bytes.NewReader(make([]byte, 1000))); !fault.Is(err, fault.Internal) {
		t.Errorf("zeros only: %v, %v", n, err)
	}
	if n, err := NewSerial(iotestErr{}); !fault.Is(err, fault.Internal) {
		t.Errorf("no randomness: %v, %v", n, err)
	}
	// The top bit is always cleared: a 21st octet would be needed otherwise.
	n, err := NewSerial(bytes.NewReader(bytes.Repeat([]byte{0xff}, 20)))
	if err != nil || n.BitLen() != 159 {
		t.Errorf("ones only: %v, %v", n, err)
	}
}

type iotestErr struct{}

func (iotestErr) Read([]byte) (int, error) { return 0, errors.Join(io.ErrUnexpectedEOF) }

func TestParseSerialIsStrict(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"", "0", "00", "01", "0x1", "-1", "AB", "g", " 1", "1 ", "1_0", SerialText(new(big.Int).Lsh(big.NewInt(1), 160))} {
		if n, err := ParseSerial(s); !fault.Is(err, fault.Invalid) {
			t.Errorf("%q was read as %v, %v", s, n, err)
		}
	}
}
