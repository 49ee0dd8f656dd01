// Package storage owns where the bytes of sandboxes live on this host: it makes sure that the
// sandboxes' directory is on a file system where a copy costs nothing (reflinks), clones and resizes
// files there, and tells how much room is left. It knows files, not sandboxes: it must not import the
// agent, a hypervisor driver or anything that speaks to a network.
package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Modes of Options.Mode (AGENT_STORAGE).
const (
	ModeAuto    = "auto"    // reflinks if Dir has them, else an XFS volume file mounted at Dir, else copies
	ModeReflink = "reflink" // reflinks or an error
	ModeCopy    = "copy"    // sparse copies always
)

// MinVolumeSize is the smallest volume file that Open makes, in bytes. mkfs.xfs refuses less than 300 MB.
const MinVolumeSize = 1 << 30

// Names of files that are not finished, as patterns.
const (
	reflinkTemp = ".reflink-*"
	cloneTemp   = ".clone-*"
	importTemp  = ".new" // suffix
)

// reserve is what NeedSpace keeps back for the file system's own needs, in bytes.
const reserve = 64 << 20

// Options of Open.
type Options struct {
	Dir        string // AGENT_SANDBOXES_PATH; created if absent
	Mode       string // ModeAuto if empty
	VolumeFile string // where the XFS volume may be made; Dir + ".xfs" if empty
	VolumeSize int64  // bytes, sparse; half of what is free, rounded to a GiB, if 0
	Log        *slog.Logger
}

// Store is an open storage directory. Its methods may be called from several goroutines.
type Store struct {
	dir      string
	volume   string // the volume file when Dir is a mount of it, else ""
	reflinks bool
	reason   string
	imports  sync.Mutex
}

// Open makes Dir ready and tells what it can do. It is idempotent: a volume that is mounted already is
// used as it is, one that is there but not mounted (after a reboot) is mounted again.
func Open(ctx context.Context, opts Options) (*Store, error) {
	opts, err := opts.normal()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(opts.Dir, 0o700); err != nil {
		return nil, wrenn.Wrap(err, wrenn.KindInternal, "cannot make the sandboxes directory %s", opts.Dir)
	}
	s := &Store{dir: opts.Dir}
	if opts.Mode == ModeCopy {
		err, s.reason = s.remount(ctx, opts), "AGENT_STORAGE=copy"
	} else {
		err = s.ensureReflinks(ctx, opts)
	}
	if err != nil {
		return nil, err
	}
	// No other user of the host gets in: the memory of a template is readable for VMMs of several uids.
	if err := os.Chmod(opts.Dir, 0o700); err != nil {
		return nil, wrenn.Wrap(err, wrenn.KindInternal, "cannot close the sandboxes directory %s to others", opts.Dir)
	}
	if !s.reflinks {
		opts.Log.Warn("no reflinks: every sandbox disk is copied", "dir", opts.Dir, "reason", s.reason)
	}
	return s, s.removeUnfinished()
}

// removeUnfinished removes what a crash left of a probe or an import. Only one agent has the directory open.
func (s *Store) removeUnfinished() error {
	for _, pattern := range []string{reflinkTemp, filepath.Join(importDir, cloneTemp), filepath.Join(importDir, "*"+importTemp)} {
		paths, err := filepath.Glob(filepath.Join(s.dir, pattern))
		if err != nil {
			return fileError(err, "list", s.dir)
		}
		for _, path := range paths {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fileError(err, "remove", path)
			}
		}
	}
	return nil
}

func (o Options) normal() (Options, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if !filepath.IsAbs(o.Dir) {
		return o, wrenn.Errorf(wrenn.KindInvalidRequest, "AGENT_SANDBOXES_PATH must be an absolute path, not %q", o.Dir)
	}
	o.Dir = filepath.Clean(o.Dir)
	if o.VolumeFile == "" {
		o.VolumeFile = o.Dir + ".xfs"
	}
	if o.VolumeSize != 0 && o.VolumeSize < MinVolumeSize {
		return o, wrenn.Errorf(wrenn.KindInvalidRequest, "AGENT_VOLUME_SIZE must be at least 1 GiB, not %d bytes", o.VolumeSize)
	}
	switch o.Mode {
	case "":
		o.Mode = ModeAuto
	case ModeAuto, ModeReflink, ModeCopy:
	default:
		return o, wrenn.Errorf(wrenn.KindInvalidRequest, "AGENT_STORAGE must be auto, reflink or copy, not %q", o.Mode)
	}
	return o, nil
}

