package vmtest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
)

// TestFakeConforms shows that the suite can be passed without a hypervisor: it asks for nothing but what
// the contract says.
func TestFakeConforms(t *testing.T) {
	w := &world{machines: map[int]*machine{}, lastPID: 1 << 30}
	Exercise(t, Env{
		New: func() vm.Driver { return fake{w} },
		Config: func(t *testing.T) vm.Config {
			dir := t.TempDir()
			path := func(name string) string { return filepath.Join(dir, name) }
			for _, name := range []string{"disk", "kernel", "netns"} {
				if err := os.WriteFile(path(name), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			return vm.Config{
				ID: "sb-x", Dir: dir, VCPUs: 1, MemoryMB: 128, Kernel: path("kernel"), MemoryFile: path("memory"),
				Console: path("console"), Cgroup: "x", Disks: []vm.Disk{{Path: path("disk")}},
				Net: vm.Net{NetnsPath: path("netns"), MAC: "02:00:5e:00:00:02"},
			}
		},
		Ask:       w.ask,
		Leftovers: w.leftovers,
	})
	for _, m := range w.machines {
		if !m.finished {
			t.Errorf("the suite left the VM in %s", m.cfg.Dir)
		}
	}
}
