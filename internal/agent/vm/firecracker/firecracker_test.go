//go:build linux

package firecracker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmtest"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmtest/lab"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

func TestMain(m *testing.M) {
	lab.Child(func(raw []byte) (vm.Handle, error) {
		var s childSpec
		if err := json.Unmarshal(raw, &s); err != nil {
			return vm.Handle{}, err
		}
		return New(s.Verdict, s.Options).Start(context.Background(), s.Config)
	})
	goleak.VerifyTestMain(m)
}

// childSpec is what an agent that is killed needs to start a VM.
type childSpec struct {
	Verdict Verdict
	Options Options
	Config  vm.Config
}

// dirEnv names the directory with the real Firecracker and its jailer.
const dirEnv = "WRENN_TEST_FIRECRACKER"

// fcLab is a lab with Firecracker in it.
type fcLab struct {
	*lab.Lab
	verdict Verdict
	opts    Options
}

// newLab skips where Firecracker does not run.
func newLab(t testing.TB) *fcLab {
	t.Helper()
	dir := os.Getenv(dirEnv)
	if dir == "" {
		t.Skipf("needs Firecracker: use make test-firecracker, or set %s to its directory", dirEnv)
	}
	l := &fcLab{Lab: lab.New(t)}
	l.opts = Options{CacheDir: filepath.Join(l.Dir, "cache"), CgroupParent: l.CgroupParent, Log: l.Log}
	var err error
	l.verdict, err = Probe(t.Context(), ProbeOptions{
		Dir: dir, Kernel: l.Kernel, CacheFile: filepath.Join(os.TempDir(), "wrenn-test-firecracker.json"),
		Timeout: vmtest.Stretch(10 * time.Second),
	})
	if err != nil {
		t.Fatal(err)
	}
	if !l.verdict.Works {
		t.Skip(l.verdict.Reason)
	}
	return l
}

func (l *fcLab) driver() vm.Driver { return New(l.verdict, l.opts) }

func (l *fcLab) limited(limits vm.DiskLimits) vm.Driver {
	opts := l.opts
	opts.Disk = limits
	return New(l.verdict, opts)
}

func TestFirecrackerConforms(t *testing.T) {
	l := newLab(t)
	leak, err := unix.Open("/dev/null", unix.O_RDONLY, 0) // not close-on-exec, as inherited from a careless parent
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(leak) })
	vmtest.Exercise(t, l.Env(l.limited, l.confined))
}

func (l *fcLab) bounds(t *testing.T, cfg vm.Config) vmproc.Limits {
	t.Helper()
	d := New(l.verdict, l.opts)
	bounds, err := (&starting{driver: d, cfg: cfg, binary: d.binaries[0]}).limits()
	if err != nil {
		t.Fatal(err)
	}
	return bounds
}

func (l *fcLab) confined(t *testing.T, cfg vm.Config, h vm.Handle) {
	l.Confined(t, cfg, h)
	l.Limited(t, cfg, h, l.bounds(t, cfg))
	// Seen from inside its jail, where the files of the host have other names.
	l.Descriptors(t, h, memoryPath, diskPath(0), diskPath(1), logPath, metricsPath, mappedPath, "/dev/kvm", "/dev/net/tun")
	if entries, err := os.ReadDir(filepath.Join(workDir(h), jailFolder)); err != nil || len(entries) > 0 {
		t.Errorf("the host sees %v in the jail's directory, %v", entries, err)
	}
}

func TestVMOutlivesTheAgentThatWasKilled(t *testing.T) {
	l := newLab(t)
	cfg := l.Config(t)
	opts := l.opts
	opts.Log = nil
	l.OutlivesItsAgent(t, cfg, childSpec{l.verdict, opts, cfg}, l.driver)
}

