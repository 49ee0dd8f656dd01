//go:build linux

// Package vmproc owns VMM processes as the host's kernel sees them: how one is started confined (own
// uid, network namespace, cgroup, session, no new privileges, no inherited descriptors), how it is told
// from another that got its pid, waited for and killed. It must not know what the process does: nothing
// of QEMU or Firecracker, sockets or guests belongs here.
package vmproc

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// Spec is a process to start.
type Spec struct {
	Path  string     // of the program, absolute
	Args  []string   // without the program's name
	Files []*os.File // become descriptors 3, 4, … of the process; nothing else is inherited
	// Stderr may be nil: /dev/null. Standard input and output always are.
	Stderr *os.File

	UID, GID  int
	NetnsPath string   // network namespace to run in
	Cgroup    *Cgroup  // joined before the program's first instruction; nil for none (probe)
	Devices   []string // host devices that UID may use, such as /dev/kvm, by nodes in a private mount namespace
	Dir       string   // a directory of the process's own, where Devices need to mount something
}

// maxFiles bounds the descriptors of a VMM: its own files, eventfds and worker threads.
const maxFiles = 1024

// Launch starts the process and returns what names it. The caller must reap it with Process.Reap.
//
// A thread of this process is made into what the child shall be (namespaces, cgroup, no_new_privs,
// bounding set: all of them are attributes of a thread), forks it and is thrown away. This costs
// no second program start, and the child never runs an instruction outside its confinement.
func Launch(spec Spec) (*Process, error) {
	var proc *os.Process
	err := onThrowawayThread(func() error {
		attr, err := prepareThread(spec)
		if err != nil {
			return err
		}
		proc, err = start(spec, attr)
		if attr.UseCgroupFD {
			unix.Close(attr.CgroupFD)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	p, err := identify(proc.Pid)
	if err == nil {
		err = limit(proc.Pid)
	}
	if err != nil {
		_ = proc.Kill()
		_, _ = proc.Wait()
		return nil, fmt.Errorf("process %d: %w", proc.Pid, err)
	}
	p.child = proc
	return p, nil
}

// onThrowawayThread runs fn on a thread that ends afterwards. The process's first thread cannot end, and
// the memory cgroup of a process is that of its first thread, so it is never used.
func onThrowawayThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if unix.Gettid() == os.Getpid() {
			// While this goroutine holds the first thread, the next one gets another.
			done <- onThrowawayThread(fn)
			runtime.UnlockOSThread()
			return
		}
		done <- fn()
	}()
	return <-done
}

func prepareThread(spec Spec) (*syscall.SysProcAttr, error) {
	attr := &syscall.SysProcAttr{Setsid: true}
	if spec.NetnsPath != "" {
		if err := enterNetns(spec.NetnsPath); err != nil {
			return nil, err
		}
	}
	if len(spec.Devices) > 0 {
		if err := privateDevices(spec); err != nil {
			return nil, err
		}
	}
	if spec.Cgroup != nil {
		if err := spec.Cgroup.apply(attr); err != nil {
			return nil, err
		}
	}
	// A root that no longer can gain anything: only tests and probes run a VMM as root.
	if spec.UID != 0 || spec.GID != 0 {
		attr.Credential = &syscall.Credential{Uid: uint32(spec.UID), Gid: uint32(spec.GID)}
		for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
				return nil, fmt.Errorf("drop capability %d: %w", c, err)
			}
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("set no_new_privs: %w", err)
	}
	return attr, nil
}

func enterNetns(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open namespace %s: %w", path, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter namespace %s: %w", path, err)
	}
	return nil
}

// privateDevices gives the process nodes of its own for the devices, in a mount namespace of its own: the
// host's nodes belong to root or a group, and nobody shall have to change that.
func privateDevices(spec Spec) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare mounts: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("wrenn", spec.Dir, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "size=64k,mode=0711"); err != nil {
		return fmt.Errorf("mount %s: %w", spec.Dir, err)
	}
	for _, dev := range spec.Devices {
		var st unix.Stat_t
		if err := unix.Stat(dev, &st); err != nil {
			return fmt.Errorf("device %s: %w", dev, err)
		}
		node := filepath.Join(spec.Dir, filepath.Base(dev))
		if err := unix.Mknod(node, unix.S_IFCHR|0o600, int(st.Rdev)); err != nil {
			return fmt.Errorf("make %s: %w", node, err)
		}
		if err := unix.Chown(node, spec.UID, spec.GID); err != nil {
			return fmt.Errorf("chown %s: %w", node, err)
		}
		if err := unix.Mount(node, dev, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s: %w", dev, err)
		}
	}
	return nil
}

func start(spec Spec, attr *syscall.SysProcAttr) (*os.Process, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	stderr := spec.Stderr
	if stderr == nil {
		stderr = null
	}
	// Descriptors that this process itself inherited are not marked; what Go opens always is.
	if err := unix.CloseRange(3, ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("mark descriptors: %w", err)
	}
	return os.StartProcess(spec.Path, slices.Concat([]string{spec.Path}, spec.Args), &os.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: slices.Concat([]*os.File{null, null, stderr}, spec.Files),
		Sys:   attr,
	})
}

// limit sets what a process cannot be born with from a thread: rlimits belong to whole processes. The
// program is still in its loader, and no guest runs yet.
func limit(pid int) error {
	for resource, value := range map[int]uint64{
		unix.RLIMIT_NOFILE: maxFiles,
		unix.RLIMIT_CORE:   0, // a core would hold the guest's memory
	} {
		lim := unix.Rlimit{Cur: value, Max: value}
		// Another uid's limits take CAP_SYS_RESOURCE, which not every root has (containers, units). The cgroup
		// bounds the process all the same.
		if err := unix.Prlimit(pid, resource, &lim, nil); err != nil && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("set resource limit %d: %w", resource, err)
		}
	}
	return nil
}
