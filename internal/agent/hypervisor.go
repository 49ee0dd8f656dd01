package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/firecracker"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/qemu"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// hypervisors is what was found out about a host: Firecracker is used where it boots our kernel, else QEMU.
type hypervisors struct {
	firecracker firecracker.Verdict
	qemu        qemu.Verdict
	qemuErr     error // QEMU is not there, which matters only where Firecracker does not work
}

func probeHypervisors(ctx context.Context, cfg Config, log *slog.Logger) (hypervisors, error) {
	var h hypervisors
	var err error
	h.firecracker, err = firecracker.Probe(ctx, firecracker.ProbeOptions{
		Dir: cfg.Firecracker, Kernel: cfg.Kernel, Initrd: cfg.Initrd, CacheFile: cfg.firecrackerFile(),
		Unjailed: cfg.AllowUnjailed, Timeout: cfg.probeTimeout(),
	})
	if err != nil {
		return h, err
	}
	h.qemu, h.qemuErr = qemu.Probe(ctx, probeOptions(cfg, log))
	if ctx.Err() != nil {
		return h, ctx.Err()
	}
	if !h.firecracker.Works && h.qemuErr != nil {
		return h, wrenn.Wrap(h.qemuErr, wrenn.KindOf(h.qemuErr), "%s. Nor can Firecracker be used: %s", wrenn.Public(h.qemuErr).Message, h.firecracker.Reason)
	}
	return h, nil
}

func probeOptions(cfg Config, log *slog.Logger) qemu.ProbeOptions {
	return qemu.ProbeOptions{
		Kernel: cfg.Kernel, Initrd: cfg.Initrd, CacheFile: cfg.verdictFile(), Timeout: cfg.probeTimeout(), Log: log,
	}
}

// chooseDriver opens the hypervisor that new sandboxes run with, and any other for the sandboxes that it has.
func chooseDriver(ctx context.Context, cfg Config, log *slog.Logger) (vm.Driver, error) {
	h, err := probeHypervisors(ctx, cfg, log)
	if err != nil {
		return nil, err
	}
	var drivers vm.Drivers
	why := h.qemu.Reason
	if h.firecracker.Works {
		why = h.firecracker.Reason
		if cfg.AllowUnjailed {
			log.Warn("AGENT_ALLOW_UNJAILED is set: a Firecracker without its jailer is confined by the agent alone")
		}
		driver, err := openFirecracker(cfg, h.firecracker, log)
		if err != nil {
			return nil, err
		}
		drivers = append(drivers, driver)
	}
	if h.qemuErr == nil {
		drivers = append(drivers, qemu.New(h.qemu, qemu.Options{
			CacheDir: cfg.cacheDir(), CgroupParent: cgroupParent(cfg), Disk: cfg.diskLimits(), Log: log,
		}))
	}
	caps := drivers.Capabilities()
	log.Info("hypervisor chosen", "driver", caps.Driver, "version", caps.Version, "acceleration", caps.Acceleration, "why", why)
	return drivers, nil
}

func openFirecracker(cfg Config, verdict firecracker.Verdict, log *slog.Logger) (vm.Driver, error) {
	if err := firecracker.CheckMemory(cfg.Memory); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return firecracker.New(verdict, firecracker.Options{
		CacheDir: cfg.cacheDir(), CgroupParent: cgroupParent(cfg), Unjailed: cfg.AllowUnjailed,
		Disk: cfg.diskLimits(), Log: log, Memory: cfg.Memory, PageServer: []string{self},
	}), nil
}

// findings are the doctor's rows about hypervisors: the one that is chosen first, and why not the other.
func (h hypervisors) findings() []finding {
	if !h.firecracker.Works {
		return append(h.qemuFindings(), finding{
			"Firecracker", note, "not used: " + h.firecracker.Reason,
			"put firecracker and jailer of one release into AGENT_FIRECRACKER_DIR, on a host with KVM",
		})
	}
	all := []finding{{"VMM", ok, "", ""}, {"KVM", ok, h.firecracker.Reason, ""}}
	for i, b := range h.firecracker.Binaries {
		text := fmt.Sprintf("firecracker %s (%s, snapshot format %s)", b.Version, b.Path, b.Format)
		if b.Jailer != "" {
			text += ", jailed by " + b.Jailer
		} else {
			text += ", WITHOUT its jailer"
		}
		if i == 0 {
			all[0].detail = text
			continue
		}
		all = append(all, finding{"VMM", ok, "for its own snapshots: " + text, ""})
	}
	return all
}

func (h hypervisors) qemuFindings() []finding {
	caps := qemu.New(h.qemu, qemu.Options{}).Capabilities()
	vmm := finding{"VMM", ok, fmt.Sprintf("%s %s (%s), CPU model %s", caps.Driver, caps.Version, h.qemu.Binary, caps.CPUModel), ""}
	if h.qemu.KVM {
		return []finding{vmm, {"KVM", ok, h.qemu.Reason, ""}}
	}
	return []finding{vmm, {"KVM", note, "not used, guests are emulated: " + h.qemu.Reason, "use bare metal or a machine with nested virtualisation; `wrenn-agent doctor --again` tries anew"}}
}

func hypervisor(ctx context.Context, cfg Config) []finding {
	if _, err := os.Stat(cfg.Kernel); err != nil {
		return []finding{{"VMM", note, "not tried: there is no kernel for it to boot", ""}}
	}
	h, err := probeHypervisors(ctx, cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return []finding{{"VMM", fail, wrenn.Public(err).Message, "apt-get install qemu-system-x86, or put Firecracker into AGENT_FIRECRACKER_DIR"}}
	}
	return h.findings()
}

func (c Config) diskLimits() vm.DiskLimits {
	return vm.DiskLimits{BytesPerSec: int64(c.DiskMBPerSec) << 20, OpsPerSec: int64(c.DiskOpsPerSec)}
}

func (c Config) cacheDir() string { return filepath.Join(c.Sandboxes, "cache") }

// firecrackerFile keeps whether Firecracker works, as verdictFile does for QEMU.
func (c Config) firecrackerFile() string { return c.Sandboxes + ".firecracker.json" }
