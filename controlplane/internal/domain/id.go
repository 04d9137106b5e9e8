package domain

import (
	"crypto/sha256"
	"encoding/hex"
	"hash/fnv"
)

// Shards is the fixed number of shards that lead the indexes of hot tables.
const Shards = 8

// ShardOf maps an id to its shard.
func ShardOf(id string) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(id))
	return int(h.Sum32() % Shards)
}

// HashHex returns the SHA-256 of b in lower-case hex.
func HashHex(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}
