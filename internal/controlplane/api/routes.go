package api

import (
	"net/http"

	gen "github.com/wrenn-sandbox/wrenn/internal/gen/api"
)

// who may call a route. What of it they may then touch, the store's and the fleet's scopes decide.
type who int

const (
	anyone    who = iota // no credentials
	user                 // a user's token
	hostAdmin            // a user's token, of an admin or the owner of a team
	team                 // a user's token or a team's API key
	host                 // a host's token
)

// Limits of request bodies, in bytes.
const (
	jsonBody = 1 << 20
	execBody = 4 << 20 // carries standard input
	noLimit  = -1      // streamed
)

// route is one line of the API.
type route struct {
	method  string
	path    string
	who     who
	handler http.HandlerFunc
	body    int64 // most bytes of the request's body; 0 is jsonBody
	once    bool  // takes Idempotency-Key
}

// routes is the whole API. A test holds it against openapi.yaml in both directions.
func (s *Server) routes(g gen.ServerInterfaceWrapper) []route {
	return []route{
		{method: "POST", path: "/v1/auth/signup", who: anyone, handler: g.Signup},
		{method: "POST", path: "/v1/auth/login", who: anyone, handler: g.Login},
		{method: "GET", path: "/v1/me", who: user, handler: g.GetMe},

		{method: "GET", path: "/v1/api-keys", who: user, handler: g.ListAPIKeys},
		{method: "POST", path: "/v1/api-keys", who: user, handler: g.CreateAPIKey, once: true},
		{method: "DELETE", path: "/v1/api-keys/{id}", who: user, handler: g.DeleteAPIKey, once: true},

		{method: "GET", path: "/v1/hosts", who: hostAdmin, handler: g.ListHosts},
		{method: "POST", path: "/v1/hosts", who: hostAdmin, handler: g.CreateHost, once: true},
		{method: "POST", path: "/v1/hosts/register", who: anyone, handler: g.RegisterHost},
		{method: "GET", path: "/v1/hosts/{id}", who: hostAdmin, handler: g.GetHost},
		{method: "DELETE", path: "/v1/hosts/{id}", who: hostAdmin, handler: g.DeleteHost, once: true},
		{method: "POST", path: "/v1/hosts/{id}/heartbeat", who: host, handler: g.HeartbeatHost},
		{method: "POST", path: "/v1/hosts/{id}/token", who: hostAdmin, handler: g.RegenerateHostToken, once: true},
		{method: "GET", path: "/v1/hosts/{id}/tags", who: hostAdmin, handler: g.ListHostTags},
		{method: "POST", path: "/v1/hosts/{id}/tags", who: hostAdmin, handler: g.AddHostTag, once: true},
		{method: "DELETE", path: "/v1/hosts/{id}/tags/{tag}", who: hostAdmin, handler: g.RemoveHostTag, once: true},

		{method: "GET", path: "/v1/templates", who: team, handler: g.ListTemplates},

		{method: "GET", path: "/v1/sandboxes", who: team, handler: g.ListSandboxes},
		{method: "POST", path: "/v1/sandboxes", who: team, handler: g.CreateSandbox, once: true},
		{method: "GET", path: "/v1/sandboxes/{id}", who: team, handler: g.GetSandbox},
		{method: "DELETE", path: "/v1/sandboxes/{id}", who: team, handler: g.DeleteSandbox, once: true},
		{method: "POST", path: "/v1/sandboxes/{id}/pause", who: team, handler: g.PauseSandbox, once: true},
		{method: "POST", path: "/v1/sandboxes/{id}/resume", who: team, handler: g.ResumeSandbox, once: true},
		{method: "POST", path: "/v1/sandboxes/{id}/ping", who: team, handler: g.PingSandbox, once: true},
		{method: "PUT", path: "/v1/sandboxes/{id}/timeout", who: team, handler: g.SetSandboxTimeout, once: true},

		{method: "POST", path: "/v1/sandboxes/{id}/fork", who: team, handler: g.ForkSandbox, once: true},
		{method: "GET", path: "/v1/sandboxes/{id}/checkpoints", who: team, handler: g.ListCheckpoints},
		{method: "POST", path: "/v1/sandboxes/{id}/checkpoints", who: team, handler: g.CreateCheckpoint, once: true},
		{method: "DELETE", path: "/v1/sandboxes/{id}/checkpoints/{cid}", who: team, handler: g.DeleteCheckpoint, once: true},
		{method: "POST", path: "/v1/sandboxes/{id}/checkpoints/{cid}/rollback", who: team, handler: g.RollbackSandbox, once: true},
		{method: "GET", path: "/v1/sandboxes/{id}/storage", who: team, handler: g.GetSandboxStorage},

		{method: "GET", path: "/v1/snapshots", who: team, handler: g.ListSnapshots},
		{method: "POST", path: "/v1/snapshots", who: team, handler: g.CreateSnapshot, once: true},
		{method: "DELETE", path: "/v1/snapshots/{name}", who: team, handler: g.DeleteSnapshot, once: true},

		{method: "GET", path: "/v1/events", who: team, handler: s.streamEvents},

		{method: "POST", path: "/v1/sandboxes/{id}/exec", who: team, handler: g.ExecSandbox, body: execBody, once: true},
		{method: "GET", path: "/v1/sandboxes/{id}/exec/stream", who: team, handler: s.execStream},
		{method: "GET", path: "/v1/sandboxes/{id}/pty", who: team, handler: s.openPTY},
		{method: "GET", path: "/v1/sandboxes/{id}/processes", who: team, handler: g.ListProcesses},
		{method: "POST", path: "/v1/sandboxes/{id}/processes/{pid}/signal", who: team, handler: g.SignalProcess, once: true},
		{method: "GET", path: "/v1/sandboxes/{id}/processes/{pid}/attach", who: team, handler: s.attachProcess},

		{method: "GET", path: "/v1/sandboxes/{id}/files", who: team, handler: s.readFile},
		{method: "PUT", path: "/v1/sandboxes/{id}/files", who: team, handler: s.writeFile, body: noLimit},
		{method: "DELETE", path: "/v1/sandboxes/{id}/files", who: team, handler: g.RemoveFile, once: true},
		{method: "GET", path: "/v1/sandboxes/{id}/files/list", who: team, handler: g.ListFiles},
		{method: "GET", path: "/v1/sandboxes/{id}/files/stat", who: team, handler: g.StatFile},
		{method: "GET", path: "/v1/sandboxes/{id}/files/watch", who: team, handler: s.watchFiles},
		{method: "POST", path: "/v1/sandboxes/{id}/files/mkdir", who: team, handler: g.MakeDir, once: true},
		{method: "POST", path: "/v1/sandboxes/{id}/files/move", who: team, handler: g.MoveFile, once: true},

		{method: "GET", path: "/healthz", who: anyone, handler: s.health},
		{method: "GET", path: "/readyz", who: anyone, handler: s.ready},
		{method: "GET", path: "/metrics", who: anyone, handler: s.metrics.serve},
		{method: "GET", path: "/openapi.yaml", who: anyone, handler: s.spec.serveText},
		{method: "GET", path: "/docs", who: anyone, handler: s.spec.serveDocs},
	}
}
