package wrenn

import (
	"crypto/rand"
	"regexp"
)

// Prefixes of ids. An id is its prefix, "-" and 25 characters [a-z0-9], 128 random bits
// (36^25 > 2^129).
const (
	PrefixSandbox    = "sb"
	PrefixHost       = "host"
	PrefixTeam       = "team"
	PrefixUser       = "user"
	PrefixKey        = "key"
	PrefixTemplate   = "tpl"
	PrefixSnapshot   = "snap"
	PrefixCheckpoint = "chk"
	PrefixOperation  = "op"
	PrefixEvent      = "evt"
)

const idAlphabet = "abcdefghijklmnopqrstuvwxyz0123456789"

const idLength = 25

// NewID makes an id with the given prefix from the system's random source.
func NewID(prefix string) string {
	out := make([]byte, 0, len(prefix)+1+idLength)
	out = append(append(out, prefix...), '-')
	var buf [64]byte
	for {
		_, _ = rand.Read(buf[:]) // never fails (crypto/rand since Go 1.24)
		for _, b := range buf {
			if int(b) >= 256-256%len(idAlphabet) {
				continue // keeps the distribution uniform
			}
			out = append(out, idAlphabet[int(b)%len(idAlphabet)])
			if len(out) == len(prefix)+1+idLength {
				return string(out)
			}
		}
	}
}

// IDFrom makes the id that belongs to 32 bytes: the same for the same ones.
func IDFrom(prefix string, sum [32]byte) string {
	out := append([]byte(prefix), '-')
	for _, b := range sum[:idLength] {
		out = append(out, idAlphabet[int(b)%len(idAlphabet)])
	}
	return string(out)
}

var idPattern = regexp.MustCompile(`^[a-z]+-[a-z0-9]{25}$`)

// ValidID tells whether id is well formed and has the given prefix.
func ValidID(prefix, id string) bool {
	return len(id) == len(prefix)+1+idLength && id[:len(prefix)] == prefix && idPattern.MatchString(id)
}
