//go:build linux

package qemu

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/netns"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/kernel"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// open opens everything that the VM consists of.
func (s *starting) open(ctx context.Context) (opened, error) {
	o := opened{cfg: s.cfg, limits: s.driver.opts.Disk, kvm: s.driver.verdict.KVM, version: s.driver.verdict.Version, tscKHz: s.driver.verdict.TSCkHz, kernel: -1, initrd: -1, tap: -1, state: -1}
	var err error
	if s.stderr, err = vmproc.BoundedFile("qemu-stderr", vmproc.WordsLimit); err != nil {
		return o, err
	}
	if err := s.openSockets(&o); err != nil {
		return o, err
	}
	if err := s.openMemory(ctx, &o); err != nil {
		return o, err
	}
	if s.cfg.Restore != nil {
		err = s.openState(&o)
	} else {
		err = s.openKernel(ctx, &o)
	}
	if err != nil {
		return o, err
	}
	for _, disk := range s.cfg.Disks {
		f, err := openDisk(disk)
		if err != nil {
			return o, err
		}
		o.disks = append(o.disks, s.inherit.add(f))
	}
	if s.cfg.Net.TAP != "" {
		f, err := openTAP(s.cfg.Net)
		if err != nil {
			return o, err
		}
		o.tap = s.inherit.add(f)
	}
	return o, nil
}

func (s *starting) openSockets(o *opened) error {
	var random [4]byte
	_, _ = rand.Read(random[:])
	// Every VM of a directory has sockets of its own name: cleaning up after one spares the next.
	s.socket = filepath.Join(s.cfg.Dir, "qmp-"+hex.EncodeToString(random[:])+".sock")
	s.madeSockets = true
	for path, fd := range map[string]*int{s.socket: &o.monitor, consoleSocket(s.socket): &o.console} {
		f, err := listen(path)
		if err != nil {
			return err
		}
		*fd = s.inherit.add(f)
	}
	return nil
}

// consoleSocket is beside the control socket.
func consoleSocket(control string) string {
	return filepath.Join(filepath.Dir(control), "console-"+strings.TrimPrefix(filepath.Base(control), "qmp-"))
}

func removeSockets(control string) error {
	for _, path := range []string{control, consoleSocket(control)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return wrenn.Wrap(err, wrenn.KindInternal, "cannot clean up after the VM")
		}
	}
	return nil
}

// listen makes a unix socket that nobody but root can connect to.
func listen(path string) (*os.File, error) {
	address, done, err := shortPath(path)
	if err != nil {
		return nil, err
	}
	defer done()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: address, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	ln.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	return ln.File()
}

// maxSocketPath is what fits sun_path.
const maxSocketPath = 107

// shortPath gives an address for a unix socket of which the path may be too long for one.
func shortPath(path string) (address string, done func(), err error) {
	if len(path) <= maxSocketPath {
		return path, func() {}, nil
	}
	dir, err := os.OpenFile(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path)), func() { dir.Close() }, nil
}

func (s *starting) openKernel(ctx context.Context, o *opened) error {
	path := s.cfg.Kernel
	if s.driver.opts.CacheDir != "" {
		vmlinux, err := kernel.Vmlinux(ctx, path, s.driver.opts.CacheDir)
		if err != nil {
			return err
		}
		path = vmlinux
	}
	f, err := openReadable(path)
	if err != nil {
		return vm.FileError(err, "the kernel")
	}
	o.kernel = s.inherit.add(f)
	if s.cfg.Initrd == "" {
		return nil
	}
	if f, err = openInitrd(s.cfg.Initrd); err != nil {
		return vm.FileError(err, "the initramfs")
	}
	o.initrd = s.inherit.add(f)
	return nil
}

// openReadable opens a file so that any uid may open it again by its descriptor: one that is closed to
// others is copied into memory.
func openReadable(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil || fi.Mode().Perm()&0o004 != 0 {
		return f, err
	}
	defer f.Close()
	return inMemory(f)
}

// openInitrd is openReadable for an initramfs, which ends where a page does: one that does not is copied into memory and
// gets zeros behind it. QEMU gives a kernel that is an ELF its initramfs in the last pages of memory, and SeaBIOS 1.16.3
// and later has its ACPI tables in the last of them: what the initramfs leaves of it is a whole page then.
func openInitrd(path string) (*os.File, error) {
	f, err := openReadable(path)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil || fi.Size()%pageSize == 0 {
		return f, err
	}
	defer f.Close()
	mem, err := inMemory(f)
	if err != nil {
		return nil, err
	}
	if err := mem.Truncate((fi.Size()/pageSize + 1) * pageSize); err != nil {
		mem.Close()
		return nil, err
	}
	return mem, nil
}

// inMemory is a copy of a file that has no name.
func inMemory(f *os.File) (*os.File, error) {
	fd, err := unix.MemfdCreate(filepath.Base(f.Name()), unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	mem := os.NewFile(uintptr(fd), f.Name())
	if _, err := io.Copy(mem, f); err != nil {
		mem.Close()
		return nil, err
	}
	return mem, nil
}

func openDisk(disk vm.Disk) (*os.File, error) {
	flags := os.O_RDWR
	if disk.ReadOnly {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(disk.Path, flags, 0)
	return f, vm.FileError(err, "the disk")
}

// openTAP attaches to the TAP inside its namespace.
func openTAP(n vm.Net) (*os.File, error) {
	var f *os.File
	err := netns.Do(n.NetnsPath, func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), n.TAP)
		req, err := unix.NewIfreq(n.TAP)
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	})
	if err != nil {
		if f != nil {
			f.Close()
		}
		return nil, fmt.Errorf("open %s: %w", n.TAP, err)
	}
	return f, nil
}
