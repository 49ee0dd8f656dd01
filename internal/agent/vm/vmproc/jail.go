//go:build linux

package vmproc

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Jail is a root directory of a process's own: a small file system in memory with what the process needs
// and nothing else, in a mount namespace that nobody else has. It ends with the process, whatever becomes
// of the agent: nothing of it is ever to be cleaned up on the host. The agent reaches into it by Path.
type Jail struct {
	Dir     string   // a directory of the host, over which the jail is mounted in that namespace
	Root    string   // the root directory, relative to Dir; "" is Dir itself
	Binds   []Bind   // files and directories of the host
	Folders []string // made in the jail, and the process's own
	Devices []string // host devices that the process may use, such as /dev/kvm
	// Proc gives the process a /proc that shows its own entry and no other (hidepid, subset=pid).
	Proc bool
	// ByProgram is set for a launcher that enters Root, makes its devices and takes the uid by itself
	// (Firecracker's jailer). It starts in the host's root, as root with the capabilities for that.
	ByProgram bool
}

// Bind shows a file or directory of the host in the jail.
type Bind struct {
	From, To string // To is absolute in the jail
	Writable bool
}

// jailSize bounds what the jail's own file system takes of memory: Firecracker's jailer copies its program in.
const jailSize = "size=32m,nr_inodes=4k,mode=0711"

// launcherCaps are what a launcher needs to confine a process.
func launcherCaps() []uintptr {
	return []uintptr{
		unix.CAP_SYS_ADMIN, unix.CAP_SYS_CHROOT, unix.CAP_MKNOD, unix.CAP_CHOWN, unix.CAP_FOWNER,
		unix.CAP_DAC_OVERRIDE, unix.CAP_SETUID, unix.CAP_SETGID,
	}
}

// Path is where the agent finds a path of a jailed process's own root.
func (p *Process) Path(inside string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", p.PID), inside)
}

// build makes the jail for this thread and what it forks.
func (j Jail) build(uid, gid int) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare mounts: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("wrenn", j.Dir, "tmpfs", unix.MS_NOSUID, jailSize); err != nil {
		return fmt.Errorf("mount %s: %w", j.Dir, err)
	}
	root := filepath.Join(j.Dir, j.Root)
	if err := os.MkdirAll(root, 0o711); err != nil {
		return err
	}
	for _, b := range j.Binds {
		if err := b.mount(root); err != nil {
			return fmt.Errorf("bind %s: %w", b.From, err)
		}
	}
	for _, dev := range j.Devices {
		if err := makeDevice(root, dev, uid, gid); err != nil {
			return fmt.Errorf("device %s: %w", dev, err)
		}
	}
	for _, folder := range j.Folders {
		folder = filepath.Join(root, folder)
		if err := os.MkdirAll(folder, 0o700); err != nil {
			return err
		}
		if err := os.Chown(folder, uid, gid); err != nil {
			return err
		}
	}
	if j.Proc {
		if err := mountProc(root); err != nil {
			return err
		}
	}
	if j.ByProgram {
		return nil
	}
	return enter(root)
}

func (b Bind) mount(root string) error {
	info, err := os.Stat(b.From)
	if err != nil {
		return err
	}
	target := filepath.Join(root, b.To)
	if err := os.MkdirAll(filepath.Dir(target), 0o711); err != nil {
		return err
	}
	if info.IsDir() {
		err = os.MkdirAll(target, 0o711)
	} else {
		err = os.WriteFile(target, nil, 0)
	}
	if err != nil {
		return err
	}
	if err := unix.Mount(b.From, target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	flags := uintptr(unix.MS_REMOUNT | unix.MS_BIND | unix.MS_NOSUID | unix.MS_NODEV)
	if !b.Writable {
		flags |= unix.MS_RDONLY
	}
	return unix.Mount("", target, "", flags, "")
}

// makeDevice makes a node of the process's own: the host's belong to root or a group, and nobody shall have
// to change that.
func makeDevice(root, dev string, uid, gid int) error {
	var st unix.Stat_t
	if err := unix.Stat(dev, &st); err != nil {
		return err
	}
	node := filepath.Join(root, dev)
	if err := os.MkdirAll(filepath.Dir(node), 0o711); err != nil {
		return err
	}
	if err := unix.Mknod(node, unix.S_IFCHR|0o600, int(st.Rdev)); err != nil {
		return err
	}
	return os.Chown(node, uid, gid)
}

func mountProc(root string) error {
	target := filepath.Join(root, "proc")
	if err := os.Mkdir(target, 0o555); err != nil {
		return err
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if err := unix.Mount("proc", target, "proc", flags, "hidepid=invisible,subset=pid"); err != nil {
		return fmt.Errorf("mount a private /proc (needs Linux 5.8): %w", err)
	}
	return nil
}

// enter makes root this thread's root, and the host's file systems unreachable (pivot_root(2), "pivot_root(".", ".")").
func enter(root string) error {
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the host's root: %w", err)
	}
	return unix.Chdir("/")
}
