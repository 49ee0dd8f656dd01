//go:build linux

package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmtest"
)

// newPagedLab has restored VMs served by the page server of a real agent.
func newPagedLab(t testing.TB) *fcLab {
	t.Helper()
	bin := os.Getenv("WRENN_TEST_BIN")
	if bin == "" {
		t.Skip("needs the agent, whose page server this is: use make test-firecracker, or set WRENN_TEST_BIN")
	}
	if err := CheckMemory(MemoryUffd); err != nil {
		t.Skip(err)
	}
	l := newLab(t)
	l.opts.Memory, l.opts.PageServer = MemoryUffd, []string{filepath.Join(bin, "wrenn-agent")}
	return l
}

// TestFirecrackerConformsWithAPageServer runs those checks that restore a VM, or look at its memory.
func TestFirecrackerConformsWithAPageServer(t *testing.T) {
	l := newPagedLab(t)
	env := l.Env(l.limited, func(t *testing.T, cfg vm.Config, h vm.Handle) {
		l.confined(t, cfg, h)
		pagerConfined(t, cfg, h)
	})
	env.Only = []string{
		"a restored guest sees its disk grow", "a frozen start runs no vCPU", "every call in every state", "restore goes on where the snapshot was",
		"many restores of one snapshot", "pause in place and resume, again and again", "cleared memory comes back clear", "a VM goes on after a snapshot",
		"a failed snapshot leaves the VM frozen", "a snapshot that does not fit is refused", "a cancelled start leaves nothing",
		"the next agent adopts a VM by its handle", "a reused pid is not the VM", "wait sees the guest power off", "the VM is confined",
	}
	vmtest.Exercise(t, env)
}

// pagerConfined looks at a page server from outside.
func pagerConfined(t *testing.T, cfg vm.Config, h vm.Handle) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", h.PagerPID))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		fmt.Sprintf("Uid:\t%d\t%d\t%d\t%d\n", cfg.UID, cfg.UID, cfg.UID, cfg.UID), "NoNewPrivs:\t1\n", "CapEff:\t0000000000000000\n", "CapBnd:\t0000000000000000\n",
		fmt.Sprintf("NSpid:\t%d\t1\n", h.PagerPID), "Groups:\t \n",
	} {
		if !strings.Contains(string(status), want) {
			t.Errorf("a page server has not %q: %s", want, status)
		}
	}
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/root", h.PagerPID))
	if err != nil || len(entries) != 1 {
		t.Errorf("a page server's root has %v, %v; want its program", entries, err)
	}
}

// template is a VM that was saved after its guest filled some memory.
func (l *fcLab) template(ctx context.Context, t testing.TB) (*Driver, vm.Config, vm.SnapshotFiles) {
	t.Helper()
	d := New(l.verdict, l.opts)
	cfg := l.Config(t)
	h, err := d.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range [][2]string{{"ping", "pong"}, {"fill 7 24", "ok"}} {
		if answer, err := l.Ask(ctx, cfg, step[0]); err != nil || answer != step[1] {
			t.Fatalf("%s: the guest says %q, %v", step[0], answer, err)
		}
	}
	saved := vm.SnapshotFiles{State: filepath.Join(cfg.Dir, "saved.state"), Memory: filepath.Join(cfg.Dir, "saved.memory")}
	if err := errors.Join(d.Pause(ctx, h), d.Snapshot(ctx, h, saved), d.Destroy(ctx, h)); err != nil {
		t.Fatal(err)
	}
	return d, cfg, saved
}

// served is a VM restored from a template that it shares with others.
func (l *fcLab) served(ctx context.Context, t *testing.T) (*Driver, vm.Config, vm.Handle) {
	t.Helper()
	d, base, saved := l.template(ctx, t)
	restored := l.Config(t)
	restored.Disks, restored.Restore, restored.SharedMemory = base.Disks, &saved, true
	return d, restored, l.restored(ctx, t, d, restored)
}

