package storage

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// chunk is how much is copied between two looks at the context, in bytes.
const chunk = 32 << 20

func cloneFile(ctx context.Context, src, dst string, reflink bool) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return fileError(err, "clone", src)
	}
	defer in.Close()
	fi, err := in.Stat()
	if err != nil {
		return fileError(err, "clone", src)
	}
	if !fi.Mode().IsRegular() {
		return wrenn.Errorf(wrenn.KindInvalidRequest, "cannot clone %s: not a regular file", src)
	}
	if _, err := os.Lstat(dst); err == nil {
		return wrenn.Errorf(wrenn.KindAlreadyExists, "cannot clone to %s: it exists already", dst)
	}
	// Written under another name first: a crash must not leave half a file under the right one.
	out, err := os.CreateTemp(filepath.Dir(dst), cloneTemp)
	if err != nil {
		return fileError(err, "clone to", dst)
	}
	defer func() {
		_ = out.Close()
		if err != nil {
			_ = os.Remove(out.Name())
		}
	}()
	if err := fill(ctx, out, in, fi.Size(), reflink); err != nil {
		return fileError(err, "clone to", dst)
	}
	// RENAME_NOREPLACE and not link+unlink: one step, and it works on every file system used here.
	if err := unix.Renameat2(unix.AT_FDCWD, out.Name(), unix.AT_FDCWD, dst, unix.RENAME_NOREPLACE); err != nil {
		return fileError(err, "clone to", dst)
	}
	return nil
}

func fill(ctx context.Context, out, in *os.File, size int64, reflink bool) error {
	if reflink {
		err := unix.IoctlFileClone(int(out.Fd()), int(in.Fd()))
		if err == nil {
			return nil
		}
		if !noReflink(err) {
			return err
		}
	}
	return CopySparse(ctx, out, in, size)
}

// noReflink tells errors that mean "not between these two files" from real failures.
func noReflink(err error) bool {
	return errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) ||
		errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.ENOSYS)
}

// CopySparse copies the data of in, size bytes of it, to an empty file and leaves holes where in has holes.
func CopySparse(ctx context.Context, out, in *os.File, size int64) error {
	if err := out.Truncate(size); err != nil {
		return err
	}
	for pos := int64(0); pos < size; {
		start, err := unix.Seek(int(in.Fd()), pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // only a hole is left
		}
		if err != nil {
			return err
		}
		end, err := unix.Seek(int(in.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if err := copyRange(ctx, out, in, start, end); err != nil {
			return err
		}
		pos = end
	}
	return nil
}

func copyRange(ctx context.Context, out, in *os.File, start, end int64) error {
	for pos := start; pos < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(end-pos, chunk)
		// io.Copy between *os.File uses copy_file_range, so the bytes stay in the kernel.
		if _, err := out.Seek(pos, io.SeekStart); err != nil {
			return err
		}
		if _, err := in.Seek(pos, io.SeekStart); err != nil {
			return err
		}
		if _, err := io.CopyN(out, in, n); err != nil {
			return err
		}
		pos += n
	}
	return nil
}

// fileError turns an error of the operating system into one that a user may see.
func fileError(err error, what, path string) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EFBIG):
		return wrenn.Wrap(err, wrenn.KindDiskFull, "the host's disk is full; delete sandboxes or snapshots, or add disk")
	case errors.Is(err, fs.ErrNotExist):
		return wrenn.Wrap(err, wrenn.KindNotFound, "cannot %s %s: no such file", what, filepath.Base(path))
	case errors.Is(err, fs.ErrExist):
		return wrenn.Wrap(err, wrenn.KindAlreadyExists, "cannot %s %s: it exists already", what, filepath.Base(path))
	}
	return wrenn.Wrap(err, wrenn.KindInternal, "cannot %s %s", what, filepath.Base(path))
}
