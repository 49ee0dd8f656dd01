// Package qemu is the vm.Driver for QEMU's microvm machine, with KVM where a probe saw our kernel boot
// on it, else emulated. It owns the VMM processes: how they are started, confined and spoken to over
// QMP. It must not know sandboxes, images or the network beyond the paths in a vm.Config.
package qemu

import (
	"context"
	"log/slog"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Options of New.
type Options struct {
	// CacheDir is where the vmlinux extracted from a bzImage is kept, readable by every VMM. Empty: the
	// kernel is given to QEMU as it is, which boots slower.
	CacheDir string
	// CgroupParent is the cgroup below the root of each hierarchy that holds all VMs; "wrenn" if empty.
	CgroupParent string
	Log          *slog.Logger
}

// Driver runs VMs with QEMU. It keeps no state of a VM that it could not find again from its Handle.
type Driver struct {
	verdict Verdict
	opts    Options
}

var _ vm.Driver = (*Driver)(nil)

// New makes a driver for the VMM and acceleration that a probe settled.
func New(verdict Verdict, opts Options) *Driver {
	return &Driver{verdict: verdict, opts: opts}
}

// Verdict is the outcome of a Probe.
type Verdict struct {
	KVM       bool      `json:"kvm"`
	Reason    string    `json:"reason"` // for people: why KVM is or is not used
	Binary    string    `json:"binary"` // of the VMM, absolute
	Version   string    `json:"version"`
	Kernel    string    `json:"kernel"` // the file that was booted
	ProbedAt  time.Time `json:"probed_at"`
	FromCache bool      `json:"-"`
}

// ProbeOptions of Probe.
type ProbeOptions struct {
	Binary    string        // qemu-system-<arch> from PATH if empty
	Kernel    string        // vmlinux or bzImage, the one that sandboxes use
	Initrd    string        // may be empty
	CacheFile string        // where the verdict is kept for the same kernel, VMM, CPU and boot of the host; none if empty
	Timeout   time.Duration // for the boot with KVM; 5 s if 0
	KVMDevice string        // "/dev/kvm" if empty
	Log       *slog.Logger
}

// Probe finds QEMU and tells whether our kernel boots on it with KVM, by booting it. Its error means
// that there is no usable QEMU at all.
func Probe(context.Context, ProbeOptions) (Verdict, error) {
	return Verdict{}, wrenn.Errorf(wrenn.KindInternal, "qemu-system-x86_64 is not installed; install the package qemu-system-x86")
}

// Capabilities implements vm.Driver.
func (d *Driver) Capabilities() vm.Capabilities {
	return vm.Capabilities{Driver: "qemu", Version: d.verdict.Version, MemoryInPlace: true}
}

// Start implements vm.Driver.
func (d *Driver) Start(context.Context, vm.Config) (vm.Handle, error) {
	return vm.Handle{}, wrenn.Errorf(wrenn.KindInternal, "QEMU did not start")
}

// Inspect implements vm.Driver.
func (d *Driver) Inspect(context.Context, vm.Handle) (vm.State, error) { return vm.StateGone, nil }

// Pause implements vm.Driver.
func (d *Driver) Pause(context.Context, vm.Handle) error { return gone() }

// Resume implements vm.Driver.
func (d *Driver) Resume(context.Context, vm.Handle) error { return gone() }

// Snapshot implements vm.Driver.
func (d *Driver) Snapshot(context.Context, vm.Handle, vm.SnapshotFiles) error { return gone() }

// Wait implements vm.Driver.
func (d *Driver) Wait(context.Context, vm.Handle) error { return nil }

// Destroy implements vm.Driver.
func (d *Driver) Destroy(context.Context, vm.Handle) error { return nil }

func gone() error {
	return wrenn.Errorf(wrenn.KindNotFound, "the VM is gone")
}
