package files

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Operations that a signature allows.
const (
	opRead  = "read"
	opWrite = "write"
)

func now() time.Time { return time.Now() }

// Sign makes the signature of a file's URL; expiry is a Unix time in seconds, or empty.
func Sign(path, operation, user, token, expiry string) string {
	parts := []string{path, operation, user, token}
	if expiry != "" {
		parts = append(parts, expiry)
	}
	sum := sha256.Sum256([]byte(strings.Join(parts, ":")))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// verifySignature checks the signature in a query; path and user are taken as they were signed.
func verifySignature(q url.Values, operation, token string, at time.Time) error {
	expiry := q.Get("signature_expiration")
	if expiry != "" {
		until, err := strconv.ParseInt(expiry, 10, 64)
		if err != nil {
			return faultf(badRequest, "signature_expiration is not a Unix time in seconds")
		}
		if at.Unix() > until {
			return faultf(badUser, "the signature is expired")
		}
	}
	want := Sign(q.Get("path"), operation, q.Get("username"), token, expiry)
	if subtle.ConstantTimeCompare([]byte(want), []byte(q.Get("signature"))) != 1 {
		return faultf(badUser, "the signature is wrong")
	}
	return nil
}
