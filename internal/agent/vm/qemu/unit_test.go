//go:build linux

package qemu

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
)

func argument(args []string, name string) string {
	if i := slices.Index(args, name); i >= 0 && i+1 < len(args) {
		return args[i+1]
	}
	return ""
}

func TestArgumentsOfAColdStart(t *testing.T) {
	t.Parallel()
	o := opened{
		cfg: vm.Config{
			ID: "sb-x", VCPUs: 2, MemoryMB: 512, Cmdline: "quiet", Disks: []vm.Disk{{}, {ReadOnly: true}},
			Net: vm.Net{MAC: "02:00:5e:00:00:02"},
		},
		tscKHz: 2_600_000, monitor: 3, console: 4, memory: 5, kernel: 6, initrd: 7, disks: []int{8, 9}, tap: 10, state: -1,
	}
	args := o.arguments()
	for name, want := range map[string]string{
		"-smp": "2", "-m": "512M", "-kernel": "/proc/self/fd/6", "-initrd": "/proc/self/fd/7", "-netdev": "tap,id=net,fd=10",
		"-append":  "console=ttyS0 tsc_early_khz=2600000 tsc=reliable quiet",
		"-sandbox": "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
	} {
		if got := argument(args, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	all := strings.Join(args, " ")
	for _, want := range []string{"-S", "-accel tcg,thread=multi,tb-size=128 -cpu max", "mem-path=/proc/self/fd/5,share=off", "read-only=off", "read-only=on"} {
		if !strings.Contains(all, want) {
			t.Errorf("no %q in %s", want, all)
		}
	}
	o.kvm, o.initrd, o.tap = true, -1, -1
	all = strings.Join(o.arguments(), " ")
	if !strings.Contains(all, "-accel kvm -cpu host") || strings.Contains(all, "tsc_early_khz") || strings.Contains(all, "-initrd") || strings.Contains(all, "-netdev") {
		t.Errorf("with KVM: %s", all)
	}
}

// Machines that were saved by an older QEMU have an interrupt controller that newer ones must not have.
func TestMachineTypeOfEachSeries(t *testing.T) {
	t.Parallel()
	for version, pic := range map[string]bool{"7.2": true, "7.2.22": true, "8.2.1": false, "10.0.13": false, "11.1": false} {
		if got := machineType(version); strings.Contains(got, "pic=off") == pic {
			t.Errorf("%s: %s", version, got)
		}
	}
}

func TestArgumentsOfARestoreDifferInTheBootOnly(t *testing.T) {
	t.Parallel()
	o := opened{cfg: vm.Config{ID: "sb-x", VCPUs: 1, MemoryMB: 256, Disks: []vm.Disk{{}}}, disks: []int{6}, kernel: 7, initrd: 8, tap: -1, state: -1}
	cold := o.arguments()
	o.state = 9
	restored := o.arguments()
	i, j := slices.Index(cold, "-kernel"), slices.Index(restored, "-incoming")
	if i < 0 || j < 0 || !slices.Equal(cold[:i], restored[:j]) {
		t.Errorf("the machine of a restore is another:\n%q\n%q", cold, restored)
	}
}

func TestSnapshotsFitTheSameMachineOnly(t *testing.T) {
	t.Parallel()
	want := stateHeader{Version: "7.2", Arch: "amd64", CPUModel: "tcg-max", VCPUs: 1, MemoryMB: 512, Disks: 1, TSCkHz: 2_600_000}
	close, far, other := want, want, want
	close.TSCkHz += 100
	far.TSCkHz = 3_100_000
	other.Version = "10.0"
	if !want.fits(want) || !close.fits(want) || far.fits(want) || other.fits(want) {
		t.Errorf("fits: same %v, close clock %v, other clock %v, other version %v", want.fits(want), close.fits(want), far.fits(want), other.fits(want))
	}
}

func TestUpdatesOfASeriesTakeItsStates(t *testing.T) {
	t.Parallel()
	caps := func(version string) string {
		return New(Verdict{Version: version, TSCkHz: 1}, Options{}).Capabilities().Version
	}
	if caps("7.2.22") != caps("7.2.9") || caps("7.2") != "7.2" || caps("10.0.2") == caps("10.1.2") {
		t.Errorf("%s, %s, %s, %s, %s", caps("7.2.22"), caps("7.2.9"), caps("7.2"), caps("10.0.2"), caps("10.1.2"))
	}
}

func TestTSCIsMeasuredTheSameTwice(t *testing.T) {
	t.Parallel()
	a, b := measureTSC(), measureTSC()
	if a == 0 {
		t.Skip("this CPU has no time stamp counter")
	}
	if off := max(a-b, b-a); off > a/tscTolerance {
		t.Errorf("%d kHz and then %d kHz", a, b)
	}
}

func TestSocketsMayHaveLongPaths(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 40))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "qmp.sock")
	f, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	conn, err := dialUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}
