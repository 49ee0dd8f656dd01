package vmtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// world is a host without hypervisor: machines are structs, their RAM is a real file. It outlives the
// drivers, as VMs outlive agents.
type world struct {
	mu       sync.Mutex
	machines map[int]*machine
	lastPID  int
}

type machine struct {
	cfg      vm.Config
	running  bool
	since    time.Time     // of running
	ran      time.Duration // before
	pattern  string
	gone     chan struct{}
	finished bool
}

// snapshotted is a fake's state file.
type snapshotted struct {
	VCPUs, MemoryMB, Disks int
	Ran                    time.Duration
}

type fake struct{ w *world }

const fakeBoot = "fake-boot"

func (d fake) Capabilities() vm.Capabilities {
	return vm.Capabilities{Driver: "fake", Version: "1"}
}

func (d fake) Start(ctx context.Context, cfg vm.Config) (vm.Handle, error) {
	if err := ctx.Err(); err != nil {
		return vm.Handle{}, wrenn.Wrap(err, wrenn.KindInternal, "cancelled")
	}
	m := &machine{cfg: cfg, gone: make(chan struct{}), pattern: "0 0"}
	if err := valid(cfg); err != nil {
		return vm.Handle{}, err
	}
	for _, disk := range cfg.Disks {
		if disk.GrowTo == 0 {
			continue
		}
		if err := os.Truncate(disk.Path, disk.GrowTo); err != nil {
			return vm.Handle{}, wrenn.Wrap(err, wrenn.KindInternal, "cannot grow the disk")
		}
	}
	if err := m.load(); err != nil {
		return vm.Handle{}, err
	}
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	if !cfg.Frozen {
		m.running, m.since = true, time.Now()
	}
	d.w.lastPID++
	d.w.machines[d.w.lastPID] = m
	return vm.Handle{
		Version: 1, Driver: "fake", PID: d.w.lastPID, StartTime: 1, BootID: fakeBoot, Dir: cfg.Dir, Memory: cfg.MemoryFile,
		MemoryMB: cfg.MemoryMB, VCPUs: cfg.VCPUs, Disks: len(cfg.Disks), StartedAt: time.Now(),
	}, nil
}

func valid(cfg vm.Config) error {
	bad := cfg.VCPUs < 1 || cfg.VCPUs > wrenn.MaxVCPUs || cfg.MemoryMB < 1 || !filepath.IsAbs(cfg.MemoryFile) ||
		strings.ContainsAny(cfg.ID+cfg.Cgroup+cfg.Net.MAC, "/,") || cfg.Cgroup == ".." || strings.Contains(cfg.Cmdline, "\n")
	for _, path := range []string{cfg.Kernel, cfg.Net.NetnsPath} {
		_, err := os.Stat(path)
		bad = bad || err != nil
	}
	for _, disk := range cfg.Disks {
		_, err := os.Stat(disk.Path)
		bad = bad || err != nil
	}
	if bad {
		return wrenn.Errorf(wrenn.KindInvalidRequest, "bad config")
	}
	return nil
}

// load makes the RAM: empty, or the snapshot's.
func (m *machine) load() error {
	if m.cfg.Restore == nil {
		return os.WriteFile(m.cfg.MemoryFile, nil, 0o600)
	}
	b, err := os.ReadFile(m.cfg.Restore.State)
	var state snapshotted
	if err == nil {
		err = json.Unmarshal(b, &state)
	}
	if err == nil && (state.VCPUs != m.cfg.VCPUs || state.MemoryMB != m.cfg.MemoryMB || state.Disks != len(m.cfg.Disks)) {
		err = errors.New("another machine")
	}
	if err != nil {
		return wrenn.Wrap(err, wrenn.KindInvalidRequest, "the snapshot does not fit")
	}
	memory, err := os.ReadFile(m.cfg.MemoryFile)
	if errors.Is(err, os.ErrNotExist) {
		if memory, err = os.ReadFile(m.cfg.Restore.Memory); err == nil {
			err = os.WriteFile(m.cfg.MemoryFile, memory, 0o600)
		}
	}
	if err != nil {
		return wrenn.Wrap(err, wrenn.KindInvalidRequest, "no memory")
	}
	m.pattern, m.ran = string(memory), state.Ran
	return nil
}

// with calls fn for a VM that is there, under the world's lock.
func (d fake) with(ctx context.Context, h vm.Handle, fn func(*machine) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	m := d.w.machines[h.PID]
	if m == nil || h.BootID != fakeBoot || m.finished {
		return wrenn.Errorf(wrenn.KindNotFound, "the VM is gone")
	}
	return fn(m)
}

