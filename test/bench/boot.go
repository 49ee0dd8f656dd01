package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
)

// measureBoot creates sandboxes of sizes that no template has yet, so that the image is booted, beside a
// boot of the same image with the same size by hand.
func measureBoot(ctx context.Context, b *bench) (err error) {
	if err := b.prepare(ctx, "minimal", smallMB); err != nil { // the image is on the volume from here on
		return err
	}
	images, err := filepath.Glob(filepath.Join(b.volume(), ".images", "minimal*"))
	if err == nil && len(images) != 1 {
		err = fmt.Errorf("%d imported images of minimal, not 1", len(images))
	}
	if err != nil {
		return err
	}
	l, err := b.newLab(ctx, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	var ours, floor []float64
	for _, memoryMB := range []int32{272, 288, 304} {
		took, err := b.bootOurs(ctx, memoryMB)
		if err != nil {
			return err
		}
		ours = append(ours, took)
		if took, err = b.bootFloor(ctx, l, images[0], int(memoryMB)); err != nil {
			return err
		}
		floor = append(floor, took)
	}
	f := summarize(floor...)
	b.add("cold boot to guest ready (and freeze, clone, restore)", "ms", summarize(ours...), &f, nil)
	return nil
}

func (b *bench) bootOurs(ctx context.Context, memoryMB int32) (float64, error) {
	var sb *wrenn.Sandbox
	took, err := timed(func() (err error) {
		sb, err = b.create(ctx, "minimal", memoryMB)
		return err
	})
	if err != nil {
		return 0, err
	}
	return took, b.remove(ctx, sb)
}

func (b *bench) bootFloor(ctx context.Context, l *lab, image string, memoryMB int) (float64, error) {
	template, err := b.templateDir("minimal", memoryMB)
	if err != nil {
		return 0, err
	}
	hw, err := hardwareOf(template)
	if err != nil {
		return 0, err
	}
	var vm *floorVM
	took, err := timed(func() (err error) {
		if vm, err = l.boot(ctx, b.stack.Kernel, 0, image, hw); err != nil {
			return err
		}
		return vm.guest.client.WaitReady(ctx, nil)
	})
	return took, errors.Join(err, vm.stop())
}
