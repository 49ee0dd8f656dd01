package vmtest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

func (s *suite) coldStart(t *testing.T) {
	r := s.start(t, s.env.Config(t))
	h := r.handle
	if h.Version != 1 || h.Driver != r.driver.Capabilities().Driver || h.PID <= 0 || h.Dir != r.cfg.Dir || h.StartedAt.IsZero() {
		t.Errorf("handle is %+v", h)
	}
	r.state(vm.StateRunning)
	r.expect("cpus", strconv.Itoa(r.cfg.VCPUs))
	r.expect("ping", "pong")
	r.destroy()
	r.state(vm.StateGone)
}

// hardware asks the guest what it sees. Its initramfs all but fills its last page: nothing may count on room there.
func (s *suite) hardware(t *testing.T) {
	cfg := s.env.Config(t)
	cfg.VCPUs, cfg.MemoryMB = 2, 160
	if cfg.Initrd != "" {
		raw, err := os.ReadFile(cfg.Initrd)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Initrd = filepath.Join(t.TempDir(), "initramfs")
		const page = 4096
		if err := os.WriteFile(cfg.Initrd, append(raw, make([]byte, 2*page-4-len(raw)%page)...), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	r := s.start(t, cfg)
	r.expect("cpus", "2")
	if mb, err := strconv.Atoi(r.ask("memory")); err != nil || mb > 160 || mb < 100 {
		t.Errorf("the guest sees %d MiB, %v; want what its kernel leaves of 160", mb, err)
	}
	r.expect("random", "virtio_rng.0")
}

// grow gives a restored guest a larger disk than it knew.
func (s *suite) grow(t *testing.T) {
	cfg := s.clone(t)
	const size = 1 << 20
	cfg.Disks[0].GrowTo = size
	r := s.start(t, cfg)
	r.awaitSize(size)
	r.expect("disk read", "before")
	if fi, err := os.Stat(cfg.Disks[0].Path); err != nil || fi.Size() != size {
		t.Errorf("the image has %d bytes, %v", fi.Size(), err)
	}
}

// awaitSize waits until the guest sees its disk grow, which it is told by an interrupt.
func (r *running) awaitSize(size int) {
	r.Helper()
	ctx := r.context()
	for seen := ""; seen != strconv.Itoa(size); seen = r.ask("disk size") {
		select {
		case <-ctx.Done():
			r.Fatalf("the guest sees %s bytes, want %d", seen, size)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (s *suite) frozenStart(t *testing.T) {
	cfg := s.clone(t)
	cfg.Frozen = true
	r := s.start(t, cfg)
	r.state(vm.StateFrozen)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if answer, err := s.env.Ask(ctx, r.cfg, "ping"); err == nil {
		t.Errorf("a frozen guest answered %q", answer)
	}
	r.resume()
	r.expect("check", "7 24")
	r.state(vm.StateRunning)
}

func (s *suite) everyCallInEveryState(t *testing.T) {
	r := s.start(t, s.clone(t))
	r.state(vm.StateRunning)
	r.kind("snapshot of a running VM", r.driver.Snapshot(r.context(), r.handle, r.files("no")), wrenn.KindInvalidState)
	if left, _ := filepath.Glob(filepath.Join(r.cfg.Dir, "no.*")); len(left) > 0 {
		t.Errorf("a refused snapshot left %v", left)
	}
	r.resume()
	r.pause()
	r.state(vm.StateFrozen)
	r.pause()
	r.snapshot(r.files("yes"))
	r.state(vm.StateFrozen)
	r.resume()
	r.expect("check", "7 24")
	r.pause()
	r.destroy()
	r.state(vm.StateGone)
	r.destroy()
	r.kind("pause when gone", r.driver.Pause(r.context(), r.handle), wrenn.KindNotFound)
	r.kind("resume when gone", r.driver.Resume(r.context(), r.handle), wrenn.KindNotFound)
	r.kind("snapshot when gone", r.driver.Snapshot(r.context(), r.handle, r.files("no")), wrenn.KindNotFound)
	r.ok("wait when gone", r.driver.Wait(r.context(), r.handle))
	r.nothingLeft(r.cfg)
}

func (s *suite) idempotent(t *testing.T) {
	r := s.start(t, s.clone(t))
	before := r.ticks()
	r.pause()
	r.pause()
	r.resume()
	r.resume()
	if after := r.ticks(); after <= before {
		t.Errorf("the guest's clock went from %d to %d", before, after)
	}
	for range 20 {
		r.pause()
		r.state(vm.StateFrozen)
		r.resume()
		r.state(vm.StateRunning)
	}
	r.expect("check", "7 24")
}

func (r *running) ticks() int {
	r.Helper()
	n, err := strconv.Atoi(r.ask("ticks"))
	r.ok("ticks", err)
	return n
}

func (s *suite) restore(t *testing.T) {
	r := s.start(t, s.clone(t))
	r.expect("check", "7 24")
	r.expect("disk read", "before")
	r.expect("fill 9 24", "ok")
	r.expect("disk write after", "ok")
	before := r.ticks()
	r.pause()
	second := r.files("second")
	r.snapshot(second)
	r.destroy()

	cfg := s.clone(t)
	cfg.Restore = &second
	cfg.Disks = r.cfg.Disks
	again := s.start(t, cfg)
	again.expect("check", "9 24")
	again.expect("disk read", "after")
	if n := again.ticks(); n < before || n > before+int(patience()/time.Millisecond) {
		t.Errorf("the guest's ticks went from %d to %d", before, n)
	}
}

func (s *suite) manyRestores(t *testing.T) {
	before := sum(t, s.snap.Memory)
	var wg sync.WaitGroup
	for i := range 3 {
		cfg := s.clone(t)
		cfg.SharedMemory = i > 0
		r := &running{T: t, env: s.env, driver: s.env.New(), cfg: cfg}
		r.begin()
		wg.Go(func() {
			seed := strconv.Itoa(20 + i)
			for _, step := range [][2]string{{"check", "7 24"}, {"fill " + seed + " 24", "ok"}, {"check", seed + " 24"}} {
				if got, err := s.env.Ask(r.context(), cfg, step[0]); err != nil || got != step[1] {
					t.Errorf("clone %d: %s: %q, %v", i, step[0], got, err)
				}
			}
		})
	}
	wg.Wait()
	if sum(t, s.snap.Memory) != before {
		t.Error("a clone changed the snapshot")
	}
}

func sum(t *testing.T, path string) [sha256.Size]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// inPlace is pause and resume as the agent does it: the RAM goes into the VM's own file.
func (s *suite) inPlace(t *testing.T) {
	cfg := s.clone(t)
	cfg.SharedMemory = true
	r := s.start(t, cfg)
	for round := range 3 {
		seed := strconv.Itoa(40 + round)
		r.expect("fill "+seed+" 24", "ok")
		r.pause()
		snap := vm.SnapshotFiles{State: r.files("here").State, Memory: r.cfg.MemoryFile}
		r.snapshot(snap)
		r.destroy()
		r.cfg.Restore, r.cfg.SharedMemory = &snap, false
		r.begin()
		r.expect("check", seed+" 24")
	}
}

// zeroes clears memory that the snapshot below had filled: a page of zeroes is data, not a page unchanged.
func (s *suite) zeroes(t *testing.T) {
	r := s.start(t, s.clone(t))
	r.expect("check", "7 24")
	r.expect("clear 24", "ok")
	r.pause()
	cleared := r.files("cleared")
	r.snapshot(cleared)
	r.destroy()
	cfg := s.clone(t)
	cfg.Restore, cfg.Disks = &cleared, r.cfg.Disks
	again := s.start(t, cfg)
	again.expect("check", "0 24")
}

// goesOn snapshots a VM that goes on: what it changes later is in the second snapshot, not in the first.
func (s *suite) goesOn(t *testing.T) {
	cfg := s.clone(t)
	cfg.SharedMemory = true
	r := s.start(t, cfg)
	var snaps []vm.SnapshotFiles
	for _, seed := range []string{"50", "51"} {
		r.expect("fill "+seed+" 24", "ok")
		r.pause()
		snaps = append(snaps, r.files(seed))
		seen := int64(-1)
		to := snaps[len(snaps)-1]
		to.Progress = func(done, total int64) {
			if done < seen || done > total || total != int64(r.cfg.MemoryMB)<<20 {
				t.Errorf("a snapshot that had gone through %d bytes tells %d of %d", seen, done, total)
			}
			seen = done
		}
		r.snapshot(to)
		if seen < 0 {
			t.Error("a snapshot told nothing")
		}
		r.resume()
	}
	r.expect("check", "51 24")
	for i, want := range []string{"50 24", "51 24"} {
		cfg := s.clone(t)
		cfg.Restore = &snaps[i]
		again := s.start(t, cfg)
		again.expect("check", want)
		again.destroy()
	}
}

func (s *suite) failedSnapshot(t *testing.T) {
	r := s.start(t, s.clone(t))
	r.pause()
	for _, dst := range []vm.SnapshotFiles{
		{State: filepath.Join(r.cfg.Dir, "absent", "state"), Memory: r.files("x").Memory},
		{State: r.files("x").State, Memory: filepath.Join(r.cfg.Dir, "absent", "memory")},
		{State: "relative", Memory: r.files("x").Memory},
	} {
		if err := r.driver.Snapshot(r.context(), r.handle, dst); err == nil {
			t.Errorf("a snapshot to %+v succeeded", dst)
		}
		if left, _ := filepath.Glob(filepath.Join(r.cfg.Dir, "x.*")); len(left) > 0 {
			t.Errorf("a failed snapshot left %v", left)
		}
		r.state(vm.StateFrozen)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.driver.Snapshot(ctx, r.handle, r.files("x")); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled snapshot: %v", err)
	}
	r.resume()
	r.expect("check", "7 24")
}

func (s *suite) mismatch(t *testing.T) {
	damage := func(change func([]byte) []byte) vm.SnapshotFiles {
		b, err := os.ReadFile(s.snap.State)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "state")
		if err := os.WriteFile(path, change(bytes.Clone(b)), 0o600); err != nil {
			t.Fatal(err)
		}
		return vm.SnapshotFiles{State: path, Memory: s.snap.Memory}
	}
	cut := damage(func(b []byte) []byte { return b[:len(b)/2] })
	empty := damage(func([]byte) []byte { return nil })
	noise := damage(func(b []byte) []byte { return bytes.Repeat([]byte("noise"), len(b)/5) })
	absent := vm.SnapshotFiles{State: filepath.Join(t.TempDir(), "absent"), Memory: s.snap.Memory}
	for name, change := range map[string]func(*vm.Config){
		"more memory":        func(c *vm.Config) { c.MemoryMB += 64 },
		"more vCPUs":         func(c *vm.Config) { c.VCPUs++ },
		"one disk less":      func(c *vm.Config) { c.Disks = c.Disks[1:] },
		"a state cut off":    func(c *vm.Config) { c.Restore = &cut },
		"an empty state":     func(c *vm.Config) { c.Restore = &empty },
		"a state of noise":   func(c *vm.Config) { c.Restore = &noise },
		"a state not there":  func(c *vm.Config) { c.Restore = &absent },
		"a memory not there": func(c *vm.Config) { c.Restore = &vm.SnapshotFiles{State: s.snap.State, Memory: absent.State} },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := s.clone(t)
			change(&cfg)
			s.refuses(t, cfg)
		})
	}
}

// refuses checks that a start fails and leaves nothing, not even a memory file.
func (s *suite) refuses(t *testing.T, cfg vm.Config) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience())
	defer cancel()
	d := s.env.New()
	h, err := d.Start(ctx, cfg)
	if err == nil {
		t.Error("the VM started")
		_ = d.Destroy(ctx, h)
		return
	}
	var public *wrenn.Error
	if !errors.As(err, &public) {
		t.Errorf("%v is no wrenn.Error", err)
	}
	if left, err := s.env.Leftovers(cfg); err != nil || len(left) > 0 {
		t.Errorf("left over: %v %v", left, err)
	}
	if _, err := os.Stat(cfg.MemoryFile); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the memory file was left: %v", err)
	}
}

