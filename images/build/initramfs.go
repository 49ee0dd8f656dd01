package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// modulesDir is where the guest's init looks for modules (internal/envd/boot).
const modulesDir = "wrenn-modules"

// initramfs writes initramfs.img: the guest agent as /init, and the modules. It is not compressed: an
// emulated CPU unpacks slower than the host hands it over.
func (b *builder) initramfs() error {
	raw, err := os.ReadFile(filepath.Join(b.kernels, "kernel.json"))
	if err != nil {
		return err
	}
	var info kernelInfo
	if err := json.Unmarshal(raw, &info); err != nil {
		return err
	}
	path := filepath.Join(b.kernels, "initramfs.img")
	f, err := os.Create(path + ".new")
	if err != nil {
		return err
	}
	defer os.Remove(path + ".new")
	defer f.Close()
	buf := bufio.NewWriterSize(f, 1<<20)
	c := &cpio{w: buf}
	for _, dir := range []string{"dev", "newroot", "proc", "sys", modulesDir} {
		c.add(dir, 0o040755, nil)
	}
	// Before devtmpfs is mounted init's messages go here.
	c.addDevice("dev/console", 0o020600, 5, 1)
	envd, err := os.ReadFile(b.envd)
	if err != nil {
		return err
	}
	c.add("init", 0o100755, envd)
	for _, name := range info.Modules {
		module, err := os.ReadFile(filepath.Join(b.kernels, "modules", name))
		if err != nil {
			return err
		}
		c.add(modulesDir+"/"+name, 0o100644, module)
	}
	c.add(modulesDir+"/order", 0o100644, []byte(strings.Join(info.Modules, "\n")+"\n"))
	c.add("TRAILER!!!", 0, nil)
	c.fillPage() // or internal/agent/vm/qemu must copy it at each boot
	if c.err != nil {
		return c.err
	}
	if err := buf.Flush(); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// cpio writes a newc archive (kernel document driver-api/early-userspace/buffer-format) whose bytes
// depend only on names and contents.
type cpio struct {
	w     io.Writer
	inode int
	size  int
	err   error
}

func (c *cpio) add(name string, mode int, data []byte) { c.entry(name, mode, data, 0, 0) }

func (c *cpio) addDevice(name string, mode, major, minor int) { c.entry(name, mode, nil, major, minor) }

func (c *cpio) entry(name string, mode int, data []byte, major, minor int) {
	c.inode++
	header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		c.inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0)
	c.write([]byte(header + name + "\x00"))
	c.pad(len(header) + len(name) + 1)
	c.write(data)
	c.pad(len(data))
}

func (c *cpio) pad(n int) { c.write(make([]byte, (4-n%4)%4)) }

// fillPage has the archive end where a page does.
func (c *cpio) fillPage() {
	const page = 4096
	c.write(make([]byte, (page-c.size%page)%page))
}

func (c *cpio) write(b []byte) {
	if c.err == nil {
		_, c.err = c.w.Write(b)
	}
	c.size += len(b)
}
