//go:build linux

package vmproc

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Limits of a cgroup.
type Limits struct {
	MemoryBytes int64
	CPUs        float64
	PIDs        int
	IO          IO
}

// Hierarchy is where this host's cgroup controllers are: the unified one (v2) if it has them, else one
// directory per controller (v1).
type Hierarchy struct {
	unified string            // mount point, "" if v1 is used
	v1      map[string]string // controller → mount point
	io      string            // name of the controller for disks, "" if there is none
}

// needed are the controllers without which no VM is run.
func needed() []string { return []string{"cpu", "memory", "pids"} }

// controllers are the ones that bound a VMM.
func (h *Hierarchy) controllers() []string {
	if h.io == "" {
		return needed()
	}
	return append(needed(), h.io)
}

// FindHierarchy looks at the mounts of this process. Its error names the controller that is missing.
func FindHierarchy() (*Hierarchy, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	defer f.Close()
	h := &Hierarchy{v1: map[string]string{}}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields, tail := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(tail) < 3 {
			continue
		}
		switch tail[0] {
		case "cgroup2":
			if have := controllersAt(fields[4]); missing(have) == "" {
				h.unified = fields[4]
				if slices.Contains(have, ioV2) {
					h.io = ioV2
				}
			}
		case "cgroup":
			for option := range strings.SplitSeq(tail[2], ",") {
				h.v1[option] = fields[4]
			}
		}
	}
	if h.unified != "" {
		return h, nil
	}
	if c := missing(slices.Collect(maps.Keys(h.v1))); c != "" {
		return nil, fmt.Errorf("no cgroup controller %q is mounted, neither v2 nor v1", c)
	}
	if h.v1[ioV1] != "" {
		h.io = ioV1
	}
	return h, nil
}

// controllersAt are those of the unified hierarchy.
func controllersAt(mount string) []string {
	b, err := os.ReadFile(filepath.Join(mount, "cgroup.controllers"))
	if err != nil {
		return nil
	}
	return strings.Fields(string(b))
}

// missing is a controller that is needed and not there, "" if all are.
func missing(have []string) string {
	for _, c := range needed() {
		if !slices.Contains(have, c) {
			return c
		}
	}
	return ""
}

// Version is 2 or 1.
func (h *Hierarchy) Version() int {
	if h.unified != "" {
		return 2
	}
	return 1
}

// Cgroup is one cgroup, PARENT/NAME below the root of each hierarchy. Its parent holds nothing but such.
type Cgroup struct {
	h            *Hierarchy
	parent, name string
}

// Cgroup names a cgroup, which need not exist.
func (h *Hierarchy) Cgroup(parent, name string) *Cgroup { return &Cgroup{h, parent, name} }

// dirs maps each directory of the cgroup to one of its controllers ("" for the unified one).
func (c *Cgroup) dirs() map[string]string {
	if c.h.unified != "" {
		return map[string]string{filepath.Join(c.h.unified, c.parent, c.name): ""}
	}
	out := map[string]string{}
	for _, ctl := range c.h.controllers() {
		out[filepath.Join(c.h.v1[ctl], c.parent, c.name)] = ctl
	}
	return out
}

// Path is the directory that has the named controller's files.
func (c *Cgroup) Path(controller string) string {
	if c.h.unified != "" {
		return filepath.Join(c.h.unified, c.parent, c.name)
	}
	return filepath.Join(c.h.v1[controller], c.parent, c.name)
}

// Ensure makes the cgroup with the given limits; one that is there gets them.
func (c *Cgroup) Ensure(l Limits) error {
	if c.h.unified != "" {
		if err := c.delegate(); err != nil {
			return err
		}
	}
	for dir := range c.dirs() {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make cgroup: %w", err)
		}
	}
	if err := c.yield(); err != nil {
		return err
	}
	for _, s := range c.settings(l) {
		err := set(filepath.Join(c.Path(s.controller), s.file), s.value)
		if err != nil && (!s.optional || !errors.Is(err, fs.ErrNotExist)) {
			return fmt.Errorf("limit cgroup: %w", err)
		}
	}
	return c.limitIO(l.IO)
}

