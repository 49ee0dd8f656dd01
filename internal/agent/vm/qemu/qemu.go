//go:build linux

// Package qemu is the vm.Driver for QEMU's microvm machine, with KVM where a probe saw our kernel boot
// on it, else emulated. It owns the VMM processes: how they are started, confined and spoken to over
// QMP. It must not know sandboxes, images or the network beyond the paths in a vm.Config.
//
// QEMU runs as the VM's own uid and is handed everything as open files: RAM, disks, TAP, sockets. It
// needs the right to no path, and the VM's directory is closed to it.
package qemu

import (
	"context"
	"errors"
	"log/slog"
	"runtime"
	"strings"
	"sync"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/probe"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Name of this driver in handles and capabilities.
const Name = "qemu"

// Options of New.
type Options struct {
	// CacheDir is where the vmlinux extracted from a bzImage is kept. Empty: the kernel is given to QEMU
	// as it is, and decompresses itself inside the guest, which is slow without KVM.
	CacheDir string
	// CgroupParent is the cgroup below the root of each hierarchy that holds the VMs of this instance, and
	// nothing else, so that vmproc.Sweep can find what a crash left. "wrenn" if empty.
	CgroupParent string
	Disk         vm.DiskLimits
	Log          *slog.Logger
}

// Driver runs VMs with QEMU. It keeps no state of a VM that it could not find again from its Handle.
type Driver struct {
	verdict Verdict
	opts    Options
	caps    vm.Capabilities

	shared   sharedMemory
	lines    lines
	mu       sync.Mutex
	consoles map[vmproc.Process]bool // VMs whose console is being read
}

var _ vm.Driver = (*Driver)(nil)

// New makes a driver for the VMM and acceleration that a probe settled.
func New(verdict Verdict, opts Options) *Driver {
	if opts.CgroupParent == "" {
		opts.CgroupParent = "wrenn"
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if !verdict.KVM && verdict.TSCkHz == 0 {
		verdict.TSCkHz = measureTSC()
	}
	d := &Driver{verdict: verdict, opts: opts, consoles: map[vmproc.Process]bool{}}
	d.caps = vm.Capabilities{
		Driver: Name, Version: series(verdict.Version), Acceleration: "tcg", CPUModel: "tcg-max",
		Arch: runtime.GOARCH,
	}
	if verdict.KVM {
		d.caps.Acceleration, d.caps.CPUModel = "kvm", probe.HostCPU()
	}
	return d
}

// series is what device state depends on: QEMU's stable releases (7.2.1, 7.2.2 …) take each other's, so that a host's
// updates leave saved machines as they are.
func series(version string) string {
	parts := strings.SplitN(version, ".", 3)
	return strings.Join(parts[:min(2, len(parts))], ".")
}

// Capabilities implements vm.Driver.
func (d *Driver) Capabilities() vm.Capabilities { return d.caps }

func process(h vm.Handle) *vmproc.Process {
	return &vmproc.Process{PID: h.PID, StartTime: h.StartTime, BootID: h.BootID}
}

// Inspect implements vm.Driver.
func (d *Driver) Inspect(ctx context.Context, h vm.Handle) (vm.State, error) {
	state := vm.StateGone
	err := d.talk(ctx, h, func(m *monitor) error {
		status, err := m.status(ctx)
		if err != nil {
			return err
		}
		state = vm.StateFrozen
		if status.Running {
			state = vm.StateRunning
		}
		return nil
	})
	if wrenn.KindOf(err) == wrenn.KindNotFound {
		return vm.StateGone, nil
	}
	return state, err
}

// Pause implements vm.Driver.
func (d *Driver) Pause(ctx context.Context, h vm.Handle) error {
	return d.talk(ctx, h, func(m *monitor) error { return m.execute(ctx, "stop", nil, nil) })
}

// Resume implements vm.Driver.
func (d *Driver) Resume(ctx context.Context, h vm.Handle) error {
	return d.talk(ctx, h, func(m *monitor) error { return m.execute(ctx, "cont", nil, nil) })
}

// Wait implements vm.Driver.
func (d *Driver) Wait(ctx context.Context, h vm.Handle) error {
	d.readConsole(h)
	if err := process(h).Wait(ctx); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return wrenn.Wrap(err, wrenn.KindInternal, "cannot wait for the VM")
	}
	return nil
}

// Destroy implements vm.Driver.
func (d *Driver) Destroy(ctx context.Context, h vm.Handle) error {
	if err := process(h).Kill(ctx); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return wrenn.Wrap(err, wrenn.KindInternal, "cannot end the VM")
	}
	if err := vmproc.RemoveCgroup(d.opts.CgroupParent, h.Cgroup, h.PID); err != nil {
		return wrenn.Wrap(err, wrenn.KindInternal, "cannot clean up after the VM")
	}
	return removeSockets(h.Socket)
}

// talk has a VM's monitor talked to.
func (d *Driver) talk(ctx context.Context, h vm.Handle, fn func(*monitor) error) error {
	refused := func(err error) bool { return errors.As(err, new(*qmpError)) }
	return process(h).Talk(ctx, refused, func() (err error) {
		m := d.lines.take(*process(h))
		defer func() { d.lines.put(*process(h), m, err == nil) }()
		if m == nil {
			if m, err = connect(ctx, h.Socket); err != nil {
				return err
			}
		}
		return fn(m)
	})
}

type runStatus struct {
	Running bool   `json:"running"`
	Status  string `json:"status"`
}

func (m *monitor) status(ctx context.Context) (runStatus, error) {
	var s runStatus
	err := m.execute(ctx, "query-status", nil, &s)
	return s, err
}
