package vmtest

import (
	"fmt"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
)

// loadMB is what the guest writes to its disk for the checks below, loadOps in how many operations.
const (
	loadMB   = 4
	loadOps  = 64
	diskSize = 1 << 20
)

// diskLimits has a guest write as fast as it can: with a limit it takes at least as long as it must, without one less.
func (s *suite) diskLimits(t *testing.T) {
	if s.env.Limited == nil {
		t.Skip("VMs of this driver have no disks")
	}
	// A bucket may be full at the start, with what a second lets through, and be filled once more when it is empty for the
	// first time: Firecracker does not look at the clock before.
	const must, burst = 3 * time.Second, 2 * time.Second
	const slow = int64((must + burst) / time.Second)
	bytes := vm.DiskLimits{BytesPerSec: loadMB << 20 / slow}
	ops := vm.DiskLimits{OpsPerSec: loadOps / slow}
	free := s.load(t, s.env.New(), false)
	if free >= must {
		t.Fatalf("without a limit the guest needs %s for %d MiB: nothing can be told on this machine", free, loadMB)
	}
	for name, limits := range map[string]vm.DiskLimits{"bytes": bytes, "operations": ops} {
		for kind, cold := range map[string]bool{"a cold start": true, "a restore": false} {
			t.Run(fmt.Sprintf("%s of %s", name, kind), func(t *testing.T) {
				t.Parallel()
				if took := s.load(t, s.env.Limited(limits), cold); took < must*9/10 {
					t.Errorf("%d MiB in %d operations took %s with %+v", loadMB, loadOps, took, limits)
				}
			})
		}
	}
	t.Run("a limit is not the snapshot's", func(t *testing.T) {
		t.Parallel()
		const much = 4 // so that a slow machine is not taken for a limit
		r := s.disk(t, s.env.Limited(vm.DiskLimits{BytesPerSec: bytes.BytesPerSec / much}), false)
		r.pause()
		saved := r.files("limited")
		r.snapshot(saved)
		r.destroy()
		cfg := s.clone(t)
		cfg.Restore, cfg.Disks = &saved, r.cfg.Disks
		again := s.start(t, cfg)
		if took := again.load(); took >= much*must {
			t.Errorf("a VM without limit needs %s for %d MiB, with its snapshot's limit %s", took, loadMB, much*must)
		}
	})
}

// load tells how long a guest of this driver takes to write.
func (s *suite) load(t *testing.T, d vm.Driver, cold bool) time.Duration {
	t.Helper()
	return s.disk(t, d, cold).load()
}

// disk starts a VM with a disk that can be written to.
func (s *suite) disk(t *testing.T, d vm.Driver, cold bool) *running {
	t.Helper()
	cfg := s.env.Config(t)
	if !cold {
		cfg = s.clone(t)
	}
	cfg.Disks[0].GrowTo = diskSize
	r := &running{T: t, env: s.env, driver: d, cfg: cfg}
	r.begin()
	r.awaitSize(diskSize)
	return r
}

func (r *running) load() time.Duration {
	r.Helper()
	begun := time.Now()
	r.expect(fmt.Sprintf("load %d %d", loadMB<<10, loadMB<<10/loadOps), "ok")
	took := time.Since(begun)
	r.Logf("%d MiB in %d operations in %s", loadMB, loadOps, took.Round(time.Millisecond))
	return took
}
