package agent

import (
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/envd/routes"
)

// What the proxy lets through is what the guest agent says may be reached from outside.
func TestGuestPathsAreThePublicRoutes(t *testing.T) {
	t.Parallel()
	for _, path := range append(routes.Internal(),
		routes.Health, routes.Metrics, routes.Envs, routes.Files, routes.Compose, "/process.Process/Start", "/filesystem.Filesystem/Stat", "/", "", "/other",
	) {
		if got, want := isGuestPath(path), routes.Public(path); got != want {
			t.Errorf("%q: passed on %v, public %v", path, got, want)
		}
	}
}
