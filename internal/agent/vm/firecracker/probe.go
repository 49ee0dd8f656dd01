//go:build linux

package firecracker

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/wrenn-sandbox/wrenn/internal/agent/vm"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/probe"
	"github.com/wrenn-sandbox/wrenn/internal/agent/vm/vmproc"
	"github.com/wrenn-sandbox/wrenn/internal/wrenn"
)

// Verdict is the outcome of a Probe.
type Verdict struct {
	Works    bool      `json:"works"`
	Reason   string    `json:"reason"` // for people: why it is or is not used
	Binaries []Binary  `json:"binaries"`
	ProbedAt time.Time `json:"probed_at"`
}

// ProbeOptions of Probe.
type ProbeOptions struct {
	Dir       string        // where Firecracker and its jailer are
	Kernel    string        // the one that sandboxes use
	Initrd    string        // may be empty
	CacheFile string        // where the verdict is kept; none if empty
	Unjailed  bool          // as Options.Unjailed
	Timeout   time.Duration // for the boot; 5 s if 0

	device string // /dev/kvm if empty (tests)
}

const (
	probeTimeout  = 5 * time.Second
	probeMemoryMB = 192
	nobody        = 65534 // the uid and gid of no user in every Linux
)

// Probe tells whether Firecracker runs our kernel on this host, by booting it. That it does not is a Verdict, and
// no error.
func Probe(ctx context.Context, opts ProbeOptions) (Verdict, error) {
	if opts.Timeout == 0 {
		opts.Timeout = probeTimeout
	}
	if opts.device == "" {
		opts.device = "/dev/kvm"
	}
	binaries, err := find(ctx, opts.Dir)
	if err != nil {
		return Verdict{}, err
	}
	v := Verdict{Binaries: binaries, ProbedAt: time.Now().UTC()}
	if v.Reason = cannot(opts, binaries); v.Reason != "" {
		return v, nil
	}
	key, err := probe.Key(opts.device, []string{opts.Kernel, opts.Initrd, binaries[0].Path}, binaries[0].Jailer)
	if err != nil {
		return Verdict{}, err
	}
	if kept, ok := probe.Cached[Verdict](opts.CacheFile, key); ok {
		kept.Binaries = binaries
		return kept, nil
	}
	var begun time.Time
	// What is found is remembered, so a boot that only a busy host spoiled gets a second chance.
	for range 2 {
		begun = time.Now()
		if err = boot(ctx, v, opts); err == nil || ctx.Err() != nil {
			break
		}
	}
	switch {
	case ctx.Err() != nil:
		return Verdict{}, ctx.Err()
	case err != nil:
		v.Reason = fmt.Sprintf("Firecracker %s is installed, but did not boot our kernel: %v; %s", binaries[0].Version, err, probe.RetryWords)
	default:
		v.Works, v.Reason = true, fmt.Sprintf("our kernel booted on Firecracker %s in %d ms", binaries[0].Version, time.Since(begun).Milliseconds())
	}
	return v, probe.Keep(opts.CacheFile, key, v.Works, v)
}

// cannot says what stands against Firecracker without trying.
func cannot(opts ProbeOptions, binaries []Binary) string {
	if len(binaries) == 0 {
		return fmt.Sprintf("no Firecracker %d.%d or later in %s", oldest.Major, oldest.Minor, opts.Dir)
	}
	if b := binaries[0]; b.Jailer == "" && !opts.Unjailed {
		return fmt.Sprintf("Firecracker %s has no jailer of the same version beside it; install it, or set AGENT_ALLOW_UNJAILED=1", b.Version)
	}
	if err := probe.OpenDevice(opts.device); err != nil {
		return fmt.Sprintf("Firecracker %s is installed, but there is no KVM: %v", binaries[0].Version, err)
	}
	return ""
}

// boot runs a VM without disk or network until its kernel has come up.
func boot(ctx context.Context, v Verdict, opts ProbeOptions) error {
	dir, err := os.MkdirTemp("", "wrenn-probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(ctx, opts.Timeout)
	defer cancel()
	parent := filepath.Base(dir)
	defer func() { _, _ = vmproc.Sweep(parent, func(string) bool { return false }) }()
	d := New(v, Options{CacheDir: dir, CgroupParent: parent, Unjailed: opts.Unjailed, Log: slog.New(slog.DiscardHandler)})
	console := filepath.Join(dir, "console.log")
	h, err := d.Start(ctx, vm.Config{
		ID: "probe", Dir: dir, VCPUs: 1, MemoryMB: probeMemoryMB, Kernel: opts.Kernel, Initrd: opts.Initrd, Cmdline: "panic=-1",
		MemoryFile: filepath.Join(dir, "memory"), Console: console, UID: nobody, GID: nobody, Cgroup: "probe",
	})
	if err != nil {
		return wrenn.Public(err)
	}
	defer func() { _ = d.Destroy(context.WithoutCancel(ctx), h) }()
	ended := make(chan error, 1)
	go func() { ended <- d.Wait(ctx, h) }()
	return waitBooted(ctx, console, ended)
}

// waitBooted reads a console until the kernel has come up. A kernel that finds no user space ends its VM.
func waitBooted(ctx context.Context, console string, ended <-chan error) error {
	const afterEnd = 10 // looks, for what the console's reader has still to write
	var printed []byte
	tail := func() []byte { return printed[max(0, len(printed)-100):] }
	for left := afterEnd; left > 0; {
		printed, _ = os.ReadFile(console) // not there yet
		if probe.Booted(printed) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("it did not reach user space in time; its console ends with %q", tail())
		case err := <-ended:
			if err != nil {
				continue // ctx is over
			}
			ended, left = nil, left-1
		case <-time.After(50 * time.Millisecond): // nothing tells when a file has grown
			if ended == nil {
				left--
			}
		}
	}
	return fmt.Errorf("it ended early; its console ends with %q", tail())
}
