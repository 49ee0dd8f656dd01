// Package vm is the contract between the host agent and a hypervisor, and nothing else: Driver says
// what every hypervisor must do, in terms of plain data. The implementations are the packages below;
// vmtest is the conformance suite that each of them passes.
//
// # Terms
//
// A VM is one VMM process with its guest. It is `running` (vCPUs execute), `frozen` (the VMM lives, no
// vCPU executes) or `gone` (no VMM process). A Handle is plain data that names a VM: it is written to
// disk by the agent before it is used, and any later agent process on the same boot of the host may use
// it. The VM's files may be renamed, with the directories they are in, while it is frozen: it is then named
// by Handle.Moved. A driver holds no state of a VM that it could not find again from the Handle.
//
// # Rules for every method
//
// Methods may be called from several goroutines; for one VM the agent serialises all but Inspect and
// Wait. A method that fails leaves the VM as it was (Start: nothing is left). A cancelled context ends
// the wait, and leaves the VM either as it was or as asked, never between. Errors are *wrenn.Error:
// KindNotFound when the VM is gone, KindInvalidState when its state does not allow the call,
// KindDiskFull, KindInvalidRequest for a Config that cannot be honoured, KindInternal for the rest.
package vm

import (
	"cmp"
	"context"
	"strings"
	"time"
)

// Driver runs VMs with one hypervisor. Differences between hypervisors are data in Capabilities.
type Driver interface {
	// Capabilities says what this driver can do on this host; constant for the life of the process.
	Capabilities() Capabilities

	// Start makes a VM: cold from kernel and disk, or from a snapshot if cfg.Restore is set. It returns
	// once the VMM accepted the configuration and, if cfg.Frozen, holds the VM frozen; else the VM runs
	// (the guest may still be booting). The VMM outlives the caller, runs as cfg.UID/GID in cfg.NetnsPath
	// and cfg.Cgroup, and has no inherited descriptors.
	Start(ctx context.Context, cfg Config) (Handle, error)

	// Inspect tells the VM's state. A VM whose process is gone, or whose pid now belongs to another
	// process, is StateGone without error.
	Inspect(ctx context.Context, h Handle) (State, error)

	// Pause freezes a running VM; a frozen one stays frozen (idempotent).
	Pause(ctx context.Context, h Handle) error

	// Resume lets a frozen VM run; a running one goes on (idempotent).
	Resume(ctx context.Context, h Handle) error

	// Snapshot writes the device state of a frozen VM to dst.State and makes dst.Memory hold its RAM: what
	// the VM changed since its start goes into dst.Memory, which is the VM's own memory file or becomes a
	// clone of it. The VM stays frozen and may be resumed. dst.State appears whole or not at all, and last; a
	// dst.Memory other than the VM's own file too. The own file may hold part of the changes after a failure,
	// which neither the VM sees nor a later Snapshot minds. Durability (fsync) is the caller's.
	Snapshot(ctx context.Context, h Handle, dst SnapshotFiles) error

	// Wait returns when the VM is gone, or with ctx's error.
	Wait(ctx context.Context, h Handle) error

	// Destroy ends the VMM at once and returns when it is gone; a VM that is gone already is success.
	// Files named in the Config are left alone.
	Destroy(ctx context.Context, h Handle) error
}

// Capabilities of a driver on this host. All values are shown by `wrenn-agent doctor` and reported to
// the control plane.
type Capabilities struct {
	Driver       string // "qemu", "firecracker"
	Version      string // of the VMM, as far as snapshots depend on it, e.g. "7.2"
	Acceleration string // "kvm", "tcg"
	Arch         string // as GOARCH
	CPUModel     string // what a snapshot needs of the CPU, e.g. "tcg-max", "host:GenuineIntel-6-143"
	// Others are further hypervisors, or versions, that are here for the VMs and snapshots that they made.
	Others []Capabilities
}

// Own is c without what else is here.
func (c Capabilities) Own() Capabilities {
	c.Others = nil
	return c
}

// Of is what a running VM has of c: those of its hypervisor in its version, which may be one that is not here any more.
func (c Capabilities) Of(h Handle) Capabilities {
	for _, one := range append([]Capabilities{c}, c.Others...) {
		if one.Driver == h.Driver {
			one = one.Own()
			one.Version = cmp.Or(h.VMMVersion, one.Version)
			return one
		}
	}
	return c.Own()
}

// State of a VM.
type State string

