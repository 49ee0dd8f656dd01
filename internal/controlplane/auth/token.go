package auth

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// UserTokenLifetime is how long a user stays logged in.
const UserTokenLifetime = 6 * time.Hour

// MinSecret is the least length of the signing secret, in bytes (RFC 7518 §3.2: the hash's output).
const MinSecret = 32

const typHost = "host"

// Tokens signs and verifies JWTs (RFC 7519), HS256 only. User tokens have no `typ` claim and host tokens
// have "host"; each verifier refuses the other's, so neither can be used in the other's place.
type Tokens struct {
	secret []byte
	now    func() time.Time
}

// NewTokens uses secret, of at least MinSecret bytes.
func NewTokens(secret []byte, now func() time.Time) (*Tokens, error) {
	if len(secret) < MinSecret {
		return nil, errors.New("the JWT secret is too short")
	}
	return &Tokens{secret, now}, nil
}

// UserClaims are what a user token says.
type UserClaims struct {
	TeamID string  `json:"team_id"`
	Email  string  `json:"email"`
	Role   string  `json:"role"`
	Typ    *string `json:"typ,omitempty"` // always absent: see Tokens
	jwt.RegisteredClaims
}

type hostClaims struct {
	Typ *string `json:"typ,omitempty"`
	jwt.RegisteredClaims
}

// SignUser makes a user token and tells when it expires.
func (t *Tokens) SignUser(userID, teamID, email, role string) (string, time.Time, error) {
	reg := t.registered(userID, UserTokenLifetime)
	token, err := t.sign(&UserClaims{TeamID: teamID, Email: email, Role: role, RegisteredClaims: reg})
	return token, reg.ExpiresAt.Time, err
}

// SignHost makes a host token that is good for life.
func (t *Tokens) SignHost(hostID string, life time.Duration) (string, error) {
	typ := typHost
	return t.sign(&hostClaims{Typ: &typ, RegisteredClaims: t.registered(hostID, life)})
}

// VerifyUser gives the claims of a user token.
func (t *Tokens) VerifyUser(token string) (*UserClaims, error) {
	var c UserClaims
	if err := t.parse(token, &c); err != nil {
		return nil, err
	}
	if c.Typ != nil {
		return nil, errors.New("not a user token")
	}
	if c.Subject == "" || c.TeamID == "" {
		return nil, errors.New("token names no user or team")
	}
	return &c, nil
}

// VerifyHost gives the id of the host that the token belongs to and when the token expires. Whether the
// host still exists is the caller's to check.
func (t *Tokens) VerifyHost(token string) (hostID string, expires time.Time, err error) {
	var c hostClaims
	if err := t.parse(token, &c); err != nil {
		return "", time.Time{}, err
	}
	if c.Typ == nil || *c.Typ != typHost || c.Subject == "" {
		return "", time.Time{}, errors.New("not a host token")
	}
	return c.Subject, c.ExpiresAt.Time, nil
}

func (t *Tokens) registered(subject string, life time.Duration) jwt.RegisteredClaims {
	now := t.now().UTC()
	var id [16]byte
	_, _ = rand.Read(id[:])
	return jwt.RegisteredClaims{
		Subject:   subject,
		IssuedAt:  jwt.NewNumericDate(now),
		ExpiresAt: jwt.NewNumericDate(now.Add(life)),
		ID:        hex.EncodeToString(id[:]),
	}
}

func (t *Tokens) sign(c jwt.Claims) (string, error) {
	return jwt.NewWithClaims(jwt.SigningMethodHS256, c).SignedString(t.secret)
}

func (t *Tokens) parse(token string, c jwt.Claims) error {
	_, err := jwt.ParseWithClaims(token, c, func(*jwt.Token) (any, error) { return t.secret, nil },
		jwt.WithValidMethods([]string{jwt.SigningMethodHS256.Alg()}), jwt.WithExpirationRequired(),
		jwt.WithTimeFunc(t.now), jwt.WithStrictDecoding())
	return err
}