func (l *fcLab) restored(ctx context.Context, t *testing.T, d *Driver, cfg vm.Config) vm.Handle {
	t.Helper()
	h, err := d.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Destroy(context.Background(), h); err != nil {
			t.Error(err)
		}
		if left, err := l.Leftovers(cfg); err != nil || len(left) > 0 {
			t.Errorf("left over: %v %v", left, err)
		}
	})
	if answer, err := l.Ask(ctx, cfg, "ping"); err != nil || answer != "pong" {
		t.Fatalf("the guest says %q, %v", answer, err)
	}
	return h
}

// TestAVMDiesWithItsPageServer kills the server while the guest runs over memory that it has not seen yet.
func TestAVMDiesWithItsPageServer(t *testing.T) {
	l := newPagedLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), vmtest.Stretch(2*time.Minute))
	defer cancel()
	d, cfg, h := l.served(ctx, t)
	if h.PagerPID == 0 {
		t.Fatalf("no page server in %+v", h)
	}
	// Stopped, it answers no more: the guest's next answer needs a page that it waits for.
	if err := unix.Kill(h.PagerPID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	asked := make(chan string, 1)
	go func() {
		answer, _ := l.Ask(ctx, cfg, "check")
		asked <- answer
	}()
	select {
	case answer := <-asked:
		t.Fatalf("without its page server the guest says %q", answer)
	case <-time.After(vmtest.Stretch(200 * time.Millisecond)):
	}
	killed := time.Now()
	if err := unix.Kill(h.PagerPID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	soon, stop := context.WithTimeout(ctx, vmtest.Stretch(time.Second))
	defer stop()
	if err := d.Wait(soon, h); err != nil {
		t.Fatalf("the VM outlives its page server: %v", err)
	}
	t.Logf("gone %s after its page server was killed", time.Since(killed).Round(time.Millisecond/10))
	if state, err := d.Inspect(ctx, h); err != nil || state != vm.StateGone {
		t.Errorf("the VM is %q, %v", state, err)
	}
	cancel()
	if answer := <-asked; answer != "" {
		t.Errorf("the guest said %q when its page server was dead", answer)
	}
}

// TestAPagedVMOutlivesTheAgentThatWasKilled has the page server outlive it, too.
func TestAPagedVMOutlivesTheAgentThatWasKilled(t *testing.T) {
	l := newPagedLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), vmtest.Stretch(2*time.Minute))
	defer cancel()
	d, cfg, h := l.served(ctx, t)
	if err := d.Destroy(ctx, h); err != nil {
		t.Fatal(err)
	}
	again := l.Config(t)
	again.Disks, again.Restore, again.SharedMemory = cfg.Disks, cfg.Restore, true
	opts := l.opts
	opts.Log = nil
	l.OutlivesItsAgent(t, again, childSpec{l.verdict, opts, again}, l.driver)
}

// TestABalloonsPagesAreZero gives memory away that the page server has in its file, and saves what is left.
func TestABalloonsPagesAreZero(t *testing.T) {
	l := newPagedLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), vmtest.Stretch(2*time.Minute))
	defer cancel()
	d, cfg, h := l.served(ctx, t)
	for _, mb := range []int{8, 0, 12, 0} {
		if err := d.SetBalloon(ctx, h, mb); err != nil {
			t.Fatal(err)
		}
		for {
			if stats, err := d.Balloon(ctx, h); err != nil {
				t.Fatal(err)
			} else if stats.ActualMB == mb {
				break
			}
			select {
			case <-ctx.Done():
				t.Fatal("the balloon does not become as large as asked")
			case <-time.After(50 * time.Millisecond):
			}
		}
		if answer, err := l.Ask(ctx, cfg, "check"); err != nil || answer != "7 24" {
			t.Fatalf("with a balloon of %d MiB the guest says %q, %v", mb, answer, err)
		}
	}
	saved := vm.SnapshotFiles{State: filepath.Join(cfg.Dir, "less.state"), Memory: cfg.MemoryFile}
	if err := errors.Join(d.Pause(ctx, h), d.Snapshot(ctx, h, saved), d.Destroy(ctx, h)); err != nil {
		t.Fatal(err)
	}
	again := cfg
	again.Restore, again.SharedMemory = &saved, false
	l.restored(ctx, t, d, again)
	if answer, err := l.Ask(ctx, again, "check"); err != nil || answer != "7 24" {
		t.Errorf("restored the guest says %q, %v", answer, err)
	}
}
