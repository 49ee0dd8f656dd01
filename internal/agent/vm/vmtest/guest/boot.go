//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

func boot() error {
	for _, m := range []struct{ kind, dir string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	if err := redirectConsole(); err != nil {
		return err
	}
	if err := loadModules(); err != nil {
		return err
	}
	return setAddress("eth0", cmdline("wrenn.addr"))
}

// redirectConsole is for kernels that open no console for an init in an initramfs without /dev/console.
func redirectConsole() error {
	f, err := os.OpenFile("/dev/console", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	for fd := range 3 {
		if err := unix.Dup2(int(f.Fd()), fd); err != nil {
			return err
		}
	}
	return nil
}

func cmdline(key string) string {
	b, _ := os.ReadFile("/proc/cmdline")
	for _, word := range strings.Fields(string(b)) {
		if v, ok := strings.CutPrefix(word, key+"="); ok {
			return v
		}
	}
	return ""
}

// loadModules loads what the virtio devices need from wherever the initramfs has it, dependencies first.
func loadModules() error {
	files := map[string]string{}
	err := filepath.WalkDir("/", func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == "/proc" || path == "/sys" || path == "/dev" {
			return fs.SkipDir
		}
		if name, ok := strings.CutSuffix(d.Name(), ".ko"); ok {
			files[strings.ReplaceAll(name, "-", "_")] = path
		}
		return nil
	})
	if err != nil {
		return err
	}
	done := map[string]bool{}
	for _, name := range []string{"virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon"} {
		if err := load(name, files, done); err != nil {
			return err
		}
	}
	return nil
}

func load(name string, files map[string]string, done map[string]bool) error {
	path := files[name]
	if path == "" || done[name] {
		return nil // built in, or loaded
	}
	done[name] = true
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	for _, dep := range depends(b) {
		if err := load(dep, files, done); err != nil {
			return err
		}
	}
	if err := unix.InitModule(b, ""); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", path, err)
	}
	return nil
}

// depends reads the `depends=` entry of a module's .modinfo.
func depends(ko []byte) []string {
	_, rest, ok := bytes.Cut(ko, []byte("\x00depends="))
	if !ok {
		return nil
	}
	list, _, _ := bytes.Cut(rest, []byte{0})
	return strings.FieldsFunc(string(list), func(r rune) bool { return r == ',' })
}

// setAddress is `ip addr add` and `ip link set up` by ioctl, for IPv4.
func setAddress(dev, cidr string) error {
	if cidr == "" {
		return nil
	}
	ip, ipnet, err := net.ParseCIDR(cidr)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, set := range []struct {
		request uintptr
		value   []byte
	}{{unix.SIOCSIFADDR, ip.To4()}, {unix.SIOCSIFNETMASK, ipnet.Mask}} {
		if err := ifreq(fd, dev, set.request, append([]byte{unix.AF_INET, 0, 0, 0}, set.value...)); err != nil {
			return fmt.Errorf("address of %s: %w", dev, err)
		}
	}
	if err := ifreq(fd, dev, unix.SIOCSIFFLAGS, []byte{unix.IFF_UP | unix.IFF_RUNNING, 0}); err != nil {
		return err
	}
	if gw := net.ParseIP(cmdline("wrenn.gw")); gw != nil {
		return addDefaultRoute(fd, gw)
	}
	return nil
}

func ifreq(fd int, dev string, request uintptr, value []byte) error {
	var req [40]byte
	copy(req[:15], dev)
	copy(req[16:], value)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&req))); e != 0 {
		return e
	}
	return nil
}

// addDefaultRoute fills a struct rtentry (linux/route.h): destination and mask are zero.
func addDefaultRoute(fd int, gw net.IP) error {
	var rt [120]byte
	rt[8], rt[24], rt[40] = unix.AF_INET, unix.AF_INET, unix.AF_INET // rt_dst, rt_gateway, rt_genmask
	copy(rt[28:], gw.To4())
	rt[56] = unix.RTF_UP | unix.RTF_GATEWAY
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCADDRT, uintptr(unsafe.Pointer(&rt))); e != 0 && e != unix.EEXIST {
		return fmt.Errorf("default route: %w", e)
	}
	return nil
}
