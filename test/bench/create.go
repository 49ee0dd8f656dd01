package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	wrenn "github.com/wrenn-sandbox/wrenn/sdk/go"
)

const (
	createRuns   = 50
	createAtOnce = 10
	createRounds = 2 // of createAtOnce
	firstWord    = "ready"
)

// measureCreate times POST /v1/sandboxes and a first command, beside a restore of the same template by
// hand and the same command asked of its guest.
func measureCreate(ctx context.Context, b *bench) (err error) {
	if err := b.prepare(ctx, "minimal", smallMB); err != nil {
		return err
	}
	template, err := b.templateDir("minimal", smallMB)
	if err != nil {
		return err
	}
	hw, err := hardwareOf(template)
	if err != nil {
		return err
	}
	l, err := b.newLab(ctx, createAtOnce)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	c := creator{b, l, template, hw}
	if err := c.oneByOne(ctx); err != nil {
		return err
	}
	return c.atOnce(ctx)
}

type creator struct {
	b        *bench
	lab      *lab
	template string
	hw       hardware
}

func createGoal() *goal {
	return &goal{"≤ 1.5 × floor, < 150 ms, p95 ≤ 2 × p50", func(ours, floor sample) bool {
		return ours.P50 <= 1.5*floor.P50 && ours.P50 < 150 && ours.P95 <= 2*ours.P50
	}}
}

func (c creator) oneByOne(ctx context.Context) error {
	var ours, floor, sole []float64
	for i := range createRuns {
		if c.b.enough(i) {
			break
		}
		took, created, sb, err := c.ours(ctx)
		if err := errors.Join(err, c.remove(ctx, sb)); err != nil {
			return err
		}
		ours, sole = append(ours, took), append(sole, created)
		took, vm, err := c.floor(ctx, 0)
		if err := errors.Join(err, vm.stop()); err != nil {
			return err
		}
		floor = append(floor, took)
	}
	f := summarize(floor...)
	c.b.add("create → first output, one by one", "ms", summarize(ours...), &f, createGoal())
	c.b.add("  of it: POST /v1/sandboxes alone", "ms", summarize(sole...), nil, nil)
	return nil
}

// atOnce times each of several that are begun together, and all of them.
func (c creator) atOnce(ctx context.Context) error {
	var ours, floor, oursAll, floorAll []float64
	for i := range createRounds {
		if i > 0 && c.b.enough(fewestRuns) {
			break
		}
		began := time.Now()
		each, all, err := c.oursAtOnce(ctx, began)
		if err != nil {
			return err
		}
		ours, oursAll = append(ours, each...), append(oursAll, all)
		began = time.Now()
		each, all, err = c.floorAtOnce(ctx, began)
		if err != nil {
			return err
		}
		floor, floorAll = append(floor, each...), append(floorAll, all)
	}
	f, all := summarize(floor...), summarize(floorAll...)
	c.b.add(fmt.Sprintf("create → first output, %d at once, each", createAtOnce), "ms", summarize(ours...), &f, atMostTimes(1.5))
	c.b.add(fmt.Sprintf("create → first output, all %d", createAtOnce), "ms", summarize(oursAll...), &all, atMostTimes(1.5))
	return nil
}

func (c creator) oursAtOnce(ctx context.Context, began time.Time) (each []float64, all float64, err error) {
	each = make([]float64, createAtOnce)
	made, err := together(createAtOnce, func(i int) (*wrenn.Sandbox, error) {
		took, _, sb, err := c.ours(ctx)
		each[i] = took
		return sb, err
	})
	all = ms(time.Since(began))
	_, removed := together(createAtOnce, func(i int) (struct{}, error) { return struct{}{}, c.remove(ctx, made[i]) })
	return each, all, errors.Join(err, removed)
}

func (c creator) floorAtOnce(ctx context.Context, began time.Time) (each []float64, all float64, err error) {
	each = make([]float64, createAtOnce)
	made, err := together(createAtOnce, func(i int) (*floorVM, error) {
		took, vm, err := c.floor(ctx, i)
		each[i] = took
		return vm, err
	})
	all = ms(time.Since(began))
	for _, vm := range made {
		err = errors.Join(err, vm.stop())
	}
	return each, all, err
}

// ours gives the whole time, and that of the create in it. The sandbox is the caller's to remove, also
// after an error; it may be nil then.
func (c creator) ours(ctx context.Context) (took, created float64, sb *wrenn.Sandbox, err error) {
	took, err = timed(func() (err error) {
		began := time.Now()
		if sb, err = c.b.create(ctx, "minimal", smallMB); err != nil {
			return err
		}
		created = ms(time.Since(began))
		res, err := sb.Exec(ctx, "echo", firstWord)
		if err == nil && string(res.Stdout) != firstWord+"\n" {
			err = fmt.Errorf("the sandbox's first command printed %q: %s", res.Stdout, res.Stderr)
		}
		return err
	})
	return took, created, sb, err
}

func (c creator) remove(ctx context.Context, sb *wrenn.Sandbox) error {
	if sb == nil {
		return nil
	}
	return c.b.remove(ctx, sb)
}

// floor restores by hand. The VM is the caller's to stop, also after an error; it may be nil then.
func (c creator) floor(ctx context.Context, net int) (took float64, vm *floorVM, err error) {
	took, err = timed(func() (err error) {
		if vm, err = c.lab.restore(ctx, net, c.template, c.hw); err != nil {
			return err
		}
		out, err := vm.guest.exec(ctx, "echo", firstWord)
		if err == nil && out != firstWord+"\n" {
			err = fmt.Errorf("the floor's first command printed %q", out)
		}
		return err
	})
	return took, vm, err
}
