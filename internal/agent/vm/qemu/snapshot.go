//go:build linux

package qemu

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// A state file is one line, magic and JSON, that says what it fits; then a stream as QEMU's migration reads it.
const (
	stateMagic  = "wrenn-qemu-2 "
	headerLimit = 4096
	pollEvery   = time.Millisecond
)

// stateHeader is what a restored VM must have in common with the one the snapshot was taken of.
type stateHeader struct {
	Version  string `json:"version"`
	Arch     string `json:"arch"`
	CPUModel string `json:"cpu_model"`
	VCPUs    int    `json:"vcpus"`
	MemoryMB int    `json:"memory_mb"`
	Disks    int    `json:"disks"`
	TSCkHz   int    `json:"tsc_khz"` // the guest knows its clock's rate; 0 with KVM, which scales it
}

// fits tells whether a snapshot with this header may be restored where want holds.
func (h stateHeader) fits(want stateHeader) bool {
	off, limit := h.TSCkHz-want.TSCkHz, want.TSCkHz/tscTolerance
	h.TSCkHz, want.TSCkHz = 0, 0
	return h == want && max(off, -off) <= limit
}

func (d *Driver) header(version string, vcpus, memoryMB, disks int) stateHeader {
	h := stateHeader{
		Version: version, Arch: d.caps.Arch, CPUModel: d.caps.CPUModel, VCPUs: vcpus, MemoryMB: memoryMB, Disks: disks,
	}
	if !d.verdict.KVM {
		h.TSCkHz = d.verdict.TSCkHz
	}
	return h
}

// Snapshot implements vm.Driver.
func (d *Driver) Snapshot(ctx context.Context, h vm.Handle, dst vm.SnapshotFiles) error {
	if !filepath.IsAbs(dst.State) || !filepath.IsAbs(dst.Memory) {
		return wrenn.Errorf(wrenn.KindInvalidRequest, "paths of a snapshot must be absolute")
	}
	return d.talk(ctx, h, func(m *monitor) error {
		status, err := m.status(ctx)
		if err != nil {
			return err
		}
		if status.Running {
			return wrenn.Errorf(wrenn.KindInvalidState, "a running VM cannot be snapshotted; pause it first")
		}
		return d.snapshot(ctx, m, h, dst)
	})
}

func (d *Driver) snapshot(ctx context.Context, m *monitor, h vm.Handle, dst vm.SnapshotFiles) (err error) {
	state, err := os.CreateTemp(filepath.Dir(dst.State), ".state-*")
	if err != nil {
		return vm.FileError(err, "the snapshot")
	}
	memory := h.Memory
	defer func() {
		state.Close()
		if err == nil {
			return
		}
		_ = os.Remove(state.Name())
		if memory != h.Memory {
			_ = os.Remove(memory)
		}
	}()
	if filepath.Clean(dst.Memory) != filepath.Clean(h.Memory) {
		memory = filepath.Join(filepath.Dir(dst.Memory), filepath.Base(state.Name())+".memory")
		if err := storage.CloneFile(ctx, h.Memory, memory); err != nil {
			return err
		}
	}
	saved := make(chan error, 1) // nothing of the VM moves: RAM is read while QEMU writes its devices' state
	go func() { saved <- saveMemory(ctx, h, memory, dst.Progress) }()
	err = d.writeState(ctx, m, h, state)
	if err := errors.Join(err, <-saved); err != nil {
		return vm.FileError(err, "the snapshot")
	}
	if memory != h.Memory {
		if err := os.Rename(memory, dst.Memory); err != nil {
			return vm.FileError(err, "the snapshot")
		}
		memory = dst.Memory
	}
	return vm.FileError(os.Rename(state.Name(), dst.State), "the snapshot")
}

// QEMU's migration stream (migration/savevm.c, docs/devel/migration.rst): a header, the sections of the
// devices, an end. Integers are big-endian.
const (
	streamMagic   = "QEVM\x00\x00\x00\x03"
	configSection = "\x07\x00\x00\x00\x07microvm" // the machine type, which an incoming stream must name
	emptyEpilogue = "\x06\x00\x00\x00\x02{}"      // a description of the sections, for debuggers
	streamLimit   = 64 << 20
)

// writeState writes the header and a stream of the devices alone. QEMU offers that as xen-save-devices-state,
// without what an incoming migration expects around it: a configuration before and a description behind.
// RAM is no part of it, and a stream without RAM leaves the RAM of the VM that loads it as it is.
func (d *Driver) writeState(ctx context.Context, m *monitor, h vm.Handle, state io.Writer) error {
	header, err := json.Marshal(d.header(cmp.Or(h.VMMVersion, d.caps.Version), h.VCPUs, h.MemoryMB, h.Disks))
	if err != nil {
		return err
	}
	devices, err := m.saveDevices(ctx)
	if err != nil {
		return err
	}
	sections, ok := bytes.CutPrefix(devices, []byte(streamMagic))
	if !ok {
		return errors.New("QEMU's device state has another format than this driver knows")
	}
	for _, part := range [][]byte{[]byte(stateMagic), header, []byte("\n" + streamMagic + configSection), sections, []byte(emptyEpilogue)} {
		if _, err := state.Write(part); err != nil {
			return err
		}
	}
	return nil
}

