//go:build linux

// Package firecracker is the vm.Driver for Firecracker. It owns its processes: how they are started in the jail
// of Firecracker's jailer, and spoken to by HTTP over their unix socket. It must not know sandboxes, images or the
// network beyond the paths in a vm.Config.
//
// # What is where
//
// Everything that belongs to one process is in a directory of its own, DIR/fc-RANDOM: FIFOs for console, log and
// metrics, and the place of the jail, which the host sees empty (see vmproc.Jail). Inside the jail every VM has the
// same paths, so a snapshot fits each. The RAM of a restored VM is a private mapping of its snapshot's memory file;
// Firecracker writes the pages that changed into the VM's own memory file when it is snapshotted. With MemoryUffd the
// same file is served by a page server (package uffd), beneath which the VMM runs: neither outlives the other.
package firecracker

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/probe"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Name of this driver in handles and capabilities.
const Name = "firecracker"

// Options of New.
type Options struct {
	CacheDir     string // where the vmlinux extracted from a bzImage is kept
	CgroupParent string // as of the qemu driver; "wrenn" if empty
	// Unjailed starts a Firecracker that has no jailer beside it in the launcher's own jail.
	Unjailed bool
	Disk     vm.DiskLimits
	// Memory is how the RAM of a restored VM is brought in: MemoryFile, also if empty, or MemoryUffd by PageServer,
	// a program with its arguments that is a page server if its next argument is uffd.Command.
	Memory     string
	PageServer []string
	Log        *slog.Logger
}

// Driver runs VMs with Firecracker. It keeps no state of a VM that it could not find again from its Handle.
type Driver struct {
	binaries []Binary // newest first, at least one
	opts     Options
	caps     vm.Capabilities

	mu       sync.Mutex
	attended map[vmproc.Process]bool // VMs whose FIFOs are being read
}

var _ vm.Driver = (*Driver)(nil)

// New makes a driver for the binaries that a probe found.
func New(verdict Verdict, opts Options) *Driver {
	if opts.CgroupParent == "" {
		opts.CgroupParent = "wrenn"
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	d := &Driver{binaries: verdict.Binaries, opts: opts, attended: map[vmproc.Process]bool{}}
	for i := range d.binaries {
		d.binaries[i].version, _ = parseVersion("v" + d.binaries[i].Version)
	}
	d.caps = vm.Capabilities{
		Driver: Name, Version: d.binaries[0].Version, Acceleration: "kvm", Arch: runtime.GOARCH, CPUModel: probe.HostCPU(),
	}
	for _, b := range d.binaries[1:] {
		other := d.caps.Own()
		other.Version = b.Version
		d.caps.Others = append(d.caps.Others, other)
	}
	return d
}

// Capabilities implements vm.Driver.
func (d *Driver) Capabilities() vm.Capabilities { return d.caps }

func process(h vm.Handle) *vmproc.Process {
	return &vmproc.Process{PID: h.PID, StartTime: h.StartTime, BootID: h.BootID}
}

// Inspect implements vm.Driver.
func (d *Driver) Inspect(ctx context.Context, h vm.Handle) (vm.State, error) {
	state := vm.StateGone
	err := d.talk(ctx, h, func(c *client) error {
		i, err := c.describe(ctx)
		if err != nil {
			return err
		}
		state = vm.StateFrozen
		if i.State == stateRunning {
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
	return d.talk(ctx, h, func(c *client) error {
		i, err := c.describe(ctx)
		if err != nil || i.State != stateRunning {
			return err
		}
		return c.do(ctx, pause(), nil)
	})
}

// Resume implements vm.Driver.
func (d *Driver) Resume(ctx context.Context, h vm.Handle) error {
	return d.talk(ctx, h, func(c *client) error { return run(ctx, c) })
}

// run lets a VM run whatever it was: Firecracker starts one that has not begun, and resumes one that was paused.
func run(ctx context.Context, c *client) error {
	i, err := c.describe(ctx)
	if err != nil {
		return err
	}
	switch i.State {
	case stateNotStarted:
		return c.do(ctx, instanceStart(), nil)
	case statePaused:
		return c.do(ctx, resume(), nil)
	}
	return nil
}

// Wait implements vm.Driver.
func (d *Driver) Wait(ctx context.Context, h vm.Handle) error {
	d.attend(h)
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
	// The page server has lost its VM, and is gone when its cgroup is empty.
	err := pager(h).Doom()
	err = errors.Join(err, vmproc.RemoveCgroup(d.opts.CgroupParent, h.Cgroup, h.PID, h.PagerPID))
	if h.Socket != "" {
		err = errors.Join(err, os.RemoveAll(workDir(h)))
	}
	if err != nil {
		return wrenn.Wrap(err, wrenn.KindInternal, "cannot clean up after the VM")
	}
	return nil
}

// BalloonStatistics are what the guest's balloon driver tells, in bytes but for the balloon itself.
type BalloonStatistics struct {
	TargetMB        int   `json:"target_mib"`
	ActualMB        int   `json:"actual_mib"`
	FreeMemory      int64 `json:"free_memory"`
	TotalMemory     int64 `json:"total_memory"`
	AvailableMemory int64 `json:"available_memory"`
}

// Balloon tells how much of a VM's memory its balloon holds, and what the guest says of the rest.
func (d *Driver) Balloon(ctx context.Context, h vm.Handle) (BalloonStatistics, error) {
	var s BalloonStatistics
	err := d.talk(ctx, h, func(c *client) error { return c.do(ctx, balloonStatistics(), &s) })
	return s, err
}

// SetBalloon asks the guest for that much of its memory. A guest that runs out of memory gets it back.
func (d *Driver) SetBalloon(ctx context.Context, h vm.Handle, mb int) error {
	return d.talk(ctx, h, func(c *client) error { return c.do(ctx, setBalloon(mb), nil) })
}

// workDir is the directory of a VM's process. It is named like its socket.
func workDir(h vm.Handle) string {
	return filepath.Join(h.Dir, strings.TrimSuffix(filepath.Base(h.Socket), socketSuffix))
}

// talk connects to a VM's API.
func (d *Driver) talk(ctx context.Context, h vm.Handle, fn func(*client) error) error {
	refused := func(err error) bool { return errors.As(err, new(*fault)) }
	return process(h).Talk(ctx, refused, func() error {
		c := connect(h.Socket)
		defer c.close()
		return fn(c)
	})
}
