// Package routes names the guest agent's HTTP routes and says which of them may be reached from outside
// the host. The host agent's proxy passes Public ones on and answers 404 for the rest.
package routes

import "strings"

// Internal routes: for the host agent only.
const (
	Init     = "/init"
	Clock    = "/clock"
	Freeze   = "/freeze"
	Unfreeze = "/unfreeze"
	FSFreeze = "/fsfreeze"
	FSThaw   = "/fsthaw"
	Collapse = "/collapse"
	Shutdown = "/shutdown"
)

// Public routes.
const (
	Health  = "/health"
	Metrics = "/metrics"
	Envs    = "/envs"
	Files   = "/files"
	Compose = "/files/compose"
)

// Port is where the guest agent listens.
const Port = 49983

// Internal lists the routes that only the host agent may call.
func Internal() []string {
	return []string{Init, Clock, Freeze, Unfreeze, FSFreeze, FSThaw, Collapse, Shutdown}
}

// Public tells whether a request path (as in url.URL.Path) may be passed on to the guest agent. It is a
// list of what is allowed, so a route that is added and forgotten here is closed.
func Public(path string) bool {
	switch path {
	case Health, Metrics, Envs, Files, Compose:
		return true
	}
	for _, service := range []string{"/process.Process/", "/filesystem.Filesystem/"} {
		if method, ok := strings.CutPrefix(path, service); ok {
			return method != "" && !strings.ContainsAny(method, "/.")
		}
	}
	return false
}
