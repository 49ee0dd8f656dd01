//go:build linux

package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// A state file is one line, magic and JSON, that says what it fits; then QEMU's own stream.
const (
	stateMagic    = "wrenn-qemu-1 "
	headerLimit   = 4096
	cancelTimeout = 5 * time.Second
	pollEvery     = time.Millisecond
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

func (d *Driver) header(vcpus, memoryMB, disks int) stateHeader {
	h := stateHeader{
		Version: d.caps.Version, Arch: d.caps.Arch, CPUModel: d.caps.CPUModel, VCPUs: vcpus, MemoryMB: memoryMB, Disks: disks,
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
		return fileError(err, "the snapshot")
	}
	memory := state.Name() + ".memory"
	defer func() {
		state.Close()
		if err != nil {
			_, _ = os.Remove(state.Name()), os.Remove(memory)
		}
	}()
	if err := d.writeState(ctx, m, h, state); err != nil {
		return err
	}
	if filepath.Clean(dst.Memory) != filepath.Clean(h.Memory) {
		memory = filepath.Join(filepath.Dir(dst.Memory), filepath.Base(memory))
		if err := storage.CloneFile(ctx, h.Memory, memory); err != nil {
			return err
		}
		if err := os.Rename(memory, dst.Memory); err != nil {
			return fileError(err, "the snapshot")
		}
	}
	return fileError(os.Rename(state.Name(), dst.State), "the snapshot")
}

func (d *Driver) writeState(ctx context.Context, m *monitor, h vm.Handle, state *os.File) error {
	header, err := json.Marshal(d.header(h.VCPUs, h.MemoryMB, h.Disks))
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(state, "%s%s\n", stateMagic, header); err != nil {
		return fileError(err, "the snapshot")
	}
	if err := m.ignoreSharedRAM(ctx); err != nil {
		return err
	}
	if err := m.execute(ctx, "getfd", map[string]any{"fdname": "state"}, nil, state); err != nil {
		return err
	}
	if err := m.execute(ctx, "migrate", map[string]any{"uri": "fd:state"}, nil); err != nil {
		return err
	}
	err = m.migrated(ctx)
	if err != nil && ctx.Err() != nil {
		m.cancelMigration(h.Socket)
	}
	if err != nil && diskFull(state) {
		return wrenn.Wrap(err, wrenn.KindDiskFull, "the host's disk is full; delete sandboxes or snapshots, or add disk")
	}
	return err
}

// diskFull tries to write on after a migration failed, which does not say why.
func diskFull(f *os.File) bool {
	_, err := f.Write(make([]byte, 64<<10))
	return err != nil && wrenn.KindOf(fileError(err, "")) == wrenn.KindDiskFull
}

// ignoreSharedRAM makes a stream carry the devices only: RAM is in a file that outlives the process.
func (m *monitor) ignoreSharedRAM(ctx context.Context) error {
	on := map[string]any{"capability": "x-ignore-shared", "state": true}
	return m.execute(ctx, "migrate-set-capabilities", map[string]any{"capabilities": []any{on}}, nil)
}

// load reads a stream from a descriptor that QEMU inherited. QEMU ends if it does not fit.
func (m *monitor) load(ctx context.Context, fd int) error {
	if err := m.ignoreSharedRAM(ctx); err != nil {
		return err
	}
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

// migrated waits until the stream is written: milliseconds, because RAM is not in it.
func (m *monitor) migrated(ctx context.Context) error {
	for {
		var info struct {
			Status string `json:"status"`
			Error  string `json:"error-desc"`
		}
		if err := m.execute(ctx, "query-migrate", nil, &info); err != nil {
			return err
		}
		switch info.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return fmt.Errorf("writing the state failed: %s", info.Error)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pollEvery):
		}
	}
}

// cancelMigration takes back a migration whose caller gave up; the VM stays frozen as it was.
func (m *monitor) cancelMigration(socket string) {
	m.close() // its deadline has passed
	ctx, cancel := context.WithTimeout(context.Background(), cancelTimeout)
	defer cancel()
	again, err := connect(ctx, socket)
	if err != nil {
		return
	}
	defer again.close()
	_ = again.execute(ctx, "migrate_cancel", nil, nil)
}

// openState opens the snapshot's state, checks that it fits this VM, and leaves the file at QEMU's stream.
func (s *starting) openState(o *opened) error {
	f, err := os.Open(s.cfg.Restore.State)
	if err != nil {
		return fileError(err, "the snapshot's state")
	}
	o.state = s.inherit.add(f)
	b := make([]byte, headerLimit)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the state: %w", err)
	}
	got, length, err := parseHeader(b[:n])
	if err != nil {
		return wrenn.Wrap(err, wrenn.KindInvalidRequest, "the snapshot's state file is damaged, or was not made by this driver")
	}
	if want := s.driver.header(s.cfg.VCPUs, s.cfg.MemoryMB, len(s.cfg.Disks)); !got.fits(want) {
		return wrenn.Wrap(fmt.Errorf("it is of %+v, the VM is %+v", got, want), wrenn.KindInvalidRequest,
			"the snapshot does not fit: it needs QEMU %s (%s), %d vCPUs, %d MiB, %d disks; restore it on a host and with a size like that",
			got.Version, got.CPUModel, got.VCPUs, got.MemoryMB, got.Disks)
	}
	_, err = f.Seek(int64(length), io.SeekStart)
	return err
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
