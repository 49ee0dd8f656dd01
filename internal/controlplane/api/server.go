// Package api is the control plane's REST surface: it authenticates, checks each request against
// openapi.yaml, calls, and encodes. routes.go is the whole of it on one screen, errors.go the one place
// where failures become answers. It decides nothing about hosts and sandboxes (fleet) and holds no SQL (store).
package api

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/agents"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/auth"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/ephemeral"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/fleet"
	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store"
	gen "github.com/wrenn-sandbox/wrenn/internal/gen/api"
)

// Deps are what a Server is made of.
type Deps struct {
	Store     *store.Store
	Redis     *ephemeral.Redis
	Fleet     *fleet.Fleet
	Agents    *agents.Pool
	Tokens    *auth.Tokens
	Passwords *auth.Passwords
	Secret    []byte // of JWTs; seals stored answers
	Log       *slog.Logger

	SignupClosed   bool
	TrustedProxies []netip.Prefix // whose X-Forwarded-For is believed
}

// Server answers requests.
type Server struct {
	Deps
	st      *store.Store
	log     *slog.Logger
	spec    *spec
	metrics *metrics
	mux     *http.ServeMux
	streams context.Context // ends when open streams shall
	hub     *hub
}

// New makes a Server. Streams that are open when ctx ends are closed.
func New(ctx context.Context, d Deps) (*Server, error) {
	sp, err := loadSpec()
	if err != nil {
		return nil, err
	}
	s := &Server{Deps: d, st: d.Store, log: d.Log, spec: sp, mux: http.NewServeMux(), streams: ctx, hub: &hub{followers: map[string]map[*follower]bool{}}}
	if d.Redis != nil {
		go s.hub.run(ctx, d.Redis)
	}
	s.metrics = newMetrics(prometheus.NewRegistry(), d.Store, d.Fleet)
	strict := gen.NewStrictHandlerWithOptions(s, nil, gen.StrictHTTPServerOptions{
		RequestErrorHandlerFunc: func(w http.ResponseWriter, r *http.Request, err error) {
			s.fail(w, r, badRequest(err))
		},
		ResponseErrorHandlerFunc: s.fail,
	})
	wrapper := gen.ServerInterfaceWrapper{Handler: strict, ErrorHandlerFunc: func(w http.ResponseWriter, r *http.Request, err error) {
		s.fail(w, r, badRequest(err))
	}}
	for _, rt := range s.routes(wrapper) {
		op, err := sp.operation(rt)
		if err != nil {
			return nil, err
		}
		s.mux.Handle(rt.method+" "+rt.path, s.serve(rt, op))
	}
	return s, nil
}

// Limits of the HTTP server. Bodies of ordinary requests have a limit of their own (validate.go); streams
// may last as long as both sides want.
const (
	readHeaderTimeout = 10 * time.Second
	idleTimeout       = 2 * time.Minute
	maxHeaderBytes    = 64 << 10
)

// HTTPServer is a server for s with the product's limits.
func (s *Server) HTTPServer() *http.Server {
	return &http.Server{
		Handler:           s,
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
}

// clientAddr is the address a request comes from: the nearest one that is not a trusted proxy.
func (s *Server) clientAddr(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	forwarded := forwardedFor(r.Header)
	for i := len(forwarded) - 1; i >= 0 && s.trusted(host); i-- {
		host = forwarded[i]
	}
	return host
}

func (s *Server) trusted(addr string) bool {
	ip, err := netip.ParseAddr(addr)
	if err != nil {
		return false
	}
	for _, p := range s.TrustedProxies {
		if p.Contains(ip.Unmap()) {
			return true
		}
	}
	return false
}
