package wrenn

import (
	"errors"
	"fmt"
)

// Kind says what sort of failure an Error is. Each edge (REST, agent RPC, CLI) maps kinds to its own
// codes in one place; the value is the `code` of the REST error body.
type Kind string

const (
	KindInvalidRequest  Kind = "invalid_request"
	KindUnauthorized    Kind = "unauthorized"
	KindForbidden       Kind = "forbidden"
	KindNotFound        Kind = "not_found"
	KindInvalidState    Kind = "invalid_state"
	KindConflict        Kind = "conflict"
	KindAlreadyExists   Kind = "already_exists"
	KindInUse           Kind = "in_use"
	KindTooLarge        Kind = "too_large"
	KindRateLimited     Kind = "rate_limited"
	KindPoolExhausted   Kind = "pool_exhausted"
	KindNoCapacity      Kind = "no_capacity"
	KindHostUnavailable Kind = "host_unavailable"
	KindUnavailable     Kind = "unavailable" // the control plane itself lacks something it needs (database)
	KindAgentError      Kind = "agent_error"
	KindDiskFull        Kind = "disk_full"
	KindNotImplemented  Kind = "not_implemented"
	KindInternal        Kind = "internal"
)

// Error is a failure that a user may see. Message says what is wrong and what to do and is safe to
// show to anyone; the cause is for logs only and never crosses an edge.
type Error struct {
	Kind    Kind
	Message string
	Details map[string]any
	cause   error
}

// Errorf makes an Error without a cause.
func Errorf(kind Kind, format string, args ...any) *Error {
	return &Error{Kind: kind, Message: fmt.Sprintf(format, args...)}
}

// Wrap makes an Error whose private cause is err.
func Wrap(err error, kind Kind, format string, args ...any) *Error {
	e := Errorf(kind, format, args...)
	e.cause = err
	return e
}

// With returns a copy of e with one more public detail.
func (e *Error) With(key string, value any) *Error {
	c := *e
	c.Details = make(map[string]any, len(e.Details)+1)
	for k, v := range e.Details {
		c.Details[k] = v
	}
	c.Details[key] = value
	return &c
}

// Error is the text for logs: the message and the cause.
func (e *Error) Error() string {
	if e.cause == nil {
		return string(e.Kind) + ": " + e.Message
	}
	return string(e.Kind) + ": " + e.Message + ": " + e.cause.Error()
}

// Unwrap gives the private cause.
func (e *Error) Unwrap() error { return e.cause }

// KindOf is the kind of the first Error in err's chain, KindInternal if there is none, "" for nil.
func KindOf(err error) Kind {
	if err == nil {
		return ""
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return KindInternal
}

// Public is what may be shown of err: the first Error in its chain, or a generic internal error that
// carries err as its private cause.
func Public(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return Wrap(err, KindInternal, "internal error; try again, and report the request id if it persists")
}
