package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"regexp"
	"strings"
)

const (
	keyPrefix  = "wrn_"
	e2bPrefix  = "e2b_"
	keyBytes   = 20
	shownChars = len(keyPrefix) + 6
)

var keyPattern = regexp.MustCompile(`^(wrn|e2b)_[0-9a-f]{40}$`)

// NewAPIKey makes a key: what its owner gets to see once, what is stored, and what is shown later.
func NewAPIKey() (key string, hash []byte, prefix string) {
	var raw [keyBytes]byte
	_, _ = rand.Read(raw[:])
	key = keyPrefix + hex.EncodeToString(raw[:])
	return key, HashAPIKey(key), key[:shownChars]
}

// HashAPIKey is what is stored of a key, the same for both ways of writing it; nil if it is none. A plain
// hash is enough: a key has 160 random bits.
func HashAPIKey(key string) []byte {
	if !keyPattern.MatchString(key) {
		return nil
	}
	return hashSecret(keyPrefix + strings.TrimPrefix(strings.TrimPrefix(key, keyPrefix), e2bPrefix))
}

// NewRegistrationToken makes a host's one-time token, 64 hex digits, and its hash.
func NewRegistrationToken() (token string, hash []byte) {
	var raw [32]byte
	_, _ = rand.Read(raw[:])
	token = hex.EncodeToString(raw[:])
	return token, HashRegistrationToken(token)
}

// HashRegistrationToken is what is stored of a one-time token.
func HashRegistrationToken(token string) []byte { return hashSecret(token) }

func hashSecret(s string) []byte {
	sum := sha256.Sum256([]byte(s))
	return sum[:]
}
