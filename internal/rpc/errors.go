// Package rpc is what both ends of the agent's RPC share: how a wrenn.Error travels, and mutual TLS
// between control plane and hosts. It owns no service.
package rpc

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Metadata keys that carry what a Connect code cannot: the kind, and the details as JSON.
const (
	KindHeader    = "Wrenn-Error-Kind"
	detailsHeader = "Wrenn-Error-Details"
)

var codes = map[wrenn.Kind]connect.Code{
	wrenn.KindInvalidRequest:  connect.CodeInvalidArgument,
	wrenn.KindUnauthorized:    connect.CodeUnauthenticated,
	wrenn.KindForbidden:       connect.CodePermissionDenied,
	wrenn.KindNotFound:        connect.CodeNotFound,
	wrenn.KindInvalidState:    connect.CodeFailedPrecondition,
	wrenn.KindConflict:        connect.CodeAborted,
	wrenn.KindAlreadyExists:   connect.CodeAlreadyExists,
	wrenn.KindInUse:           connect.CodeFailedPrecondition,
	wrenn.KindTooLarge:        connect.CodeResourceExhausted,
	wrenn.KindRateLimited:     connect.CodeResourceExhausted,
	wrenn.KindPoolExhausted:   connect.CodeResourceExhausted,
	wrenn.KindNoCapacity:      connect.CodeResourceExhausted,
	wrenn.KindDiskFull:        connect.CodeResourceExhausted,
	wrenn.KindHostUnavailable: connect.CodeUnavailable,
	wrenn.KindUnavailable:     connect.CodeUnavailable,
	wrenn.KindNotImplemented:  connect.CodeUnimplemented,
}

// ToConnect turns err into what goes over the wire: only the public message, kind and details.
func ToConnect(err error) error {
	if err == nil {
		return nil
	}
	pub := wrenn.Public(err)
	code, ok := codes[pub.Kind]
	if !ok {
		code = connect.CodeInternal
	}
	ce := connect.NewError(code, errors.New(pub.Message))
	ce.Meta().Set(KindHeader, string(pub.Kind))
	if len(pub.Details) > 0 {
		if raw, err := json.Marshal(pub.Details); err == nil {
			ce.Meta().Set(detailsHeader, string(raw))
		}
	}
	return ce
}

// FromConnect turns an error of a Connect client back into a *wrenn.Error. One that the peer's
// ToConnect did not make is a transport failure: KindHostUnavailable if the peer could not be reached
// or did not answer in time, KindNotImplemented if it is too old, else KindAgentError.
func FromConnect(err error) error {
	if err == nil {
		return nil
	}
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return wrenn.Wrap(err, wrenn.KindHostUnavailable, "the sandbox's host cannot be reached; try again")
	}
	if kind := ce.Meta().Get(KindHeader); kind != "" {
		e := wrenn.Wrap(err, wrenn.Kind(kind), "%s", ce.Message())
		var details map[string]any
		if json.Unmarshal([]byte(ce.Meta().Get(detailsHeader)), &details) == nil {
			e.Details = details
		}
		return e
	}
	switch ce.Code() {
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded, connect.CodeCanceled:
		return wrenn.Wrap(err, wrenn.KindHostUnavailable, "the sandbox's host cannot be reached; try again")
	case connect.CodeUnimplemented:
		return wrenn.Wrap(err, wrenn.KindNotImplemented, "the sandbox's host runs an older agent that cannot do this; upgrade it")
	default:
		return wrenn.Wrap(err, wrenn.KindAgentError, "the sandbox's host failed to answer; try again")
	}
}

// ServerErrors is the interceptor of the agent's handlers: it maps every unary error with ToConnect.
func ServerErrors() connect.Interceptor {
	return connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			res, err := next(ctx, req)
			return res, ToConnect(err)
		}
	})
}

var statuses = map[wrenn.Kind]int{
	wrenn.KindInvalidRequest:  http.StatusBadRequest,
	wrenn.KindUnauthorized:    http.StatusUnauthorized,
	wrenn.KindForbidden:       http.StatusForbidden,
	wrenn.KindNotFound:        http.StatusNotFound,
	wrenn.KindInvalidState:    http.StatusConflict,
	wrenn.KindConflict:        http.StatusConflict,
	wrenn.KindAlreadyExists:   http.StatusConflict,
	wrenn.KindInUse:           http.StatusConflict,
	wrenn.KindTooLarge:        http.StatusRequestEntityTooLarge,
	wrenn.KindRateLimited:     http.StatusTooManyRequests,
	wrenn.KindPoolExhausted:   http.StatusTooManyRequests,
	wrenn.KindNoCapacity:      http.StatusServiceUnavailable,
	wrenn.KindHostUnavailable: http.StatusServiceUnavailable,
	wrenn.KindUnavailable:     http.StatusServiceUnavailable,
	wrenn.KindAgentError:      http.StatusBadGateway,
	wrenn.KindDiskFull:        http.StatusInsufficientStorage,
	wrenn.KindNotImplemented:  http.StatusNotImplemented,
}

// HTTPStatus is the status of a kind of error on every HTTP surface.
func HTTPStatus(kind wrenn.Kind) int {
	if s, ok := statuses[kind]; ok {
		return s
	}
	return http.StatusInternalServerError
}
