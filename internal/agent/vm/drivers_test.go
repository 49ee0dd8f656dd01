package vm

import (
	"context"
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// named is a driver that tells only that it was asked.
type named struct {
	Driver
	caps  Capabilities
	asked []string
}

func (n *named) Capabilities() Capabilities { return n.caps }
func (n *named) Start(context.Context, Config) (Handle, error) {
	n.asked = append(n.asked, "start")
	return Handle{Driver: n.caps.Driver}, nil
}
func (n *named) Pause(context.Context, Handle) error { n.asked = append(n.asked, "pause"); return nil }

func TestEachVMStaysWithItsDriver(t *testing.T) {
	t.Parallel()
	first := &named{caps: Capabilities{Driver: "first", Version: "2", Others: []Capabilities{{Driver: "first", Version: "1"}}}}
	second := &named{caps: Capabilities{Driver: "second", Version: "7"}}
	d := Drivers{first, second}
	ctx := t.Context()
	fresh, err := d.Start(ctx, Config{})
	if err != nil || fresh.Driver != "first" {
		t.Errorf("a new VM: %+v, %v", fresh, err)
	}
	old, err := d.Start(ctx, Config{Restore: &SnapshotFiles{Driver: "second"}})
	if err != nil || old.Driver != "second" {
		t.Errorf("a restored VM: %+v, %v", old, err)
	}
	if err := d.Pause(ctx, old); err != nil || len(first.asked) != 1 || len(second.asked) != 2 {
		t.Errorf("asked %v and %v, %v", first.asked, second.asked, err)
	}
	if err := d.Pause(ctx, Handle{Driver: "third"}); wrenn.KindOf(err) != wrenn.KindInvalidRequest {
		t.Errorf("a driver that is gone: %v", err)
	}
	caps := d.Capabilities()
	if caps.Driver != "first" || len(caps.Others) != 2 || caps.Own().Others != nil {
		t.Errorf("capabilities are %+v", caps)
	}
	for handle, want := range map[Handle]string{
		{Driver: "second"}: "7", {Driver: "first", VMMVersion: "1"}: "1", {Driver: "first"}: "2",
		{Driver: "first", VMMVersion: "0"}: "0", // replaced on the host while the VM runs
	} {
		if got := caps.Of(handle); got.Version != want {
			t.Errorf("%+v has %+v, want version %s", handle, got, want)
		}
	}
}
