package process

import (
	"errors"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	processpb "github.com/wrenn-sandbox/wrenn/internal/gen/process"
)

// wrap makes a data event of one sort of output.
type wrap func([]byte) *processpb.ProcessEvent_DataEvent

func asStdout(b []byte) *processpb.ProcessEvent_DataEvent {
	return &processpb.ProcessEvent_DataEvent{Output: &processpb.ProcessEvent_DataEvent_Stdout{Stdout: b}}
}

func asStderr(b []byte) *processpb.ProcessEvent_DataEvent {
	return &processpb.ProcessEvent_DataEvent{Output: &processpb.ProcessEvent_DataEvent_Stderr{Stderr: b}}
}

func asPTY(b []byte) *processpb.ProcessEvent_DataEvent {
	return &processpb.ProcessEvent_DataEvent{Output: &processpb.ProcessEvent_DataEvent_Pty{Pty: b}}
}

// pump moves output from one pipe or terminal to the fanout.
type pump struct {
	src  *os.File
	wrap wrap
	out  *fanout
	done chan struct{}
}

func startPump(src *os.File, w wrap, out *fanout) *pump {
	p := &pump{src: src, wrap: w, out: out, done: make(chan struct{})}
	go p.run()
	return p
}

// exited tells the pump that the process is gone: the pipe may stay open in other hands, but only what
// comes in the grace period is still waited for.
func (p *pump) exited() { _ = p.src.SetReadDeadline(time.Now().Add(endGrace)) }

func (p *pump) run() {
	defer close(p.done)
	buf := make([]byte, chunkSize)
	for {
		n, err := p.src.Read(buf)
		if n > 0 {
			p.out.publish(p.wrap(slices.Clone(buf[:n])))
		}
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				p.drain(buf)
			}
			return // end of file, or EIO: the terminal was hung up
		}
	}
}

// drain reads what is in the pipe without waiting for more. It stops after as much as a pipe can hold:
// the process itself is gone, so what it wrote is within that, however busily others go on writing.
func (p *pump) drain(buf []byte) {
	conn, err := p.src.SyscallConn()
	if err != nil {
		return
	}
	_ = p.src.SetReadDeadline(time.Time{}) // else the raw read is refused too
	left := p.capacity()
	for left > 0 {
		n := 0
		err := conn.Read(func(fd uintptr) bool {
			n, _ = unix.Read(int(fd), buf)
			return true
		})
		if err != nil || n <= 0 {
			return
		}
		left -= n
		p.out.publish(p.wrap(slices.Clone(buf[:n])))
	}
}

func (p *pump) capacity() int {
	size := 64 << 10
	if conn, err := p.src.SyscallConn(); err == nil {
		_ = conn.Control(func(fd uintptr) {
			if n, err := unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0); err == nil && n > size {
				size = n
			}
		})
	}
	return size
}
