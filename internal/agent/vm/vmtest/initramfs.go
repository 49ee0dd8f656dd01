package vmtest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
)

// KernelEnv names the kernel that tests boot; its modules or initramfs.img are beside it.
const KernelEnv = "WRENN_TEST_KERNEL"

// Kernel finds the guest kernel for tests: $WRENN_TEST_KERNEL, else what `make images` makes. The error
// says what is missing, for t.Skip.
func Kernel() (string, error) {
	path := os.Getenv(KernelEnv)
	if path == "" {
		_, file, _, _ := runtime.Caller(0)
		path = filepath.Join(filepath.Dir(file), "..", "..", "..", "..", ".wrenn", "kernels", "vmlinuz")
	}
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("needs a guest kernel: run `make images`, or set %s", KernelEnv)
	}
	return path, nil
}

// BuildInitramfs makes an initramfs of the suite's guest and the modules of the kernel, in dir.
func BuildInitramfs(ctx context.Context, dir, kernel string) (string, error) {
	guest, err := BuildGuest(ctx, dir)
	if err != nil {
		return "", err
	}
	program, err := os.ReadFile(guest)
	if err != nil {
		return "", err
	}
	var archive bytes.Buffer
	modules, err := filepath.Glob(filepath.Join(filepath.Dir(kernel), "modules", "*.ko"))
	if err != nil {
		return "", err
	}
	if len(modules) == 0 {
		// A later archive replaces files of an earlier one: the image's /init by ours.
		whole, err := os.ReadFile(filepath.Join(filepath.Dir(kernel), "initramfs.img"))
		if err != nil {
			return "", fmt.Errorf("the kernel has neither modules nor initramfs.img beside it: %w", err)
		}
		archive.Write(whole)
		pad(&archive)
	}
	entry(&archive, "dev", 0o40755, nil)
	entry(&archive, "modules", 0o40755, nil)
	for _, path := range slices.Sorted(slices.Values(modules)) {
		b, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		entry(&archive, "modules/"+filepath.Base(path), 0o100644, b)
	}
	entry(&archive, "init", 0o100755, program)
	entry(&archive, "TRAILER!!!", 0, nil)
	path := filepath.Join(dir, "initramfs")
	return path, os.WriteFile(path, archive.Bytes(), 0o644)
}

// GuestEnv names the suite's guest where it was built already, for machines without a compiler.
const GuestEnv = "WRENN_TEST_GUEST"

// BuildGuest builds the program that is the suite's guest, in dir, and returns its path. Told to look around, it tells
// what it can reach where it is run.
func BuildGuest(ctx context.Context, dir string) (string, error) {
	if path := os.Getenv(GuestEnv); path != "" {
		return path, nil
	}
	_, file, _, _ := runtime.Caller(0)
	init := filepath.Join(dir, "init")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", init, ".")
	build.Dir = filepath.Join(filepath.Dir(file), "guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the test guest: %w: %s", err, out)
	}
	return init, nil
}

// entry appends a file in the kernel's "newc" cpio format (Documentation/driver-api/early-userspace).
func entry(w *bytes.Buffer, name string, mode int, content []byte) {
	fmt.Fprintf(w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		w.Len()+1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0)
	w.WriteString(name + "\x00")
	pad(w)
	w.Write(content)
	pad(w)
}

func pad(w *bytes.Buffer) {
	for w.Len()%4 != 0 {
		w.WriteByte(0)
	}
}
