package files

import (
	"cmp"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"

	"github.com/wrenn-sandbox/wrenn/internal/envd/account"
)

// target is a path and on whose behalf it is used.
type target struct {
	user account.Account
	path string
}

func status(k kind) int {
	switch k {
	case badRequest, exists:
		return http.StatusBadRequest
	case badUser:
		return http.StatusUnauthorized
	case notFound:
		return http.StatusNotFound
	case denied:
		return http.StatusForbidden
	case diskFull:
		return http.StatusInsufficientStorage
	case notAcceptable:
		return http.StatusNotAcceptable
	default:
		return http.StatusInternalServerError
	}
}

// fail answers with the contract's error body.
func fail(w http.ResponseWriter, err error) {
	code, message := http.StatusInternalServerError, "internal error"
	var f *fault
	if errors.As(err, &f) {
		code, message = status(f.kind), f.message
	}
	answer(w, code, map[string]any{"code": code, "message": message})
}

func answer(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body) // the client may be gone
}

// queryUser gives the user of an HTTP request: the query's, the Authorization header's, the default.
func (s *Service) queryUser(r *http.Request, q url.Values) (account.Account, error) {
	name, err := account.FromHeader(r.Header.Get("Authorization"))
	if err != nil {
		return account.Account{}, faultf(badUser, "%s", err)
	}
	return s.user(cmp.Or(q.Get("username"), name))
}

// admit checks the access token, or the signature that stands for it.
func (s *Service) admit(r *http.Request, operation string) (url.Values, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, faultf(badRequest, "the query cannot be read")
	}
	set := s.settings.Get()
	token := r.Header.Get("X-Access-Token")
	if token != "" || set.AccessToken == "" || !q.Has("signature") {
		if !set.Admits(token) {
			return nil, faultf(badUser, "the X-Access-Token header or the signature is missing or wrong")
		}
		return q, nil
	}
	return q, verifySignature(q, operation, set.AccessToken, now())
}
