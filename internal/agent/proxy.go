package agent

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-sandbox/wrenn/internal/agent/guest"
	"github.com/wrenn-sandbox/wrenn/internal/rpc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// guestPaths are envd's public routes. All others are guest-internal and 404 here.
var guestPaths = []string{"/process.Process/", "/filesystem.Filesystem/", "/files", "/files/compose", "/metrics", "/health", "/envs"}

func isGuestPath(path string) bool {
	for _, p := range guestPaths {
		if path == p || strings.HasSuffix(p, "/") && strings.HasPrefix(path, p) {
			return true
		}
	}
	return false
}

// quietPaths say nothing of activity: they are asked for by machines that watch.
var quietPaths = map[string]bool{"/metrics": true, "/health": true}

// guestProxy passes /sandboxes/{id}/envd/… on to the guest of a running sandbox, with its access token,
// and counts the traffic as activity.
func guestProxy(s *Sandboxes) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path := strings.TrimPrefix(r.URL.Path, "/sandboxes/"+r.PathValue("id")+"/envd")
		if !isGuestPath(path) {
			writeError(w, r, wrenn.Errorf(wrenn.KindNotFound, "no such route"))
			return
		}
		sb, err := s.get(r.PathValue("id"))
		if err != nil {
			writeError(w, r, err)
			return
		}
		if !quietPaths[path] { // first: a pause that begins now sees it, or it sees the pause
			defer sb.activity.begin()()
		}
		client, token, err := sb.running()
		if err != nil {
			writeError(w, r, err)
			return
		}
		forward(w, r, client, token, path, s.log)
	})
}

func forward(w http.ResponseWriter, r *http.Request, client *guest.Client, token, path string, log *slog.Logger) {
	// The guest answers bounded requests in full duplex (streams in both directions at once).
	_ = http.NewResponseController(w).EnableFullDuplex() // HTTP/1.1 only; HTTP/2 always is
	proxy := httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL.Scheme, pr.Out.URL.Host, pr.Out.Host = "http", client.Host(), client.Host()
			pr.Out.URL.Path, pr.Out.URL.RawPath = path, ""
			pr.Out.Header.Set(guest.TokenHeader, token)
			pr.Out.Header.Del("Expect") // it is let through: the body is asked for as soon as it is read
		},
		Transport:     client.Transport,
		FlushInterval: -1,
		ErrorLog:      slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if r.Context().Err() != nil {
				return // the caller left
			}
			writeError(w, r, wrenn.Wrap(err, wrenn.KindAgentError, "the sandbox's guest agent does not answer"))
		},
	}
	proxy.ServeHTTP(w, r)
}

// writeError answers as Connect where the request speaks it, else as JSON with the error's kind.
func writeError(w http.ResponseWriter, r *http.Request, err error) {
	if ew := connect.NewErrorWriter(); ew.IsSupported(r) {
		_ = ew.Write(w, r, rpc.ToConnect(err))
		return
	}
	pub := wrenn.Public(err)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set(rpc.KindHeader, string(pub.Kind))
	w.WriteHeader(rpc.HTTPStatus(pub.Kind))
	_ = json.NewEncoder(w).Encode(map[string]any{"code": rpc.HTTPStatus(pub.Kind), "message": pub.Message})
}

// Limits of the RPC server.
const (
	readHeaderTimeout = 10 * time.Second
	idleTimeout       = 5 * time.Minute
)
