//go:build linux

package qemu

import (
	"os"
	"path/filepath"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
)

// jail is all of the host's files that QEMU can open by name: its program, the libraries and firmware it
// comes with, /dev/null, and /dev/kvm where it is used. What the VM consists of is handed over as open files, which
// QEMU opens again by /proc/self/fd.
func jail(dir, binary, kvm string) *vmproc.Jail {
	j := &vmproc.Jail{Dir: dir, Proc: true, Devices: []string{os.DevNull}, Binds: []vmproc.Bind{{From: binary, To: binary}}}
	share := filepath.Join(filepath.Dir(binary), "..", "share")
	for _, path := range []string{
		"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache",
		filepath.Join(share, "qemu"), filepath.Join(share, "seabios"),
	} {
		if _, err := os.Stat(path); err == nil {
			j.Binds = append(j.Binds, vmproc.Bind{From: path, To: path})
		}
	}
	if kvm != "" {
		j.Devices = append(j.Devices, kvm)
	}
	return j
}
