package agent

import (
	"path/filepath"
	"strings"
	"testing"
)

// A volume is mounted over an empty directory only, and `doctor`, which keeps its verdict on KVM, may
// run before the first start.
func TestVerdictIsNotKeptAmongTheSandboxes(t *testing.T) {
	t.Parallel()
	env := map[string]string{"AGENT_SANDBOXES_PATH": "/srv/sandboxes/"}
	cfg, err := loadConfig(func(name string) string { return env[name] })
	if err != nil {
		t.Fatal(err)
	}
	file := probeOptions(cfg, nil).CacheFile
	if rel, err := filepath.Rel(cfg.Sandboxes, file); err != nil || !strings.HasPrefix(rel, "..") {
		t.Errorf("%s is inside %s", file, cfg.Sandboxes)
	}
}
