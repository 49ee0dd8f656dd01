package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
	"github.com/wrenn-sandbox/wrenn/sdk/go/api"
)

const (
	checkpointRuns = 3
	dirtyVMMB      = 2048 // of the sandbox whose memory is made dirty
)

// measureSnapshots times fork, checkpoint and rollback through REST, beside restores by hand and raw writes
// of as many bytes.
func measureSnapshots(ctx context.Context, b *bench) error {
	restored, err := b.restoreFloor(ctx)
	if err != nil {
		return err
	}
	if err := b.measureForks(ctx, restored); err != nil {
		return err
	}
	return b.measureCheckpoints(ctx, restored)
}

// restoreFloor is one restore by hand, until the guest answers.
func (b *bench) restoreFloor(ctx context.Context) (s sample, err error) {
	if err := b.prepare(ctx, "minimal", smallMB); err != nil {
		return s, err
	}
	template, err := b.templateDir("minimal", smallMB)
	if err != nil {
		return s, err
	}
	hw, err := hardwareOf(template)
	if err != nil {
		return s, err
	}
	l, err := b.newLab(ctx, 1)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	var all []float64
	for range 5 {
		var vm *floorVM
		took, err := timed(func() (err error) {
			if vm, err = l.restore(ctx, 0, template, hw); err != nil {
				return err
			}
			return vm.guest.client.WaitReady(ctx, nil)
		})
		if err := errors.Join(err, vm.stop()); err != nil {
			return s, err
		}
		all = append(all, took)
	}
	return summarize(all...), nil
}

// times is a sample of n of the same after each other.
func (s sample) times(n int) sample {
	f := float64(n)
	return sample{s.N, s.P50 * f, s.P95 * f, s.Min * f, s.Max * f}
}

func (b *bench) measureForks(ctx context.Context, restored sample) (err error) {
	sb, err := b.create(ctx, "minimal", smallMB)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.remove(ctx, sb)) }()
	for _, n := range []int{10, 50} {
		var all []float64
		var own float64
		for i := range checkpointRuns {
			if i > 0 && b.enough(fewestRuns) {
				break
			}
			var children []wrenn.Forked
			took, err := timed(func() (err error) {
				children, err = sb.Fork(ctx, api.ForkRequest{Count: int32(n)})
				return err
			})
			if err == nil && children[0].Sandbox != nil {
				own, err = ownMB(ctx, children[0].Sandbox)
			}
			_, removed := together(len(children), func(i int) (struct{}, error) {
				if children[i].Sandbox == nil {
					return struct{}{}, children[i].Err
				}
				return struct{}{}, b.remove(ctx, children[i].Sandbox)
			})
			if err := errors.Join(err, removed); err != nil {
				return err
			}
			all = append(all, took)
		}
		floor := restored.times(n)
		b.add(fmt.Sprintf("fork into %d, beside %d restores", n, n), "ms", summarize(all...), &floor, atMostTimes(0.5))
		b.add("  of one child: bytes on disk of its own", "MB", summarize(own), nil, nil)
	}
	return nil
}

// ownMB is what a sandbox's disk and memory take that nothing else shares, its checkpoints aside.
func ownMB(ctx context.Context, sb *wrenn.Sandbox) (float64, error) {
	u, err := sb.Storage(ctx)
	return float64(u.Disk.OwnBytes+u.Memory.OwnBytes) / (1 << 20), err
}

func (b *bench) measureCheckpoints(ctx context.Context, restored sample) (err error) {
	if err := b.prepare(ctx, "minimal", dirtyVMMB); err != nil {
		return err
	}
	sb, err := b.create(ctx, "minimal", dirtyVMMB)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.remove(ctx, sb)) }()
	for _, dirtyMB := range []int{0, 100, 500} {
		if err := b.checkpoint(ctx, sb, dirtyMB, restored); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) checkpoint(ctx context.Context, sb *wrenn.Sandbox, dirtyMB int, restored sample) error {
	var saved, back, written []float64
	var own, after float64
	for range checkpointRuns {
		if err := makeDirty(ctx, sb, dirtyMB); err != nil {
			return err
		}
		var c *api.Checkpoint
		took, err := timed(func() (err error) { c, err = sb.Checkpoint(ctx, ""); return err })
		if err != nil {
			return err
		}
		saved, own = append(saved, took), float64(c.OwnBytes)/(1<<20)
		if took, err = timed(func() error { _, err := sb.Rollback(ctx, c.ID, true); return err }); err != nil {
			return err
		}
		back = append(back, took)
		if after, err = ownMB(ctx, sb); err != nil {
			return err
		}
		if err := sb.DeleteCheckpoint(ctx, c.ID); err != nil {
			return err
		}
		if took, err = timed(func() error { return b.rawWrite(dirtyMB) }); err != nil {
			return err
		}
		written = append(written, took)
	}
	floor := summarize(written...)
	b.add(fmt.Sprintf("checkpoint, %d MB more dirty, beside a durable write of them", dirtyMB), "ms", summarize(saved...), &floor, nil)
	b.add("  of it: bytes on disk of its own", "MB", summarize(own), nil, nil)
	b.add(fmt.Sprintf("rollback, %d MB more dirty, beside a restore", dirtyMB), "ms", summarize(back...), &restored, nil)
	b.add("  after it: bytes on disk of the sandbox's own", "MB", summarize(after), nil, nil)
	return nil
}

// makeDirty changes so much of the sandbox's memory.
func makeDirty(ctx context.Context, sb *wrenn.Sandbox, mb int) error {
	res, err := sb.Exec(ctx, "/bin/bash", "-c", fmt.Sprintf("head -c %dM /dev/urandom > /dev/shm/dirty", mb))
	if err == nil && res.ExitCode != 0 {
		err = fmt.Errorf("make memory dirty: %s", res.Stderr)
	}
	return err
}

// rawWrite writes so much to the agent's volume and waits until it is there.
func (b *bench) rawWrite(mb int) (err error) {
	f, err := os.Create(filepath.Join(b.volume(), ".raw"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	block := make([]byte, 1<<20)
	for i := range block {
		block[i] = byte(i)
	}
	for range mb {
		if _, err := f.Write(block); err != nil {
			return err
		}
	}
	return f.Sync()
}
