package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// setupTimeout bounds mkfs and mount.
const setupTimeout = time.Minute

// probeReflink tries a reflink between two files in dir.
func probeReflink(dir string) error {
	src, err := os.CreateTemp(dir, reflinkTemp)
	if err != nil {
		return err
	}
	defer func() { _ = src.Close(); _ = os.Remove(src.Name()) }()
	if _, err := src.Write(make([]byte, 4096)); err != nil {
		return err
	}
	dst, err := os.CreateTemp(dir, reflinkTemp)
	if err != nil {
		return err
	}
	defer func() { _ = dst.Close(); _ = os.Remove(dst.Name()) }()
	return unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))
}

// remount sets s.volume if Dir is a volume of an earlier start, and mounts it if it is not.
func (s *Store) remount(ctx context.Context, opts Options) error {
	if _, err := os.Stat(opts.VolumeFile); errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return fileError(err, "open", opts.VolumeFile)
	}
	mounted, err := isMountPoint(opts.Dir)
	if err != nil {
		return fileError(err, "look at", opts.Dir)
	}
	if !mounted {
		if err := mountVolume(ctx, opts); err != nil {
			return fileError(err, "mount the volume", opts.VolumeFile)
		}
		opts.Log.Info("mounted the volume", "file", opts.VolumeFile, "dir", opts.Dir)
	}
	s.volume = opts.VolumeFile
	return nil
}

// makeVolume makes the volume file and mounts it. What is in Dir would be hidden, so it must be empty.
func (s *Store) makeVolume(ctx context.Context, opts Options) error {
	entries, err := os.ReadDir(opts.Dir)
	if err != nil {
		return err
	}
	if len(entries) > 0 {
		return fmt.Errorf("%s is not empty, and a volume mounted there would hide its files", opts.Dir)
	}
	size := opts.VolumeSize
	if size == 0 {
		free, _, err := statfs(filepath.Dir(opts.VolumeFile))
		if err != nil {
			return err
		}
		size = max(free/2>>30<<30, MinVolumeSize)
	}
	if err := formatVolume(ctx, opts.VolumeFile, size); err != nil {
		return err
	}
	if err := mountVolume(ctx, opts); err != nil {
		return errors.Join(err, os.Remove(opts.VolumeFile))
	}
	s.volume = opts.VolumeFile
	opts.Log.Info("made an XFS volume", "file", opts.VolumeFile, "dir", opts.Dir, "bytes", size)
	return nil
}

// formatVolume makes the file under another name first, so that one which exists is complete.
func formatVolume(ctx context.Context, path string, size int64) error {
	tmp := path + ".new"
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	err = errors.Join(f.Truncate(size), f.Close())
	if err == nil {
		err = run(ctx, "mkfs.xfs", "-q", "-m", "reflink=1", tmp)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return nil
}

func mountVolume(ctx context.Context, opts Options) error {
	if err := run(ctx, "mount", "-t", "xfs", "-o", "loop,discard,noatime,nodev,nosuid", opts.VolumeFile, opts.Dir); err != nil {
		return err
	}
	return nil
}

// run is exec with a time limit and the program's last words in the error.
func run(ctx context.Context, name string, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(out[max(0, len(out)-500):]))
	}
	return nil
}

// isMountPoint compares the device of dir with its parent's.
func isMountPoint(dir string) (bool, error) {
	var here, parent unix.Stat_t
	if err := unix.Stat(dir, &here); err != nil {
		return false, err
	}
	if err := unix.Stat(filepath.Dir(dir), &parent); err != nil {
		return false, err
	}
	return here.Dev != parent.Dev, nil
}

// Unmount takes the volume off dir; it is for a reset of the host, when nothing runs any more. A dir
// that is no mount point, or is not there, is success.
func Unmount(dir string) error {
	mounted, err := isMountPoint(dir)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fileError(err, "look at", dir)
	}
	if !mounted {
		return nil
	}
	if err := unix.Unmount(dir, 0); err != nil {
		return fileError(err, "unmount", dir)
	}
	return nil
}

// usedBytes is the room that a file takes, without its holes.
func usedBytes(path string) (int64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, err
	}
	return st.Blocks * 512, nil
}