// ensureReflinks tries what Dir is, then a volume, and settles s.reflinks and s.reason.
func (s *Store) ensureReflinks(ctx context.Context, opts Options) error {
	// A volume of an earlier start comes first: what it holds must be seen again.
	if err := s.remount(ctx, opts); err != nil {
		return err
	}
	if err := probeReflink(s.dir); err == nil {
		s.reflinks, s.reason = true, "the file system of the sandboxes directory has reflinks"
		if s.volume != "" {
			s.reason = "XFS volume file " + s.volume
		}
		return nil
	} else if opts.Mode == ModeReflink {
		return wrenn.Wrap(err, wrenn.KindInvalidRequest,
			"AGENT_STORAGE=reflink, but %s has no reflinks; put it on XFS or Btrfs, or use AGENT_STORAGE=auto", s.dir)
	}
	if s.volume != "" {
		s.reason = "the volume " + s.volume + " has no reflinks; it was made without -m reflink=1"
		return nil
	}
	if err := s.makeVolume(ctx, opts); err != nil {
		s.reason = "cannot make an XFS volume: " + err.Error()
		return nil //nolint:nilerr // copying still works; the reason is shown by doctor and logged
	}
	s.reflinks, s.reason = true, "XFS volume file "+s.volume
	return nil
}

// Reflinks tells whether clones in Dir share their blocks.
func (s *Store) Reflinks() bool { return s.reflinks }

// Reason says in words why Reflinks is what it is.
func (s *Store) Reason() string { return s.reason }

// Dir is the directory that was opened.
func (s *Store) Dir() string { return s.dir }

// VolumeFile is the volume that is mounted at Dir, "" if Dir is on a file system of the host.
func (s *Store) VolumeFile() string { return s.volume }

// Close ends the use of the store. It unmounts nothing: VMs outlive the agent and have files there.
func (s *Store) Close() error { return nil }

// Clone makes dst, which must not exist, with the contents of src: by reflink where that is possible,
// else by a copy that keeps holes. The new file has mode 0600. fsync is the caller's. dst appears whole
// or not at all.
func (s *Store) Clone(ctx context.Context, src, dst string) error {
	return cloneFile(ctx, src, dst, s.reflinks)
}

// CloneFile is Clone for files of which the caller does not know the store: it tries a reflink first.
func CloneFile(ctx context.Context, src, dst string) error {
	return cloneFile(ctx, src, dst, true)
}

// Resize grows a raw image to the given size without using room for it. It never shrinks.
func (s *Store) Resize(path string, bytes int64) error {
	fi, err := os.Stat(path)
	if err != nil {
		return fileError(err, "resize", path)
	}
	if fi.Size() > bytes {
		return wrenn.Errorf(wrenn.KindInvalidRequest,
			"disk size %d MiB is less than the image's %d MiB; ask for at least that", bytes>>20, (fi.Size()+1<<20-1)>>20)
	}
	return fileError(os.Truncate(path, bytes), "resize", path)
}

// Free tells what may still be written below Dir and what it holds in all, in bytes. A volume file is
// sparse, so it has no more room than the file system that it lies on.
func (s *Store) Free() (free, total int64, err error) {
	free, total, err = statfs(s.dir)
	if err != nil || s.volume == "" {
		return free, total, err
	}
	outer, _, err := statfs(filepath.Dir(s.volume))
	if err != nil {
		return 0, 0, err
	}
	return min(free, outer), total, nil
}

func statfs(path string) (free, total int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, 0, wrenn.Wrap(err, wrenn.KindInternal, "cannot tell the free space of %s", path)
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}

// NeedSpace is nil if that many bytes may be written, else an error of KindDiskFull with the numbers.
func (s *Store) NeedSpace(bytes int64) error {
	free, total, err := s.Free()
	if err != nil {
		return err
	}
	if bytes+reserve <= free {
		return nil
	}
	return wrenn.Errorf(wrenn.KindDiskFull, "the host's disk is full: %s needed, %s of %s free; delete sandboxes or snapshots, or add disk",
		mib(bytes), mib(max(free-reserve, 0)), mib(total)).
		With("needed_bytes", bytes).With("free_bytes", max(free-reserve, 0)).With("total_bytes", total)
}

func mib(bytes int64) string { return fmt.Sprintf("%d MiB", (bytes+1<<20-1)>>20) }