func TestWalls(t *testing.T) {
	l := newLab(t)
	d := New(l.verdict, l.opts)
	place := func(cfg vm.Config, program string) vmproc.Spec {
		s := &starting{driver: d, cfg: cfg, binary: d.binaries[0]}
		binds, err := s.prepare(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		s.madeMemory = false // goes with the directory
		t.Cleanup(func() {
			if err := s.undo(); err != nil {
				t.Error(err)
			}
		})
		s.binary.Path = program
		return s.spec(binds)
	}
	// The jailer gives its root directory to the VMM: that may fill it, which costs its own memory.
	l.Walls(t, d, place, "/", "/run", "/dev", "/dev/kvm", "/dev/net/tun", "/dev/urandom", "/dev/userfaultfd")
}

// TestWithoutItsJailerOnlyIfAllowed takes the jailer away: the launcher's own jail has to do the same.
func TestWithoutItsJailerOnlyIfAllowed(t *testing.T) {
	l := newLab(t)
	alone := l.verdict.Binaries[0]
	alone.Jailer = ""
	l.verdict.Binaries = []Binary{alone}
	cfg := l.Config(t)
	_, err := New(l.verdict, l.opts).Start(t.Context(), cfg)
	if err == nil || !strings.Contains(wrenn.Public(err).Message, "AGENT_ALLOW_UNJAILED=1") {
		t.Errorf("without the jailer it starts: %v", err)
	}
	if left, err := l.Leftovers(cfg); err != nil || len(left) > 0 {
		t.Errorf("left over: %v %v", left, err)
	}
	l.opts.Unjailed = true
	saved := vm.SnapshotFiles{State: filepath.Join(cfg.Dir, "saved.state"), Memory: cfg.MemoryFile}
	b := l.start(t, cfg)
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", b.h.PID)); err != nil || exe != "/firecracker" {
		t.Errorf("the VMM is %s, %v", exe, err)
	}
	l.Confined(t, cfg, b.h)
	l.Limited(t, cfg, b.h, l.bounds(t, cfg))
	b.says("fill 6 24", "ok")
	if err := errors.Join(b.d.Pause(b.ctx, b.h), b.d.Snapshot(b.ctx, b.h, saved)); err != nil {
		t.Fatal(err)
	}
	b.destroy()
	cfg.Restore = &saved
	b = l.start(t, cfg)
	b.says("check", "6 24")
}

// TestARestoredKernelLearnsThatItIsACopy: Firecracker renews the VM generation id, at which the guest's kernel reseeds.
func TestARestoredKernelLearnsThatItIsACopy(t *testing.T) {
	l := newLab(t)
	cfg := l.Config(t)
	saved := vm.SnapshotFiles{State: filepath.Join(cfg.Dir, "saved.state"), Memory: cfg.MemoryFile}
	for round := range 3 {
		b := l.start(t, cfg)
		b.until("copies that the kernel knows of", func() (string, bool) {
			answer, err := b.ask("copies")
			if err != nil {
				t.Fatal(err)
			}
			return answer, answer == strconv.Itoa(round)
		})
		if err := errors.Join(b.d.Pause(b.ctx, b.h), b.d.Snapshot(b.ctx, b.h, saved)); err != nil {
			t.Fatal(err)
		}
		b.destroy()
		cfg.Restore = &saved
	}
}

// TestResumeTakesTheVersionThatSaved needs two releases in the directory.
func TestResumeTakesTheVersionThatSaved(t *testing.T) {
	l := newLab(t)
	if len(l.verdict.Binaries) < 2 {
		t.Skipf("needs two releases of Firecracker in %s", os.Getenv(dirEnv))
	}
	newest, older := l.verdict.Binaries[:1], l.verdict.Binaries[1:2]
	only := func(b []Binary) *Driver { return New(Verdict{Works: true, Binaries: b}, l.opts) }
	both := New(l.verdict, l.opts)
	ctx, cancel := context.WithTimeout(t.Context(), vmtest.Stretch(2*time.Minute))
	defer cancel()
	cfg := l.Config(t)
	saved := vm.SnapshotFiles{State: filepath.Join(cfg.Dir, "saved.state"), Memory: cfg.MemoryFile}
	save := func(d *Driver, h vm.Handle) {
		t.Helper()
		if answer, err := l.Ask(ctx, cfg, "ping"); err != nil || answer != "pong" {
			t.Fatalf("the guest says %q, %v", answer, err)
		}
		if err := errors.Join(d.Pause(ctx, h), d.Snapshot(ctx, h, saved), d.Destroy(ctx, h)); err != nil {
			t.Fatal(err)
		}
	}
	h, err := only(older).Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	save(only(older), h)
	cfg.Restore = &saved
	if h, err = both.Start(ctx, cfg); err != nil || h.VMMVersion != older[0].Version {
		t.Fatalf("restored with %s, %v; want %s", h.VMMVersion, err, older[0].Version)
	}
	if i, err := both.version(ctx, h); err != nil || i != older[0].Version {
		t.Errorf("the VMM says that it is %s, %v", i, err)
	}
	save(both, h) // what it saves needs the older one again
	if _, err := only(newest).Start(ctx, cfg); wrenn.KindOf(err) != wrenn.KindInvalidRequest || !strings.Contains(err.Error(), older[0].Version) {
		t.Errorf("without that version: %v", err)
	}
	if h, err = both.Start(ctx, cfg); err != nil || h.VMMVersion != older[0].Version {
		t.Fatalf("restored again with %s, %v", h.VMMVersion, err)
	}
	save(both, h)
}

// version asks a VM's process.
func (d *Driver) version(ctx context.Context, h vm.Handle) (string, error) {
	var i instance
	err := d.talk(ctx, h, func(c *client) (err error) { i, err = c.describe(ctx); return err })
	return i.Version, err
}