func (s *suite) badConfigs(t *testing.T) {
	for name, change := range map[string]func(*vm.Config){
		"no vCPU":           func(c *vm.Config) { c.VCPUs = 0 },
		"10000 vCPUs":       func(c *vm.Config) { c.VCPUs = 10_000 },
		"negative memory":   func(c *vm.Config) { c.MemoryMB = -1 },
		"no kernel":         func(c *vm.Config) { c.Kernel = "" },
		"a kernel absent":   func(c *vm.Config) { c.Kernel = "/nonexistent/kernel" },
		"a disk absent":     func(c *vm.Config) { c.Disks = []vm.Disk{{Path: "/nonexistent/disk"}} },
		"a netns absent":    func(c *vm.Config) { c.Net.NetnsPath = "/nonexistent/netns" },
		"a relative path":   func(c *vm.Config) { c.MemoryFile = "memory" },
		"an id with a path": func(c *vm.Config) { c.ID = "../x" },
		"an id with commas": func(c *vm.Config) { c.ID = "x,debug-threads=on" },
		"a cgroup above":    func(c *vm.Config) { c.Cgroup = ".." },
		"a MAC with more":   func(c *vm.Config) { c.Net.MAC += ",script=/bin/true" },
		"a second line":     func(c *vm.Config) { c.Cmdline += "\nx" },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := s.env.Config(t)
			change(&cfg)
			s.refuses(t, cfg)
		})
	}
}

