package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// earlyMounts are needed by the initramfs too; switching roots carries them along.
func earlyMounts() []mount {
	return []mount{
		{"proc", "/proc", "proc", safe, ""},
		{"sysfs", "/sys", "sysfs", safe, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	}
}

// lateMounts complete the real root. /tmp is ordinary: what is in it belongs to the disk and survives.
func lateMounts() []mount {
	return []mount{
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"},
		{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755,size=25%"},
		{"tmpfs", "/run/lock", "tmpfs", safe, "mode=1777,size=5m"},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", safe, "nsdelegate"},
	}
}

// mountAll mounts what is not mounted yet, and goes on after a failure.
func mountAll(list []mount) error {
	var failed error
	for _, m := range list {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		if mounted(m.target) {
			continue
		}
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			failed = errors.Join(failed, fmt.Errorf("mount %s: %w", m.target, err))
		}
	}
	return failed
}

// mounted tells whether something is mounted at path: then its device is not that of what holds it.
func mounted(path string) bool {
	var here, above unix.Stat_t
	return unix.Stat(path, &here) == nil && unix.Stat(filepath.Dir(path), &above) == nil && here.Dev != above.Dev
}

// linkDevices makes the links that devtmpfs does not.
func linkDevices() error {
	var failed error
	for link, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "fd/0", "/dev/stdout": "fd/1", "/dev/stderr": "fd/2", "/dev/core": "/proc/kcore",
	} {
		if err := os.Symlink(target, link); err != nil && !errors.Is(err, os.ErrExist) {
			failed = errors.Join(failed, err)
		}
	}
	return failed
}
