//go:build linux

package qemu

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/storage"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
)

// BenchmarkRestore tells, for each round trip of a VM through a snapshot, what each step takes: the clone
// of the memory, the restore to running, until the guest answers, the pause, the snapshot in place and
// the end of the process.
func BenchmarkRestore(b *testing.B) {
	l := newLab(b)
	ctx := context.Background()
	d := New(l.verdict, l.opts)
	cfg := l.Config(b)
	begun := time.Now()
	h := start(b, d, cfg)
	ping(b, l, cfg)
	cold := time.Since(begun)
	snap := vm.SnapshotFiles{State: filepath.Join(cfg.Dir, "state"), Memory: cfg.MemoryFile}
	try(b, d.Pause(ctx, h))
	try(b, d.Snapshot(ctx, h, snap))
	try(b, d.Destroy(ctx, h))
	cfg.Restore = &snap
	var clone, restore, answer, pause, snapshot, destroy time.Duration
	lap := func(total *time.Duration, since time.Time) time.Time {
		now := time.Now()
		*total += now.Sub(since)
		return now
	}
	for i := 0; b.Loop(); i++ {
		at := time.Now()
		copied := filepath.Join(cfg.Dir, "clone")
		try(b, storage.CloneFile(ctx, cfg.MemoryFile, copied))
		try(b, os.Rename(copied, cfg.MemoryFile))
		at = lap(&clone, at)
		h := start(b, d, cfg)
		at = lap(&restore, at)
		ping(b, l, cfg)
		at = lap(&answer, at)
		try(b, d.Pause(ctx, h))
		at = lap(&pause, at)
		try(b, d.Snapshot(ctx, h, snap))
		at = lap(&snapshot, at)
		try(b, d.Destroy(ctx, h))
		lap(&destroy, at)
	}
	b.ReportMetric(cold.Seconds()*1000, "cold-ready-ms")
	for name, total := range map[string]time.Duration{
		"clone-ms": clone, "restore-ms": restore, "answer-ms": answer, "pause-ms": pause, "snapshot-ms": snapshot, "destroy-ms": destroy,
	} {
		b.ReportMetric(total.Seconds()*1000/float64(b.N), name)
	}
}

func start(b *testing.B, d *Driver, cfg vm.Config) vm.Handle {
	b.Helper()
	h, err := d.Start(context.Background(), cfg)
	try(b, err)
	return h
}

func ping(b *testing.B, l *qemuLab, cfg vm.Config) {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if answer, err := l.Ask(ctx, cfg, "ping"); answer != "pong" {
		b.Fatalf("%q, %v", answer, err)
	}
}

func try(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}