func (s *suite) cancelledStart(t *testing.T) {
	for _, after := range []time.Duration{0, 5 * time.Millisecond, 15 * time.Millisecond, 25 * time.Millisecond} {
		t.Run(after.String(), func(t *testing.T) {
			cfg := s.clone(t)
			ctx, cancel := context.WithTimeout(t.Context(), after)
			d := s.env.New()
			h, err := d.Start(ctx, cfg)
			cancel()
			if err == nil { // it was faster
				r := &running{T: t, env: s.env, driver: d, cfg: cfg, handle: h}
				r.state(vm.StateRunning)
				r.destroy()
			} else if _, statErr := os.Stat(cfg.MemoryFile); !errors.Is(statErr, os.ErrNotExist) {
				t.Error("the memory file was left")
			}
			if left, err := s.env.Leftovers(cfg); err != nil || len(left) > 0 {
				t.Errorf("left over: %v %v", left, err)
			}
		})
	}
}

func (s *suite) adoption(t *testing.T) {
	r := s.start(t, s.clone(t))
	r.driver, r.handle = s.env.New(), later(t, r.handle)
	r.state(vm.StateRunning)
	r.pause()
	r.snapshot(r.files("adopted"))
	r.driver = s.env.New()
	r.state(vm.StateFrozen)
	r.resume()
	r.expect("check", "7 24")
	done := make(chan error, 1)
	go func() { done <- s.env.New().Wait(r.context(), r.handle) }()
	r.ok("destroy by another driver", s.env.New().Destroy(r.context(), r.handle))
	r.ok("wait of another driver", <-done)
	r.state(vm.StateGone)
}

