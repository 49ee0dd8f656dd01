//go:build linux

package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/probe"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Verdict is the outcome of a Probe.
type Verdict struct {
	KVM      bool      `json:"kvm"`
	Reason   string    `json:"reason"` // for people: why KVM is or is not used
	Binary   string    `json:"binary"` // of the VMM, absolute
	Version  string    `json:"version"`
	TSCkHz   int       `json:"tsc_khz"` // rate of the host's time stamp counter; see measureTSC
	ProbedAt time.Time `json:"probed_at"`
}

// ProbeOptions of Probe.
type ProbeOptions struct {
	Binary    string        // qemu-system-<arch> from PATH if empty
	Kernel    string        // vmlinux or bzImage, the one that sandboxes use
	Initrd    string        // may be empty
	CacheFile string        // where the verdict is kept for the same kernel, VMM, CPU and host kernel; none if empty
	Timeout   time.Duration // for the boot with KVM; 5 s if 0
	Log       *slog.Logger

	device string // /dev/kvm if empty (tests)
}

const (
	probeTimeout   = 5 * time.Second
	versionTimeout = 10 * time.Second
	probeMemoryMB  = 192
	probeOutput    = 256 << 10
)

// Probe finds QEMU and tells whether our kernel boots on it with KVM, by booting it: a /dev/kvm that opens
// proves nothing (it may be a paravirtual one that runs special kernels only). Its error means that no
// VM can be run on this host at all.
func Probe(ctx context.Context, opts ProbeOptions) (Verdict, error) {
	if opts.Timeout == 0 {
		opts.Timeout = probeTimeout
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.device == "" {
		opts.device = "/dev/kvm"
	}
	v, err := findQEMU(ctx, opts.Binary)
	if err != nil {
		return Verdict{}, err
	}
	key, err := probe.Key(opts.device, []string{opts.Kernel, opts.Initrd}, v.Binary, v.Version)
	if err != nil {
		return Verdict{}, err
	}
	if cached, ok := probe.Cached[Verdict](opts.CacheFile, key); ok {
		return cached, nil
	}
	var settled bool
	v.KVM, settled, v.Reason = tryKVM(ctx, opts, v)
	if ctx.Err() != nil {
		return Verdict{}, ctx.Err()
	}
	v.ProbedAt, v.TSCkHz = time.Now().UTC(), measureTSC()
	if !settled {
		return v, nil
	}
	if err := probe.Keep(opts.CacheFile, key, v.KVM, v); err != nil {
		opts.Log.Warn("cannot keep the verdict on KVM; the next start probes again", "err", err)
	}
	return v, nil
}

var versionPattern = regexp.MustCompile(`version (\d+\.\d+(?:\.\d+)?)`)

func findQEMU(ctx context.Context, binary string) (Verdict, error) {
	machine := map[string]string{"amd64": "x86_64"}[runtime.GOARCH]
	if machine == "" {
		return Verdict{}, wrenn.Errorf(wrenn.KindInternal, "QEMU's microvm machine is for x86-64 hosts, not %s", runtime.GOARCH)
	}
	if binary == "" {
		binary = "qemu-system-" + machine
	}
	path, err := exec.LookPath(binary)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return Verdict{}, wrenn.Wrap(err, wrenn.KindInternal, "%s is not installed; install the package qemu-system-x86", binary)
	}
	ctx, cancel := context.WithTimeout(ctx, versionTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return Verdict{}, wrenn.Wrap(err, wrenn.KindInternal, "%s does not run; install the package qemu-system-x86 again", path)
	}
	found := versionPattern.FindSubmatch(out)
	if found == nil {
		return Verdict{}, wrenn.Errorf(wrenn.KindInternal, "%s does not tell its version", path)
	}
	return Verdict{Binary: path, Version: string(found[1])}, nil
}

