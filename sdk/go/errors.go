package wrenn

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

// Codes of APIError. The server may send others; they are for the same statuses.
const (
	CodeInvalidRequest  = "invalid_request"
	CodeUnauthorized    = "unauthorized"
	CodeForbidden       = "forbidden"
	CodeNotFound        = "not_found"
	CodeInvalidState    = "invalid_state"
	CodeConflict        = "conflict"
	CodeAlreadyExists   = "already_exists"
	CodeInUse           = "in_use"
	CodeTooLarge        = "too_large"
	CodeRateLimited     = "rate_limited"
	CodePoolExhausted   = "pool_exhausted"
	CodeNotImplemented  = "not_implemented"
	CodeAgentError      = "agent_error"
	CodeNoCapacity      = "no_capacity"
	CodeHostUnavailable = "host_unavailable"
	CodeUnavailable     = "unavailable"
	CodeDiskFull        = "disk_full"
	CodeInternal        = "internal"
)

// APIError is a failure that the server reports.
type APIError struct {
	// Status is the HTTP status; 0 for an error sent inside a stream.
	Status int
	// Code says what kind of failure it is.
	Code string
	// Message says what is wrong and what to do.
	Message string
	// Details depend on the code; invalid_request has "field".
	Details map[string]any
	// RequestID finds the request in the server's logs.
	RequestID string
	// RetryAfter is how long the server asks to wait; 0 if it does not say.
	RetryAfter time.Duration
}

func (e *APIError) Error() string {
	if e.RequestID == "" {
		return fmt.Sprintf("%s (%s)", e.Message, e.Code)
	}
	return fmt.Sprintf("%s (%s, request %s)", e.Message, e.Code, e.RequestID)
}

// CodeOf is the Code of the APIError in err's chain, or "".
func CodeOf(err error) string {
	var e *APIError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// IsNotFound tells whether err says that something does not exist, or is not yours.
func IsNotFound(err error) bool { return CodeOf(err) == CodeNotFound }

// maxErrorBody bounds what is read of an error answer.
const maxErrorBody = 1 << 20

// readError turns an answer that is not a success into an error. An answer that is not of the
// documented form comes from something between us and the server.
func readError(res *http.Response) *APIError {
	body, _ := io.ReadAll(io.LimitReader(res.Body, maxErrorBody))
	e := &APIError{Status: res.StatusCode, RequestID: res.Header.Get("X-Request-Id"),
		RetryAfter: retryAfter(res.Header.Get("Retry-After"))}
	var doc api.Error
	if json.Unmarshal(body, &doc) == nil && doc.Error.Code != "" {
		e.fill(doc.Error)
		return e
	}
	e.Code = codeOfStatus(res.StatusCode)
	e.Message = fmt.Sprintf("the server answered %s", res.Status)
	if text := strings.TrimSpace(string(body)); text != "" && len(text) <= 300 {
		e.Message += ": " + text
	}
	return e
}

func (e *APIError) fill(body api.ErrorBody) {
	e.Code, e.Message, e.Details = body.Code, body.Message, body.Details
	if body.RequestID != "" {
		e.RequestID = body.RequestID
	}
}

func codeOfStatus(status int) string {
	switch status {
	case http.StatusUnauthorized:
		return CodeUnauthorized
	case http.StatusForbidden:
		return CodeForbidden
	case http.StatusNotFound:
		return CodeNotFound
	case http.StatusRequestEntityTooLarge:
		return CodeTooLarge
	case http.StatusTooManyRequests:
		return CodeRateLimited
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return CodeUnavailable
	}
	if status >= 500 {
		return CodeInternal
	}
	return CodeInvalidRequest
}

// retryAfter reads whole seconds, the only form the API sends.
func retryAfter(v string) time.Duration {
	n, err := strconv.Atoi(v)
	if err != nil || n < 0 {
		return 0
	}
	return time.Duration(n) * time.Second
}
