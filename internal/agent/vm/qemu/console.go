//go:build linux

package qemu

import (
	"net"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/console"
)

// readConsole reads the VM's console into its log until the VM is gone, if this driver does not do so
// already. QEMU drops what is printed while nobody reads, so the console of a VM that outlived its agent
// goes on when the next one waits for it.
func (d *Driver) readConsole(h vm.Handle) {
	if h.Console == "" || h.Socket == "" {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.consoles[*process(h)] {
		return
	}
	conn, err := dialUnix(consoleSocket(h.Socket))
	if err != nil {
		return // the VM is gone
	}
	d.consoles[*process(h)] = true
	go func() {
		defer conn.Close()
		if err := console.Copy(h.Console, conn); err != nil {
			d.opts.Log.Warn("cannot keep the console of a VM", "pid", h.PID, "err", err)
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.consoles, *process(h))
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
