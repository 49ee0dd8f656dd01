//go:build linux

// Package uffd is the page server of a VM whose RAM is brought in by userfaultfd(2): a small process that answers
// the VMM's page faults from a memory file, notes the order in which pages are first touched, and brings in what was
// touched the last time before it is asked for. It knows neither the VMM's API nor what the memory means.
//
// # Who ends with whom
//
// The server is the first process of a pid namespace, and the VMM is started beneath it (vmproc.Spec.Beneath): when
// the server ends, for whatever reason, the kernel kills the VMM, whether an agent lives or not. Until then a page
// that nobody serves makes its reader wait, since the VMM holds the userfaultfd open, too; a wrong page is never read.
// The server ends by itself when the VMM does.
package uffd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests and messages of a userfaultfd, as include/uapi/linux/userfaultfd.h has them.
const (
	ioctlWake     = 0x8010AA02 // UFFDIO_WAKE
	ioctlCopy     = 0xC028AA03 // UFFDIO_COPY
	ioctlZeroPage = 0xC020AA04 // UFFDIO_ZEROPAGE

	eventPageFault = 0x12 // UFFD_EVENT_PAGEFAULT
	eventRemove    = 0x15 // UFFD_EVENT_REMOVE

	messageSize = 32 // struct uffd_msg
	pageSize    = 4096
)

// blockPages are brought in together, as the kernel does with a mapped file that is in its cache (fault_around_bytes).
const blockPages = 16

func blocksOf(size uint64) uint64 { return (size/pageSize + blockPages - 1) / blockPages }

// addresses is struct uffdio_range.
type addresses struct{ start, length uint64 }

// copyRequest is struct uffdio_copy.
type copyRequest struct {
	to, from, length, mode uint64
	done                   int64
}

// zeroRequest is struct uffdio_zeropage.
type zeroRequest struct {
	addresses
	mode uint64
	done int64
}

// errLater says that the kernel takes pages out at this moment: its messages must be read first.
var errLater = errors.New("the memory is changing")

// errGone says that the memory is, with the process that had it.
var errGone = errors.New("the VM is gone")

// userfault is an open userfaultfd of another process.
type userfault int

// copy puts pages at an address where none are, and tells how many bytes it came.
func (u userfault) copy(to uint64, from []byte) (int, error) {
	r := copyRequest{to: to, from: uint64(uintptr(unsafe.Pointer(&from[0]))), length: uint64(len(from))}
	err := u.ioctl(ioctlCopy, unsafe.Pointer(&r))
	return came(r.done, err)
}

// zero puts pages of zeroes.
func (u userfault) zero(to uint64, length int) (int, error) {
	r := zeroRequest{addresses: addresses{to, uint64(length)}}
	err := u.ioctl(ioctlZeroPage, unsafe.Pointer(&r))
	return came(r.done, err)
}

// came is how far a request came: it may do a part, and then tell the reason only if it is asked for the rest.
func came(done int64, err error) (int, error) {
	if done > 0 {
		return int(done), nil
	}
	switch {
	case errors.Is(err, unix.EAGAIN):
		return 0, errLater
	case errors.Is(err, unix.ESRCH):
		return 0, errGone
	}
	return 0, err
}

// wake lets those go on who wait for a page that is there.
func (u userfault) wake(at uint64, length int) error {
	r := addresses{at, uint64(length)}
	return u.ioctl(ioctlWake, unsafe.Pointer(&r))
}

func (u userfault) ioctl(request uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(u), request, uintptr(arg))
	if errno != 0 {
		return errno
	}
	return nil
}

// message is what happened to the memory: a fault at start, or that a range was taken out.
type message struct {
	event      byte
	start, end uint64
}

// messages reads what has happened, at most as much as fits buf.
func (u userfault) messages(buf []byte) ([]message, error) {
	n, err := unix.Read(int(u), buf)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the userfaultfd: %w", err)
	}
	if n == 0 || n%messageSize != 0 {
		return nil, fmt.Errorf("%d bytes are no messages of a userfaultfd", n)
	}
	var all []message
	for b := buf[:n]; len(b) > 0; b = b[messageSize:] {
		m := message{event: b[0]}
		switch m.event {
		case eventPageFault: // flags, address
			m.start = binary.NativeEndian.Uint64(b[16:])
		case eventRemove: // start, end
			m.start, m.end = binary.NativeEndian.Uint64(b[8:]), binary.NativeEndian.Uint64(b[16:])
		default:
			return nil, fmt.Errorf("event %#x was not asked for", m.event)
		}
		all = append(all, m)
	}
	return all, nil
}
