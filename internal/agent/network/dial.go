package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/netns"
)

// DialContext connects from the gateway's side inside the namespace, to an IPv4 address and port. Only
// the socket is made inside: no thread waits there for a guest that does not answer.
func (s *Slot) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil || !to.Addr().Is4() || (network != "tcp" && network != "tcp4") {
		return nil, fmt.Errorf("dial %s %q in a slot: must be tcp and an IPv4 address with port", network, addr)
	}
	f, err := s.socket()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := connectSocket(ctx, f, to); err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Addr: net.TCPAddrFromAddrPort(to), Err: err}
	}
	return net.FileConn(f)
}

func (s *Slot) socket() (*os.File, error) {
	fd := -1
	err := netns.Do(s.NetnsPath, func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("socket in slot %d: %w", s.Index, err)
	}
	return os.NewFile(uintptr(fd), "slot"), nil
}

func connectSocket(ctx context.Context, f *os.File, to netip.AddrPort) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = unix.Connect(int(fd), &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
	})
	if err != nil {
		return err
	}
	if failed != nil && !errors.Is(failed, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", failed)
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	err = raw.Write(func(fd uintptr) bool {
		var pending bool
		pending, failed = connecting(int(fd))
		return !pending
	})
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	return os.NewSyscallError("connect", failed)
}

// connecting tells whether a connect is still under way, and else how it ended.
func connecting(fd int) (bool, error) {
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return false, err
	}
	if code != 0 {
		return false, unix.Errno(code)
	}
	_, err = unix.Getpeername(fd)
	if errors.Is(err, unix.ENOTCONN) {
		return true, nil
	}
	return false, err
}
