//go:build linux

package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

//go:embed suites.sh
var suiteFunctions string

//go:embed init.sh
var initScript string

// suiteScript runs all suites.
var suiteScript = suiteFunctions + runs()

func runs() string {
	var b strings.Builder
	for _, s := range suites() {
		fmt.Fprintf(&b, "run %s %q %q\n", s.name, s.only, s.skip)
	}
	return b.String()
}

// What the emulated machine is like. A test there takes five to twenty times as long as on the host itself.
const (
	machineMemoryMB = 3072
	machineCPUs     = 2
	machineStretch  = 8
	machineTries    = 3
	silence         = 6 * time.Minute // after which a machine hangs
	rootSize        = "16G"           // sparse: sandboxes are on it
	packages        = "linux-image-cloud-amd64,kmod,udev,iproute2,nftables,xfsprogs,e2fsprogs,postgresql,redis-server,procps,sudo"
)

// inMachine runs the suites inside an emulated machine and brings their results back.
func inMachine(ctx context.Context, dir, stage, results string) error {
	for _, program := range []string{"qemu-system-x86_64", "mmdebstrap", "mke2fs", "debugfs"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("needs %s for an emulated machine with KVM", program)
		}
	}
	base, err := rootDisk(ctx)
	if err != nil {
		return err
	}
	payload := filepath.Join(dir, "payload.ext4")
	environment := fmt.Sprintf("export WRENN_TEST_STRETCH=%d WRENN_TEST_PARALLEL=%d\n", machineStretch, 1)
	for name, content := range map[string]string{"suites.sh": suiteScript, "environment": environment} {
		if err := os.WriteFile(filepath.Join(stage, name), []byte(content), 0o644); err != nil { //nolint:gosec // no secret
			return err
		}
	}
	for try := 1; ; try++ {
		err := session(ctx, dir, base, stage, payload)
		if err == nil {
			break
		}
		if !errors.Is(err, errSilent) || try == machineTries {
			return err
		}
		fmt.Println("=== the emulated machine hangs, as one with nested KVM does now and then; once more")
	}
	// The journal is replayed, in case the machine could not unmount; 1 says that something was repaired.
	var exit *exec.ExitError
	if err := exec.CommandContext(ctx, "e2fsck", "-p", payload).Run(); err != nil && (!errors.As(err, &exit) || exit.ExitCode() > 1) {
		return fmt.Errorf("e2fsck: %w", err)
	}
	// debugfs makes the directory, and gives up on one that is there.
	if err := command(ctx, "debugfs", "-R", "rdump /results "+filepath.Dir(results), payload); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(results, "done")); err != nil {
		return errors.New("the emulated machine ended before its tests did")
	}
	return nil
}

// session runs the machine once, from new disks.
func session(ctx context.Context, dir, base, stage, payload string) error {
	root := filepath.Join(dir, "root.ext4")
	if err := command(ctx, "cp", "--sparse=always", "--reflink=auto", filepath.Join(base, "root.ext4"), root); err != nil {
		return err
	}
	if err := makeDisk(ctx, stage, payload, "4G"); err != nil {
		return err
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

// boot runs the machine until it switches itself off.
func boot(ctx context.Context, base, root, payload string) error {
	disk := func(path string) []string {
		return []string{"-drive", "file=" + path + ",if=virtio,format=raw,cache=unsafe"}
	}
	args := []string{
		"-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,+svm", "-m", strconv.Itoa(machineMemoryMB), "-smp", strconv.Itoa(machineCPUs),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-kernel", filepath.Join(base, "vmlinuz"), "-initrd", filepath.Join(base, "initrd"),
		"-append", "root=/dev/vda rw console=ttyS0 init=/init.sh panic=-1 quiet mitigations=off",
	}
	args = append(append(args, disk(root)...), disk(payload)...)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := &watched{timer: time.AfterFunc(silence, func() { cancel(errSilent) })}
	defer watch.timer.Stop()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	cmd.Stdout, cmd.Stderr = watch, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("the emulated machine: %w", errors.Join(context.Cause(ctx), err))
	}
	return nil
}

var errSilent = errors.New("it prints nothing any more")

// watched prints what a machine prints, and notes that it does.
type watched struct{ timer *time.Timer }

func (w *watched) Write(b []byte) (int, error) {
	w.timer.Reset(silence)
	return os.Stdout.Write(b)
}
