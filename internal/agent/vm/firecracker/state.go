//go:build linux

package firecracker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/probe"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// A state file is a page with magic and JSON that says what it fits, then Firecracker's own state. A whole page, so
// that the rest can be had by reflink.
const (
	stateMagic = "wrenn-firecracker-1 "
	headerSize = 4096
	stateLimit = 64 << 20
)

// stateHeader is what a restored VM must have in common with the one the snapshot was taken of.
type stateHeader struct {
	Version     string `json:"version"` // of the Firecracker that wrote it
	Format      string `json:"format"`  // of its snapshots
	CPUTemplate string `json:"cpu_template"`
	Arch        string `json:"arch"`
	CPUModel    string `json:"cpu_model"`
	VCPUs       int    `json:"vcpus"`
	MemoryMB    int    `json:"memory_mb"`
	Disks       int    `json:"disks"`
}

// noTemplate is the only CPU template yet: the host's CPU as it is.
const noTemplate = "None"

func (d *Driver) header(vmm string, vcpus, memoryMB, disks int) stateHeader {
	h := stateHeader{
		Version: vmm, CPUTemplate: noTemplate, Arch: d.caps.Arch, CPUModel: probe.HostCPU(),
		VCPUs: vcpus, MemoryMB: memoryMB, Disks: disks,
	}
	for _, b := range d.binaries {
		if b.Version == vmm {
			h.Format = b.Format
		}
	}
	return h
}

// Snapshot implements vm.Driver. Firecracker counts what changed from its last snapshot on, so the changes are
// always collected in the VM's own memory file, of which any other is made a clone.
func (d *Driver) Snapshot(ctx context.Context, h vm.Handle, dst vm.SnapshotFiles) error {
	if !filepath.IsAbs(dst.State) || !filepath.IsAbs(dst.Memory) {
		return wrenn.Errorf(wrenn.KindInvalidRequest, "paths of a snapshot must be absolute")
	}
	return d.talk(ctx, h, func(c *client) error {
		i, err := c.describe(ctx)
		if err != nil {
			return err
		}
		switch i.State {
		case stateRunning:
			return wrenn.Errorf(wrenn.KindInvalidState, "a running VM cannot be snapshotted; pause it first")
		case stateNotStarted:
			return wrenn.Errorf(wrenn.KindInvalidState, "a VM that never ran cannot be snapshotted; let it run first")
		}
		return d.snapshot(ctx, c, h, dst)
	})
}

func (d *Driver) snapshot(ctx context.Context, c *client, h vm.Handle, dst vm.SnapshotFiles) (err error) {
	state, err := os.CreateTemp(filepath.Dir(dst.State), ".state-*")
	if err != nil {
		return vm.FileError(err, "the snapshot")
	}
	memory := filepath.Join(filepath.Dir(dst.Memory), filepath.Base(state.Name())+".memory")
	defer func() {
		state.Close()
		if err != nil {
			_, _ = os.Remove(state.Name()), os.Remove(memory)
		}
	}()
	told := tellProgress(h, dst.Progress)
	err = c.do(ctx, snapshotDiff(), nil)
	told()
	if err != nil {
		return diskFull(err, filepath.Dir(h.Memory))
	}
	if err := d.writeState(h, state); err != nil {
		return vm.FileError(err, "the snapshot")
	}
	if filepath.Clean(dst.Memory) != filepath.Clean(h.Memory) {
		if err := storage.CloneFile(ctx, h.Memory, memory); err != nil {
			return err
		}
		if err := os.Rename(memory, dst.Memory); err != nil {
			return vm.FileError(err, "the snapshot")
		}
	}
	return vm.FileError(os.Rename(state.Name(), dst.State), "the snapshot")
}

// progressEvery is how often it is looked how far Firecracker has got, which does not tell.
const progressEvery = 100 * time.Millisecond

// tellProgress tells how much of the RAM Firecracker has gone through, until done is called.
func tellProgress(h vm.Handle, tell func(done, total int64)) (done func()) {
	if tell == nil {
		return func() {}
	}
	total := int64(h.MemoryMB) << 20
	tell(0, total)
	end := make(chan struct{})
	var telling sync.WaitGroup
	telling.Go(func() {
		every := time.NewTicker(progressEvery)
		defer every.Stop()
		for {
			select {
			case <-end:
				return
			case <-every.C:
				if at, ok := writesAt(h.PID, memoryPath); ok {
					tell(min(at, total), total)
				}
			}
		}
	})
	return func() { close(end); telling.Wait() }
}

