//go:build linux

package qemu

import (
	"fmt"
	"os"
	"strconv"

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
	kvm            bool
	tscKHz         int // of an emulated CPU
	monitor        int // listening socket
	console        int // listening socket
	memory         int
	kernel, initrd int
	tap            int
	state          int // positioned at QEMU's own data
	disks          []int
}

// arguments is the whole command line. What a snapshot needs to fit is here and nowhere else: machine,
// CPU, memory, devices and their order.
func (o opened) arguments() []string {
	args := []string{
		"-name", o.cfg.ID,
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-S",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		// PIT and PIC stay on: without them the guest hangs when emulated.
		"-M", "microvm,acpi=on,rtc=on,isa-serial=on,memory-backend=ram",
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
	if !o.kvm && o.tscKHz > 0 {
		words += fmt.Sprintf("tsc_early_khz=%d ", o.tscKHz)
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
		readOnly, set := "off", i+1
		if o.cfg.Disks[i].ReadOnly {
			readOnly = "on"
		}
		args = append(args,
			"-add-fd", fmt.Sprintf("fd=%d,set=%d", fd, set),
			"-blockdev", fmt.Sprintf("driver=raw,node-name=disk%d,read-only=%s,discard=unmap,file.driver=file,file.filename=/dev/fdset/%d", i, readOnly, set),
			"-device", fmt.Sprintf("virtio-blk-device,drive=disk%d", i))
	}
	if o.tap >= 0 {
		args = append(args,
			"-netdev", fmt.Sprintf("tap,id=net,fd=%d", o.tap),
			"-device", "virtio-net-device,netdev=net,mac="+o.cfg.Net.MAC)
	}
	return append(args, "-device", "virtio-rng-device")
}

func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }
