//go:build linux

package qemu

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
)

// consoleRate is how fast a console is read, in bytes per second. A guest that prints more is slowed down
// by its own serial port: it costs neither the host's disk nor the agent's time.
const consoleRate = 256 << 10

// readConsole reads the VM's console into its log until the VM is gone, if this driver does not do so
// already. QEMU drops what is printed while nobody reads, so the console of a VM that outlived its agent
// goes on when the next one waits for it.
func (d *Driver) readConsole(h vm.Handle) {
	if h.Console == "" || h.Socket == "" {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.consoles[h.Socket] {
		return
	}
	conn, err := dialUnix(consoleSocket(h.Socket))
	if err != nil {
		return // the VM is gone
	}
	d.consoles[h.Socket] = true
	go func() {
		defer conn.Close()
		if err := copyConsole(h.Console, conn); err != nil {
			d.opts.Log.Warn("cannot keep the console of a VM", "pid", h.PID, "err", err)
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.consoles, h.Socket)
	}()
}

func dialUnix(path string) (*net.UnixConn, error) {
	address, done, err := shortPath(path)
	if err != nil {
		return nil, err
	}
	defer done()
	return net.DialUnix("unix", nil, &net.UnixAddr{Name: address, Net: "unix"})
}

func copyConsole(path string, from io.Reader) error {
	log, err := openConsole(path)
	if err != nil {
		_, _ = io.Copy(io.Discard, from) // a console that nobody reads would stop the guest
		return err
	}
	defer log.file.Close()
	buf := make([]byte, consoleRate/8)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if writeErr := log.append(buf[:n]); writeErr != nil {
				_, _ = io.Copy(io.Discard, from)
				return writeErr
			}
		}
		if err != nil {
			return nil //nolint:nilerr // the end of the VM, however it shows
		}
		time.Sleep(time.Duration(n) * time.Second / consoleRate)
	}
}

// consoleLog is a file that keeps the end of what is appended to it, at most vm.ConsoleLimit bytes.
type consoleLog struct {
	file *os.File
	size int64
}

func openConsole(path string) (*consoleLog, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		f.Close()
		return nil, err
	}
	return &consoleLog{file: f, size: size}, nil
}

func (c *consoleLog) append(b []byte) error {
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
func (c *consoleLog) shrink() error {
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
