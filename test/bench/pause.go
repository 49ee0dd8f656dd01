package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
)

const pauseRuns = 5

// measurePause times pause and resume through REST, beside the same by hand: freeze and write the devices'
// state; start QEMU, read it, and hear from the guest.
func measurePause(ctx context.Context, b *bench) error {
	offered, err := b.canPause(ctx)
	if err != nil {
		return err
	}
	if !offered {
		b.skip("the API does not offer pause and resume yet (501)")
		return nil
	}
	var paused, resumed []sample
	sizes := []int32{256, 1024, 4096}
	for _, memoryMB := range sizes {
		p, r, err := b.pauseSize(ctx, memoryMB)
		if err != nil {
			return fmt.Errorf("%d MB: %w", memoryMB, err)
		}
		paused, resumed = append(paused, p), append(resumed, r)
	}
	last := len(sizes) - 1
	beside := fmt.Sprintf("%d MB beside %d MB", sizes[last], sizes[0])
	b.add("pause: "+beside, "ms", paused[last], &paused[0], atMostTimes(1.3))
	b.add("resume: "+beside, "ms", resumed[last], &resumed[0], atMostTimes(1.3))
	return nil
}

// canPause asks whether there is such an operation at all.
func (b *bench) canPause(ctx context.Context) (yes bool, err error) {
	if err := b.prepare(ctx, "minimal", smallMB); err != nil {
		return false, err
	}
	sb, err := b.create(ctx, "minimal", smallMB)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, b.remove(ctx, sb)) }()
	var no *statusError
	err = b.ask(ctx, sb, "pause")
	if errors.As(err, &no) && no.status == http.StatusNotImplemented {
		return false, nil
	}
	return err == nil, err
}

// ask is without the SDK, which repeats what failed.
func (b *bench) ask(ctx context.Context, sb *wrenn.Sandbox, operation string) error {
	r := request{
		method: http.MethodPost, path: "/v1/sandboxes/" + sb.ID + "/" + operation,
		header: "X-API-Key", value: b.stack.Key, body: []byte("{}"),
	}
	_, err := r.do(ctx, http.DefaultClient, b.stack.URL)
	return err
}

func (b *bench) pauseSize(ctx context.Context, memoryMB int32) (paused, resumed sample, err error) {
	if err := b.prepare(ctx, "minimal", memoryMB); err != nil {
		return paused, resumed, err
	}
	sb, err := b.create(ctx, "minimal", memoryMB)
	if err != nil {
		return paused, resumed, err
	}
	defer func() { err = errors.Join(err, b.remove(ctx, sb)) }()
	var pause, resume []float64
	for range pauseRuns {
		took, err := timed(func() error { return b.ask(ctx, sb, "pause") })
		if err != nil {
			return paused, resumed, err
		}
		pause = append(pause, took)
		if took, err = timed(func() error { return b.ask(ctx, sb, "resume") }); err != nil {
			return paused, resumed, err
		}
		resume = append(resume, took)
	}
	paused, resumed = summarize(pause...), summarize(resume...)
	floorPause, floorResume, err := b.pauseFloor(ctx, int(memoryMB))
	if err != nil {
		return paused, resumed, err
	}
	b.add(fmt.Sprintf("pause, %d MB", memoryMB), "ms", paused, &floorPause, atMostTimes(2))
	b.add(fmt.Sprintf("resume, %d MB", memoryMB), "ms", resumed, &floorResume, atMostTimes(2))
	return paused, resumed, nil
}

// pauseFloor does the same to one VM by hand.
func (b *bench) pauseFloor(ctx context.Context, memoryMB int) (paused, resumed sample, err error) {
	template, err := b.templateDir("minimal", memoryMB)
	if err != nil {
		return paused, resumed, err
	}
	hw, err := hardwareOf(template)
	if err != nil {
		return paused, resumed, err
	}
	l, err := b.newLab(ctx, 1)
	if err != nil {
		return paused, resumed, err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	vm, err := l.restoreShared(ctx, 0, template, hw)
	if err != nil {
		return paused, resumed, err
	}
	defer func() { err = errors.Join(err, vm.stop()) }()
	var pause, resume []float64
	for range pauseRuns {
		if err := vm.guest.client.WaitReady(ctx, nil); err != nil {
			return paused, resumed, err
		}
		state := filepath.Join(vm.dir, "state")
		took, err := timed(func() error { return errors.Join(vm.save(ctx, state), vm.end()) })
		if err != nil {
			return paused, resumed, err
		}
		pause = append(pause, took)
		took, err = timed(func() error {
			again, err := l.again(ctx, vm.dir, state, hw)
			if err != nil {
				return err
			}
			vm = again
			return vm.guest.client.WaitReady(ctx, nil)
		})
		if err != nil {
			return paused, resumed, err
		}
		resume = append(resume, took)
	}
	return summarize(pause...), summarize(resume...), nil
}

// again continues a machine that was saved in its own directory.
func (l *lab) again(ctx context.Context, dir, state string, hw hardware) (*floorVM, error) {
	f, err := os.Open(state)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return l.resume(ctx, dir, 0, f, hw, ram{filepath.Join(dir, "memory"), true}, true)
}
