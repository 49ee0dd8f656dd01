// Package console keeps what a VM's serial console prints: bounded in size and in rate, because a guest
// prints what it likes. It must not know VMMs, or how a console is reached.
package console

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
)

// Rate is how fast a console is read, in bytes per second. A guest that prints more is slowed down
// by its own serial port: it costs neither the host's disk nor the agent's time.
const Rate = 256 << 10

// Copy reads a console until its end, which is that of its VM, and keeps the end of what it read in a file.
func Copy(path string, from io.Reader) error {
	l, err := open(path)
	if err != nil {
		_, _ = io.Copy(io.Discard, from) // a console that nobody reads would stop the guest
		return err
	}
	defer l.file.Close()
	buf := make([]byte, Rate/8)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if writeErr := l.append(buf[:n]); writeErr != nil {
				_, _ = io.Copy(io.Discard, from)
				return writeErr
			}
		}
		if err != nil {
			return nil //nolint:nilerr // the end of the VM, however it shows
		}
		time.Sleep(time.Duration(n) * time.Second / Rate)
	}
}

// log is a file that keeps the end of what is appended to it, at most vm.ConsoleLimit bytes.
type log struct {
	file *os.File
	size int64
}

func open(path string) (*log, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		f.Close()
		return nil, err
	}
	return &log{file: f, size: size}, nil
}

func (c *log) append(b []byte) error {
	if c.size+int64(len(b)) > vm.ConsoleLimit {
		if err := c.shrink(); err != nil {
			return err
		}
	}
	n, err := c.file.WriteAt(b, c.size)
	c.size += int64(n)
	return err
}

// shrink drops the older half, up to the end of a line.
func (c *log) shrink() error {
	keep := make([]byte, min(c.size, vm.ConsoleLimit/2))
	if _, err := c.file.ReadAt(keep, c.size-int64(len(keep))); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the console log: %w", err)
	}
	for i, b := range keep {
		if b == '\n' {
			keep = keep[i+1:]
			break
		}
	}
	if _, err := c.file.WriteAt(keep, 0); err != nil {
		return fmt.Errorf("rewrite the console log: %w", err)
	}
	c.size = int64(len(keep))
	return c.file.Truncate(c.size)
}