// saveDevices gets the devices' state through a file in memory, which QEMU is handed open for writing.
func (m *monitor) saveDevices(ctx context.Context) (devices []byte, err error) {
	fd, err := unix.MemfdCreate("qemu-devices", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "qemu-devices")
	defer f.Close()
	writable, err := os.OpenFile(fdPath(fd), os.O_WRONLY, 0) // QEMU compares the access mode
	if err != nil {
		return nil, err
	}
	defer writable.Close()
	var set struct {
		ID int `json:"fdset-id"`
	}
	if err := m.execute(ctx, "add-fd", nil, &set, writable); err != nil {
		return nil, err
	}
	save := map[string]any{"filename": fmt.Sprintf("/dev/fdset/%d", set.ID), "live": false}
	err = m.execute(ctx, "xen-save-devices-state", save, nil)
	if err := errors.Join(err, m.execute(ctx, "remove-fd", map[string]any{"fdset-id": set.ID}, nil)); err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, 0, streamLimit))
}

// load reads a stream from a descriptor that QEMU inherited. QEMU ends if it does not fit.
func (m *monitor) load(ctx context.Context, fd int) error {
	// A migrated guest is told to announce its address. There is nobody to hear it, its kernel works for it
	// for half a second, and one that powers off meanwhile hangs: Linux 6.1 waits for an answer of a network
	// device that it has reset.
	if err := m.execute(ctx, "migrate-set-parameters", map[string]any{"announce-rounds": 0}, nil); err != nil {
		return err
	}
	if err := m.execute(ctx, "migrate-incoming", map[string]any{"uri": fmt.Sprintf("fd:%d", fd)}, nil); err != nil {
		return err
	}
	for {
		status, err := m.status(ctx)
		if err != nil || status.Status != "inmigrate" {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pollEvery):
		}
	}
}

// openState opens the snapshot's state, checks that it fits this VM, and hands QEMU its stream.
func (s *starting) openState(o *opened) error {
	f, err := os.Open(s.cfg.Restore.State)
	if err != nil {
		return vm.FileError(err, "the snapshot's state")
	}
	length, err := s.fits(f)
	if err == nil {
		_, err = f.Seek(int64(length), io.SeekStart)
	}
	if err == nil {
		o.state, err = s.stream(f)
	}
	if err != nil {
		f.Close()
	}
	return err
}

// stream hands QEMU what is left of a file through a pipe: since version 9.1 it wants no descriptor of a file. The file is
// closed when QEMU has read it all, or ended.
func (s *starting) stream(f *os.File) (fd int, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return -1, err
	}
	go func() {
		defer f.Close()
		defer w.Close()
		_, _ = io.Copy(w, f) // of a stream cut off QEMU says so
	}()
	return s.inherit.add(r), nil
}

// fits checks that a state is of a VM like this, and tells where QEMU's stream begins.
func (s *starting) fits(f *os.File) (length int, err error) {
	b := make([]byte, headerLimit)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("read the state: %w", err)
	}
	got, length, err := parseHeader(b[:n])
	if err != nil {
		return 0, wrenn.Wrap(err, wrenn.KindInvalidRequest, "the snapshot's state file is damaged, or was not made by this driver")
	}
	if want := s.driver.header(s.driver.caps.Version, s.cfg.VCPUs, s.cfg.MemoryMB, len(s.cfg.Disks)); !got.fits(want) {
		return 0, wrenn.Wrap(fmt.Errorf("it is of %+v, the VM is %+v", got, want), wrenn.KindInvalidRequest,
			"the snapshot does not fit: it needs QEMU %s (%s), %d vCPUs, %d MiB, %d disks; restore it on a host and with a size like that",
			got.Version, got.CPUModel, got.VCPUs, got.MemoryMB, got.Disks)
	}
	return length, nil
}

// parseHeader returns the header and its length in the file.
func parseHeader(b []byte) (stateHeader, int, error) {
	var h stateHeader
	line, _, ok := bytes.Cut(b, []byte("\n"))
	text, magic := bytes.CutPrefix(line, []byte(stateMagic))
	if !ok || !magic {
		return h, 0, errors.New("no header")
	}
	if err := json.Unmarshal(text, &h); err != nil {
		return h, 0, fmt.Errorf("header: %w", err)
	}
	return h, len(line) + 1, nil
}
