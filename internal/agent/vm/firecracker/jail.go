//go:build linux

package firecracker

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
)

// Paths in the jail. Those of disks are part of snapshots and may never change.
const (
	kernelPath   = "/kernel"
	initrdPath   = "/initrd"
	memoryPath   = "/memory"        // the VM's own file
	mappedPath   = "/shared-memory" // the snapshot's, where others are restored from it as well
	statePath    = "/state"
	newStatePath = "/out/state"
	logPath      = "/log"
	metricsPath  = "/metrics"
	pagesPath    = "/pages.sock" // of the page server
	socketFolder = "/run"
	socketSuffix = ".sock"
)

func diskPath(i int) string { return fmt.Sprintf("/disk%d", i) }

// binds are the files of the VM in its jail. The VMM's uid gets those that it alone uses; what it only reads it is
// given to read by a mount that nothing can be written through.
func (s *starting) binds(ctx context.Context) ([]vmproc.Bind, error) {
	var binds []vmproc.Bind
	var err error
	own := func(from, to string) {
		if err == nil {
			err = s.give(from)
		}
		binds = append(binds, vmproc.Bind{From: from, To: to, Writable: true})
	}
	read := func(from, to, what string) {
		if err == nil {
			from, err = s.readable(ctx, from, what)
		}
		binds = append(binds, vmproc.Bind{From: from, To: to})
	}
	own(s.cfg.MemoryFile, memoryPath)
	own(s.path(logFile), logPath)
	own(s.path(metricsFile), metricsPath)
	for i, disk := range s.cfg.Disks {
		if disk.ReadOnly {
			read(disk.Path, diskPath(i), "the disk")
			continue
		}
		own(disk.Path, diskPath(i))
	}
	switch {
	case s.cfg.Restore == nil:
		read(s.kernel, kernelPath, "the kernel")
		if s.cfg.Initrd != "" {
			read(s.cfg.Initrd, initrdPath, "the initramfs")
		}
	case s.cfg.SharedMemory && !s.paged():
		binds = append(binds, vmproc.Bind{From: s.cfg.Restore.Memory, To: mappedPath})
		err = errorsFirst(err, publish(s.cfg.Restore.Memory))
		fallthrough
	default:
		own(s.path(stateFile), statePath)
	}
	return binds, err
}

func errorsFirst(first, second error) error {
	if first != nil {
		return first
	}
	return second
}

// give makes a file the VMM's.
func (s *starting) give(path string) error {
	if err := os.Chmod(path, 0o600); err != nil {
		return vm.FileError(err, "a file")
	}
	return os.Chown(path, s.cfg.UID, s.cfg.GID)
}

// publish lets every uid read a file that VMMs of several uids map. By its path nobody reaches it: the directories
// of sandboxes are closed to others.
func publish(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return vm.FileError(err, "the snapshot's memory")
	}
	if info.Mode().Perm()&0o004 != 0 {
		return nil
	}
	return os.Chmod(path, info.Mode().Perm()|fs.FileMode(0o004))
}

// readable is a file that the VMM may read: the one that is asked for, or a clone of it if that is closed to others.
func (s *starting) readable(ctx context.Context, path, what string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", vm.FileError(err, what)
	}
	if info.Mode().Perm()&0o004 != 0 {
		return path, nil
	}
	s.clones++
	clone := s.path("clone-" + strconv.Itoa(s.clones))
	if err := storage.CloneFile(ctx, path, clone); err != nil {
		return "", err
	}
	return clone, s.give(clone)
}

// spec is how the process is started: by the jailer of its release, or in the launcher's own jail.
func (s *starting) spec(binds []vmproc.Bind) vmproc.Spec {
	jail := &vmproc.Jail{Dir: s.path(jailFolder), Binds: binds, Folders: []string{socketFolder, filepath.Dir(newStatePath)}}
	id := strings.NewReplacer(".", "-", "_", "-").Replace(s.cfg.ID)
	id = id[:min(len(id), 60)]
	args := []string{
		"--api-sock", s.socket, "--log-path", logPath, "--level", "Warning", "--show-level", "--metrics-path", metricsPath,
	}
	spec := vmproc.Spec{
		Stdout: s.console, Stderr: s.stderr, UID: s.cfg.UID, GID: s.cfg.GID,
		NetnsPath: s.cfg.Net.NetnsPath, Cgroup: s.cgroup, Jail: jail, Beneath: s.pager,
	}
	if s.binary.Jailer == "" {
		const program = "/firecracker"
		jail.Binds = append(jail.Binds, vmproc.Bind{From: s.binary.Path, To: program})
		jail.Devices = devices()
		spec.Path, spec.Args = program, append([]string{"--id", id}, args...)
		return spec
	}
	jail.ByProgram, jail.Root = true, filepath.Join(filepath.Base(s.binary.Path), id, "root")
	spec.Path = s.binary.Jailer
	spec.Args = append([]string{
		"--id", id, "--exec-file", s.binary.Path, "--uid", strconv.Itoa(s.cfg.UID), "--gid", strconv.Itoa(s.cfg.GID),
		"--chroot-base-dir", jail.Dir, "--resource-limit", "no-file=" + strconv.Itoa(vmproc.MaxFiles), "--",
	}, args...)
	return spec
}

// devices are those that the jailer would make.
func devices() []string {
	all := []string{"/dev/kvm", "/dev/net/tun", "/dev/urandom"}
	if _, err := os.Stat("/dev/userfaultfd"); err == nil {
		all = append(all, "/dev/userfaultfd")
	}
	return all
}
