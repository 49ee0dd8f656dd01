package api

import (
	"context"
	"fmt"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/rpc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// exchange is what is known of a request and its answer while it is served.
type exchange struct {
	id     string
	code   wrenn.Kind // of the error, if it failed
	route  string
	actor  string
	client string // address
}

type exchangeKey struct{}

func exchangeOf(ctx context.Context) *exchange {
	x, _ := ctx.Value(exchangeKey{}).(*exchange)
	if x == nil {
		return &exchange{}
	}
	return x
}

func requestID(ctx context.Context) string { return exchangeOf(ctx).id }

// note keeps an error for the access log.
func note(ctx context.Context, e *wrenn.Error) { exchangeOf(ctx).code = e.Kind }

// ServeHTTP gives every request an id and every answer the marks of an API, logs it, and turns a panic
// into a 500 without internals.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	x := &exchange{id: wrenn.NewID("req"), client: s.clientAddr(r)}
	r = r.WithContext(context.WithValue(r.Context(), exchangeKey{}, x))
	rec := &recorder{ResponseWriter: w}
	head := rec.Header()
	head.Set("X-Request-Id", x.id)
	head.Set("X-Content-Type-Options", "nosniff")
	head.Set("Cache-Control", "no-store")
	defer func() {
		if p := recover(); p != nil {
			s.panicked(rec, r, p)
		}
		s.metrics.observe(x.route, r.Method, rec.code(), time.Since(start))
		s.accessLog(r, x, rec, time.Since(start))
	}()
	if _, pattern := s.mux.Handler(r); pattern == "" {
		s.noRoute(rec, r)
		return
	}
	s.mux.ServeHTTP(rec, r)
}

func (s *Server) panicked(rec *recorder, r *http.Request, p any) {
	if p == http.ErrAbortHandler { //nolint:errorlint // as net/http compares it
		panic(p)
	}
	s.log.Error("panic", "request_id", requestID(r.Context()), "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
	if rec.status != 0 {
		panic(http.ErrAbortHandler) // too late to answer; cut the connection so that it does not look whole
	}
	pub := wrenn.Public(fmt.Errorf("panic: %v", p))
	note(r.Context(), pub)
	writeError(rec, r, rpc.HTTPStatus(pub.Kind), pub)
}

func (s *Server) accessLog(r *http.Request, x *exchange, rec *recorder, took time.Duration) {
	level := s.log.Info
	if x.route == "GET /healthz" || x.route == "GET /readyz" || x.route == "GET /metrics" || strings.HasSuffix(x.route, "/heartbeat") {
		level = s.log.Debug
	}
	args := []any{"request_id", x.id, "method", r.Method, "path", r.URL.Path, "status", rec.code(), "bytes", rec.bytes, "ms", took.Milliseconds(), "client", x.client}
	if x.actor != "" {
		args = append(args, "actor", x.actor)
	}
	if x.code != "" {
		args = append(args, "code", x.code)
	}
	level("request", args...)
}

// methods a path may be asked with, to tell 405 from 404.
var methods = [...]string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete}

func (s *Server) noRoute(w http.ResponseWriter, r *http.Request) {
	var allowed []string
	for _, m := range methods {
		probe := r.Clone(r.Context())
		probe.Method = m
		if _, pattern := s.mux.Handler(probe); pattern != "" {
			allowed = append(allowed, m)
		}
	}
	if len(allowed) == 0 {
		s.fail(w, r, wrenn.Errorf(wrenn.KindNotFound, "no such route; see /docs"))
		return
	}
	list := strings.Join(allowed, ", ")
	w.Header().Set("Allow", list)
	e := wrenn.Errorf("method_not_allowed", "%s is not possible here; use %s", r.Method, list)
	note(r.Context(), e)
	writeError(w, r, http.StatusMethodNotAllowed, e)
}

// recorder remembers what was answered.
type recorder struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (r *recorder) WriteHeader(status int) {
	if r.status == 0 && (status >= 200 || status == http.StatusSwitchingProtocols) {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(p []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	n, err := r.ResponseWriter.Write(p)
	r.bytes += int64(n)
	return n, err
}

func (r *recorder) code() int {
	if r.status == 0 {
		return http.StatusOK
	}
	return r.status
}

// Unwrap is for http.ResponseController.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

func forwardedFor(h http.Header) []string {
	var out []string
	for _, line := range h.Values("X-Forwarded-For") {
		for _, a := range strings.Split(line, ",") {
			out = append(out, strings.TrimSpace(a))
		}
	}
	if len(out) > 32 {
		out = out[len(out)-32:]
	}
	return out
}

// serve is the way of every request to its handler.
func (s *Server) serve(rt route, op *operation) http.Handler {
	name := rt.method + " " + rt.path
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		exchangeOf(r.Context()).route = name
		ctx, err := s.authenticate(r, rt.who)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		r = r.WithContext(ctx)
		if err := op.check(w, r, rt.body); err != nil {
			s.fail(w, r, err)
			return
		}
		if key := r.Header.Get("Idempotency-Key"); rt.once && key != "" {
			s.serveOnce(w, r, key, rt.handler)
			return
		}
		rt.handler(w, r)
	})
}
