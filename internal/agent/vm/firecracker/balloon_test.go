//go:build linux

package firecracker

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmtest"
)

// ballooned is a VM whose memory is watched.
type ballooned struct {
	*testing.T
	l   *fcLab
	d   *Driver
	cfg vm.Config
	h   vm.Handle
	ctx context.Context //nolint:containedctx // of a test
}

// start starts a VM and has it destroyed at the end.
func (l *fcLab) start(t *testing.T, cfg vm.Config) *ballooned {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), vmtest.Stretch(time.Minute))
	t.Cleanup(cancel)
	b := &ballooned{T: t, l: l, d: New(l.verdict, l.opts), cfg: cfg, ctx: ctx}
	var err error
	if b.h, err = b.d.Start(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.destroy)
	b.says("ping", "pong")
	return b
}

func (b *ballooned) destroy() {
	b.Helper()
	if err := b.d.Destroy(context.WithoutCancel(b.ctx), b.h); err != nil {
		b.Error(err)
	}
}

func (b *ballooned) ask(command string) (string, error) {
	return vmtest.Ask(b.ctx, b.l.Ask, b.d, b.h, b.cfg, command)
}

func (b *ballooned) says(command, want string) {
	b.Helper()
	if answer, err := b.ask(command); err != nil || answer != want {
		b.Fatalf("%s: the guest says %q, %v", command, answer, err)
	}
}

// until looks again and again; nothing tells when a guest has given something back.
func (b *ballooned) until(what string, fn func() (string, bool)) {
	b.Helper()
	for {
		seen, ok := fn()
		if ok {
			b.Logf("%s: %s", what, seen)
			return
		}
		select {
		case <-b.ctx.Done():
			b.Fatalf("%s: it stays at %s", what, seen)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (b *ballooned) balloon() BalloonStatistics {
	b.Helper()
	s, err := b.d.Balloon(b.ctx, b.h)
	if err != nil {
		b.Fatal(err)
	}
	return s
}

func (b *ballooned) inflate(mb int) {
	b.Helper()
	if err := b.d.SetBalloon(b.ctx, b.h, mb); err != nil {
		b.Fatal(err)
	}
}

var rssPattern = regexp.MustCompile(`RssAnon:\s+(\d+) kB`)

// ownMB is what the VMM has of the host's memory for itself.
func (b *ballooned) ownMB() int {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.h.PID))
	m := rssPattern.FindSubmatch(status)
	if err != nil || m == nil {
		b.Fatalf("%v: %s", err, status)
	}
	kb, err := strconv.Atoi(string(m[1]))
	if err != nil {
		b.Fatal(err)
	}
	return kb >> 10
}

func (b *ballooned) falls(what string, below int) {
	b.Helper()
	b.until(what, func() (string, bool) {
		now := b.ownMB()
		return fmt.Sprintf("%d MiB, to be at most %d", now, below), now <= below
	})
}

func TestBalloonTakesMemoryAndTells(t *testing.T) {
	l := newLab(t)
	b := l.start(t, l.Config(t))
	b.inflate(16)
	b.until("the balloon", func() (string, bool) {
		s := b.balloon()
		return fmt.Sprintf("%+v", s), s.ActualMB == 16 && s.TotalMemory > 0
	})
	b.says("ping", "pong")
}

// TestBalloonGivesMemoryBackToTheHost has a guest fill its cache, which it gives up for a balloon.
func TestBalloonGivesMemoryBackToTheHost(t *testing.T) {
	const cached, most = 96, 120
	l := newLab(t)
	cfg := l.Config(t)
	cfg.MemoryMB = 192
	cfg.Disks[0].GrowTo = cached << 20
	b := l.start(t, cfg)
	before := b.ownMB()
	b.says(fmt.Sprintf("cache %d", cached), strconv.Itoa(cached))
	full := b.ownMB()
	if full < before+cached*3/4 {
		t.Fatalf("the VM has %d MiB with a cache of %d, %d before", full, cached, before)
	}
	t.Logf("%d MiB, with a full cache %d", before, full)
	b.inflate(most)
	b.falls("after the balloon was inflated", full-cached/2)
	b.inflate(0)
	b.says("fill 1 48", "ok")
	b.says("check", "1 48")
}

// TestGuestThatNeedsMemoryGetsItFromTheBalloon has a guest use more than its balloon leaves it.
func TestGuestThatNeedsMemoryGetsItFromTheBalloon(t *testing.T) {
	const most, least = 80, 48
	l := newLab(t)
	cfg := l.Config(t)
	cfg.MemoryMB = 160
	b := l.start(t, cfg)
	b.inflate(most)
	b.until("the balloon", func() (string, bool) {
		s := b.balloon()
		return fmt.Sprintf("%d MiB", s.ActualMB), s.ActualMB >= least
	})
	b.says("fill 5 56", "ok")
	b.says("check", "5 56")
	if s := b.balloon(); s.ActualMB >= most-8 {
		t.Errorf("the balloon still has %d MiB", s.ActualMB)
	}
}

// TestFreedMemoryGoesBackToTheHost has a guest use memory and free it, from a cold start, and in a restored VM, whose
// memory Firecracker maps in another way.
func TestFreedMemoryGoesBackToTheHost(t *testing.T) {
	const filled = 64
	l := newLab(t)
	if !l.verdict.Binaries[0].version.reports() {
		t.Skipf("Firecracker %s has no free page reporting", l.verdict.Binaries[0].Version)
	}
	cfg := l.Config(t)
	cfg.MemoryMB = 192
	b := l.start(t, cfg)
	for round := range 2 {
		before := b.ownMB()
		b.says(fmt.Sprintf("fill 3 %d", filled), "ok")
		full := b.ownMB()
		if full < before+filled*3/4 {
			t.Fatalf("the VM has %d MiB with %d in use, %d before", full, filled, before)
		}
		t.Logf("round %d: %d MiB, with %d in use %d", round, before, filled, full)
		b.says("drop", "ok")
		b.falls("after the guest freed it", full-filled/2)
		b.says(fmt.Sprintf("fill 4 %d", filled), "ok")
		saved := vm.SnapshotFiles{State: b.cfg.Dir + "/saved.state", Memory: b.cfg.MemoryFile}
		for _, err := range []error{b.d.Pause(b.ctx, b.h), b.d.Snapshot(b.ctx, b.h, saved)} {
			if err != nil {
				t.Fatal(err)
			}
		}
		b.destroy()
		b.cfg.Restore = &saved
		b = l.start(t, b.cfg)
		b.says("check", fmt.Sprintf("4 %d", filled))
		b.says("drop", "ok")
	}
}
