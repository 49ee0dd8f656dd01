package boot

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// modulesDir is only in the initramfs: the modules, and "order", their file names in loading order.
	modulesDir = "/wrenn-modules"
	newRoot    = "/newroot"
	// rootPatience is how long the root device may take to appear.
	rootPatience = 10 * time.Second
)

// initramfs loads the modules, mounts the root named on the command line and becomes its init.
func initramfs(cmdline map[string]string) error {
	if err := loadModules(modulesDir); err != nil {
		return err
	}
	root := cmdline["root"]
	if !strings.HasPrefix(root, "/dev/") {
		return fmt.Errorf("root=%q: a device below /dev is needed", root)
	}
	if err := awaitDevice(root); err != nil {
		return err
	}
	if err := os.MkdirAll(newRoot, 0o755); err != nil {
		return err
	}
	var flags uintptr = unix.MS_NOATIME
	if _, ro := cmdline["ro"]; ro {
		flags |= unix.MS_RDONLY
	}
	fstype := cmdline["rootfstype"]
	if fstype == "" {
		fstype = "ext4"
	}
	if err := unix.Mount(root, newRoot, fstype, flags, ""); err != nil {
		return fmt.Errorf("mount %s: %w", root, err)
	}
	program := cmdline["init"]
	if program == "" {
		program = Self
	}
	return switchRoot(program)
}

func loadModules(dir string) error {
	order, err := os.Open(filepath.Join(dir, "order"))
	if err != nil {
		return err
	}
	defer order.Close()
	lines := bufio.NewScanner(order)
	for lines.Scan() {
		name := filepath.Base(lines.Text())
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		// A module for hardware that this VM does not have may refuse; what is vital shows by the root.
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
			fmt.Fprintf(os.Stderr, "init: module %s: %v\n", name, err)
		}
	}
	return lines.Err()
}

// awaitDevice waits for a device node. Devices are found while modules load, so it is there at once or
// a few milliseconds later.
func awaitDevice(path string) error {
	for deadline := time.Now().Add(rootPatience); ; time.Sleep(2 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("root device %s did not appear within %s", path, rootPatience)
		}
	}
}

// switchRoot moves the mounts to the new root, frees the initramfs' memory and runs the new init.
func switchRoot(program string) error {
	for _, m := range earlyMounts() {
		if err := unix.Mount(m.target, filepath.Join(newRoot, m.target), "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", m.target, err)
		}
	}
	for _, path := range []string{modulesDir, "/init"} {
		_ = os.RemoveAll(path) // only memory is lost if it fails
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	err := unix.Exec(program, []string{program}, []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"})
	return fmt.Errorf("run %s: %w", program, err)
}
