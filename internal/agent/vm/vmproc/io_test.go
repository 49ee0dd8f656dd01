//go:build linux

package vmproc

import (
	"errors"
	"io/fs"
	"path/filepath"
	"testing"
	"time"
)

// TestDiskOfTheHostIsAsFastAsTheCgroupMay has a process in a cgroup write as fast as it can.
func TestDiskOfTheHostIsAsFastAsTheCgroupMay(t *testing.T) {
	t.Parallel()
	h := needRoot(t)
	file := filepath.Join(t.TempDir(), "file")
	const megabytes, perSec = "8", 4 << 20 // no burst: the kernel counts from the first byte on
	const must = time.Second
	limit, err := NewIO(filepath.Dir(file), perSec, 0)
	if err != nil {
		t.Fatal(err)
	}
	if h.io == "" || limit.Device == "" {
		t.Skipf("needs a cgroup controller for disks and a disk below %s; have %q, %q", file, h.io, limit.Device)
	}
	write := func(io IO) time.Duration {
		t.Helper()
		c, err := NewCgroup(parent, "disk", Limits{MemoryBytes: 64 << 20, CPUs: 1, PIDs: 10, IO: io})
		if err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		p, err := Launch(Spec{
			Path: "/bin/dd", Args: []string{"if=/dev/zero", "of=" + file, "bs=1M", "count=" + megabytes, "oflag=direct"}, Cgroup: c,
		})
		if err != nil {
			t.Fatal(err)
		}
		state, err := p.child.Wait()
		took := time.Since(begun)
		if err != nil || !state.Success() {
			t.Fatalf("dd: %v, %v", state, err)
		}
		if err := c.Remove(); err != nil {
			t.Error(err)
		}
		return took
	}
	free, limited := write(IO{}), write(limit)
	t.Logf("%s MiB to %s: %s, with a limit %s", megabytes, limit.Device, free, limited)
	if limited < must {
		t.Errorf("%s MiB took %s with a limit of %d bytes a second", megabytes, limited, perSec)
	}
	if free >= limited {
		t.Errorf("without a limit %s MiB take %s, with it %s", megabytes, free, limited)
	}
}

func TestFileOnNoDiskHasNoDevice(t *testing.T) {
	t.Parallel()
	if device, err := deviceOf("/proc"); device != "" || err != nil {
		t.Errorf("/proc is on %q, %v", device, err)
	}
	if _, err := NewIO("/nonexistent", 1, 0); err == nil {
		t.Error("a file that is not there has a disk")
	}
	if limit, err := NewIO("/nonexistent", 0, 0); limit != (IO{}) || err != nil {
		t.Errorf("no limit is %+v, %v", limit, err)
	}
}

// TestFileThatACgroupHasNot is one of a kernel without a part of a controller, such as the accounting of swap.
func TestFileThatACgroupHasNot(t *testing.T) {
	t.Parallel()
	h := needRoot(t)
	c := h.Cgroup(parent, "file")
	if err := c.Ensure(Limits{MemoryBytes: 64 << 20, CPUs: 1, PIDs: 10}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Remove(); err != nil {
			t.Error(err)
		}
	}()
	if err := set(filepath.Join(c.Path("memory"), "memory.of_another_kernel"), "1"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file is not there, but: %v", err)
	}
}
