//go:build linux

package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
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

// qemuLab is a lab with QEMU in it.
type qemuLab struct {
	*lab.Lab
	verdict Verdict
	opts    Options
}

func newLab(t testing.TB) *qemuLab {
	t.Helper()
	l := &qemuLab{Lab: lab.New(t, "qemu-system-x86_64")}
	l.opts = Options{CacheDir: filepath.Join(l.Dir, "cache"), CgroupParent: l.CgroupParent, Log: l.Log}
	// The probe has a test of its own; here only QEMU is looked for.
	var err error
	if l.verdict, err = findQEMU(t.Context(), ""); err != nil {
		t.Skip(err.Error())
	}
	return l
}

func (l *qemuLab) driver() vm.Driver { return New(l.verdict, l.opts) }

func (l *qemuLab) limited(limits vm.DiskLimits) vm.Driver {
	opts := l.opts
	opts.Disk = limits
	return New(l.verdict, opts)
}

func (l *qemuLab) bounds(t *testing.T, cfg vm.Config) vmproc.Limits {
	t.Helper()
	bounds, err := New(l.verdict, l.opts).limits(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return bounds
}

func (l *qemuLab) confined(t *testing.T, cfg vm.Config, h vm.Handle) {
	l.Confined(t, cfg, h)
	own := []string{cfg.MemoryFile, cfg.Disks[0].Path, cfg.Disks[1].Path, "/dev/net/tun", "/memfd:qemu-stderr", "/memfd:guest-memory"}
	if cfg.Restore != nil {
		own = append(own, cfg.Restore.State)
	}
	l.Descriptors(t, h, own...)
	l.Limited(t, cfg, h, l.bounds(t, cfg))
	if status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", h.PID)); err != nil || !strings.Contains(string(status), "CapBnd:\t0000000000000000") {
		t.Errorf("QEMU may gain capabilities: %s, %v", status, err)
	}
	if fi, err := os.Stat(h.Socket); err != nil || fi.Mode().Perm()&0o077 != 0 {
		t.Errorf("%s is open to others: %v %v", h.Socket, fi.Mode(), err)
	}
}

func TestQEMUConforms(t *testing.T) {
	l := newLab(t)
	leak, err := unix.Open("/dev/null", unix.O_RDONLY, 0) // not close-on-exec, as inherited from a careless parent
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(leak) })
	vmtest.Exercise(t, l.Env(l.limited, l.confined))
}

func TestVMOutlivesTheAgentThatWasKilled(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cfg := l.Config(t)
	opts := l.opts
	opts.Log = nil
	l.OutlivesItsAgent(t, cfg, childSpec{l.verdict, opts, cfg}, l.driver)
}

// TestVMThatNeedsTooMuchMemoryIsEndedAlone gives a VM less than QEMU itself takes.
func TestVMThatNeedsTooMuchMemoryIsEndedAlone(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cfg := l.Config(t)
	h, err := vmproc.FindHierarchy()
	if err != nil {
		t.Fatal(err)
	}
	c := h.Cgroup(l.CgroupParent, cfg.Cgroup)
	if err := c.Ensure(vmproc.Limits{MemoryBytes: 8 << 20, CPUs: 1, PIDs: 100}); err != nil {
		t.Fatal(err)
	}
	p, err := vmproc.Launch(vmproc.Spec{Path: l.verdict.Binary, Args: []string{"-M", "none", "-m", "64M", "-nographic"}, UID: cfg.UID, GID: cfg.GID, Cgroup: c})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := p.Wait(ctx); err != nil {
		t.Errorf("QEMU lives on with 8 MiB: %v", err)
		_ = p.Kill(ctx)
	}
	if err := p.Reap(); err != nil {
		t.Error(err)
	}
	if err := c.Remove(); err != nil {
		t.Error(err)
	}
}

func TestStartRefusesASecondVMOfTheSameName(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cfg := l.Config(t)
	cfg.Frozen = true
	d := New(l.verdict, l.opts)
	h, err := d.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Start(t.Context(), cfg); wrenn.KindOf(err) != wrenn.KindInvalidState {
		t.Errorf("a second start: %v", err)
	}
	if state, err := d.Inspect(t.Context(), h); err != nil || state != vm.StateFrozen {
		t.Errorf("the first is %q, %v", state, err)
	}
	if err := d.Destroy(t.Context(), h); err != nil {
		t.Error(err)
	}
}

func TestProbe(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	opts := ProbeOptions{Kernel: l.Kernel, Initrd: l.Initrd, CacheFile: filepath.Join(t.TempDir(), "verdict"), Timeout: 3 * time.Second}
	v, err := Probe(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("verdict: %+v", v)
	if v.Binary == "" || v.Version == "" || v.Reason == "" || v.ProbedAt.IsZero() {
		t.Errorf("verdict is incomplete: %+v", v)
	}
	again, err := Probe(t.Context(), opts)
	if err != nil || !again.ProbedAt.Equal(v.ProbedAt) || again.KVM != v.KVM {
		t.Errorf("the cached verdict is %+v, %v", again, err)
	}
	// Another kernel is another question.
	other := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(other, []byte("no kernel"), 0o644); err != nil {
		t.Fatal(err)
	}
	opts.Kernel = other
	if v, err = Probe(t.Context(), opts); err != nil || v.KVM {
		t.Errorf("a file of nonsense booted: %+v, %v", v, err)
	}
	opts.device = "/nonexistent/kvm"
	if v, err = Probe(t.Context(), opts); err != nil || v.KVM || !strings.Contains(v.Reason, "/nonexistent/kvm") {
		t.Errorf("without a device: %+v, %v", v, err)
	}
	opts.Binary = "qemu-system-nonexistent"
	if _, err = Probe(t.Context(), opts); err == nil {
		t.Error("a QEMU that is not installed was found")
	}
}

func TestWalls(t *testing.T) {
	l := newLab(t)
	kvm := "/dev/kvm" // which it has where QEMU uses it
	if _, err := os.Stat(kvm); err != nil {
		kvm = ""
	}
	place := func(cfg vm.Config, program string) vmproc.Spec {
		j := jail(cfg.Dir, l.verdict.Binary, kvm)
		j.Binds = append(j.Binds, vmproc.Bind{From: program, To: "/program"})
		return vmproc.Spec{Path: "/program", UID: cfg.UID, GID: cfg.GID, NetnsPath: cfg.Net.NetnsPath, Jail: j}
	}
	l.Walls(t, l.driver(), place, "/etc/ld.so.cache", "/usr/lib", "/lib", "/dev/null", kvm)
}
