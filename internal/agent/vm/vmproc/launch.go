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
	// Stdout and Stderr may be nil: /dev/null. Standard input always is.
	Stdout, Stderr *os.File

	UID, GID  int
	NetnsPath string  // network namespace to run in
	Cgroup    *Cgroup // joined before the program's first instruction; nil for none (probe)
	Jail      *Jail   // nil: the host's root (tests)
	// Beneath puts the process into the pid namespace that this one, launched before, is the first of: the kernel
	// kills it when that one ends, however it ends and whoever is there to see it. nil: a namespace of its own.
	Beneath *Process
}

// MaxFiles bounds the descriptors of a VMM: its own files, eventfds and worker threads.
const MaxFiles = 1024

// Launch starts the process and returns what names it. The caller must reap it with Process.Reap.
//
// A thread of this process is made into what the child shall be (namespaces, cgroup, no_new_privs,
// bounding set: all of them are attributes of a thread), forks it and is thrown away. This costs
// no second program start, and the child never runs an instruction outside its confinement.
func Launch(spec Spec) (*Process, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0) // the jail has none
	if err != nil {
		return nil, err
	}
	defer null.Close()
	var proc *os.Process
	err = onThrowawayThread(func() error {
		attr, err := prepareThread(spec)
		if err != nil {
			return err
		}
		proc, err = start(spec, attr, null)
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
	// The first process of a pid namespace: it sees no other process, and none that it might start outlives it.
	attr := &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWIPC}
	if spec.Beneath != nil {
		attr.Cloneflags &^= unix.CLONE_NEWPID
		if err := enterNamespace(fmt.Sprintf("/proc/%d/ns/pid", spec.Beneath.PID), unix.CLONE_NEWPID); err != nil {
			return nil, err
		}
	}
	if spec.NetnsPath != "" {
		if err := enterNamespace(spec.NetnsPath, unix.CLONE_NEWNET); err != nil {
			return nil, err
		}
	}
	if spec.Cgroup != nil {
		if err := spec.Cgroup.apply(attr); err != nil {
			return nil, err
		}
	}
	byProgram := spec.Jail != nil && spec.Jail.ByProgram
	if spec.Jail != nil {
		if err := spec.Jail.build(spec.UID, spec.GID); err != nil {
			return nil, fmt.Errorf("build the jail: %w", err)
		}
	}
	// A root that no longer can gain anything: only tests and probes run a VMM as root.
	if spec.UID != 0 || spec.GID != 0 {
		var keep []uintptr
		if byProgram {
			keep = launcherCaps()
		} else {
			attr.Credential = &syscall.Credential{Uid: uint32(spec.UID), Gid: uint32(spec.GID)}
		}
		if err := dropCapabilities(keep); err != nil {
			return nil, err
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("set no_new_privs: %w", err)
	}
	return attr, nil
}

// dropCapabilities takes all but these from what a program started by this thread may ever have.
func dropCapabilities(keep []uintptr) error {
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		if slices.Contains(keep, c) {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	return nil
}

// enterNamespace makes a namespace this thread's, or, one of pids, that of what it forks.
func enterNamespace(path string, kind int) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open namespace %s: %w", path, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, kind); err != nil {
		return fmt.Errorf("enter namespace %s: %w", path, err)
	}
	return nil
}

func start(spec Spec, attr *syscall.SysProcAttr, null *os.File) (*os.Process, error) {
	stdout, stderr := spec.Stdout, spec.Stderr
	if stdout == nil {
		stdout = null
	}
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
		Files: slices.Concat([]*os.File{null, stdout, stderr}, spec.Files),
		Sys:   attr,
	})
}

// limit sets what a process cannot be born with from a thread: rlimits belong to whole processes. The
// program is still in its loader, and no guest runs yet.
func limit(pid int) error {
	for resource, value := range map[int]uint64{
		unix.RLIMIT_NOFILE: MaxFiles,
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
