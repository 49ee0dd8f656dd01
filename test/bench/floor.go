package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/wrenn-sandbox/wrenn/internal/agent/netns"
	"github.com/wrenn-sandbox/wrenn/internal/agent/network"
)

// The floor is the VMM driven by hand, without any of Wrenn: files by cp, network by ip, QEMU by its
// command line and monitor. It runs the machine that the agent's driver describes in
// internal/agent/vm/qemu/args.go; a snapshot of one could not be restored by the other else.

// lab is where floor VMs live: a directory on the agent's volume, and a namespace with a TAP for each.
type lab struct {
	dir  string
	nets []string // names of namespaces
}

// newLab makes n namespaces. They are not measured, as the agent has them ready, too.
func (b *bench) newLab(ctx context.Context, n int) (*lab, error) {
	l := &lab{}
	var err error
	if l.dir, err = os.MkdirTemp(b.volume(), ".floor-"); err != nil {
		return nil, err
	}
	for i := range n {
		name := fmt.Sprintf("wfloor-%d-%d", os.Getpid(), i)
		l.nets = append(l.nets, name)
		if err := makeNamespace(ctx, name); err != nil {
			return nil, errors.Join(err, l.close())
		}
	}
	return l, nil
}

// gatewayMAC is that of every slot: a restored guest remembers it.
const gatewayMAC = "02:00:5e:00:00:01"

func makeNamespace(ctx context.Context, name string) error {
	gateway := network.GatewayIP + "/" + strconv.Itoa(network.GuestPrefix)
	for _, args := range [][]string{
		{"netns", "add", name},
		{"-n", name, "tuntap", "add", "dev", "tap0", "mode", "tap", "vnet_hdr"},
		{"-n", name, "link", "set", "tap0", "address", gatewayMAC},
		{"-n", name, "addr", "add", gateway, "dev", "tap0"},
		{"-n", name, "link", "set", "tap0", "up"},
		{"-n", name, "neigh", "replace", network.GuestIP, "lladdr", network.GuestMAC, "dev", "tap0", "nud", "permanent"},
	} {
		if err := command(ctx, "ip", args...); err != nil {
			return err
		}
	}
	return nil
}

// command runs a program, in its own words if it fails.
func command(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// close removes the lab; its VMs must have ended.
func (l *lab) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanup)
	defer cancel()
	errs := []error{os.RemoveAll(l.dir)}
	for _, name := range l.nets {
		if _, err := os.Stat("/run/netns/" + name); err == nil {
			errs = append(errs, command(ctx, "ip", "netns", "del", name))
		}
	}
	return errors.Join(errs...)
}

// hardware is what a floor VM is made of.
type hardware struct {
	memoryMB int
	kvm      bool
	tscKHz   int
}

// hardwareOf reads a template's, so that the floor has the same.
func hardwareOf(templateDir string) (hardware, error) {
	var man struct {
		Acceleration string `json:"acceleration"`
		MemoryMB     int    `json:"memory_mb"`
	}
	raw, err := os.ReadFile(filepath.Join(templateDir, "manifest.json"))
	if err != nil {
		return hardware{}, err
	}
	if err := json.Unmarshal(raw, &man); err != nil {
		return hardware{}, fmt.Errorf("manifest of %s: %w", templateDir, err)
	}
	var header struct {
		TSCkHz int `json:"tsc_khz"`
	}
	state, line, err := openState(templateDir)
	if err != nil {
		return hardware{}, err
	}
	defer state.Close()
	_, text, _ := bytes.Cut(line, []byte(" "))
	if err := json.Unmarshal(text, &header); err != nil {
		return hardware{}, fmt.Errorf("header of the state of %s: %w", templateDir, err)
	}
	return hardware{man.MemoryMB, man.Acceleration == "kvm", header.TSCkHz}, nil
}

// openState opens a template's device state behind its first line, which is the driver's; the rest is
// QEMU's own.
func openState(templateDir string) (f *os.File, line []byte, err error) {
	if f, err = os.Open(filepath.Join(templateDir, "state")); err != nil {
		return nil, nil, err
	}
	head := make([]byte, 4096)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, nil, errors.Join(err, f.Close())
	}
	end := bytes.IndexByte(head[:n], '\n')
	if end < 0 {
		return nil, nil, errors.Join(errors.New("state file without a header"), f.Close())
	}
	if _, err := f.Seek(int64(end)+1, io.SeekStart); err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return f, head[:end], nil
}

// boot starts an image cold.
func (l *lab) boot(ctx context.Context, kernel string, net int, image string, hw hardware) (*floorVM, error) {
	dir, err := os.MkdirTemp(l.dir, "vm-")
	if err != nil {
		return nil, err
	}
	if err := command(ctx, "cp", "--reflink=always", image, filepath.Join(dir, "disk.ext4")); err != nil {
		return nil, err
	}
	words := "console=ttyS0 "
	if !hw.kvm && hw.tscKHz > 0 {
		words += fmt.Sprintf("tsc_early_khz=%d ", hw.tscKHz)
	}
	words += fmt.Sprintf("root=/dev/vda rootfstype=ext4 rw init=/usr/local/bin/envd quiet panic=-1 wrenn.addr=%s/%d wrenn.gw=%s",
		network.GuestIP, network.GuestPrefix, network.GatewayIP)
	args := []string{"-kernel", kernel, "-append", words}
	if initrd := filepath.Join(filepath.Dir(kernel), "initramfs.img"); exists(initrd) {
		args = append(args, "-initrd", initrd)
	}
	return startFloor(ctx, dir, l.nets[net], hw, ram{filepath.Join(dir, "memory"), false}, args, nil)
}

