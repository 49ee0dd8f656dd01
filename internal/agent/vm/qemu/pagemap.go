//go:build linux

package qemu

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ownRuns calls fn for each run [from, to) of addresses between start and end whose pages the process of a
// /proc/PID/pagemap has of its own: in memory or swapped out, and not the mapped file's. The kernel finds them
// itself since Linux 6.7; before, the entries of all pages are gone through.
func ownRuns(pagemap *os.File, start, end int64, fn func(from, to int64) error) error {
	err := scanRuns(pagemap, start, end, fn)
	if errors.Is(err, unix.ENOTTY) {
		return readRuns(pagemap, start, end, fn)
	}
	return err
}

// PAGEMAP_SCAN (include/uapi/linux/fs.h; Linux, admin-guide/mm/pagemap.rst).
const (
	pagemapScan     = 0xC0606610
	categoryFile    = 1 << 2
	categoryPresent = 1 << 3
	categorySwapped = 1 << 4
)

type pageRegion struct{ start, end, categories uint64 }

type scanArg struct {
	size, flags, start, end, walkEnd, vec, vecLen, maxPages     uint64
	categoryInverted, categoryMask, categoryAnyof, categoryMore uint64 // the last: to tell of each region
}

const scanRegions = 1024 // at a time

func scanRuns(pagemap *os.File, start, end int64, fn func(from, to int64) error) error {
	regions := make([]pageRegion, scanRegions)
	for at := uint64(start); at < uint64(end); { //nolint:gosec // addresses of user space
		arg := scanArg{
			size: uint64(unsafe.Sizeof(scanArg{})), start: at, end: uint64(end), //nolint:gosec // as above
			vec: uint64(uintptr(unsafe.Pointer(&regions[0]))), vecLen: scanRegions,
			categoryInverted: categoryFile, categoryMask: categoryFile, categoryAnyof: categoryPresent | categorySwapped,
		}
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, pagemap.Fd(), pagemapScan, uintptr(unsafe.Pointer(&arg)))
		runtime.KeepAlive(regions)
		if errno != 0 {
			return errno
		}
		for _, r := range regions[:n] {
			if err := fn(int64(r.start), int64(r.end)); err != nil { //nolint:gosec // as above
				return err
			}
		}
		if arg.walkEnd <= at {
			return errors.New("the kernel does not go through the VMM's memory")
		}
		at = arg.walkEnd
	}
	return nil
}

// readRuns is ownRuns for a kernel that cannot scan.
func readRuns(pagemap *os.File, start, end int64, fn func(from, to int64) error) error {
	entries := make([]byte, 8*scanPages)
	for at := start; at < end; at += scanPages * pageSize {
		pages := min(scanPages, (end-at)/pageSize)
		if _, err := pagemap.ReadAt(entries[:8*pages], at/pageSize*8); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		for first := int64(0); first < pages; {
			n := ownPages(entries[8*first : 8*pages])
			if n == 0 {
				first++
				continue
			}
			if err := fn(at+first*pageSize, at+(first+n)*pageSize); err != nil {
				return err
			}
			first += n
		}
	}
	return nil
}

// Bits of an entry of /proc/PID/pagemap (Linux, admin-guide/mm/pagemap.rst).
const (
	scanPages   = 64 << 10 // of pagemap at a time: 512 KiB
	pagePresent = 1 << 63
	pageSwapped = 1 << 62
	pageOfFile  = 1 << 61
)

// ownPages counts the leading entries that are pages of the process, not of the file.
func ownPages(entries []byte) int64 {
	n := int64(0)
	for ; len(entries) >= 8; entries = entries[8:] {
		e := binary.LittleEndian.Uint64(entries)
		if e&(pagePresent|pageSwapped) == 0 || e&pageOfFile != 0 {
			break
		}
		n++
	}
	return n
}