// set writes a file of a cgroup. One that is not there must not be asked to be made: the kernel refuses that, in words
// that do not say so.
func set(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// yield puts all VMs together behind what else the host does: half the weight of one service. The agent and the
// control plane need little CPU and disk, but at once. In v1 a group has the weight of one process of the root group,
// which is behind enough.
func (c *Cgroup) yield() error {
	files := map[string]string{"cpu.weight": "50", "io.weight": "50"}
	if c.h.unified == "" {
		files = map[string]string{"cpu.shares": "1024", "blkio.weight": "250", "blkio.bfq.weight": "50"}
	}
	parent := &Cgroup{h: c.h, parent: c.parent}
	for file, weight := range files {
		controller, _, _ := strings.Cut(file, ".")
		if !slices.Contains(c.h.controllers(), controller) {
			continue
		}
		// Weights of disks are there for some schedulers only.
		if err := set(filepath.Join(parent.Path(controller), file), weight); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("set %s of all VMs: %w", file, err)
		}
	}
	return nil
}

// delegate turns the controllers on for the children of the root and of the parent.
func (c *Cgroup) delegate() error {
	parent := filepath.Join(c.h.unified, c.parent)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return fmt.Errorf("make cgroup: %w", err)
	}
	on := []byte("+" + strings.Join(c.h.controllers(), " +"))
	for dir := c.h.unified; ; {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), on, 0); err != nil {
			return fmt.Errorf("turn cgroup controllers on: %w", err)
		}
		if dir == parent {
			return nil
		}
		rest := strings.TrimPrefix(strings.TrimPrefix(parent, dir), "/")
		next, _, _ := strings.Cut(rest, "/")
		dir = filepath.Join(dir, next)
	}
}

// NewCgroup makes the cgroup of a VM that is about to start. One that has a process is another VM's.
func NewCgroup(parent, name string, l Limits) (*Cgroup, error) {
	h, err := FindHierarchy()
	if err != nil {
		return nil, wrenn.Wrap(err, wrenn.KindInternal, "this host has no cgroups for cpu, memory and pids; mount them")
	}
	c := h.Cgroup(parent, name)
	pids, err := c.PIDs()
	if err != nil {
		return nil, err
	}
	if len(pids) > 0 {
		return nil, wrenn.Errorf(wrenn.KindInvalidState, "a VM of this name runs already; destroy it first")
	}
	// An empty one that a crash left has the limits of another VM, and v1 does not let all be raised in place.
	if err := c.Remove(); err != nil {
		return nil, err
	}
	return c, c.Ensure(l)
}

// RemoveCgroup removes the cgroup of a VM that is gone, and leaves one alone that a later VM of the same name
// lives in. A handle may name none.
func RemoveCgroup(parent, name string, own ...int) error {
	if name == "" {
		return nil
	}
	h, err := FindHierarchy()
	if err != nil {
		return err
	}
	c := h.Cgroup(parent, name)
	pids, err := c.PIDs()
	if err != nil || slices.ContainsFunc(pids, func(p int) bool { return !slices.Contains(own, p) }) {
		return err
	}
	return c.Remove()
}

type setting struct {
	controller, file, value string
	optional                bool // where the kernel has no such file (swap accounting off)
}

const cpuPeriodUsec = 100_000

func (c *Cgroup) settings(l Limits) []setting {
	mem, pids := strconv.FormatInt(l.MemoryBytes, 10), strconv.Itoa(l.PIDs)
	quota := strconv.FormatInt(int64(l.CPUs*cpuPeriodUsec), 10)
	period := strconv.Itoa(cpuPeriodUsec)
	if c.h.unified != "" {
		return []setting{
			{"memory", "memory.max", mem, false},
			{"memory", "memory.swap.max", "0", true},
			{"memory", "memory.oom.group", "1", true},
			{"cpu", "cpu.max", quota + " " + period, false},
			{"pids", "pids.max", pids, false},
		}
	}
	return []setting{
		{"memory", "memory.limit_in_bytes", mem, false},
		{"memory", "memory.memsw.limit_in_bytes", mem, true},
		{"cpu", "cpu.cfs_period_us", period, false},
		{"cpu", "cpu.cfs_quota_us", quota, false},
		{"pids", "pids.max", pids, false},
	}
}

