//go:build linux

package firecracker

import (
	"fmt"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/uffd"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Ways to bring in the RAM of a restored VM, Options.Memory.
const (
	MemoryFile = "file" // the kernel maps the memory file
	MemoryUffd = "uffd" // a page server answers the VM's page faults
)

// touchesSuffix names, beside a memory file, the order in which a VM first touched its pages.
const touchesSuffix = ".touches"

// paged tells whether this VM gets a page server. A cold start has no memory to be served, and Firecrackers before 1.12
// do not say what their balloon removed, or close the socket before their greeting has arrived.
func (s *starting) paged() bool {
	return s.cfg.Restore != nil && s.driver.opts.Memory == MemoryUffd && !s.binary.version.before(1, 12)
}

// base is the file that a restored VM's RAM is read from.
func (s *starting) base() string {
	if s.cfg.SharedMemory {
		return s.cfg.Restore.Memory
	}
	return s.cfg.MemoryFile
}

// startPager starts the VM's page server, beneath which the VMM is then to be started.
func (s *starting) startPager() error {
	var err error
	if s.pagerWords, err = vmproc.BoundedFile("pager-stderr", vmproc.WordsLimit); err != nil {
		return err
	}
	s.pager, err = uffd.Launch(uffd.Options{
		Program: s.driver.opts.PageServer, ID: s.cfg.ID, Memory: s.base(), Touches: s.cfg.Restore.Memory + touchesSuffix,
		Socket: s.path(pagesSocket), Jail: s.path(pagerJail), Stderr: s.pagerWords,
		UID: s.cfg.UID, GID: s.cfg.GID, NetnsPath: s.cfg.Net.NetnsPath, Cgroup: s.cgroup,
	})
	if err != nil {
		return fmt.Errorf("page server: %w", err)
	}
	return nil
}

// doomPager ends the page server of a failed start, which is gone when its VMM is: then it can be reaped.
func (s *starting) doomPager() error {
	if s.pager == nil {
		return nil
	}
	return s.pager.Doom()
}

func (s *starting) reapPager() error {
	if s.pagerWords != nil {
		s.pagerWords.Close()
	}
	if s.pager == nil {
		return nil
	}
	return s.pager.Reap()
}

// pager is the process that serves a VM's memory, if there is one.
func pager(h vm.Handle) *vmproc.Process {
	return &vmproc.Process{PID: h.PagerPID, StartTime: h.PagerStartTime, BootID: h.BootID}
}

// CheckMemory tells why RAM cannot be brought in this way on this host.
func CheckMemory(way string) error {
	if way != MemoryUffd {
		return nil
	}
	if err := uffd.Available(); err != nil {
		return wrenn.Wrap(err, wrenn.KindInternal, "this host's kernel has no userfaultfd; set AGENT_FIRECRACKER_MEMORY=file")
	}
	return nil
}