const (
	StateRunning State = "running"
	StateFrozen  State = "frozen"
	StateGone    State = "gone"
)

// Config is a whole VM. All paths are absolute and on the host; the driver opens them, gives the ones
// that the VMM must open itself to UID/GID, and creates nothing outside Dir.
type Config struct {
	ID  string // the sandbox id, for process titles and logs
	Dir string // the VM's own directory, for sockets, pid and log files of the driver; exists, mode 0700

	VCPUs    int
	MemoryMB int

	Kernel  string // vmlinux or bzImage
	Initrd  string // may be empty
	Cmdline string // appended to what the driver needs (console)

	Disks      []Disk // /dev/vda, /dev/vdb, …
	MemoryFile string // the VM's own file of MemoryMB MiB, mapped privately: it is as at the start until a Snapshot
	Console    string // serial console output is appended here, at most ConsoleLimit bytes are kept
	Net        Net

	// Restore is set to restore this snapshot, with the vCPUs, memory and number of disks it was taken of. A
	// MemoryFile that exists then already holds the snapshot's RAM (resume in place); one that does not is
	// cloned from Restore.Memory. A cold start makes it anew, empty.
	Restore *SnapshotFiles
	// SharedMemory says that others are restored from Restore.Memory as well: its clean pages are in the host's
	// memory once for all of them, and no VMM gets the right to change them.
	SharedMemory bool
	Frozen       bool // do not let it run yet

	UID, GID int
	Cgroup   string // name of the cgroup below the agent's own, with limits from VCPUs and MemoryMB
}

// ConsoleLimit bounds the console log that is kept of a VM, in bytes.
const ConsoleLimit = 1 << 20

// Disk is one block device, a raw image.
type Disk struct {
	Path     string
	ReadOnly bool
	// GrowTo, if larger than the image, makes it that many bytes (sparse) and tells the guest, also one
	// that was restored from a snapshot taken with the smaller disk.
	GrowTo int64
}

// Net is the VM's only network device, an existing TAP in an existing namespace.
type Net struct {
	NetnsPath string // e.g. /run/netns/wrenn-x-3; the VMM runs in it
	TAP       string
	MAC       string
}

// SnapshotFiles are the two files of a VM snapshot.
type SnapshotFiles struct {
	State  string // device state, format of the driver and VMM version
	Memory string // RAM, raw, MemoryMB MiB
	Driver string // that made them, Capabilities.Driver; for Drivers to choose by

	// Progress, if not nil, is told by Snapshot now and then how much of the RAM it has gone through, in bytes. It
	// must return at once.
	Progress func(done, total int64) `json:"-"`
}

// Handle names a VM for every later call, also by a later agent process. It is stored as JSON; fields
// are only ever added.
type Handle struct {
	Version   int       `json:"version"` // of this struct: 1
	Driver    string    `json:"driver"`
	PID       int       `json:"pid"`
	StartTime uint64    `json:"start_time"` // field 22 of /proc/PID/stat, clock ticks: tells a reused pid
	BootID    string    `json:"boot_id"`    // /proc/sys/kernel/random/boot_id: a handle of an earlier boot is gone
	Socket    string    `json:"socket"`     // control socket (QMP, Firecracker API)
	Dir       string    `json:"dir"`        // Config.Dir
	Memory    string    `json:"memory"`     // Config.MemoryFile
	Mapped    uint64    `json:"mapped"`     // inode of the file that is mapped as RAM
	MemoryMB  int       `json:"memory_mb"`
	VCPUs     int       `json:"vcpus"`
	Disks     int       `json:"disks"`
	Console   string    `json:"console"` // Config.Console
	Cgroup    string    `json:"cgroup"`
	StartedAt time.Time `json:"started_at"`
	// VMMVersion is that of the running VMM, as in Capabilities: what a snapshot of this VM needs.
	VMMVersion string `json:"vmm_version,omitempty"`
	// The process that serves the VM's memory, of the same boot, where there is one: neither outlives the other.
	PagerPID       int    `json:"pager_pid,omitempty"`
	PagerStartTime uint64 `json:"pager_start_time,omitempty"`
}

// Moved is the handle of a VM whose files were moved, with all that is below one directory.
func (h Handle) Moved(from, to string) Handle {
	for _, path := range []*string{&h.Dir, &h.Socket, &h.Memory, &h.Console} {
		if rest, ok := strings.CutPrefix(*path, from+"/"); ok {
			*path = to + "/" + rest
		}
	}
	return h
}