// apply makes the child of this thread start inside the cgroup: by clone3 (v2), or by moving the thread,
// which is about to be thrown away, itself (v1).
func (c *Cgroup) apply(attr *syscall.SysProcAttr) error {
	if c.h.unified != "" {
		fd, err := unix.Open(c.Path(""), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open cgroup: %w", err)
		}
		attr.UseCgroupFD, attr.CgroupFD = true, fd
		return nil
	}
	tid := []byte(strconv.Itoa(unix.Gettid()))
	for dir := range c.dirs() {
		if err := os.WriteFile(filepath.Join(dir, "tasks"), tid, 0); err != nil {
			return fmt.Errorf("join cgroup: %w", err)
		}
	}
	return nil
}

// removeTimeout bounds the wait for a dying process to leave its cgroup.
const removeTimeout = 5 * time.Second

// Remove removes the cgroup when its last process has left it; one that is not there is success.
func (c *Cgroup) Remove() error {
	deadline := time.Now().Add(removeTimeout)
	for dir := range c.dirs() {
		for wait := time.Millisecond; ; wait *= 2 {
			err := unix.Rmdir(dir)
			if err == nil || errors.Is(err, unix.ENOENT) {
				break
			}
			if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
				return fmt.Errorf("remove cgroup %s: %w", dir, err)
			}
			// A killed process leaves its cgroup in the kernel's own time, and there is no event for it in v1.
			time.Sleep(min(wait, 50*time.Millisecond))
		}
	}
	return nil
}

// PIDs lists the processes in the cgroup.
func (c *Cgroup) PIDs() ([]int, error) {
	b, err := os.ReadFile(filepath.Join(c.Path("pids"), "cgroup.procs"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list cgroup: %w", err)
	}
	var pids []int
	for word := range strings.FieldsSeq(string(b)) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			return nil, fmt.Errorf("list cgroup: %w", err)
		}
		// A thread about to be thrown away belongs to the launching process itself.
		if pid <= 0 || pid == os.Getpid() {
			continue
		}
		// KVM puts a thread of its own beside each VMM, which ends with the VM.
		if stat, err := readStat(pid); err == nil && stat.kernel {
			continue
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// Children lists the names of the cgroups below parent.
func (h *Hierarchy) Children(parent string) ([]string, error) {
	seen := map[string]bool{}
	var names []string
	for dir := range h.Cgroup(parent, "").dirs() {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("list cgroups: %w", err)
		}
		for _, e := range entries {
			if e.IsDir() && !seen[e.Name()] {
				seen[e.Name()] = true
				names = append(names, e.Name())
			}
		}
	}
	return names, nil
}

// Kill ends every process in the cgroup and removes it.
func (c *Cgroup) Kill() error {
	pids, err := c.PIDs()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill %d: %w", pid, err)
		}
	}
	return c.Remove()
}

// Sweep ends every process in the cgroups below parent whose name is not to be kept, and removes them, and
// parent itself if nothing is left in it. It returns how many cgroups still had a process. Nothing may
// be launched below parent meanwhile.
func Sweep(parent string, keep func(name string) bool) (ended int, err error) {
	h, err := FindHierarchy()
	if err != nil {
		return 0, err
	}
	names, err := h.Children(parent)
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, name := range names {
		if keep(name) {
			continue
		}
		c := h.Cgroup(parent, name)
		pids, err := c.PIDs()
		if len(pids) > 0 {
			ended++
		}
		errs = append(errs, err, c.Kill())
	}
	for dir := range h.Cgroup(parent, "").dirs() {
		_ = unix.Rmdir(dir) // refused while there are kept ones
	}
	return ended, errors.Join(errs...)
}
