package envd

import (
	"net"

	"golang.org/x/sys/unix"
)

// vanishedAfterMS is how long a peer may leave what we sent unacknowledged. A peer that reads slowly
// acknowledges; one whose machine is gone does not, and must not hold up a process for ever.
const vanishedAfterMS = 60_000

// patient is a listener whose connections give up on vanished peers.
type patient struct{ net.Listener }

func (l patient) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		if raw, err := tcp.SyscallConn(); err == nil {
			_ = raw.Control(func(fd uintptr) {
				_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, vanishedAfterMS)
			})
		}
	}
	return conn, nil
}
