//go:build linux

package qemu

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
)

// translationMB is the room for translated code when the CPU is emulated, in MiB. QEMU's default of
// up to 1 GiB would be part of what a VM may use; at this size the code of a booted Debian with Python at
// work fits.
const translationMB = 128

// files collects the open files that QEMU inherits. It opens almost nothing by name: it has no right to.
type files struct {
	list []*os.File
}

// add returns the descriptor that the file will have in QEMU.
func (f *files) add(file *os.File) int {
	f.list = append(f.list, file)
	return 2 + len(f.list)
}

func (f *files) close() {
	for _, file := range f.list {
		file.Close()
	}
}

// opened is a vm.Config with its paths opened, each given as the descriptor in QEMU; -1 is none.
type opened struct {
	cfg            vm.Config
	limits         vm.DiskLimits
	kvm            bool
	version        string // of QEMU
	tscKHz         int    // of an emulated CPU
	monitor        int    // listening socket
	console        int    // listening socket
	memory         int
	kernel, initrd int
	tap            int
	state          int // a pipe with QEMU's own data
	disks          []int
}

// machineType is the machine that a QEMU of this version gives every guest. Its firmware from 8.2 on has the timer's
// interrupt go through the legacy interrupt controller (PIC), which a kernel on "hardware reduced" ACPI never sets up: it
// takes what is pending when it first allows interrupts as vector 0, a division error. So there is none, but in series
// before 8, whose firmware leaves it quiet and whose saved machines have one.
func machineType(version string) string {
	const base = "microvm,acpi=on,rtc=on,isa-serial=on"
	major, _, _ := strings.Cut(version, ".")
	if n, err := strconv.Atoi(major); err == nil && n < 8 {
		return base
	}
	return base + ",pic=off"
}

// arguments is the whole command line. What a snapshot needs to fit is here and nowhere else: machine,
// CPU, memory, devices and their order.
func (o opened) arguments() []string {
	args := []string{
		"-name", o.cfg.ID,
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-S",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-M", machineType(o.version) + ",memory-backend=ram",
		"-smp", strconv.Itoa(o.cfg.VCPUs),
		"-m", fmt.Sprintf("%dM", o.cfg.MemoryMB),
		"-object", fmt.Sprintf("memory-backend-file,id=ram,size=%dM,mem-path=/proc/self/fd/%d,share=off,dump=off,merge=off", o.cfg.MemoryMB, o.memory),
		"-chardev", fmt.Sprintf("socket,id=monitor,fd=%d,server=on,wait=off", o.monitor),
		"-mon", "chardev=monitor,mode=control",
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d,server=on,wait=off", o.console),
		"-serial", "chardev:console",
	}
	args = append(args, o.accelerator()...)
	args = append(args, o.devices()...)
	if o.state >= 0 {
		return append(args, "-incoming", "defer")
	}
	args = append(args, "-kernel", fdPath(o.kernel), "-append", o.cmdline())
	if o.initrd >= 0 {
		args = append(args, "-initrd", fdPath(o.initrd))
	}
	return args
}

func (o opened) cmdline() string {
	words := "console=ttyS0 "
	if !o.kvm && o.tscKHz > 0 { // ADR 7
		words += fmt.Sprintf("tsc_early_khz=%d tsc=reliable ", o.tscKHz)
	}
	return words + o.cfg.Cmdline
}

func (o opened) accelerator() []string {
	if o.kvm {
		return []string{"-accel", "kvm", "-cpu", "host"}
	}
	return []string{"-accel", fmt.Sprintf("tcg,thread=multi,tb-size=%d", translationMB), "-cpu", "max"}
}

func (o opened) devices() []string {
	var args []string
	for i, fd := range o.disks {
		args = append(args, o.disk(i, fd)...)
	}
	if o.tap >= 0 {
		args = append(args,
			"-netdev", fmt.Sprintf("tap,id=net,fd=%d", o.tap),
			"-device", "virtio-net-device,netdev=net,mac="+o.cfg.Net.MAC)
	}
	return append(args, "-device", "virtio-rng-device")
}

// disk is a block device over the open image. With a limit, a filter lies between the two, and diskN names that.
func (o opened) disk(i, fd int) []string {
	node, set, options := diskNode(i), i+1, "read-only=off,discard=unmap"
	if o.cfg.Disks[i].ReadOnly {
		options = "read-only=on,discard=unmap"
	}
	image := node
	var filter []string
	if o.limits != (vm.DiskLimits{}) {
		image = fmt.Sprintf("image%d", i)
		filter = []string{
			"-object", fmt.Sprintf("throttle-group,id=limit%d,x-bps-total=%d,x-iops-total=%d", i, o.limits.BytesPerSec, o.limits.OpsPerSec),
			"-blockdev", fmt.Sprintf("driver=throttle,node-name=%s,throttle-group=limit%d,file=%s,%s", node, i, image, options),
		}
	}
	args := []string{
		"-add-fd", fmt.Sprintf("fd=%d,set=%d", fd, set),
		"-blockdev", fmt.Sprintf("driver=raw,node-name=%s,%s,file.driver=file,file.filename=/dev/fdset/%d", image, options, set),
	}
	return append(append(args, filter...), "-device", "virtio-blk-device,drive="+node)
}

func diskNode(i int) string { return fmt.Sprintf("disk%d", i) }

func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }
