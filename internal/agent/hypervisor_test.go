package agent

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/firecracker"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/qemu"
)

func TestDoctorSaysWhichHypervisorAndWhy(t *testing.T) {
	t.Parallel()
	emulated := qemu.Verdict{Binary: "/usr/bin/qemu", Version: "7.2.22", Reason: "the vCPU spins"}
	two := []firecracker.Binary{
		{Version: "1.16.1", Format: "10.0.0", Path: "/x/firecracker", Jailer: "/x/jailer"},
		{Version: "1.14.0", Format: "8.0.0", Path: "/x/firecracker-v1.14.0"},
	}
	for name, c := range map[string]struct {
		found hypervisors
		want  []string
	}{
		"Firecracker works": {
			hypervisors{firecracker: firecracker.Verdict{Works: true, Reason: "our kernel booted", Binaries: two}, qemu: emulated},
			[]string{"VMM ok firecracker 1.16.1 (/x/firecracker", "jailed by /x/jailer", "KVM ok our kernel booted", "for its own snapshots: firecracker 1.14.0", "WITHOUT its jailer"},
		},
		"Firecracker is not there": {
			hypervisors{firecracker: firecracker.Verdict{Reason: "no Firecracker in /x"}, qemu: emulated},
			[]string{"VMM ok qemu 7.2", "guests are emulated: the vCPU spins", "Firecracker note not used: no Firecracker in /x"},
		},
	} {
		var text strings.Builder
		for _, f := range c.found.findings() {
			fmt.Fprintln(&text, f.what, f.level, f.detail)
		}
		for _, want := range c.want {
			if !strings.Contains(text.String(), want) {
				t.Errorf("%s: no %q in\n%s", name, want, text.String())
			}
		}
	}
}

// What cannot be tried for want of a kernel is not blamed on the hypervisor.
func TestDoctorWithoutAKernel(t *testing.T) {
	t.Parallel()
	cfg := Config{Kernel: filepath.Join(t.TempDir(), "vmlinux")}
	if got := hypervisor(t.Context(), cfg); len(got) != 1 || got[0].level != note {
		t.Errorf("the hypervisor: %v", got)
	}
	if got := kernelFiles(cfg); len(got) != 1 || got[0].level != fail {
		t.Errorf("the kernel: %v", got)
	}
}
