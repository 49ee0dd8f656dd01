package auth

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/argon2"
)

// argon2id as OWASP recommends where memory is dear (Password Storage Cheat Sheet; RFC 9106): 19 MiB,
// two passes. The parameters are part of each hash, so they can be raised later.
const (
	argonTime    = 2
	argonMemory  = 19 * 1024 // KiB
	argonThreads = 1
	argonSalt    = 16
	argonKey     = 32
)

// maxHashes bounds how many passwords are hashed at once, and so their memory (19 MiB each).
const maxHashes = 2

// Passwords hashes and checks passwords.
type Passwords struct {
	slots chan struct{}
	dummy string
}

// NewPasswords makes one; a process needs one.
func NewPasswords() *Passwords {
	return &Passwords{
		slots: make(chan struct{}, maxHashes),
		dummy: encode(make([]byte, argonSalt), make([]byte, argonKey)),
	}
}

func (p *Passwords) enter(ctx context.Context) error {
	select {
	case p.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *Passwords) leave() { <-p.slots }

// Hash makes what is stored of a password. It waits while others are hashed.
func (p *Passwords) Hash(ctx context.Context, password string) (string, error) {
	if err := p.enter(ctx); err != nil {
		return "", err
	}
	defer p.leave()
	salt := make([]byte, argonSalt)
	_, _ = rand.Read(salt)
	return encode(salt, argon2.IDKey([]byte(password), salt, argonTime, argonMemory, argonThreads, argonKey)), nil
}

// Matches tells whether password is what hash was made of. An empty hash never matches, but costs the
// same time, so that an answer does not tell whether an account exists.
func (p *Passwords) Matches(ctx context.Context, password, hash string) (bool, error) {
	known := hash != ""
	if !known {
		hash = p.dummy
	}
	var memory, passes uint32
	var threads uint8
	salt, key, err := decode(hash, &memory, &passes, &threads)
	if err != nil {
		return false, err
	}
	if err := p.enter(ctx); err != nil {
		return false, err
	}
	defer p.leave()
	got := argon2.IDKey([]byte(password), salt, passes, memory, threads, uint32(len(key)))
	return subtle.ConstantTimeCompare(got, key) == 1 && known, nil
}

func encode(salt, key []byte) string {
	b64 := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, argonMemory, argonTime, argonThreads,
		b64.EncodeToString(salt), b64.EncodeToString(key))
}

func decode(hash string, memory, passes *uint32, threads *uint8) (salt, key []byte, err error) {
	bad := errors.New("stored password hash is malformed")
	parts := strings.Split(hash, "$")
	if len(parts) != 6 || parts[1] != "argon2id" || parts[2] != fmt.Sprintf("v=%d", argon2.Version) {
		return nil, nil, bad
	}
	if _, err := fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", memory, passes, threads); err != nil || *threads == 0 || *passes == 0 {
		return nil, nil, bad
	}
	if salt, err = base64.RawStdEncoding.DecodeString(parts[4]); err != nil {
		return nil, nil, bad
	}
	if key, err = base64.RawStdEncoding.DecodeString(parts[5]); err != nil || len(key) != argonKey {
		return nil, nil, bad
	}
	return salt, key, nil
}
