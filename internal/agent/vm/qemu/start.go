//go:build linux

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
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

var (
	validName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$`)
	validMAC  = regexp.MustCompile(`^[0-9a-f]{2}(:[0-9a-f]{2}){5}$`)
)

// Start implements vm.Driver.
func (d *Driver) Start(ctx context.Context, cfg vm.Config) (vm.Handle, error) {
	if err := check(cfg); err != nil {
		return vm.Handle{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	s := &starting{driver: d, cfg: cfg}
	h, err := s.run(ctx)
	if err != nil {
		err = s.public(ctx, err)
		if undoErr := s.undo(); undoErr != nil {
			d.opts.Log.Error("a failed start left something over", "vm", cfg.ID, "err", undoErr)
		}
		return vm.Handle{}, err
	}
	go d.attend(s.proc, s.stderr, filepath.Join(cfg.Dir, "qemu.log"))
	d.readConsole(h)
	return h, nil
}

func check(cfg vm.Config) error {
	bad := func(format string, args ...any) error {
		return wrenn.Errorf(wrenn.KindInvalidRequest, format, args...)
	}
	switch {
	case !validName.MatchString(cfg.ID):
		return bad("VM id %q is not a name", cfg.ID)
	case !validName.MatchString(cfg.Cgroup):
		return bad("cgroup %q is not a name", cfg.Cgroup)
	case cfg.VCPUs < 1 || cfg.VCPUs > wrenn.MaxVCPUs:
		return bad("vcpus must be 1 to %d, not %d", wrenn.MaxVCPUs, cfg.VCPUs)
	case cfg.MemoryMB < wrenn.MinMemoryMB || cfg.MemoryMB > wrenn.MaxMemoryMB:
		return bad("memory_mb must be %d to %d, not %d", wrenn.MinMemoryMB, wrenn.MaxMemoryMB, cfg.MemoryMB)
	case cfg.Restore == nil && cfg.Kernel == "":
		return bad("a cold start needs a kernel")
	case len(cfg.Disks) > 8:
		return bad("at most 8 disks, not %d", len(cfg.Disks))
	case strings.ContainsAny(cfg.Cmdline, "\n\x00") || len(cfg.Cmdline) > 1500:
		return bad("the kernel command line must be one line of at most 1500 characters")
	case (cfg.Net.TAP != "" || cfg.Net.MAC != "") && !validMAC.MatchString(cfg.Net.MAC):
		return bad("MAC address %q is not lower-case hex", cfg.Net.MAC)
	}
	for _, path := range []string{cfg.Dir, cfg.MemoryFile} {
		if !filepath.IsAbs(path) {
			return bad("path %q must be absolute", path)
		}
	}
	return nil
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
	if err := s.makeCgroup(); err != nil {
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
		Version: 1, Driver: Name, PID: s.proc.PID, StartTime: s.proc.StartTime, BootID: s.proc.BootID,
		Socket: s.socket, Dir: s.cfg.Dir, Memory: s.cfg.MemoryFile, MemoryMB: s.cfg.MemoryMB, Mapped: s.mapped,
		VCPUs: s.cfg.VCPUs, Disks: len(s.cfg.Disks), Console: s.cfg.Console,
		Cgroup: s.cfg.Cgroup, StartedAt: time.Now().UTC(),
	}, nil
}

func (s *starting) makeCgroup() error {
	hierarchy, err := vmproc.FindHierarchy()
	if err != nil {
		return wrenn.Wrap(err, wrenn.KindInternal, "this host has no cgroups for cpu, memory and pids; mount them")
	}
	cgroup := hierarchy.Cgroup(s.driver.opts.CgroupParent, s.cfg.Cgroup)
	pids, err := cgroup.PIDs()
	if err != nil {
		return err
	}
	if len(pids) > 0 {
		return wrenn.Errorf(wrenn.KindInvalidState, "a VM of this name runs already; destroy it first")
	}
	s.cgroup = cgroup
	// An empty one that a crash left has the limits of another VM, and v1 does not let all be raised in place.
	if err := cgroup.Remove(); err != nil {
		return err
	}
	return cgroup.Ensure(s.driver.limits(s.cfg))
}

func (d *Driver) limits(cfg vm.Config) vmproc.Limits {
	mb := cfg.MemoryMB + cfg.MemoryMB*overheadPerMille/1000 + overheadMB
	if !d.verdict.KVM {
		mb += translationMB
	}
	return vmproc.Limits{
		MemoryBytes: int64(mb) << 20, CPUs: float64(cfg.VCPUs) + extraCPUs, PIDs: cfg.VCPUs + maxThreads,
	}
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
		args := map[string]any{"node-name": fmt.Sprintf("disk%d", i), "size": disk.GrowTo}
		if err := m.execute(ctx, "block_resize", args, nil); err != nil {
			return err
		}
	}
	return nil
}

// public turns a failed start into what may be shown; QEMU's own words are part of the cause.
func (s *starting) public(ctx context.Context, err error) error {
	var public *wrenn.Error
	if errors.As(err, &public) {
		return err
	}
	if words := lastWords(s.stderr); words != "" {
		err = fmt.Errorf("%w: %s", err, words)
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	return wrenn.Wrap(err, wrenn.KindInternal, "the VM did not start; see the agent's log, and `wrenn-agent doctor`")
}

func (s *starting) undo() error {
	var errs []error
	if s.proc != nil {
		errs = append(errs, s.proc.Kill(context.Background()), s.proc.Reap())
	}
	if s.cgroup != nil {
		errs = append(errs, s.cgroup.Remove())
	}
	if s.stderr != nil {
		errs = append(errs, s.stderr.Close())
	}
	if s.madeSockets {
		errs = append(errs, removeSockets(s.socket))
	}
	if s.madeMemory {
		errs = append(errs, os.Remove(s.cfg.MemoryFile))
	}
	return errors.Join(errs...)
}

// attend reaps a VMM and keeps its last words.
func (d *Driver) attend(p *vmproc.Process, stderr *os.File, log string) {
	defer stderr.Close()
	if err := p.Reap(); err != nil {
		d.opts.Log.Warn("cannot reap a VMM", "pid", p.PID, "err", err)
	}
	words := lastWords(stderr)
	if words == "" {
		return
	}
	d.opts.Log.Warn("the VMM said something", "pid", p.PID, "stderr", words)
	// The VM's directory may be gone already, with its VM.
	_ = os.WriteFile(log, []byte(words+"\n"), 0o600)
}
