//go:build linux

package uffd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
)

// OverheadMB and Threads are what a page server takes beside its VM, for the limits of their cgroup.
const (
	OverheadMB = 32
	Threads    = 16
)

// Options of Launch.
type Options struct {
	Program []string // that is a page server, when its next argument is Command: path and arguments
	ID      string   // of the VM, for process titles
	Memory  string   // the memory file
	Touches string   // where the order of first touches is kept
	Socket  string   // made for the VMM
	Jail    string   // a directory made for the server's jail; "" for none (tests)
	Stderr  *os.File

	UID, GID  int
	NetnsPath string
	Cgroup    *vmproc.Cgroup
}

// Available tells why there is no userfaultfd on this host that serves a kernel's faults, too.
func Available() error {
	if _, err := os.Stat("/dev/userfaultfd"); err == nil {
		return nil
	}
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		return fmt.Errorf("userfaultfd: %w", errno)
	}
	return unix.Close(int(fd))
}

// Launch starts a page server, which waits at its socket. The VMM must be started beneath it. The caller must reap it
// with Process.Reap.
func Launch(opts Options) (*vmproc.Process, error) {
	memory, err := os.Open(opts.Memory)
	if err != nil {
		return nil, err
	}
	defer memory.Close()
	info, err := memory.Stat()
	if err != nil {
		return nil, err
	}
	listener, err := listen(opts.Socket, opts.UID, opts.GID)
	if err != nil {
		return nil, fmt.Errorf("listen for the VMM: %w", err)
	}
	defer listener.Close()
	files, mode := []*os.File{memory, listener}, noTouches
	if touched, write := openTouches(opts.Touches, uint64(info.Size())); touched != nil { //nolint:gosec // of a file
		defer touched.Close()
		if files, mode = append(files, touched), useTouches; write {
			mode = noteTouches
		}
	}
	spec := vmproc.Spec{
		Path: opts.Program[0], Args: append(opts.Program[1:len(opts.Program):len(opts.Program)], Command, opts.ID, mode), Files: files,
		Stderr: opts.Stderr, UID: opts.UID, GID: opts.GID, NetnsPath: opts.NetnsPath, Cgroup: opts.Cgroup,
	}
	if opts.Jail != "" {
		const program = "/page-server"
		if err := os.Mkdir(opts.Jail, 0o711); err != nil {
			return nil, err
		}
		spec.Jail = &vmproc.Jail{Dir: opts.Jail, Binds: []vmproc.Bind{{From: spec.Path, To: program}}}
		spec.Path = program
	}
	return vmproc.Launch(spec)
}

// listen makes a socket that one uid may connect to. Its path may be longer than a socket's address.
func listen(path string, uid, gid int) (*os.File, error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	short := fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path))
	if err = unix.Bind(fd, &unix.SockaddrUnix{Name: short}); err == nil {
		err = errors.Join(os.Chmod(path, 0o600), os.Chown(path, uid, gid), unix.Listen(fd, 1))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
