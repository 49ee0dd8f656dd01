//go:build linux

package qemu

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
)

// The RAM of a VM is a private mapping: pages that the guest never wrote are the file's, and the same in
// all VMs that map it; pages it wrote are the VMM's own, and are read from its process for a snapshot.

// openMemory prepares the VM's own memory file and opens what QEMU maps: that file, or the copy in memory
// that all VMs of a shared snapshot map. QEMU opens it again by its descriptor, for writing though it maps
// privately, so the own file is given to the VMM's uid and the shared copy is sealed.
func (s *starting) openMemory(ctx context.Context, o *opened) error {
	own, made, err := s.cfg.OpenMemory(ctx)
	s.madeMemory = made
	if err != nil {
		return err
	}
	o.memory = s.inherit.add(own)
	if s.cfg.SharedMemory && s.cfg.Restore != nil {
		shared, err := s.driver.shared.open(ctx, s.cfg.Restore.Memory)
		if err != nil {
			return vm.FileError(err, "the snapshot's memory")
		}
		o.memory = s.inherit.add(shared)
		s.mapped, err = inode(shared)
		return err
	}
	if s.mapped, err = inode(own); err != nil {
		return err
	}
	if err := own.Chmod(0o600); err != nil {
		return err
	}
	return own.Chown(s.cfg.UID, s.cfg.GID)
}

func inode(f *os.File) (uint64, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	return st.Ino, err
}

// sharedMemory keeps the RAM of snapshots that many VMs are restored from: each a file in memory that is
// sealed, so that a VMM, which must open it for writing, cannot write.
type sharedMemory struct {
	mu    sync.Mutex
	cache []sharedCopy // most recently used last
}

type sharedCopy struct {
	source fs.FileInfo
	path   string
	file   *os.File
}

// sharedCopies bounds what is kept for VMs to come; those that run keep theirs.
const sharedCopies = 4