// writesAt is the offset at which a process writes to a file that it has open for that, under the name that it has for it
// (proc(5), /proc/PID/fdinfo).
func writesAt(pid int, path string) (int64, bool) {
	dir := fmt.Sprintf("/proc/%d", pid)
	fds, err := os.ReadDir(dir + "/fd")
	if err != nil {
		return 0, false // it has ended
	}
	for _, fd := range fds {
		if link, err := os.Readlink(dir + "/fd/" + fd.Name()); err != nil || link != path {
			continue
		}
		info, err := os.ReadFile(dir + "/fdinfo/" + fd.Name())
		var at int64
		var flags int
		if err != nil {
			continue
		}
		if _, err := fmt.Sscanf(string(info), "pos:\t%d\nflags:\t%o", &at, &flags); err == nil && flags&unix.O_ACCMODE != unix.O_RDONLY {
			return at, true
		}
	}
	return 0, false
}

// writeState makes a state file of what Firecracker wrote in its jail.
func (d *Driver) writeState(h vm.Handle, to *os.File) error {
	written := process(h).Path(newStatePath)
	from, err := os.OpenFile(written, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0) // the folder is the VMM's
	if err != nil {
		return err
	}
	defer from.Close()
	header, err := json.Marshal(d.header(h.VMMVersion, h.VCPUs, h.MemoryMB, h.Disks))
	if err != nil {
		return err
	}
	page := make([]byte, headerSize)
	copy(page, stateMagic+string(header)+"\n")
	if _, err := to.Write(page); err != nil {
		return err
	}
	if n, err := io.Copy(to, io.LimitReader(from, stateLimit)); err != nil || n == stateLimit {
		return errors.Join(err, fmt.Errorf("the device state has %d bytes", n))
	}
	return os.Remove(written)
}

// diskFull finds out whether a write failed for want of room, which Firecracker says in words only.
func diskFull(err error, dir string) error {
	f, tempErr := os.CreateTemp(dir, ".room-*")
	if tempErr != nil {
		return errors.Join(vm.FileError(tempErr, "the memory file"), err)
	}
	defer f.Close()
	defer os.Remove(f.Name())
	if _, roomErr := f.Write(make([]byte, 1<<20)); roomErr != nil {
		return wrenn.Wrap(errors.Join(err, roomErr), wrenn.KindOf(vm.FileError(roomErr, "the memory file")),
			"the host's disk is full; delete sandboxes or snapshots, or add disk")
	}
	return err
}

// openState checks that the snapshot's state fits this VM, puts Firecracker's part of it where the jail has it, and
// tells which binary can load it.
func (s *starting) openState() (Binary, error) {
	f, err := os.Open(s.cfg.Restore.State)
	if err != nil {
		return Binary{}, vm.FileError(err, "the snapshot's state")
	}
	defer f.Close()
	page := make([]byte, headerSize)
	if _, err := io.ReadFull(f, page); err != nil {
		return Binary{}, damaged(err)
	}
	got, err := parseHeader(page)
	if err != nil {
		return Binary{}, damaged(err)
	}
	b, err := s.driver.fitting(got)
	if err != nil {
		return Binary{}, err
	}
	want := s.driver.header(got.Version, s.cfg.VCPUs, s.cfg.MemoryMB, len(s.cfg.Disks))
	want.Format = got.Format
	if got != want {
		return Binary{}, wrenn.Wrap(fmt.Errorf("it is of %+v, the VM is %+v", got, want), wrenn.KindInvalidRequest,
			"the snapshot does not fit: it needs the CPU %s, %d vCPUs, %d MiB, %d disks; restore it on a host and with a size like that",
			got.CPUModel, got.VCPUs, got.MemoryMB, got.Disks)
	}
	to, err := os.OpenFile(s.path(stateFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return Binary{}, err
	}
	_, err = io.Copy(to, f) // copy_file_range(2), which clones where it can
	return b, errors.Join(vm.FileError(err, "the snapshot's state"), to.Close())
}

func damaged(err error) error {
	return wrenn.Wrap(err, wrenn.KindInvalidRequest, "the snapshot's state file is damaged, or was not made by this driver")
}

// fitting is the binary that loads a snapshot: the one that wrote it, else one of the same snapshot format.
func (d *Driver) fitting(h stateHeader) (Binary, error) {
	for _, fits := range []func(Binary) bool{
		func(b Binary) bool { return b.Version == h.Version },
		func(b Binary) bool { return b.Format == h.Format },
	} {
		if i := slices.IndexFunc(d.binaries, fits); i >= 0 {
			return d.binaries[i], nil
		}
	}
	var have []string
	for _, b := range d.binaries {
		have = append(have, b.Version)
	}
	return Binary{}, wrenn.Errorf(wrenn.KindInvalidRequest,
		"the snapshot needs Firecracker %s (snapshot format %s), this host has %v; put that version into AGENT_FIRECRACKER_DIR", h.Version, h.Format, have)
}

func parseHeader(page []byte) (stateHeader, error) {
	var h stateHeader
	line, _, ok := bytes.Cut(page, []byte("\n"))
	text, magic := bytes.CutPrefix(line, []byte(stateMagic))
	if !ok || !magic {
		return h, errors.New("no header")
	}
	if err := json.Unmarshal(text, &h); err != nil {
		return h, fmt.Errorf("header: %w", err)
	}
	return h, nil
}
