package vm

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

var (
	validName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$`)
	validMAC  = regexp.MustCompile(`^[0-9a-f]{2}(:[0-9a-f]{2}){5}$`)
)

// DiskLimits bound what each disk of a VM may do; 0 is no limit. A restored VM has those of its driver, not those of
// the VM that its snapshot was taken of.
type DiskLimits struct{ BytesPerSec, OpsPerSec int64 }

// All is what a VMM may do to the host's disk for n disks of its VM: some times more, for it reads and saves RAM, too.
func (l DiskLimits) All(n int) DiskLimits {
	times := int64(4 * n)
	return DiskLimits{BytesPerSec: l.BytesPerSec * times, OpsPerSec: l.OpsPerSec * times}
}

// Check tells what no driver can honour in a Config.
func (cfg Config) Check() error {
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

// FileError is an error of opening or writing a file of a VM, as it may be shown; nil stays nil.
func FileError(err error, what string) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return wrenn.Wrap(err, wrenn.KindDiskFull, "the host's disk is full; delete sandboxes or snapshots, or add disk")
	case errors.Is(err, fs.ErrNotExist):
		return wrenn.Wrap(err, wrenn.KindInvalidRequest, "%s of the VM does not exist", what)
	}
	return wrenn.Wrap(err, wrenn.KindInternal, "cannot open %s of the VM", what)
}

// OpenMemory opens the VM's own memory file, which it makes if it is not there: empty for a cold start, else a clone
// of the snapshot's. It tells whether it made the file, also when it fails.
func (cfg Config) OpenMemory(ctx context.Context) (f *os.File, made bool, err error) {
	size, flags := int64(cfg.MemoryMB)<<20, os.O_RDWR
	_, err = os.Lstat(cfg.MemoryFile)
	made = errors.Is(err, fs.ErrNotExist)
	if cfg.Restore == nil {
		flags |= os.O_CREATE | os.O_TRUNC
	} else if made {
		if err := storage.CloneFile(ctx, cfg.Restore.Memory, cfg.MemoryFile); err != nil {
			return nil, false, err
		}
	}
	if f, err = os.OpenFile(cfg.MemoryFile, flags, 0o600); err != nil {
		return nil, false, FileError(err, "the memory file")
	}
	if cfg.Restore == nil {
		err = f.Truncate(size)
	}
	var info fs.FileInfo
	if err == nil {
		info, err = f.Stat()
	}
	if err == nil && info.Size() != size {
		err = wrenn.Errorf(wrenn.KindInvalidRequest, "the snapshot's memory is %d MiB, but the VM has %d MiB", info.Size()>>20, cfg.MemoryMB)
	}
	if err != nil {
		f.Close()
		return nil, made, err
	}
	return f, made, nil
}
