package api

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/ephemeral"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	gen "github.com/wrenn-sandbox/wrenn/internal/gen/api"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// public is what a user may see of err: this is the one place where failures become answers.
func public(err error) *wrenn.Error {
	var own *wrenn.Error
	switch {
	case errors.As(err, &own):
		return own
	case ephemeral.IsUnavailable(err):
		return wrenn.Wrap(err, wrenn.KindUnavailable, "Redis cannot be reached, which this request needs; try again")
	case store.IsUnavailable(err):
		return wrenn.Wrap(err, wrenn.KindUnavailable, "the database cannot be reached; try again")
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return wrenn.Wrap(err, wrenn.KindUnavailable, "the request took too long; try again")
	default:
		return wrenn.Public(err)
	}
}

// fail answers with an error. The private cause goes to the log only.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	pub := public(err)
	status := rpc.HTTPStatus(pub.Kind)
	note(r.Context(), pub)
	if status >= http.StatusInternalServerError && r.Context().Err() == nil {
		s.log.Error("request failed", "request_id", requestID(r.Context()), "method", r.Method, "path", r.URL.Path, "error", err)
	}
	if wait, ok := pub.Details["retry_after_sec"]; ok || status == http.StatusServiceUnavailable {
		seconds, _ := wait.(int)
		w.Header().Set("Retry-After", strconv.Itoa(max(1, seconds)))
	}
	writeError(w, r, status, pub)
}

func writeError(w http.ResponseWriter, r *http.Request, status int, e *wrenn.Error) {
	writeJSON(w, status, gen.Error{Error: errorBody(r.Context(), e)})
}

func errorBody(ctx context.Context, e *wrenn.Error) gen.ErrorBody {
	body := gen.ErrorBody{Code: string(e.Kind), Message: e.Message, RequestID: requestID(ctx)}
	if len(e.Details) > 0 {
		body.Details = &e.Details
	}
	return body
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the client may be gone
}

func notFound(what string) error { return wrenn.Errorf(wrenn.KindNotFound, "no such %s", what) }

func invalid(field, format string, args ...any) *wrenn.Error {
	return wrenn.Errorf(wrenn.KindInvalidRequest, "%s: "+format, append([]any{field}, args...)...).With("field", field)
}

func rateLimited(wait time.Duration) error {
	seconds := max(1, int(math.Ceil(wait.Seconds())))
	return wrenn.Errorf(wrenn.KindRateLimited, "too many attempts; wait %d seconds", seconds).With("retry_after_sec", seconds)
}