// open gives a descriptor of its own for the sealed copy of a file.
func (m *sharedMemory) open(ctx context.Context, path string) (*os.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	source, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	// Those whose source was removed will not be asked for again.
	m.cache = slices.DeleteFunc(m.cache, func(c sharedCopy) bool {
		now, err := os.Stat(c.path)
		stale := err != nil || !os.SameFile(now, c.source) || !now.ModTime().Equal(c.source.ModTime()) || now.Size() != c.source.Size()
		if stale {
			c.file.Close()
		}
		return stale
	})
	i := slices.IndexFunc(m.cache, func(c sharedCopy) bool { return c.path == path })
	if i < 0 {
		file, err := sealedCopy(ctx, path, source.Size())
		if err != nil {
			return nil, err
		}
		if len(m.cache) >= sharedCopies {
			m.cache[0].file.Close()
			m.cache = m.cache[1:]
		}
		m.cache = append(m.cache, sharedCopy{source, path, file})
	} else {
		c := m.cache[i]
		m.cache = append(slices.Delete(m.cache, i, i+1), c)
	}
	fd, err := unix.FcntlInt(m.cache[len(m.cache)-1].file.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// sealedCopy copies a sparse file into memory, its holes as holes.
func sealedCopy(ctx context.Context, path string, size int64) (*os.File, error) {
	src, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	fd, err := unix.MemfdCreate("guest-memory", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, err
	}
	dst := os.NewFile(uintptr(fd), "guest-memory")
	if err = storage.CopySparse(ctx, dst, src, size); err == nil {
		_, err = unix.FcntlInt(dst.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		dst.Close()
		return nil, err
	}
	return dst, nil
}

// saveMemory makes dst the whole RAM of a frozen VM: its own file, or a clone of that, with the pages that
// the VMM has of its own.
func saveMemory(ctx context.Context, h vm.Handle, dst string, progress func(done, total int64)) error {
	f, err := os.OpenFile(dst, os.O_RDWR, 0)
	if err != nil {
		return vm.FileError(err, "the memory file")
	}
	defer f.Close()
	parts, err := mappings(h.PID, h.Mapped)
	if err != nil {
		return err
	}
	c := ramCopy{dst: f, size: int64(h.MemoryMB) << 20, buf: make([]byte, copyBytes), progress: progress}
	if c.pagemap, err = os.Open(fmt.Sprintf("/proc/%d/pagemap", h.PID)); err != nil {
		return err
	}
	defer c.pagemap.Close()
	if c.mem, err = os.Open(fmt.Sprintf("/proc/%d/mem", h.PID)); err != nil {
		return err
	}
	defer c.mem.Close()
	for _, part := range parts {
		if err := c.copy(ctx, part); err != nil {
			return vm.FileError(err, "the memory file")
		}
	}
	return nil
}

// mapping is a part of a process's address space that maps a file: bytes [start, end) are the file's from
// offset on.
type mapping struct{ start, end, offset int64 }

// mappings finds the private mappings of a file (proc(5), /proc/PID/maps).
func mappings(pid int, inode uint64) ([]mapping, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var found []mapping
	for lines := bufio.NewScanner(f); lines.Scan(); {
		m, ino, ok := parseMapping(lines.Text())
		if ok && ino == inode {
			found = append(found, m)
		}
	}
	if len(found) == 0 {
		return nil, errors.New("the VMM has not mapped the guest's memory")
	}
	return found, nil
}

func parseMapping(line string) (m mapping, inode uint64, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 6 || !strings.HasSuffix(fields[1], "p") {
		return m, 0, false
	}
	from, to, _ := strings.Cut(fields[0], "-")
	var errs [4]error
	m.start, errs[0] = strconv.ParseInt(from, 16, 64)
	m.end, errs[1] = strconv.ParseInt(to, 16, 64)
	m.offset, errs[2] = strconv.ParseInt(fields[2], 16, 64)
	inode, errs[3] = strconv.ParseUint(fields[4], 10, 64)
	return m, inode, errors.Join(errs[:]...) == nil
}

const (
	pageSize   = 4096
	copyBytes  = 1 << 20
	punchBytes = 64 << 10 // fewer zeroes than that are written, more become a hole
)

// ramCopy copies the pages that a process has of its own.
type ramCopy struct {
	dst, pagemap, mem *os.File
	size              int64 // of the guest's RAM; nothing is written behind it
	buf               []byte
	progress          func(done, total int64) // may be nil
}

func (c *ramCopy) copy(ctx context.Context, m mapping) error {
	return ownRuns(c.pagemap, m.start, m.end, func(from, to int64) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return c.write(from, m.offset+from-m.start, to-from)
	})
}

// write copies n bytes at an address to an offset of the file.
func (c *ramCopy) write(address, offset, n int64) error {
	if offset < 0 || offset+n > c.size {
		return errors.New("the VMM maps more than the guest's memory")
	}
	for n > 0 {
		part := c.buf[:min(n, copyBytes)]
		if _, err := c.mem.ReadAt(part, address); err != nil {
			return err
		}
		if err := writeSparse(c.dst, part, offset); err != nil {
			return err
		}
		address, offset, n = address+int64(len(part)), offset+int64(len(part)), n-int64(len(part))
		if c.progress != nil {
			c.progress(offset, c.size)
		}
	}
	return nil
}

var zeroes [punchBytes]byte

// writeSparse writes b, long runs of zeroes as holes. A page of zeroes is data like any other: what the
// file held there goes.
func writeSparse(f *os.File, b []byte, offset int64) error {
	for len(b) > 0 {
		n, zero := leadingRun(b)
		var err error
		if zero && n >= punchBytes {
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, int64(n))
		} else {
			_, err = f.WriteAt(b[:n], offset)
		}
		if err != nil {
			return err
		}
		b, offset = b[n:], offset+int64(n)
	}
	return nil
}

// leadingRun is how many leading bytes of b, in steps of punchBytes, are all zero or all not.
func leadingRun(b []byte) (n int, zero bool) {
	for n < len(b) {
		step := b[n:min(n+punchBytes, len(b))]
		is := bytes.Equal(step, zeroes[:len(step)])
		if n > 0 && is != zero {
			break
		}
		n, zero = n+len(step), is
	}
	return n, zero
}
