//go:build linux

package firecracker

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmtest"
)

// BenchmarkRestore is from a start to the guest's answer about 24 MiB of its memory, with the memory file in the
// host's page cache and out of it.
func BenchmarkRestore(b *testing.B) {
	l := newPagedLab(b)
	ctx, cancel := context.WithTimeout(b.Context(), vmtest.Stretch(5*time.Minute))
	defer cancel()
	d, base, saved := l.template(ctx, b)
	touched := saved.Memory + touchesSuffix
	opts := l.opts
	opts.Memory = MemoryFile
	file := New(l.verdict, opts)
	for _, way := range []struct {
		name   string
		driver *Driver
		forget bool // what was touched the last time
	}{{"file", file, true}, {"uffd", d, true}, {"uffd knowing the touches", d, false}} {
		for _, cold := range []bool{false, true} {
			name := way.name + ", cached"
			if cold {
				name = way.name + ", from the disk"
			}
			b.Run(name, func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					if way.forget {
						if err := os.Remove(touched); err != nil && !errors.Is(err, os.ErrNotExist) {
							b.Fatal(err)
						}
					}
					cfg := l.Config(b)
					cfg.Disks, cfg.Restore, cfg.SharedMemory = base.Disks, &saved, true
					if cold {
						dropCache(b, saved.Memory)
					}
					b.StartTimer()
					l.firstAnswer(ctx, b, way.driver, cfg)
				}
			})
		}
	}
}

// firstAnswer restores a VM, has it answer, and ends it without that being measured.
func (l *fcLab) firstAnswer(ctx context.Context, b *testing.B, d *Driver, cfg vm.Config) {
	b.Helper()
	h, err := d.Start(ctx, cfg)
	if err != nil {
		b.Fatal(err)
	}
	if answer, err := l.Ask(ctx, cfg, "check"); err != nil || answer != "7 24" {
		b.Fatalf("the guest says %q, %v", answer, err)
	}
	b.StopTimer()
	// What was touched is saved when the VMM ends by itself, or after a while.
	if err := process(h).Kill(ctx); err != nil {
		b.Fatal(err)
	}
	if err := errors.Join(pager(h).Wait(ctx), d.Destroy(ctx, h), os.Remove(cfg.MemoryFile)); err != nil {
		b.Fatal(err)
	}
	b.StartTimer()
}

// dropCache makes the next reads of a file come from the disk.
func dropCache(b *testing.B, path string) {
	b.Helper()
	f, err := os.Open(filepath.Clean(path))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
		b.Fatal(err)
	}
}
