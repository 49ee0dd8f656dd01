//go:build linux

package qemu

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
)

// What QEMU itself needs beside the guest's RAM, measured: 60 MiB resident after a boot besides translated
// code and RAM, plus page tables of a large guest. What is over the limit costs the VMM its life.
const (
	overheadMB       = 96
	overheadPerMille = 10 // of the guest's RAM
	extraCPUs        = 0.25
	maxThreads       = 64 // of QEMU beside its vCPUs: I/O workers
	startTimeout     = 30 * time.Second
)

// Start implements vm.Driver.
func (d *Driver) Start(ctx context.Context, cfg vm.Config) (vm.Handle, error) {
	if err := cfg.Check(); err != nil {
		return vm.Handle{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	s := &starting{driver: d, cfg: cfg}
	h, err := s.run(ctx)
	if err != nil {
		err = vmproc.StartError(ctx, err, s.stderr)
		if undoErr := s.undo(); undoErr != nil {
			d.opts.Log.Error("a failed start left something over", "vm", cfg.ID, "err", undoErr)
		}
		return vm.Handle{}, err
	}
	go d.attend(s.proc, s.stderr, filepath.Join(cfg.Dir, "qemu.log"))
	d.readConsole(h)
	return h, nil
}

// starting is one Start under way, and what it must undo if it fails.
type starting struct {
	driver *Driver
	cfg    vm.Config

	inherit     files
	cgroup      *vmproc.Cgroup
	proc        *vmproc.Process
	stderr      *os.File
	socket      string
	mapped      uint64
	madeMemory  bool
	madeSockets bool
}

func (s *starting) run(ctx context.Context) (vm.Handle, error) {
	bounds, err := s.driver.limits(s.cfg)
	if err != nil {
		return vm.Handle{}, err
	}
	if s.cgroup, err = vmproc.NewCgroup(s.driver.opts.CgroupParent, s.cfg.Cgroup, bounds); err != nil {
		return vm.Handle{}, err
	}
	o, err := s.open(ctx)
	if err != nil {
		s.inherit.close()
		return vm.Handle{}, err
	}
	kvm := ""
	if o.kvm {
		kvm = "/dev/kvm"
	}
	spec := vmproc.Spec{
		Path: s.driver.verdict.Binary, Args: o.arguments(), Files: s.inherit.list, Stderr: s.stderr,
		UID: s.cfg.UID, GID: s.cfg.GID, NetnsPath: s.cfg.Net.NetnsPath, Cgroup: s.cgroup,
		Jail: jail(s.cfg.Dir, s.driver.verdict.Binary, kvm),
	}
	s.proc, err = vmproc.Launch(spec)
	// From now on the sockets listen only as long as QEMU lives, so nobody waits for a dead one.
	s.inherit.close()
	if err != nil {
		return vm.Handle{}, err
	}
	if err := s.ready(ctx, o); err != nil {
		return vm.Handle{}, err
	}
	return vm.Handle{
		Version: 1, Driver: Name, VMMVersion: s.driver.caps.Version, PID: s.proc.PID, StartTime: s.proc.StartTime, BootID: s.proc.BootID,
		Socket: s.socket, Dir: s.cfg.Dir, Memory: s.cfg.MemoryFile, MemoryMB: s.cfg.MemoryMB, Mapped: s.mapped,
		VCPUs: s.cfg.VCPUs, Disks: len(s.cfg.Disks), Console: s.cfg.Console,
		Cgroup: s.cfg.Cgroup, StartedAt: time.Now().UTC(),
	}, nil
}

func (d *Driver) limits(cfg vm.Config) (vmproc.Limits, error) {
	mb := cfg.MemoryMB + cfg.MemoryMB*overheadPerMille/1000 + overheadMB
	if !d.verdict.KVM {
		mb += translationMB
	}
	all := d.opts.Disk.All(len(cfg.Disks))
	io, err := vmproc.NewIO(cfg.Dir, all.BytesPerSec, all.OpsPerSec)
	return vmproc.Limits{
		MemoryBytes: int64(mb) << 20, CPUs: float64(cfg.VCPUs) + extraCPUs, PIDs: cfg.VCPUs + maxThreads, IO: io,
	}, vm.FileError(err, "the directory")
}

// ready waits until QEMU has taken the configuration, and the snapshot if there is one, and lets the
// guest run unless it shall be frozen.
func (s *starting) ready(ctx context.Context, o opened) error {
	m, err := connect(ctx, s.socket)
	if err != nil {
		return err
	}
	defer m.close()
	if o.state >= 0 {
		if err := m.load(ctx, o.state); err != nil {
			return err
		}
	}
	if err := s.growDisks(ctx, m); err != nil {
		return err
	}
	if s.cfg.Frozen {
		return nil
	}
	return m.execute(ctx, "cont", nil, nil)
}

// growDisks makes the images larger as asked. QEMU tells a guest that knew the smaller size by a
// configuration change of the device (VIRTIO 1.2, section 5.2.4).
func (s *starting) growDisks(ctx context.Context, m *monitor) error {
	for i, disk := range s.cfg.Disks {
		info, err := os.Stat(disk.Path)
		if err != nil {
			return err
		}
		if disk.GrowTo <= info.Size() {
			continue
		}
		if err := m.activateDisks(ctx); err != nil {
			return err
		}
		args := map[string]any{"node-name": diskNode(i), "size": disk.GrowTo}
		if err := m.execute(ctx, "block_resize", args, nil); err != nil {
			return err
		}
	}
	return nil
}

// activateDisks makes the disks of a VM that was loaded, and has not run, QEMU's own, as resizing wants since version 10.
func (m *monitor) activateDisks(ctx context.Context) error {
	err := m.execute(ctx, "blockdev-set-active", map[string]any{"active": true}, nil)
	var refused *qmpError
	if errors.As(err, &refused) && refused.Class == "CommandNotFound" {
		return nil
	}
	return err
}

func (s *starting) undo() error {
	memory := ""
	if s.madeMemory {
		memory = s.cfg.MemoryFile
	}
	errs := []error{vmproc.Undo(s.proc, s.cgroup, memory)}
	if s.stderr != nil {
		errs = append(errs, s.stderr.Close())
	}
	if s.madeSockets {
		errs = append(errs, removeSockets(s.socket))
	}
	return errors.Join(errs...)
}

// attend reaps a VMM and keeps its last words.
func (d *Driver) attend(p *vmproc.Process, stderr *os.File, log string) {
	defer stderr.Close()
	if err := p.Reap(); err != nil {
		d.opts.Log.Warn("cannot reap a VMM", "pid", p.PID, "err", err)
	}
	words := vmproc.LastWords(stderr)
	if words == "" {
		return
	}
	d.opts.Log.Warn("the VMM said something", "pid", p.PID, "stderr", words)
	// The VM's directory may be gone already, with its VM.
	_ = os.WriteFile(log, []byte(words+"\n"), 0o600)
}