// reusedPID makes handles of which the pid lives but is not the VM: this very process.
func (s *suite) reusedPID(t *testing.T) {
	r := s.start(t, s.clone(t))
	mine := r.handle
	mine.PID = os.Getpid()
	other := r.handle
	other.BootID = "00000000-0000-0000-0000-000000000000"
	for name, h := range map[string]vm.Handle{"another process": mine, "another boot": other} {
		x := &running{T: t, env: s.env, driver: s.env.New(), cfg: r.cfg, handle: h}
		x.state(vm.StateGone)
		x.kind("pause of "+name, x.driver.Pause(x.context(), h), wrenn.KindNotFound)
		x.ok("wait for "+name, x.driver.Wait(x.context(), h))
		h.Socket, h.Cgroup, h.PagerPID = "", "", 0 // what is left of the handle names the pid alone
		x.ok("destroy of "+name, x.driver.Destroy(x.context(), h))
	}
	r.state(vm.StateRunning)
	r.expect("ping", "pong")
}

func (s *suite) powerOff(t *testing.T) {
	r := s.start(t, s.clone(t))
	done := make(chan error, 1)
	go func() { done <- r.driver.Wait(r.context(), r.handle) }()
	// The guest may be gone before its answer has left, so only its end counts.
	ctx, stop := context.WithCancel(r.context())
	var asking sync.WaitGroup
	asking.Go(func() { _, _ = s.env.Ask(ctx, r.cfg, "poweroff") })
	defer asking.Wait()
	defer stop()
	select {
	case err := <-done:
		r.ok("wait", err)
	case <-time.After(patience()):
		t.Fatal("the VM is not gone after its guest powered off")
	}
	r.state(vm.StateGone)
}

func (s *suite) waitContext(t *testing.T) {
	r := s.start(t, s.clone(t))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := r.driver.Wait(ctx, r.handle); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait: %v", err)
	}
	r.state(vm.StateRunning)
}

func (s *suite) console(t *testing.T) {
	cfg := s.clone(t)
	// The log is nearly full: a serial port is slow, and very slow where VMs are nested.
	earlier := bytes.Repeat([]byte("of an earlier life\n"), (vm.ConsoleLimit-(8<<10))/19)
	if err := os.WriteFile(cfg.Console, earlier, 0o600); err != nil {
		t.Fatal(err)
	}
	r := s.start(t, cfg)
	r.expect("flood 24", "ok")
	deadline := time.Now().Add(patience())
	for {
		b, err := os.ReadFile(r.cfg.Console)
		if len(b) > vm.ConsoleLimit {
			t.Fatalf("the console log has %d bytes", len(b))
		}
		if strings.Contains(string(b), "end of flood") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the console log has %d bytes and not the end: %v", len(b), err)
		}
		time.Sleep(20 * time.Millisecond) // nothing tells when a file has grown
	}
	if b, err := os.ReadFile(r.cfg.Console); err != nil || !strings.HasPrefix(string(b), "of an earlier life\n") || len(b) > vm.ConsoleLimit*3/4 {
		t.Errorf("the console log has %d bytes, %v; want the younger half of what was there, and the flood", len(b), err)
	}
	r.expect("ping", "pong")
}

func (s *suite) confinement(t *testing.T) {
	if s.env.Confinement == nil {
		t.Skip("VMs of this driver are no processes")
	}
	r := s.start(t, s.clone(t))
	r.expect("ping", "pong")
	s.env.Confinement(t, r.cfg, r.handle)
}
