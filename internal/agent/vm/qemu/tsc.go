//go:build linux

package qemu

import (
	"time"

	"golang.org/x/sys/unix"
)

// An emulated CPU's time stamp counter is the host's. A guest kernel has to know its rate, because
// microvm's ACPI is "hardware reduced": Linux then uses no timer but the local APIC's, which it calibrates
// by the TSC. Left to itself it measures the TSC against the PIT while it boots, and on a busy host that
// fails in one boot out of five and hangs the guest. So the host measures, at leisure, and says so on the
// kernel's command line.
const (
	tscInterval  = 50 * time.Millisecond
	tscSamples   = 20
	tscTolerance = 1000 // a restored guest's clock may be off by one part in this many
)

// measureTSC is the rate of the host's time stamp counter in kHz, 0 if it has none.
func measureTSC() int {
	tsc0, ns0 := sampleTSC()
	time.Sleep(tscInterval)
	tsc1, ns1 := sampleTSC()
	if tsc1 <= tsc0 || ns1 <= ns0 {
		return 0
	}
	return int((tsc1 - tsc0) * 1_000_000 / uint64(ns1-ns0))
}

// sampleTSC reads counter and clock together, as the closest of several readings.
func sampleTSC() (tsc uint64, ns int64) {
	best := ^uint64(0)
	for range tscSamples {
		var ts unix.Timespec
		before := rdtsc()
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &ts); err != nil {
			return 0, 0
		}
		after := rdtsc()
		if took := after - before; took < best {
			best, tsc, ns = took, before+took/2, ts.Nano()
		}
	}
	return tsc, ns
}
