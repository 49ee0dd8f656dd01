//go:build linux

package uffd

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Command is the argument by which a program is told to be a page server; Main gets the arguments after it.
const Command = "page-server"

// Descriptors of a page server, as Launch gives them.
const (
	memoryFD  = 3 // the memory file, for reading
	listenFD  = 4 // the socket to which the VMM connects
	touchesFD = 5 // if there are touches to be noted, or read
)

// What is to be done with touches.
const (
	noTouches   = "forget"
	noteTouches = "note"
	useTouches  = "use"
)

// helloTimeout bounds the wait for the VMM: its agent may have died before it was started.
const helloTimeout = 2 * time.Minute

// helloLimit bounds what a VMM says of its memory.
const helloLimit = 64 << 10

// Main is a page server: its arguments are the VM's id, which is for people only, and what to do with touches. It
// returns when the VM is gone.
func Main(args []string) error {
	if len(args) != 2 {
		return errors.New("a page server is started by the agent, not by hand")
	}
	// A VMM that a guest has taken over has the same uid: it cannot trace this process.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("set dumpable: %w", err)
	}
	s, err := open(args[1])
	if err != nil {
		return err
	}
	said, err := s.accept()
	if err != nil {
		return fmt.Errorf("the VMM's greeting: %w", err)
	}
	if s.regions, err = parseRegions(said, uint64(len(s.memory))); err != nil {
		return err
	}
	return s.serve()
}

// open makes a server of the memory file and the touches.
func open(mode string) (*server, error) {
	file := os.NewFile(memoryFD, "memory")
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	s := &server{zero: holes(file, info.Size())}
	s.memory, err = unix.Mmap(memoryFD, 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the memory file: %w", err)
	}
	switch mode {
	case noteTouches:
		s.touches = &touches{file: os.NewFile(touchesFD, "touches"), memory: uint64(len(s.memory))}
	case useTouches:
		touched := os.NewFile(touchesFD, "touches")
		defer touched.Close()
		blocks, err := readTouches(touched, uint64(len(s.memory)))
		if err != nil {
			return nil, err
		}
		s.ahead = runs(blocks)
		for _, r := range s.ahead { // from the disk, before it is waited for
			_ = unix.Fadvise(memoryFD, int64(r.first*pageSize), int64((r.end-r.first)*pageSize), unix.FADV_WILLNEED) //nolint:gosec // within the file
		}
	}
	return s, nil
}

// accept waits for the VMM, and takes from it the userfaultfd and what it says of its memory. The VMM is known by
// the credentials of its socket.
func (s *server) accept() ([]byte, error) {
	if err := readable(listenFD); err != nil {
		return nil, err
	}
	conn, _, err := unix.Accept4(listenFD, unix.SOCK_CLOEXEC)
	if err != nil {
		return nil, err
	}
	_ = unix.Close(listenFD)
	peer, err := unix.GetsockoptUcred(conn, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return nil, err
	}
	if peer.Pid <= 1 {
		return nil, fmt.Errorf("process %d is not beneath this one", peer.Pid)
	}
	if s.client, err = unix.PidfdOpen(int(peer.Pid), 0); err != nil {
		return nil, fmt.Errorf("pidfd of the VMM: %w", err)
	}
	said, fd, err := receive(conn)
	if err != nil {
		return nil, err
	}
	s.uffd = userfault(fd)
	return said, unix.SetNonblock(fd, true)
}

func readable(fd int) error {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} //nolint:gosec // a descriptor
	for end := time.Now().Add(helloTimeout); ; {
		n, err := unix.Poll(fds, int(time.Until(end).Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return errors.New("timed out")
		default:
			return nil
		}
	}
}

// receive reads one JSON document, and the one descriptor that comes with its beginning.
func receive(conn int) (said []byte, fd int, err error) {
	buf := make([]byte, helloLimit)
	control := make([]byte, unix.CmsgSpace(4)) // of a second descriptor the kernel says that it was cut off
	fd = -1
	for n := 0; n < len(buf); {
		if err := readable(conn); err != nil {
			return nil, fd, err
		}
		more, controls, flags, _, err := unix.Recvmsg(conn, buf[n:], control, unix.MSG_CMSG_CLOEXEC)
		switch {
		case err != nil:
			return nil, fd, err
		case flags&unix.MSG_CTRUNC != 0:
			return nil, fd, errors.New("more than one descriptor")
		case more == 0:
			return nil, fd, errors.New("cut off")
		case controls > 0 && fd >= 0:
			return nil, fd, errors.New("a second descriptor")
		case controls > 0:
			if fd, err = descriptor(control[:controls]); err != nil {
				return nil, fd, err
			}
		case fd < 0:
			return nil, fd, errors.New("no userfaultfd")
		}
		if n += more; json.Valid(buf[:n]) {
			return buf[:n], fd, nil
		}
	}
	return nil, fd, errors.New("too long")
}

func descriptor(control []byte) (int, error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return -1, err
	}
	if len(messages) != 1 {
		return -1, fmt.Errorf("%d control messages", len(messages))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("%d descriptors: %w", len(fds), err)
	}
	return fds[0], nil
}
