//go:build linux

package vmproc

import (
	"bytes"
	"os"

	"golang.org/x/sys/unix"
)

// WordsLimit bounds what is kept of a program's own messages, some of which a guest can provoke.
const WordsLimit = 64 << 10

// BoundedFile is a file in memory that cannot grow over its size, whoever writes to it.
func BoundedFile(name string, size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	if err = f.Truncate(size); err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// LastWords is what was written to a BoundedFile.
func LastWords(f *os.File) string {
	if f == nil {
		return ""
	}
	b := make([]byte, WordsLimit)
	n, _ := f.ReadAt(b, 0)
	return string(bytes.TrimSpace(bytes.TrimRight(b[:n], "\x00")))
}
