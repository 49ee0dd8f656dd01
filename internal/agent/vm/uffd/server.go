//go:build linux

package uffd

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// server serves the memory of one VM. It is one thread, and what it holds is bounded by the size of the memory: a bit
// for each page and, while touches are noted, a number for each block. Waiting faults are at most one for each thread of the VMM.
type server struct {
	uffd    userfault
	client  int // pidfd of the VMM
	regions []region
	memory  []byte   // the file, mapped
	zero    bitmap   // pages that read as zero: holes of the file, and what was removed
	touches *touches // nil: not noted
	ahead   []run    // to be brought in unasked
	waiting []uint64 // pages that were asked for and could not be given yet
	buf     [128 * messageSize]byte
}

// run is a range of pages of the memory file.
type run struct{ first, end uint64 }

// serve answers until the VM is gone.
func (s *server) serve() error {
	for {
		gone, err := s.wait()
		if err != nil {
			return err
		}
		if gone {
			return s.touches.save()
		}
		err = s.answer()
		if err == nil && len(s.waiting) == 0 {
			err = s.bringAhead()
		}
		if errors.Is(err, errGone) {
			return s.touches.save()
		}
		if err != nil {
			return err
		}
	}
}

// wait waits for the next message, and tells whether the VM is gone instead. A silence is used for saving.
func (s *server) wait() (gone bool, err error) {
	timeout := -1
	switch {
	case len(s.waiting) > 0:
		timeout = 1
	case len(s.ahead) > 0:
		timeout = 0
	case s.touches.unsaved():
		timeout = int(saveAfter.Milliseconds())
	}
	fds := []unix.PollFd{{Fd: int32(s.uffd), Events: unix.POLLIN}, {Fd: int32(s.client), Events: unix.POLLIN}} //nolint:gosec // descriptors
	n, err := unix.Poll(fds, timeout)
	switch {
	case errors.Is(err, unix.EINTR):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("poll: %w", err)
	case fds[1].Revents != 0:
		return true, nil
	case fds[0].Revents&^unix.POLLIN != 0:
		return false, errors.New("the VMM did not send a userfaultfd that can be read")
	case n == 0 && timeout > 1:
		return false, s.touches.save()
	}
	return false, nil
}

// answer takes note of what was removed, and then gives all who wait their pages.
func (s *server) answer() error {
	all, err := s.uffd.messages(s.buf[:])
	if err != nil {
		return err
	}
	for _, m := range all {
		if m.event == eventRemove {
			s.removed(m)
			continue
		}
		page, ok := s.page(m.start)
		if !ok {
			return fmt.Errorf("a fault at %#x, which the VMM did not name", m.start)
		}
		s.waiting = append(s.waiting, page)
	}
	asked := s.waiting
	s.waiting = nil
	for i, page := range asked {
		if err := s.give(page); errors.Is(err, errLater) {
			s.waiting = append(s.waiting, asked[i:]...)
			return nil
		} else if err != nil {
			return err
		}
	}
	return nil
}

func (s *server) removed(m message) {
	for _, r := range s.regions {
		for page, last := r.cut(m.start, m.end); page < last; page++ {
			s.zero.set(page)
		}
	}
}

// page is that of the memory file which belongs at an address.
func (s *server) page(address uint64) (uint64, bool) {
	for _, r := range s.regions {
		if address >= r.base && address-r.base < r.size {
			return (address - r.base + r.offset) / pageSize, true
		}
	}
	return 0, false
}

// give gives a page that was asked for, with its block.
func (s *server) give(page uint64) error {
	block := page / blockPages
	if err := s.fill(run{block * blockPages, (block + 1) * blockPages}); err != nil {
		return err
	}
	if s.touches != nil {
		s.touches.add(block)
	}
	return nil
}

// bringAhead brings in the next run of pages that nobody asked for yet.
func (s *server) bringAhead() error {
	if len(s.ahead) == 0 {
		return nil
	}
	err := s.fill(s.ahead[0])
	if errors.Is(err, errLater) {
		return nil
	}
	s.ahead = s.ahead[1:]
	return err
}

// fill puts pages where none are; those that are there are left, and who waits for them is woken.
func (s *server) fill(pages run) error {
	for _, r := range s.regions {
		start := max(pages.first, r.offset/pageSize)
		end := min(pages.end, (r.offset+r.size)/pageSize)
		for start < end {
			n, err := s.put(r, run{start, end})
			if err != nil {
				return err
			}
			start += n
		}
	}
	return nil
}

// put puts some of the first pages of a run, which is within a region, and tells how many.
func (s *server) put(r region, pages run) (uint64, error) {
	zero := s.zero.has(pages.first)
	end := pages.first + 1
	for end < pages.end && s.zero.has(end) == zero {
		end++
	}
	from, to := pages.first*pageSize, end*pageSize
	at := r.base + from - r.offset
	var done int
	var err error
	if zero {
		done, err = s.uffd.zero(at, int(to-from)) //nolint:gosec // within the file
	} else {
		done, err = s.uffd.copy(at, s.memory[from:to])
	}
	if errors.Is(err, unix.EEXIST) {
		done, err = pageSize, s.uffd.wake(at, pageSize)
	}
	if err != nil {
		return 0, fmt.Errorf("page %d: %w", pages.first, err)
	}
	return uint64(done) / pageSize, nil //nolint:gosec // not negative
}

// Blocks that are brought in unasked come in the order of their touches, but sorted within stretches of it, so that
// neighbours come together; a run is short enough for a fault to wait for it.
const (
	stretch = 64
	runMost = 256
)

// runs makes runs of a list of blocks.
func runs(touched []uint32) []run {
	var all []run
	for some := range slices.Chunk(touched, stretch) {
		some = slices.Clone(some)
		slices.Sort(some)
		for _, block := range some {
			first := uint64(block) * blockPages
			if n := len(all) - 1; n >= 0 && all[n].end == first && first-all[n].first < runMost {
				all[n].end += blockPages
				continue
			}
			all = append(all, run{first, first + blockPages})
		}
	}
	return all
}

// bitmap has a bit for each page.
type bitmap []uint64

func newBitmap(pages uint64) bitmap   { return make(bitmap, (pages+63)/64) }
func (b bitmap) set(page uint64)      { b[page/64] |= 1 << (page % 64) }
func (b bitmap) has(page uint64) bool { return b[page/64]&(1<<(page%64)) != 0 }
func (b bitmap) setAll(first, end uint64) {
	for ; first < end; first++ {
		b.set(first)
	}
}

// maxExtents bounds the search for holes in a file that is in many pieces; what is not looked at is read as data.
const maxExtents = 1 << 16

// holes marks the pages that lie in holes of a file: they need not be read, nor take room in the VM.
func holes(f *os.File, size int64) bitmap {
	b := newBitmap(uint64(size) / pageSize) //nolint:gosec // of a file
	var at int64
	for range maxExtents {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			data, err = size, nil
		}
		if err != nil {
			return b // this file system does not tell
		}
		b.setAll(uint64(at+pageSize-1)/pageSize, uint64(min(data, size))/pageSize) //nolint:gosec // of a file
		if data >= size {
			return b
		}
		if at, err = unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE); err != nil {
			return b
		}
	}
	return b
}
