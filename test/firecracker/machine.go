//go:build linux

package main

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

//go:embed suites.sh
var suiteFunctions string

//go:embed init.sh
var initScript string

// suiteScript runs all suites, but for the tests that are settled.
func suiteScript(got *results) string {
	var b strings.Builder
	b.WriteString(suiteFunctions)
	for _, s := range suites() {
		var skip []string
		for _, pattern := range []string{s.skip, got.settled(s.name)} {
			if pattern != "" {
				skip = append(skip, pattern)
			}
		}
		fmt.Fprintf(&b, "%s run %s %s %s\n", s.env, s.name, quoted(s.only), quoted(strings.Join(skip, "|")))
	}
	return b.String()
}

// quoted is a word of a shell script.
func quoted(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// What the emulated machine is like. A test there takes five to twenty times as long as on the host itself.
const (
	machineMemoryMB = 6144
	machineCPUs     = 1 // with two, QEMU 11 loses a guest every few minutes as well
	machineStretch  = 8
	machineTries    = 3                // in a row that bring no test to its end
	silence         = 90 * time.Second // without a sign of life, after which the machine hangs
	standstill      = 6 * time.Minute  // without a word of the tests, after which they do
	rootSize        = "16G"            // sparse: sandboxes are on it
	packages        = "linux-image-cloud-amd64,kmod,udev,iproute2,nftables,xfsprogs,e2fsprogs,postgresql,redis-server,procps,sudo"
)

// inMachine runs the suites inside an emulated machine. One that breaks is started again for what it did not come to, as
// long as each start gets some way; and once for each test that failed, for an emulated guest is lost as well at times (by a
// triple fault).
func inMachine(ctx context.Context, dir, stage string, got *results) error {
	for _, program := range []string{emulator(), "mmdebstrap", "mke2fs"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("needs %s for an emulated machine with KVM", program)
		}
	}
	base, err := rootDisk(ctx)
	if err != nil {
		return err
	}
	advise(ctx)
	environment := fmt.Sprintf("export WRENN_TEST_STRETCH=%d WRENN_TEST_PARALLEL=%d\n", machineStretch, 1)
	if err := os.WriteFile(filepath.Join(stage, "environment"), []byte(environment), 0o644); err != nil { //nolint:gosec // no secret
		return err
	}
	for try, known := 1, 0; ; try++ {
		printed, err := session(ctx, dir, base, stage, suiteScript(got))
		if got.add(printed) {
			if !got.again() {
				return nil
			}
			err = errFailed
		}
		if now := got.count(); now > known {
			try, known = 0, now
		}
		if err == nil {
			err = errEarly
		}
		if ctx.Err() != nil || try == machineTries {
			return err
		}
		fmt.Printf("=== %v; once more, for what is missing\n", err)
	}
}

// session runs the machine once, from new disks, and returns what the tests printed.
func session(ctx context.Context, dir, base, stage, script string) (string, error) {
	root, payload := filepath.Join(dir, "root.ext4"), filepath.Join(dir, "payload.ext4")
	if err := os.WriteFile(filepath.Join(stage, "suites.sh"), []byte(script), 0o644); err != nil { //nolint:gosec // no secret
		return "", err
	}
	if err := command(ctx, "cp", "--sparse=always", "--reflink=auto", filepath.Join(base, "root.ext4"), root); err != nil {
		return "", err
	}
	if err := makeDisk(ctx, stage, payload, "4G"); err != nil {
		return "", err
	}
	return boot(ctx, base, root, payload)
}

// rootDisk makes a Debian with what the tests need, its kernel and initrd beside it, once for each list of packages.
func rootDisk(ctx context.Context) (string, error) {
	cache, err := filepath.Abs(filepath.Join(".wrenn", "firecracker"))
	if err != nil {
		return "", err
	}
	made := filepath.Join(cache, "made-of")
	recipe := packages + initScript
	if b, err := os.ReadFile(made); err == nil && string(b) == recipe {
		return cache, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	tree, err := os.MkdirTemp(cache, "tree-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tree)
	fmt.Println("making a Debian for the emulated machine …")
	if err := command(ctx, "mmdebstrap", "--variant=minbase", "--include="+packages, codename(), tree); err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(tree, "init.sh"), []byte(initScript), 0o755); err != nil { //nolint:gosec // a program
		return "", err
	}
	for name, pattern := range map[string]string{"vmlinuz": "boot/vmlinuz-*", "initrd": "boot/initrd.img-*"} {
		files, err := filepath.Glob(filepath.Join(tree, pattern))
		if err != nil || len(files) != 1 {
			return "", fmt.Errorf("find Debian's %s: %v, %w", name, files, err)
		}
		if err := command(ctx, "cp", files[0], filepath.Join(cache, name)); err != nil {
			return "", err
		}
	}
	if err := makeDisk(ctx, tree, filepath.Join(cache, "root.ext4"), rootSize); err != nil {
		return "", err
	}
	return cache, os.WriteFile(made, []byte(recipe), 0o644) //nolint:gosec // no secret
}

func codename() string {
	b, _ := os.ReadFile("/etc/os-release")
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_CODENAME="); ok && strings.Contains(string(b), "ID=debian") {
			return name
		}
	}
	return "bookworm"
}

