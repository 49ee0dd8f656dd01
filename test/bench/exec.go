package main

import (
	"context"
	"errors"
	"fmt"
)

const execRuns = 50

// measureExec times `true` through REST, beside the same asked of the same guest directly.
func measureExec(ctx context.Context, b *bench) (err error) {
	if err := b.prepare(ctx, "minimal", smallMB); err != nil {
		return err
	}
	sb, err := b.create(ctx, "minimal", smallMB)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.remove(ctx, sb)) }()
	guest, err := b.into(sb.ID)
	if err != nil {
		return err
	}
	defer guest.close()
	through := func() error {
		res, err := sb.Exec(ctx, "true")
		if err == nil && res.ExitCode != 0 {
			err = fmt.Errorf("true ended with %d: %s", res.ExitCode, res.Stderr)
		}
		return err
	}
	directly := func() error {
		_, err := guest.exec(ctx, "true")
		return err
	}
	if err := errors.Join(through(), directly()); err != nil { // connections are open from here on
		return err
	}
	var ours, floor []float64
	for i := range execRuns {
		if b.enough(i) {
			break
		}
		took, err := timed(through)
		if err != nil {
			return err
		}
		ours = append(ours, took)
		if took, err = timed(directly); err != nil {
			return err
		}
		floor = append(floor, took)
	}
	f := summarize(floor...)
	b.add("exec of true through REST", "ms", summarize(ours...), &f, atMostMore(5))
	return nil
}
