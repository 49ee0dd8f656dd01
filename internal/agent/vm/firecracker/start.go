//go:build linux

package firecracker

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/kernel"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/uffd"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// What Firecracker itself needs beside the guest's RAM: its program, copied into the jail by the jailer, page tables,
// and room for queues. What is over the limit costs the VMM its life.
const (
	overheadMB       = 64
	overheadPerMille = 10 // of the guest's RAM
	extraCPUs        = 0.25
	maxThreads       = 16 // beside the vCPUs: API, VMM, I/O
	maxVCPUs         = 32 // of Firecracker
	startTimeout     = 30 * time.Second
	pollEvery        = time.Millisecond
)

// Names in the directory of a process.
const (
	jailFolder  = "jail"
	consoleFile = "console"
	logFile     = "log"
	metricsFile = "metrics"
	stateFile   = "state"
	pagesSocket = "pages.sock"
	pagerJail   = "pager-jail"
)

// Start implements vm.Driver.
func (d *Driver) Start(ctx context.Context, cfg vm.Config) (vm.Handle, error) {
	if err := cfg.Check(); err != nil {
		return vm.Handle{}, err
	}
	if cfg.VCPUs > maxVCPUs {
		return vm.Handle{}, wrenn.Errorf(wrenn.KindInvalidRequest, "Firecracker runs at most %d vCPUs, not %d", maxVCPUs, cfg.VCPUs)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	s := &starting{driver: d, cfg: cfg, binary: d.binaries[0]}
	h, err := s.run(ctx)
	if err != nil {
		err = vmproc.StartError(ctx, err, s.stderr, s.pagerWords)
		if undoErr := s.undo(); undoErr != nil {
			d.opts.Log.Error("a failed start left something over", "vm", cfg.ID, "err", undoErr)
		}
		return vm.Handle{}, err
	}
	go d.reap(s.proc, s.stderr)
	if s.pager != nil {
		go d.reap(s.pager, s.pagerWords)
	}
	return h, nil
}

// starting is one Start under way, and what it must undo if it fails.
type starting struct {
	driver *Driver
	cfg    vm.Config
	binary Binary
	kernel string // vmlinux

	dir        string // of the process
	socket     string // in the jail
	clones     int
	reader     *os.File // holds the console's FIFO open
	console    *os.File // the end that Firecracker prints into
	stderr     *os.File
	cgroup     *vmproc.Cgroup
	proc       *vmproc.Process
	madeMemory bool
	pager      *vmproc.Process // nil: the VM's memory is a mapped file
	pagerWords *os.File
}

func (s *starting) path(name string) string { return filepath.Join(s.dir, name) }

func (s *starting) run(ctx context.Context) (vm.Handle, error) {
	binds, err := s.prepare(ctx)
	if err != nil {
		return vm.Handle{}, err
	}
	if s.paged() {
		if err := s.startPager(); err != nil {
			return vm.Handle{}, err
		}
		binds = append(binds, vmproc.Bind{From: s.path(pagesSocket), To: pagesPath, Writable: true})
	}
	if s.proc, err = vmproc.Launch(s.spec(binds)); err != nil {
		return vm.Handle{}, err
	}
	h := s.handle()
	s.driver.attend(h)
	// From now on the console ends with the VMM.
	if err := errors.Join(s.reader.Close(), s.console.Close()); err != nil {
		return vm.Handle{}, err
	}
	if err := s.ready(ctx, h); err != nil {
		return vm.Handle{}, err
	}
	return h, os.RemoveAll(s.path(stateFile))
}

// prepare makes everything that the VM consists of, and names it for the jail.
func (s *starting) prepare(ctx context.Context) ([]vmproc.Bind, error) {
	bounds, err := s.limits()
	if err != nil {
		return nil, err
	}
	if s.cgroup, err = vmproc.NewCgroup(s.driver.opts.CgroupParent, s.cfg.Cgroup, bounds); err != nil {
		return nil, err
	}
	if err := s.makeDir(); err != nil {
		return nil, err
	}
	if s.cfg.Restore != nil {
		if s.binary, err = s.openState(); err != nil {
			return nil, err
		}
	} else if s.kernel, err = kernel.Vmlinux(ctx, s.cfg.Kernel, s.driver.opts.CacheDir); err != nil {
		return nil, err
	} else {
		_ = os.Remove(s.cfg.MemoryFile + touchesSuffix) // of another life
	}
	if s.binary.Jailer == "" && !s.driver.opts.Unjailed {
		return nil, wrenn.Errorf(wrenn.KindInternal, "Firecracker %s has no jailer of the same version beside it; install it, or set AGENT_ALLOW_UNJAILED=1", s.binary.Version)
	}
	own, made, err := s.cfg.OpenMemory(ctx)
	s.madeMemory = made
	if err != nil {
		return nil, err
	}
	own.Close()
	for _, disk := range s.cfg.Disks {
		if err := grow(disk); err != nil {
			return nil, err
		}
	}
	return s.binds(ctx)
}

// makeDir makes the directory of the process. Each has a name of its own: cleaning up after one spares the next.
func (s *starting) makeDir() error {
	var random [8]byte
	_, _ = rand.Read(random[:])
	name := "fc-" + hex.EncodeToString(random[:])
	// No host has a socket of this name: until the process is in its jail, its root is the host's.
	s.socket = filepath.Join(socketFolder, name+socketSuffix)
	s.dir = filepath.Join(s.cfg.Dir, name)
	if err := os.MkdirAll(s.path(jailFolder), 0o711); err != nil {
		return vm.FileError(err, "the directory")
	}
	for _, name := range []string{consoleFile, logFile, metricsFile} {
		if err := unix.Mkfifo(s.path(name), 0o600); err != nil {
			return fmt.Errorf("make %s: %w", name, err)
		}
	}
	var err error
	if s.stderr, err = vmproc.BoundedFile("firecracker-stderr", vmproc.WordsLimit); err != nil {
		return err
	}
	// Open for reading, too, until the VMM is attended: a FIFO without a reader cannot be opened for writing.
	if s.reader, err = os.OpenFile(s.path(consoleFile), os.O_RDWR, 0); err != nil {
		return err
	}
	s.console, err = os.OpenFile(s.path(consoleFile), os.O_WRONLY, 0)
	return err
}

func (s *starting) limits() (vmproc.Limits, error) {
	mb := s.cfg.MemoryMB + s.cfg.MemoryMB*overheadPerMille/1000 + overheadMB
	l := vmproc.Limits{CPUs: float64(s.cfg.VCPUs) + extraCPUs, PIDs: s.cfg.VCPUs + maxThreads}
	if s.paged() {
		mb += uffd.OverheadMB
		l.PIDs += uffd.Threads
	}
	l.MemoryBytes = int64(mb) << 20
	all := s.driver.opts.Disk.All(len(s.cfg.Disks))
	var err error
	l.IO, err = vmproc.NewIO(s.cfg.Dir, all.BytesPerSec, all.OpsPerSec)
	return l, vm.FileError(err, "the directory")
}

func grow(disk vm.Disk) error {
	info, err := os.Stat(disk.Path)
	if err == nil && disk.GrowTo > info.Size() {
		err = os.Truncate(disk.Path, disk.GrowTo)
	}
	return vm.FileError(err, "the disk")
}

func (s *starting) handle() vm.Handle {
	h := vm.Handle{
		Version: 1, Driver: Name, PID: s.proc.PID, StartTime: s.proc.StartTime, BootID: s.proc.BootID,
		Socket: s.proc.Path(s.socket), Dir: s.cfg.Dir, Memory: s.cfg.MemoryFile, MemoryMB: s.cfg.MemoryMB,
		VCPUs: s.cfg.VCPUs, Disks: len(s.cfg.Disks), Console: s.cfg.Console, Cgroup: s.cfg.Cgroup,
		StartedAt: time.Now().UTC(), VMMVersion: s.binary.Version,
	}
	if s.pager != nil {
		h.PagerPID, h.PagerStartTime = s.pager.PID, s.pager.StartTime
	}
	return h
}

// ready waits until Firecracker answers, gives it the configuration or the snapshot, and lets the guest run unless
// it shall be frozen: a cold one that was not started is.
func (s *starting) ready(ctx context.Context, h vm.Handle) error {
	c, err := s.connect(ctx, h)
	if err != nil {
		return err
	}
	defer c.close()
	if s.cfg.Restore == nil {
		err = c.all(ctx, coldStart(s.cfg, limiter(s.driver.opts.Disk), s.binary.version)...)
	} else {
		err = s.restore(ctx, c)
	}
	if err != nil || s.cfg.Frozen {
		return err
	}
	return run(ctx, c)
}

func (s *starting) connect(ctx context.Context, h vm.Handle) (*client, error) {
	c := connect(h.Socket)
	for {
		_, err := c.describe(ctx)
		if err == nil {
			return c, nil
		}
		if alive, aliveErr := s.proc.Alive(); !alive {
			c.close()
			return nil, errors.Join(errors.New("the VMM ended"), aliveErr)
		}
		select {
		case <-ctx.Done():
			c.close()
			return nil, fmt.Errorf("%w: %w", ctx.Err(), err)
		case <-time.After(pollEvery): // nothing tells when a socket appears in a root directory that is being built
		}
	}
}

func (s *starting) restore(ctx context.Context, c *client) error {
	memory := memoryBackend{Type: "File", Path: memoryPath}
	switch {
	case s.paged():
		memory = memoryBackend{Type: "Uffd", Path: pagesPath}
	case s.cfg.SharedMemory:
		memory.Path = mappedPath
	}
	err := c.do(ctx, restore(memory, s.binary.version), nil)
	var refused *fault
	if errors.As(err, &refused) {
		return wrenn.Wrap(err, wrenn.KindInvalidRequest, "the snapshot cannot be restored: it is damaged, or was made on another kind of host")
	}
	if err != nil {
		return err
	}
	for i, disk := range s.cfg.Disks {
		if err := c.do(ctx, updateDisk(i, disk, limiter(s.driver.opts.Disk)), nil); err != nil {
			return err
		}
	}
	return nil
}

// limiter is the rate limiter of each drive: buckets for a second, which let through everything if they are empty.
func limiter(l vm.DiskLimits) rateLimiter {
	bucket := func(perSec int64) tokenBucket {
		if perSec == 0 {
			return tokenBucket{}
		}
		return tokenBucket{Size: perSec, RefillMS: 1000}
	}
	return rateLimiter{Bandwidth: bucket(l.BytesPerSec), Ops: bucket(l.OpsPerSec)}
}

func (s *starting) undo() error {
	memory := ""
	if s.madeMemory {
		memory = s.cfg.MemoryFile
	}
	errs := []error{s.doomPager(), vmproc.Undo(s.proc, s.cgroup, memory), s.reapPager()}
	for _, f := range []*os.File{s.stderr, s.reader, s.console} {
		if f != nil {
			_ = f.Close() // may be closed already
		}
	}
	if s.dir != "" {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return errors.Join(errs...)
}

// reap waits for the end of a process and keeps its last words.
func (d *Driver) reap(p *vmproc.Process, stderr *os.File) {
	defer stderr.Close()
	if err := p.Reap(); err != nil {
		d.opts.Log.Warn("cannot reap a VMM", "pid", p.PID, "err", err)
	}
	if words := vmproc.LastWords(stderr); words != "" {
		d.opts.Log.Warn("the VMM said something", "pid", p.PID, "stderr", words)
	}
}