// tryKVM boots the kernel with KVM and reads its console. What did not come to a boot for reasons of our
// own is not settled, and is tried again by the next start.
func tryKVM(ctx context.Context, opts ProbeOptions, v Verdict) (ok, settled bool, reason string) {
	const emulated = "VMs are emulated, which is slow"
	if err := probe.OpenDevice(opts.device); err != nil {
		return false, true, fmt.Sprintf("no KVM: %v; %s", err, emulated)
	}
	ctx, cancel := context.WithTimeout(ctx, opts.Timeout)
	defer cancel()
	begun := time.Now()
	console, said, err := bootWithKVM(ctx, opts, v)
	timedOut := errors.Is(err, context.DeadlineExceeded)
	silent := !bytes.Contains(console, []byte("Linux version"))
	switch {
	case probe.Booted(console):
		return true, true, fmt.Sprintf("our kernel booted with KVM in %d ms", time.Since(begun).Milliseconds())
	case timedOut && silent:
		return false, true, fmt.Sprintf("%s opens, but our kernel printed nothing in %s (the vCPU spins: a paravirtual or broken KVM); %s", opts.device, opts.Timeout, emulated)
	case timedOut:
		return false, true, fmt.Sprintf("%s opens, but our kernel did not reach user space in %s; %s", opts.device, opts.Timeout, emulated)
	case said != "":
		return false, true, fmt.Sprintf("%s opens, but QEMU ended on it: %.200q; %s", opts.device, said, emulated)
	}
	return false, false, fmt.Sprintf("%s opens, but the test boot failed: %v; %s", opts.device, err, emulated)
}

// bootWithKVM runs QEMU confined like any VM, but without disk or network, until the kernel has booted.
func bootWithKVM(ctx context.Context, opts ProbeOptions, v Verdict) (console []byte, said string, err error) {
	dir, err := os.MkdirTemp("", "wrenn-probe-")
	if err != nil {
		return nil, "", err
	}
	defer os.RemoveAll(dir)
	out, in, err := socketPair()
	if err != nil {
		return nil, "", err
	}
	defer out.Close()
	stderr, err := vmproc.BoundedFile("qemu-stderr", vmproc.WordsLimit)
	if err != nil {
		in.Close()
		return nil, "", err
	}
	defer stderr.Close()
	args, inherit, err := probeArguments(opts, v.Version, in)
	if err != nil {
		inherit.close()
		return nil, "", err
	}
	p, err := vmproc.Launch(vmproc.Spec{
		Path: v.Binary, Args: args, Files: inherit.list, Stderr: stderr,
		UID: nobody, GID: nobody, Jail: jail(dir, v.Binary, opts.device),
	})
	inherit.close()
	if err != nil {
		return nil, "", err
	}
	defer func() { err = errors.Join(err, p.Kill(context.Background()), p.Reap()) }()
	console, err = readUntil(ctx, out, probe.Booted)
	return console, vmproc.LastWords(stderr), err
}

func socketPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "console"), os.NewFile(uintptr(fds[1]), "console"), nil
}

// nobody is the uid and gid of no user in every Linux.
const nobody = 65534

func probeArguments(opts ProbeOptions, version string, console *os.File) ([]string, *files, error) {
	inherit := &files{}
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-M", machineType(version), "-accel", "kvm", "-cpu", "host",
		"-m", fmt.Sprintf("%dM", probeMemoryMB),
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d", inherit.add(console)), "-serial", "chardev:console",
		"-append", "console=ttyS0 panic=-1",
	}
	kernel, err := openReadable(opts.Kernel)
	if err != nil {
		return nil, inherit, err
	}
	args = append(args, "-kernel", fdPath(inherit.add(kernel)))
	if opts.Initrd == "" {
		return args, inherit, nil
	}
	initrd, err := openInitrd(opts.Initrd)
	if err != nil {
		return nil, inherit, err
	}
	return append(args, "-initrd", fdPath(inherit.add(initrd))), inherit, nil
}

// readUntil reads until what was read is enough, the writer is gone, or ctx ends.
func readUntil(ctx context.Context, r *os.File, enough func([]byte) bool) ([]byte, error) {
	stop := context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var all []byte
	buf := make([]byte, 4096)
	for len(all) < probeOutput {
		n, err := r.Read(buf)
		all = append(all, buf[:n]...)
		if enough(all) {
			return all, nil
		}
		if ctx.Err() != nil {
			return all, ctx.Err()
		}
		if err != nil {
			return all, fmt.Errorf("read the console: %w", err)
		}
	}
	return all, errors.New("the console printed too much")
}
