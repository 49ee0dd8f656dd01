package storage

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// FS_IOC_FIEMAP and its structures are of the kernel document filesystems/fiemap.
const (
	fiemapIoctl  = 0xc020660b
	fiemapLast   = 0x1
	fiemapShared = 0x2000
	fiemapBatch  = 512
)

type fiemapExtent struct {
	Logical, Physical, Length uint64
	_                         [2]uint64
	Flags                     uint32
	_                         [3]uint32
}

type fiemap struct {
	Start, Length           uint64
	Flags, Mapped, Count, _ uint32
	Extents                 [fiemapBatch]fiemapExtent
}

// Usage is how many bytes a file has allocated, and how many of these it shares with no other file, so
// that removing it frees them. A file system that cannot tell counts all as its own.
func Usage(path string) (size, own int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	size = info.Sys().(*syscall.Stat_t).Blocks * 512
	shared, err := sharedBytes(f)
	if err != nil {
		return size, size, nil //nolint:nilerr // as documented
	}
	return size, max(0, size-shared), nil
}

func sharedBytes(f *os.File) (int64, error) {
	var shared, at uint64
	m := new(fiemap)
	for {
		*m = fiemap{Start: at, Length: ^uint64(0) - at, Count: fiemapBatch}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fiemapIoctl, uintptr(unsafe.Pointer(m))); errno != 0 {
			return 0, errno
		}
		if m.Mapped == 0 {
			return int64(shared), nil
		}
		for _, e := range m.Extents[:m.Mapped] {
			if e.Flags&fiemapShared != 0 {
				shared += e.Length
			}
			at = e.Logical + e.Length
			if e.Flags&fiemapLast != 0 {
				return int64(shared), nil
			}
		}
	}
}
