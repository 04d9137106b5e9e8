package ca

import (
	"io"
	"math/big"

	"github.com/certmesh/certmesh/protocol/fault"
)

// serialSize is the greatest length of a serial number in octets (RFC 5280 section 4.1.2.2).
const serialSize = 20

// NewSerial returns a serial number with 159 random bits from r: positive, and at most 20 octets when encoded.
func NewSerial(r io.Reader) (*big.Int, error) {
	b := make([]byte, serialSize)
	for range 8 {
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, fault.Wrap(fault.Internal, err, "read randomness for a serial number")
		}
		b[0] &= 0x7f // a set top bit would need a 21st octet to stay positive
		if n := new(big.Int).SetBytes(b); n.Sign() > 0 {
			return n, nil
		}
	}
	return nil, fault.New(fault.Internal, "the source of randomness yields zeros only")
}

// SerialText is how serial numbers are written everywhere: lower-case hex without leading zeros.
func SerialText(n *big.Int) string { return n.Text(16) }

// ParseSerial reads what SerialText wrote.
func ParseSerial(s string) (*big.Int, error) {
	n, ok := new(big.Int).SetString(s, 16)
	if !ok || s != SerialText(n) || checkSerial(n) != nil {
		return nil, fault.InvalidField("serial", "%s is not a serial number: 1 to 40 lower-case hex digits without leading zeros", quoted(s))
	}
	return n, nil
}

func checkSerial(n *big.Int) error {
	if n == nil || n.Sign() <= 0 || n.BitLen() >= serialSize*8 {
		return fault.New(fault.Internal, "a serial number is positive and has at most %d octets (RFC 5280 section 4.1.2.2)", serialSize)
	}
	return nil
}