// makeDisk makes a file system of a directory.
func makeDisk(ctx context.Context, tree, path, size string) error {
	if err := os.RemoveAll(path); err != nil {
		return err
	}
	if err := command(ctx, "truncate", "-s", size, path); err != nil {
		return err
	}
	return command(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, path)
}

// emulator is the QEMU that emulates the machine, which need not be the one that is tested.
func emulator() string { return cmp.Or(os.Getenv("EMULATOR_BIN"), "qemu-system-x86_64") }

// steadyEmulator is the first major version of QEMU whose emulation of a hypervisor lasts: 7.2 and 10.0 at times exit to the
// hypervisor twice in a row, which leaves its state in the guest's; within minutes a kernel hangs, or a guest is lost.
const steadyEmulator = 11

// advise warns of an emulator that will not last.
func advise(ctx context.Context) {
	out, err := exec.CommandContext(ctx, emulator(), "--version").Output()
	var major int
	if _, scanErr := fmt.Sscanf(string(out), "QEMU emulator version %d.", &major); err == nil && scanErr == nil && major < steadyEmulator {
		fmt.Printf("QEMU %d does not emulate a hypervisor for long; have EMULATOR_BIN name QEMU %d or later\n", major, steadyEmulator)
	}
}

// boot runs the machine until it switches itself off, or hangs, and returns what the tests printed.
func boot(ctx context.Context, base, root, payload string) (string, error) {
	disk := func(path string) []string {
		return []string{"-drive", "file=" + path + ",if=virtio,format=raw,cache=unsafe"}
	}
	args := []string{
		"-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,+svm", "-m", strconv.Itoa(machineMemoryMB), "-smp", strconv.Itoa(machineCPUs),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-serial", "stdio", "-serial", "file:/proc/self/fd/3",
		"-kernel", filepath.Join(base, "vmlinuz"), "-initrd", filepath.Join(base, "initrd"),
		"-append", "root=/dev/vda rw console=ttyS0 init=/init.sh panic=-1 quiet mitigations=off",
	}
	args = append(append(args, disk(root)...), disk(payload)...)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	out, in, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer out.Close()
	tests := watch(standstill, func() { cancel(errStandstill) })
	defer tests.timer.Stop()
	console := watch(silence, func() { cancel(errSilent) })
	defer console.timer.Stop()
	console.show = os.Stdout
	cmd := exec.CommandContext(ctx, emulator(), args...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = console, os.Stderr, []*os.File{in}
	var reading sync.WaitGroup
	reading.Go(func() { _, _ = io.Copy(tests, out) })
	err = cmd.Run()
	in.Close()
	reading.Wait()
	if cause := context.Cause(ctx); cause != nil {
		err = cause // why it was killed
	}
	if err != nil {
		err = fmt.Errorf("the emulated machine: %w", err)
	}
	return tests.text.String(), err
}

var (
	errSilent     = errors.New("it hangs: it gives no sign of life")
	errStandstill = errors.New("it hangs: its tests print nothing any more")
	errFailed     = errors.New("some tests failed, which may be the emulated processor's doing")
	errEarly      = errors.New("the emulated machine ended before its tests did")
)

// watched keeps what comes out of a machine, and complains when nothing does.
type watched struct {
	limit time.Duration
	timer *time.Timer
	text  strings.Builder
	show  io.Writer // shows instead of keeping, but for the signs of life
	end   []byte    // of what was shown, in which a sign of life may have begun
}

func watch(limit time.Duration, complain func()) *watched {
	return &watched{limit: limit, timer: time.AfterFunc(limit, complain)}
}

// signOfLife is what init.sh prints every few seconds.
const signOfLife = "alive\r\n"

func (w *watched) Write(b []byte) (int, error) {
	if w.show == nil {
		w.timer.Reset(w.limit)
		return w.text.Write(b)
	}
	// Nothing else counts: a kernel whose processes are stuck goes on complaining. It comes in any pieces.
	if w.end = append(w.end, b...); bytes.Contains(w.end, []byte(signOfLife)) {
		w.timer.Reset(w.limit)
	}
	w.end = slices.Clone(w.end[max(0, len(w.end)-len(signOfLife)+1):])
	if _, err := w.show.Write(bytes.ReplaceAll(b, []byte(signOfLife), nil)); err != nil {
		return 0, err
	}
	return len(b), nil
}