func (d fake) Inspect(ctx context.Context, h vm.Handle) (vm.State, error) {
	state := vm.StateGone
	err := d.with(ctx, h, func(m *machine) error {
		state = vm.StateFrozen
		if m.running {
			state = vm.StateRunning
		}
		return nil
	})
	if wrenn.KindOf(err) == wrenn.KindNotFound {
		return vm.StateGone, nil
	}
	return state, err
}

func (d fake) Pause(ctx context.Context, h vm.Handle) error {
	return d.with(ctx, h, func(m *machine) error {
		if m.running {
			m.running, m.ran = false, m.ran+time.Since(m.since)
		}
		return nil
	})
}

func (d fake) Resume(ctx context.Context, h vm.Handle) error {
	return d.with(ctx, h, func(m *machine) error {
		if !m.running {
			m.running, m.since = true, time.Now()
		}
		return nil
	})
}

func (d fake) Snapshot(ctx context.Context, h vm.Handle, dst vm.SnapshotFiles) error {
	return d.with(ctx, h, func(m *machine) error {
		if m.running {
			return wrenn.Errorf(wrenn.KindInvalidState, "pause it first")
		}
		if !filepath.IsAbs(dst.State) {
			return wrenn.Errorf(wrenn.KindInvalidRequest, "relative path")
		}
		b, err := json.Marshal(snapshotted{m.cfg.VCPUs, m.cfg.MemoryMB, len(m.cfg.Disks), m.ran})
		if err == nil {
			err = os.WriteFile(dst.Memory, []byte(m.pattern), 0o600)
		}
		if err != nil {
			return wrenn.Wrap(err, wrenn.KindInternal, "cannot write the memory")
		}
		if err := os.WriteFile(dst.State, b, 0o600); err != nil {
			return errors.Join(wrenn.Wrap(err, wrenn.KindInternal, "cannot write the state"), os.Remove(dst.Memory))
		}
		if size := int64(m.cfg.MemoryMB) << 20; dst.Progress != nil {
			dst.Progress(size, size)
		}
		return nil
	})
}

func (d fake) Wait(ctx context.Context, h vm.Handle) error {
	d.w.mu.Lock()
	m := d.w.machines[h.PID]
	d.w.mu.Unlock()
	if m == nil || h.BootID != fakeBoot {
		return nil
	}
	select {
	case <-m.gone:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d fake) Destroy(ctx context.Context, h vm.Handle) error {
	err := d.with(ctx, h, func(m *machine) error { m.finish(); return nil })
	if wrenn.KindOf(err) == wrenn.KindNotFound {
		return nil
	}
	return err
}

func (m *machine) finish() {
	m.finished, m.running = true, false
	close(m.gone)
}

// ask plays the guest of the running VM with cfg's directory.
func (w *world) ask(ctx context.Context, cfg vm.Config, command string) (string, error) {
	for {
		w.mu.Lock()
		for _, m := range w.machines {
			if m.cfg.Dir == cfg.Dir && m.running {
				defer w.mu.Unlock()
				return m.command(strings.Fields(command))
			}
		}
		w.mu.Unlock()
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

func (m *machine) command(words []string) (string, error) {
	switch words[0] {
	case "ping":
		return "pong", nil
	case "ticks":
		return fmt.Sprint((m.ran + time.Since(m.since)).Microseconds()), nil
	case "cpus":
		return fmt.Sprint(m.cfg.VCPUs), nil
	case "memory":
		return fmt.Sprint(m.cfg.MemoryMB - 20), nil
	case "random":
		return "virtio_rng.0", nil
	case "fill":
		m.pattern = strings.Join(words[1:], " ")
		return "ok", nil
	case "clear":
		m.pattern = "0 " + words[1]
		return "ok", nil
	case "check":
		return m.pattern, nil
	case "disk":
		if words[1] == "size" {
			return fmt.Sprint(max(64<<10, m.cfg.Disks[0].GrowTo)), nil
		}
		if words[1] == "write" {
			return "ok", os.WriteFile(m.cfg.Disks[0].Path, []byte(words[2]), 0o600)
		}
		b, err := os.ReadFile(m.cfg.Disks[0].Path)
		return string(bytes.TrimRight(b, "\x00")), err
	case "flood":
		return "ok", os.WriteFile(m.cfg.Console, append(bytes.Repeat([]byte("of an earlier life\n"), 1000), "guest: end of flood\n"...), 0o600)
	case "poweroff":
		m.finish()
		return "ok", nil
	}
	return "", fmt.Errorf("unknown command %q", words[0])
}

func (w *world) leftovers(cfg vm.Config) ([]string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var left []string
	for pid, m := range w.machines {
		if m.cfg.Dir == cfg.Dir && !m.finished {
			left = append(left, fmt.Sprintf("machine %d", pid))
		}
	}
	return left, nil
}
