package routes

import "testing"

func TestPublic(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]bool{
		"/health": true, "/metrics": true, "/envs": true, "/files": true, "/files/compose": true, "/process.Process/Start": true, "/filesystem.Filesystem/Stat": true,
		"/": false, "": false, "/files/": false, "/files/../init": false, "//init": false, "/process.Process/": false, "/process.Process/../init": false,
		"/process.Process/Start/x": false, "/other.Service/Start": false, "/HEALTH": false,
	} {
		if got := Public(path); got != want {
			t.Errorf("Public(%q) = %v", path, got)
		}
	}
	for _, path := range Internal() {
		if Public(path) {
			t.Errorf("the internal route %s is public", path)
		}
	}
}
