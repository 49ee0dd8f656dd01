package account

import (
	"encoding/base64"
	"errors"
	"strings"
)

// ErrBadHeader is the error of an Authorization header that does not name a user.
var ErrBadHeader = errors.New(`the Authorization header must be "Basic " and the base64 of "<user>:"`)

// FromHeader gives the user name in an Authorization header, "" if the header is empty. The password
// is ignored: the header says on whose behalf a request acts, the access token says that it may.
func FromHeader(header string) (string, error) {
	if header == "" {
		return "", nil
	}
	scheme, payload, ok := strings.Cut(header, " ")
	if !ok || !strings.EqualFold(scheme, "Basic") || len(payload) > 1024 {
		return "", ErrBadHeader
	}
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(payload))
	if err != nil {
		return "", ErrBadHeader
	}
	name, _, ok := strings.Cut(string(raw), ":")
	if !ok || name == "" || len(name) > maxName {
		return "", ErrBadHeader
	}
	return name, nil
}
