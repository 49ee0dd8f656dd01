package vm

import (
	"context"
	"slices"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Drivers are the hypervisors of a host as one Driver. New VMs run with the first; one that exists already, or is
// restored, stays with the one that made it: a host may get another hypervisor while it has sandboxes.
type Drivers []Driver

var _ Driver = Drivers(nil)

// Capabilities implements Driver: the first's, and what can be restored with the others.
func (d Drivers) Capabilities() Capabilities {
	caps := d[0].Capabilities()
	caps.Others = slices.Clone(caps.Others)
	for _, other := range d[1:] {
		also := other.Capabilities()
		caps.Others = append(append(caps.Others, also.Own()), also.Others...)
	}
	return caps
}

// of is the driver of this name; the first, if it names none.
func (d Drivers) of(name string) (Driver, error) {
	for _, driver := range d {
		if name == "" || driver.Capabilities().Driver == name {
			return driver, nil
		}
	}
	return nil, wrenn.Errorf(wrenn.KindInvalidRequest, "this host has no hypervisor %s any more; install it again", name)
}

// Start implements Driver.
func (d Drivers) Start(ctx context.Context, cfg Config) (Handle, error) {
	name := ""
	if cfg.Restore != nil {
		name = cfg.Restore.Driver
	}
	driver, err := d.of(name)
	if err != nil {
		return Handle{}, err
	}
	return driver.Start(ctx, cfg)
}

// Inspect implements Driver.
func (d Drivers) Inspect(ctx context.Context, h Handle) (State, error) {
	driver, err := d.of(h.Driver)
	if err != nil {
		return "", err
	}
	return driver.Inspect(ctx, h)
}

// Pause implements Driver.
func (d Drivers) Pause(ctx context.Context, h Handle) error {
	return d.with(h, func(driver Driver) error { return driver.Pause(ctx, h) })
}

// Resume implements Driver.
func (d Drivers) Resume(ctx context.Context, h Handle) error {
	return d.with(h, func(driver Driver) error { return driver.Resume(ctx, h) })
}

// Snapshot implements Driver.
func (d Drivers) Snapshot(ctx context.Context, h Handle, dst SnapshotFiles) error {
	return d.with(h, func(driver Driver) error { return driver.Snapshot(ctx, h, dst) })
}

// Wait implements Driver.
func (d Drivers) Wait(ctx context.Context, h Handle) error {
	return d.with(h, func(driver Driver) error { return driver.Wait(ctx, h) })
}

// Destroy implements Driver.
func (d Drivers) Destroy(ctx context.Context, h Handle) error {
	return d.with(h, func(driver Driver) error { return driver.Destroy(ctx, h) })
}

func (d Drivers) with(h Handle, fn func(Driver) error) error {
	driver, err := d.of(h.Driver)
	if err != nil {
		return err
	}
	return fn(driver)
}
