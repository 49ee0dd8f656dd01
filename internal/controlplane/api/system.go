package api

import (
	"context"
	"net/http"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/version"

	contract "github.com/wrenn-sandbox/wrenn/api"
	gen "github.com/wrenn-sandbox/wrenn/internal/gen/api"
)

const readyLimit = 3 * time.Second

// health tells that the process is alive.
func (s *Server) health(w http.ResponseWriter, _ *http.Request) {
	v := version.Version
	writeJSON(w, http.StatusOK, gen.Health{Status: gen.HealthStatusOk, Version: &v})
}

// ready tells whether requests can be served now.
func (s *Server) ready(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), readyLimit)
	defer cancel()
	v := version.Version
	h := gen.Health{Status: gen.HealthStatusOk, Version: &v, Checks: &map[string]string{}}
	status := http.StatusOK
	for name, ping := range map[string]func(context.Context) error{"postgresql": s.st.Ping, "redis": s.Redis.Ping} {
		(*h.Checks)[name] = "ok"
		if err := ping(ctx); err != nil {
			s.log.Warn("not ready", "lacks", name, "error", err)
			(*h.Checks)[name] = "cannot be reached"
			h.Status, status = gen.HealthStatusUnavailable, http.StatusServiceUnavailable
		}
	}
	writeJSON(w, status, h)
}

func (sp *spec) serveText(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/yaml")
	_, _ = w.Write(contract.OpenAPI)
}

func (sp *spec) serveDocs(w http.ResponseWriter, _ *http.Request) {
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	_, _ = w.Write(sp.html)
}