// ram is the file that is mapped as a VM's memory, and whether what the VM writes goes into it.
type ram struct {
	path   string
	shared bool
}

// restore continues a template with a clone of its disk, on its memory as it is: the fastest there is.
func (l *lab) restore(ctx context.Context, net int, template string, hw hardware) (*floorVM, error) {
	return l.continueTemplate(ctx, net, template, hw, func(string) ram { return ram{filepath.Join(template, "memory"), false} })
}

// restoreShared continues a template so that its memory is in a file of its own at any time: to save it
// then takes only the state of the devices.
func (l *lab) restoreShared(ctx context.Context, net int, template string, hw hardware) (*floorVM, error) {
	return l.continueTemplate(ctx, net, template, hw, func(dir string) ram { return ram{filepath.Join(dir, "memory"), true} })
}

func (l *lab) continueTemplate(ctx context.Context, net int, template string, hw hardware, memory func(dir string) ram) (*floorVM, error) {
	dir, err := os.MkdirTemp(l.dir, "vm-")
	if err != nil {
		return nil, err
	}
	if err := command(ctx, "cp", "--reflink=always", filepath.Join(template, "disk.ext4"), dir); err != nil {
		return nil, err
	}
	mapped := memory(dir)
	if mapped.shared {
		if err := command(ctx, "cp", "--reflink=always", filepath.Join(template, "memory"), dir); err != nil {
			return nil, err
		}
	}
	state, _, err := openState(template)
	if err != nil {
		return nil, err
	}
	defer state.Close()
	return l.resume(ctx, dir, net, state, hw, mapped, false)
}

// resume continues the machine in dir from its device state.
func (l *lab) resume(ctx context.Context, dir string, net int, state *os.File, hw hardware, memory ram, saved bool) (*floorVM, error) {
	vm, err := startFloor(ctx, dir, l.nets[net], hw, memory, []string{"-incoming", "defer"}, []*os.File{state})
	if err != nil {
		return nil, err
	}
	if err := vm.load(ctx, saved); err != nil {
		return nil, errors.Join(err, vm.stop())
	}
	return vm, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// floorVM is a QEMU of the floor.
type floorVM struct {
	dir     string
	cmd     *exec.Cmd
	monitor *monitor
	guest   *direct
}

// startFloor starts QEMU in a namespace. files become its descriptors from 4 on; 3 is the monitor.
func startFloor(ctx context.Context, dir, namespace string, hw hardware, memory ram, args []string, files []*os.File) (vm *floorVM, err error) {
	socket := filepath.Join(dir, "qmp")
	if err := os.RemoveAll(socket); err != nil { // of a QEMU that ran here before
		return nil, err
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	listener.SetUnlinkOnClose(false) // QEMU goes on listening
	defer listener.Close()
	qmp, err := listener.File()
	if err != nil {
		return nil, err
	}
	defer qmp.Close()
	log, err := os.Create(filepath.Join(dir, "qemu.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	vm = &floorVM{dir: dir, cmd: exec.CommandContext(context.Background(), "qemu-system-x86_64", hw.arguments(dir, memory, args)...)}
	vm.cmd.Stdout, vm.cmd.Stderr = log, log
	vm.cmd.ExtraFiles = append([]*os.File{qmp}, files...)
	path := "/run/netns/" + namespace
	if err := netns.Do(path, vm.cmd.Start); err != nil {
		return nil, err
	}
	vm.guest = newDirect(path, "")
	if vm.monitor, err = dialMonitor(ctx, socket); err != nil {
		return nil, errors.Join(err, vm.stop())
	}
	return vm, nil
}

func (hw hardware) arguments(dir string, memory ram, more []string) []string {
	share := "off"
	if memory.shared {
		share = "on"
	}
	accel := []string{"-accel", "tcg,thread=multi,tb-size=128", "-cpu", "max"}
	if hw.kvm {
		accel = []string{"-accel", "kvm", "-cpu", "host"}
	}
	args := append([]string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-M", "microvm,acpi=on,rtc=on,isa-serial=on,memory-backend=ram", "-smp", "1", "-m", fmt.Sprintf("%dM", hw.memoryMB),
		"-object", fmt.Sprintf("memory-backend-file,id=ram,size=%dM,mem-path=%s,share=%s,dump=off,merge=off", hw.memoryMB, memory.path, share),
		"-chardev", "socket,id=monitor,fd=3,server=on,wait=off", "-mon", "chardev=monitor,mode=control",
		"-chardev", "file,id=console,path=" + filepath.Join(dir, "console"), "-serial", "chardev:console",
		"-blockdev", "driver=raw,node-name=disk0,discard=unmap,file.driver=file,file.filename=" + filepath.Join(dir, "disk.ext4"),
		"-device", "virtio-blk-device,drive=disk0",
		"-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no",
		"-device", "virtio-net-device,netdev=net,mac=" + network.GuestMAC,
		"-device", "virtio-rng-device",
	}, accel...)
	return append(args, more...)
}

// stop ends QEMU and removes what it used. A nil VM is none.
func (vm *floorVM) stop() error {
	if vm == nil {
		return nil
	}
	return errors.Join(vm.end(), os.RemoveAll(vm.dir))
}

// end ends QEMU; its files stay.
func (vm *floorVM) end() error {
	vm.guest.close()
	if vm.monitor != nil {
		vm.monitor.close()
	}
	err := vm.cmd.Process.Kill()
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	_ = vm.cmd.Wait() // killed: never a success
	return err
}
